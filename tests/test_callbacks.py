"""What the monitor measures, and what it shows."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK
from omegaconf import DictConfig
from rich.console import Console

from clipmini import console
from clipmini.data.decode import Decoder
from clipmini.train import train

Compose = Callable[..., DictConfig]


def run(compose: Compose, tiny_json: Path, shards: Path, directory: Path, *overrides: str) -> list[dict[str, float]]:
    train(compose(*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={directory}", *overrides))
    header, *lines = (directory / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    return [dict(zip(names, map(float, line.split(",")), strict=True)) for line in lines]


def test_time_waiting_for_data_is_told(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.__call__

    def slow_decode(self: Decoder, members: dict[str, bytes], position: int) -> object:
        time.sleep(0.05)
        return decode(self, members, position)

    monkeypatch.setattr(Decoder, "__call__", slow_decode)
    rows = run(compose, tiny_json, shards, tmp_path)
    # 16 pictures of 50 ms each, decoded while the step waits: a bound, not a measurement.
    assert all(row["throughput/samples_per_second"] < 20 for row in rows)
    assert all(0.5 < row["throughput/data_wait"] <= 1 for row in rows)


def test_logged_at_intervals_and_at_the_end(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    rows = run(compose, tiny_json, shards, tmp_path, "steps=8", "trainer.log_every_n_steps=3")
    assert [row["step"] for row in rows] == [3, 6, 8]


def test_scale_is_shown_as_it_is_used(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    rows = run(compose, tiny_json, shards, tmp_path, "loss.init_scale=30", "loss.max_scale=30", "optimizer.lr=0.1")
    assert rows[0]["train/scale"] == pytest.approx(30)
    assert all(row["train/scale"] <= 30.0001 for row in rows)


def test_progress_on_a_terminal(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(force_terminal=True, record=True, width=150)
    monkeypatch.setattr(console, "console", terminal)
    run(compose, tiny_json, shards, tmp_path)
    shown = terminal.export_text()
    assert re.search(
        r"step 4/4 ━+ loss \d\.\d+  accuracy \d+\.\d%  \d+ samples/s  data wait \d+%  ETA \d:\d\d:\d\d", shown
    )


def test_durations() -> None:
    assert [console.format_seconds(seconds) for seconds in (0.4, 61, 3661.9)] == ["0:00:00", "0:01:01", "1:01:01"]
