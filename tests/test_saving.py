"""A saved run goes on as if it had never stopped; what is saved, when, and what happens when it cannot be."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import QUICK, save_checkpoint
from forked import run_forked
from omegaconf import DictConfig

from clipmini.checkpoints import disk, resume
from clipmini.checkpoints.saving import SaveCheckpoints, get_random_state, set_random_state
from clipmini.checkpoints.writer import Staging
from clipmini.errors import UserError
from clipmini.train import train

Compose = Callable[..., DictConfig]
LIMITS: dict[str, Any] = {
    "directory": "x",
    "every_n_steps": 1,
    "every_n_minutes": None,
    "every_n_samples": None,
    "keep_last": 2,
    "keep_every_n_steps": None,
    "max_failures": 3,
    "check_every_seconds": 1.0,
    "requeue": True,
}


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("every_n_steps", 0, "1 or more"),
        ("keep_last", 1, "2 or more"),
        ("every_n_samples", 0, "1 or more, or null"),
        ("every_n_minutes", 0.0, "0.01 or more, or null"),
    ],
)
def test_limits(name: str, value: float, limit: str) -> None:
    with pytest.raises(UserError, match=f"^checkpoint.{name}={value}: must be {limit}$"):
        SaveCheckpoints(**{**LIMITS, name: value})


def test_another_config_is_refused_by_key() -> None:
    then = {"seed": 0, "model": {"name": "a", "x": [1]}, "trainer": {"precision": "16"}, "steps": 5}
    resume.check_same_run({**then, "trainer": {"precision": "32"}, "steps": 9}, then, Path("run"))
    with pytest.raises(UserError, match=r"run holds a run of another .*model.name: was a, now b; seed: was 0, now 1"):
        resume.check_same_run({**then, "seed": 1, "model": {"name": "b", "x": [1]}}, then, Path("run"))


def test_random_numbers_go_on_where_they_were() -> None:
    state = get_random_state()
    first = torch.rand(3), torch.randperm(5)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first[0]) and torch.equal(torch.randperm(5), first[1])


def run(compose: Compose, tiny_json: Path, shards: Path, directory: Path, *overrides: str) -> Path:
    train(compose(*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={directory}", *overrides))
    return directory


def check_same(first: Path, second: Path, step: int) -> dict[str, Any]:
    """See that two runs are the same to the last bit, and return what a checkpoint holds."""
    a, b = (disk.load_checkpoint(path / f"checkpoints/step-{step:08d}.ckpt") for path in (first, second))
    for name in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    return a


def read_losses(directory: Path) -> list[str]:
    with open(directory / "metrics.csv", newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file)]


def test_resumed_equals_uninterrupted(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    options = ("schedule=constant", "schedule.warmup_steps=0", "data.augmentation.flip=0.5")
    whole = run(compose, tiny_json, shards, tmp_path / "whole", "steps=6", *options)
    parts = run(compose, tiny_json, shards, tmp_path / "parts", "steps=3", *options)
    changes = ("data.num_workers=1", "model.grad_checkpointing=true")
    run(compose, tiny_json, shards, tmp_path / "parts", "steps=6", *changes, *options)

    a = check_same(whole, parts, 6)
    assert a["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["samples"] == 6 * 16
    assert read_losses(whole) == read_losses(parts) and len(read_losses(whole)) == 6
    assert [path.name for path in disk.list_checkpoints(parts / "checkpoints")] == [
        "step-00000004.ckpt",
        "step-00000006.ckpt",
    ]


def test_a_loader_that_lost_its_place_is_not_trained_on(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    directory = run(compose, tiny_json, shards, tmp_path / "run", "steps=2")
    path = directory / "checkpoints/step-00000002.ckpt"
    content = disk.load_checkpoint(path)
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = []  # as Lightning does where the schedule asks it
    save_checkpoint(content, path)
    with pytest.raises(AssertionError, match="the loader is at sample 0, and step 2 of 16 samples each"):
        run(compose, tiny_json, shards, directory)


def test_a_finished_run_is_not_trained_again(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = run(compose, tiny_json, shards, tmp_path / "run")
    before = (directory / "checkpoints/step-00000004.ckpt").stat().st_mtime_ns
    run(compose, tiny_json, shards, tmp_path / "run")
    assert (directory / "checkpoints/step-00000004.ckpt").stat().st_mtime_ns == before
    assert "already trained" in (directory / "train.log").read_text()
    with pytest.raises(UserError, match="step-00000004.ckpt is of step 4, and steps or epochs make the run end at 2: "):
        run(compose, tiny_json, shards, tmp_path / "run", "steps=2")


@pytest.mark.parametrize(
    "change", ["seed=1", "batch_size=8", "model.embed_dim=16", "loss.max_scale=50", "data.draft=off"]
)
def test_another_run_of_the_same_name_is_refused(
    change: str, compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    run(compose, tiny_json, shards, tmp_path / "run")
    with pytest.raises(UserError, match=f"{change.split('=')[0]}: was"):
        run(compose, tiny_json, shards, tmp_path / "run", change)


def test_other_shards_are_refused(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    run(compose, tiny_json, shards, tmp_path / "run", "steps=2")
    with pytest.raises(UserError, match="other shards, counts, weights, seed or shuffling"):
        run(compose, tiny_json, shards, tmp_path / "run", f"data.train={shards}/a.tar")


def test_a_model_file_that_has_changed_is_refused(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    architecture = json.loads(tiny_json.read_text())
    own = tmp_path / "own.json"
    own.write_text(tiny_json.read_text())
    run(compose, own, shards, tmp_path / "run", "steps=2")
    architecture["text_cfg"]["layers"] = 2
    own.write_text(json.dumps(architecture))
    with pytest.raises(UserError, match="of another model.*model_cfg.text_cfg.layers: was 1, now 2"):
        run(compose, own, shards, tmp_path / "run")


def test_dropout_goes_on_where_it_was(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    options = ("schedule=constant", "model.patch_dropout=0.5", "data.num_workers=1")
    run(compose, tiny_json, shards, tmp_path / "whole", "steps=4", *options)
    run(compose, tiny_json, shards, tmp_path / "parts", "steps=2", *options)
    run(compose, tiny_json, shards, tmp_path / "parts", "steps=4", *options)
    check_same(tmp_path / "whole", tmp_path / "parts", 4)


def saved_steps(directory: Path) -> list[int]:
    return [disk.checkpoint_step(path) for path in disk.list_checkpoints(directory / "checkpoints")]


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (["every_n_steps=4"], [4, 8, 9]),
        (["every_n_samples=40"], [3, 5, 8, 9]),  # batches of 16: 48, 80, 128 samples
        (["every_n_minutes=0.0101"], None),
        (["every_n_steps=2", "keep_last=2", "keep_every_n_steps=4"], [4, 8, 9]),
    ],
)
def test_when_is_saved(
    when: list[str], steps: list[int] | None, compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    options = [f"checkpoint.{option}" for option in ["every_n_steps=1000", "keep_last=9", *when]]
    if steps is None:  # a step takes some hundredths of a second: 0.6 seconds are less than 200 of them
        options.append("steps=200")
    run(compose, tiny_json, shards, tmp_path / "run", "steps=9", *options)
    found = saved_steps(tmp_path / "run")
    assert found == steps if steps else len(found) > 1 and found[-1] == 200


def test_the_run_goes_on_while_a_checkpoint_is_written(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, commit = [], disk.commit_checkpoint
    rows = lambda: len((tmp_path / "run/metrics.csv").read_text().splitlines())  # noqa: E731

    def slow(path: Path, *arguments: Any) -> None:
        while path.name == "step-00000003.ckpt" and rows() < 6:
            time.sleep(0.01)  # until the training has written the rows of steps 4 and 5, and the names of columns
        written.append((disk.checkpoint_step(path), rows()))
        commit(path, *arguments)

    monkeypatch.setattr(disk, "commit_checkpoint", slow)
    run(compose, tiny_json, shards, tmp_path / "run", "steps=6", "checkpoint.every_n_steps=3", "checkpoint.keep_last=9")
    assert written[0][0] == 3 and written[0][1] >= 6
    content = disk.load_checkpoint(tmp_path / "run/checkpoints/step-00000003.ckpt")
    assert content["global_step"] == 3 == content["about"]["step"]
    assert all(state["step"] == 3 for state in content["optimizer_states"][0]["state"].values())


def test_a_copy_does_not_change_with_the_state() -> None:
    staging = Staging()
    state = {"a": torch.ones(3), "b": [torch.zeros(2), (1, {"c": torch.ones(1)})], "d": [1, 2]}
    copied = staging.copy(state)
    state["a"] += 1
    state["d"].append(3)
    assert torch.equal(copied["a"], torch.ones(3)) and copied["d"] == [1, 2]
    again = staging.copy(state)
    assert again["a"].data_ptr() == copied["a"].data_ptr() and torch.equal(again["a"], torch.full((3,), 2.0))
    assert torch.equal(staging.copy({"a": torch.ones(2, dtype=torch.int)})["a"], torch.ones(2, dtype=torch.int))


class Full(OSError):
    pass


def test_an_error_is_told_in_the_same_interval_and_the_run_goes_on(
    compose: Compose,
    tiny_json: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_part, attempts = disk.write_part, []

    def full(path: Path, *arguments: Any) -> dict:
        attempts.append(path.name)
        if path.name == "step-00000004.ckpt":
            raise Full("no space left")
        return write_part(path, *arguments)

    monkeypatch.setattr(disk, "write_part", full)
    directory = tmp_path / "run"
    options = ("steps=8", "checkpoint.retries=1", "checkpoint.retry_seconds=0", "checkpoint.keep_last=9")
    run(compose, tiny_json, shards, directory, *options)
    assert attempts.count("step-00000004.ckpt") == 2 and saved_steps(directory) == [2, 6, 8]
    text = (directory / "train.log").read_text()
    assert re.search(r"step-00000004.ckpt cannot be written \(2 of 2 times\): no space left", text)
    assert "step-00000004.ckpt is not saved: no space left; the run goes on" in text
    assert text.index("step-00000004.ckpt is not saved") < text.index("trained in")
    rows = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("checkpoint/failures")
    assert [float(row[column]) for row in rows[1:]][-1] == 2 and float(rows[3][column]) == 0


@pytest.mark.parametrize("is_stopped", [False, True])
def test_one_step_is_saved_once_also_if_that_fails(
    is_stopped: bool, compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The evaluation saves its best, step 2, at which a checkpoint is due too. Of several processes all must begin it
    # again, or none, and only the first knows that the write has failed.
    write_part, attempts = disk.write_part, []

    def full(path: Path, *arguments: Any) -> dict:
        attempts.append(path.name)
        if path.name != "step-00000002.ckpt":
            return write_part(path, *arguments)
        if is_stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        raise Full("no space left")

    monkeypatch.setattr(disk, "write_part", full)
    options = ["checkpoint.retries=0", "evaluation.every_n_steps=2", "evaluation.best_metric=val/loss"]
    options += [f"data.val={shards}/b.tar", "steps=4"]
    ends = pytest.raises(UserError, match="^checkpoints cannot be written to ") if is_stopped else nullcontext()
    with ends:
        run(compose, tiny_json, shards / "a.tar", tmp_path / "run", *options)
    assert attempts == (["step-00000002.ckpt"] if is_stopped else ["step-00000002.ckpt", "step-00000004.ckpt"])


def test_too_many_failures_end_the_run(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> dict:
        raise Full("no space left")

    monkeypatch.setattr(disk, "write_part", full)
    options = ("steps=100", "checkpoint.retries=0", "checkpoint.max_failures=2", "checkpoint.background=false")
    with pytest.raises(UserError, match=r"checkpoints cannot be written to .*\(checkpoint.max_failures=2"):
        run(compose, tiny_json, shards, tmp_path / "run", *options)
    assert saved_steps(tmp_path / "run") == [] and os.listdir(tmp_path / "run/checkpoints") == []
    assert 5 <= len((tmp_path / "run/metrics.csv").read_text().splitlines()) <= 7  # steps 2 and 4 failed


def test_disk_full(small_disk: Path, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    def resize(megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", small_disk], check=True)

    options = [*QUICK, "steps=7", f"model.name={tiny_json}", f"data.train={shards}", "schedule=constant"]
    options += [f"paths.run={small_disk}/run", "checkpoint.retries=0", "data.ledger=true"]
    resize(30)  # a checkpoint has 20 MB: there is room for one
    process = run_forked(["train", *options], tmp_path)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "step-00000004.ckpt cannot be written (1 of 1 times): [Errno 28] No space left on device" in process.stderr
    assert "make room there, and the same command goes on from the newest one" in process.stderr
    assert os.listdir(small_disk / "run/checkpoints") == ["step-00000002.ckpt"]
    disk.verify_checkpoint(small_disk / "run/checkpoints/step-00000002.ckpt")

    resize(200)
    process = run_forked(["train", *options], tmp_path)
    assert process.returncode == 0 and "step-00000002.ckpt, the newest that is complete" in process.stdout
    assert run_forked(["train", *options, f"paths.run={tmp_path}/whole"], tmp_path).returncode == 0
    check_same(small_disk / "run", tmp_path / "whole", 7)
    ledgers = [path / "ledger/rank-00000.csv" for path in (small_disk / "run", tmp_path / "whole")]
    assert ledgers[0].read_text() == ledgers[1].read_text()


def test_a_run_with_damaged_checkpoints_goes_on_before_them(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    options = ("schedule=constant", "checkpoint.keep_last=3")
    run(compose, tiny_json, shards, tmp_path / "whole", "steps=6", *options)
    directory = tmp_path / "run"
    run(compose, tiny_json, shards, directory, "steps=6", *options)
    os.truncate(directory / "checkpoints/step-00000006.ckpt/rank-00000.pt", 1000)
    (directory / "checkpoints/step-00000004.ckpt/manifest.json").unlink()
    run(compose, tiny_json, shards, directory, "steps=6", *options)
    log = (directory / "train.log").read_text()
    assert "step-00000006.ckpt is not used: rank-00000.pt has 1,000 bytes of" in log
    assert "step-00000004.ckpt is not used: its manifest.json" in log
    assert "resuming from" in log and "step-00000002.ckpt, the newest that is complete (32 samples)" in log
    check_same(tmp_path / "whole", directory, 6)
    assert (directory / "checkpoints/damaged-step-00000006.ckpt").is_dir()

    for path in disk.list_checkpoints(directory / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of the 3 checkpoints in .* is valid"):
        run(compose, tiny_json, shards, directory, "steps=6", *options)


def test_a_residual_network_of_open_clip_trains(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    tower = "model.vision_cfg={layers:[1,1,1,1],width:8,head_width:16,image_size:32}"
    directory = run(compose, tiny_json, shards, tmp_path / "run", tower, "steps=2")
    open_clip.create_model_and_transforms(f"local-dir:{directory / 'model'}")
    assert {path.stat().st_mode & 0o044 for path in (directory / "model").iterdir()} == {0o044}
