"""What the monitor measures and shows, what is bad in the data, and the ledger of what was trained."""

import csv
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, read_sample, write_tar
from omegaconf import DictConfig
from rich.console import Console

from clipmini import console
from clipmini.data.decode import Decoder
from clipmini.errors import UserError
from clipmini.train import train

Compose = Callable[..., DictConfig]


def run(compose: Compose, tiny_json: Path, shards: Path, directory: Path, *overrides: str) -> list[dict[str, float]]:
    train(compose(*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={directory}", *overrides))
    header, *lines = (directory / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    return [dict(zip(names, (float(value or "nan") for value in line.split(",")), strict=True)) for line in lines]


def test_time_waiting_for_data_is_told(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.decode

    def slow_decode(self: Decoder, members: dict[str, bytes], position: int) -> object:
        time.sleep(0.05)
        return decode(self, members, position)

    monkeypatch.setattr(Decoder, "decode", slow_decode)
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


def write_bad_shards(directory: Path, bad: int) -> Path:
    """Write 60 pairs, so many of them with a picture or a caption that cannot be used."""
    samples = read_sample("train/noto-00000.tar", 60)
    for number in range(bad):
        samples[5 * number + 2]["webp" if number % 2 else "txt"] = b""
    write_tar(directory / "a.tar", samples[:40])
    write_tar(directory / "b.tar", samples[40:])
    return directory


def test_bad_samples_are_counted_by_cause_and_listed(
    compose: Compose, tiny_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards = write_bad_shards(tmp_path / "shards", 4)
    rows = run(compose, tiny_json, shards, tmp_path / "run", "steps=15", "trainer.log_every_n_steps=5")
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert 14 <= len(listed) < 30  # four in each epoch of 60, and some that were tried as substitutes
    assert set(listed[0]) == {"position", "source", "shard", "index", "key", "cause", "detail"}
    causes = Counter(row["cause"] for row in listed)
    assert set(causes) == {"caption", "picture"} and len({row["key"] for row in listed}) == 4
    assert rows[-1]["data/bad_samples"] == len(listed)
    assert rows[-1]["data/caption"] == causes["caption"] and rows[-1]["data/picture"] == causes["picture"]
    shown = capsys.readouterr().out
    assert re.search(r"\n\d+ bad samples by step \d+ \(\d+ \w+, \d+ \w+\), see .*quarantine.jsonl\n", shown)
    assert "Bad samples of 240" in shown and re.search(rf"│ caption +│ +{causes['caption']} │ +\d\.\d+% │", shown)


def test_good_data_is_said_to_be_good(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = run(compose, tiny_json, shards, tmp_path / "run")
    assert rows[-1]["data/bad_samples"] == 0 and not (tmp_path / "run/quarantine.jsonl").exists()
    assert "data health: all of 64 samples were good" in capsys.readouterr().out


def test_too_many_bad_samples_stop_the_run(compose: Compose, tiny_json: Path, tmp_path: Path) -> None:
    shards = write_bad_shards(tmp_path / "shards", 12)
    options = ("data.max_bad_fraction=0.001", "steps=60", "checkpoint.every_n_steps=1")
    with pytest.raises(
        UserError,
        match=r"\d+ of the last 10000 samples cannot be used, more than data.max_bad_fraction=0.001 allows \(in all: "
        r"\d+ (caption|picture), \d+ (caption|picture)\): .*quarantine.jsonl lists them; .*`clipmini shards verify`",
    ):
        run(compose, tiny_json, shards, tmp_path / "run", *options)
    listed = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    assert len(listed) > 10 and (tmp_path / "run/metrics.csv").read_text().count("\n") < 20  # long before the end


def test_samples_that_stop_the_run_are_listed(compose: Compose, tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 60)
    for sample in samples:
        sample["txt"] = b""
    write_tar(tmp_path / "shards/a.tar", samples)
    with pytest.raises(UserError, match="100 samples in a row cannot be used, at position 0 of data.train"):
        run(compose, tiny_json, tmp_path / "shards", tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert len(listed) == 100 and {(row["position"], row["cause"]) for row in listed} == {(0, "caption")}


def test_keys_of_any_kind_survive_a_resume_in_the_ledger(compose: Compose, tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 32)
    for number, sample in enumerate(samples):
        sample["__key__"] = f'{number},"a"\r{number}'
    write_tar(tmp_path / "shards/a.tar", samples)
    for steps in (2, 4):
        run(compose, tiny_json, tmp_path / "shards", tmp_path / "run", f"steps={steps}", "data.ledger=true")
    with open(tmp_path / "run/ledger/rank-00000.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [step for step in range(1, 5) for _ in range(16)]
    assert {row["key"] for row in rows} == {sample["__key__"] for sample in samples}


def test_a_resumed_run_lists_every_bad_sample_once(compose: Compose, tiny_json: Path, tmp_path: Path) -> None:
    shards = write_bad_shards(tmp_path / "shards", 4)
    whole = ("steps=12", "data.ledger=true")
    run(compose, tiny_json, shards, tmp_path / "whole", *whole)
    run(compose, tiny_json, shards, tmp_path / "parts", "steps=6", "data.ledger=true")
    # As if it had been killed after step 6, with nothing saved since step 4.
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000006.ckpt")
    with open(tmp_path / "parts/quarantine.jsonl", "a") as file:
        file.write('{"position": 96, "cau')  # and in the middle of a line
    run(compose, tiny_json, shards, tmp_path / "parts", *whole)
    for name in ("quarantine.jsonl", "ledger/rank-00000.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_ledger_has_every_sample_as_it_was_trained(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    run(compose, tiny_json, shards, tmp_path / "run", "steps=5", "data.ledger=true")
    with open(tmp_path / "run/ledger/rank-00000.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "position", "key"] and len(rows) == 80
    for step in range(1, 6):
        positions = sorted(int(row["position"]) for row in rows if int(row["step"]) == step)
        assert positions == list(range(16 * step - 16, 16 * step))
    assert len({row["key"] for row in rows[:64]}) == 64  # one epoch


def test_no_ledger_unless_asked(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    run(compose, tiny_json, shards, tmp_path / "run")
    assert not (tmp_path / "run/ledger").exists()
