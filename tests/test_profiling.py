"""The parts of a step add up to it, on the screen, in a table and in a trace."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from omegaconf import DictConfig

from clipmini.profiling import PARTS, TRACED_STEPS, Spans
from clipmini.train import train

Compose = Callable[..., DictConfig]


@pytest.mark.parametrize("micro_batch", ["null", "5"])
def test_where_the_time_goes(micro_batch: str, compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    given = [*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={tmp_path}", "steps=20"]
    train(compose(*given, "profile=true", f"micro_batch={micro_batch}", "checkpoint.every_n_steps=100"))
    header, *lines = (tmp_path / "profile/table.txt").read_text().splitlines()
    assert header.split() == ["ms", "a", "step", "share"]
    rows = {line[:16].strip(): line[16:].split() for line in lines}
    assert list(rows) == [*PARTS, "rest", "step"] and rows["step"][1] == "100.0%"
    milliseconds = {name: float(cells[0]) for name, cells in rows.items()}
    assert sum(milliseconds[name] for name in (*PARTS, "rest")) == pytest.approx(milliseconds["step"], abs=1)
    for name in ("data wait", "encode image", "encode text", "loss", "backward", "optimizer"):
        assert milliseconds[name] > 0, name
    assert milliseconds["rest"] < 0.5 * milliseconds["step"]  # else something is not measured
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    counts = {name: sum(event.get("name") == name for event in events) for name in PARTS[2:]}
    assert counts["loss"] == counts["backward"] == counts["optimizer"] == TRACED_STEPS
    assert "Where the time of 10 steps went" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(("steps", "written"), [(8, []), (16, ["table.txt", "trace.json"])])
def test_a_run_that_is_too_short_says_so(
    steps: int, written: list[str], compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    given = [*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={tmp_path}", f"steps={steps}"]
    train(compose(*given, "profile=true"))
    log = (tmp_path / "train.log").read_text()
    assert f"profile=true: the run has had {steps} steps here, and 17 are needed" in log
    assert sorted(path.name for path in tmp_path.glob("profile/*")) == written


def test_what_is_inside_a_part_counts_once() -> None:
    spans = Spans(torch.device("cpu"))
    with spans.span("backward"):
        time.sleep(0.02)
        with spans.span("encode text"):  # again, for a micro-batch
            time.sleep(0.02)
    with pytest.raises(KeyError), spans.span("loss"):
        raise KeyError
    seconds = spans.seconds()
    assert seconds["backward"] >= 0.04 and seconds["encode text"] == 0 and seconds["loss"] > 0
    assert list(seconds) == list(PARTS)
