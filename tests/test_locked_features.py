"""Features of a locked image tower that are kept: the same run without its pictures, and what is refused."""

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, make_augmentation, read_sample, write_tar
from forked import run_forked
from omegaconf import DictConfig
from test_model import make_model, write_json

from clipmini.cluster import signals
from clipmini.errors import Stopped, UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.kept_features import encode_shard
from clipmini.locked_features import check_locked
from clipmini.train import train

STILL = ("data.augmentation.scale=[1.0,1.0]", "data.augmentation.ratio=[1.0,1.0]")


@pytest.fixture
def options(tiny_json: Path, tmp_path: Path) -> list[str]:
    """A run beside a locked tower, on shards of which one picture is none and some have a wrong caption too."""
    samples = read_sample("train/noto-00000.tar", 40)
    for number, sample in enumerate(samples):
        sample["json"] = json.dumps({"wrong": ["a bird", f"no {number}"]} if number % 2 else {}).encode()
    samples[7]["webp"] = b"no picture"
    write_tar(tmp_path / "shards/a.tar", samples[:25])
    write_tar(tmp_path / "shards/b.tar", samples[25:])
    export_open_clip(make_model(str(tiny_json)), tmp_path / "start")
    given = [*QUICK, *STILL, "name=run", "model.name=null", f"model.pretrained={tmp_path / 'start'}", "steps=6"]
    given += ["model.lock_image=true", f"data.train={tmp_path / 'shards'}", f"paths.cache={tmp_path / 'cache'}"]
    return [*given, "data.hard_negatives=wrong", "data.ledger=true", "optimizer.lr=1e-2"]


def read_run(run: Path) -> tuple[list[float], list[list[str]], list[str]]:
    """Return the losses of a run, its samples by position, and what could not be used."""
    with open(run / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    rows = sorted(row.split(",") for path in (run / "ledger").iterdir() for row in path.read_text().splitlines()[1:])
    bad = [json.loads(line)["key"] for line in (run / "quarantine.jsonl").read_text().splitlines()]
    return losses, rows, sorted(bad)


def test_is_the_same_run_without_its_pictures(options: list[str], tmp_path: Path) -> None:
    runs = {}
    for name, processes, more in (
        ("uncached", 1, ["data.num_workers=0"]),
        ("cached", 1, ["data.cached_features=true", "data.num_workers=1"]),
        ("again", 2, ["data.cached_features=true"]),
    ):
        (tmp_path / name).mkdir()
        result = run_forked(["train", *options, *more], tmp_path / name, processes=processes)
        assert result.returncode == 0, result.stderr
        assert ("computing the features of 2 of 2 shards" in result.stdout) is (name == "cached")
        runs[name] = read_run(tmp_path / name / "outputs/run")
    losses, ledger, bad = runs["uncached"]
    assert len(losses) == 6 and losses[-1] < losses[0] and bad
    for name in ("cached", "again"):
        assert runs[name][0] == pytest.approx(losses, abs=1e-6)
        assert runs[name][1:] == (ledger, bad)
    # What is gone, as after a kill, is computed again, and no more; what changes the features has a name of its own.
    (directory,) = (tmp_path / "cache/features").iterdir()
    first, second = sorted(directory.glob("*.npy"))
    kept = np.load(first)
    first.unlink()
    changed = second.stat().st_mtime_ns
    result = run_forked(["train", *options, "data.cached_features=true", "name=third"], tmp_path)
    assert "computing the features of 1 of 2 shards" in result.stdout, result.stdout + result.stderr
    assert np.array_equal(np.load(first), kept, equal_nan=True) and second.stat().st_mtime_ns == changed
    for change in ("image_size=48", "data.draft=off"):
        result = run_forked(["train", *options, "data.cached_features=true", f"name={change[:5]}", change], tmp_path)
        assert "computing the features of 2 of 2 shards" in result.stdout, result.stdout + result.stderr
    assert len(list((tmp_path / "cache/features").iterdir())) == 3


def test_a_projection_learns_on_what_goes_into_it(options: list[str], tmp_path: Path) -> None:
    losses = []
    for cached in ("false", "true"):
        given = ["train", *options, f"name=cached-{cached}", "model.lock_image_unlocked_groups=1"]
        result = run_forked([*given, f"data.cached_features={cached}"], tmp_path)
        assert result.returncode == 0, result.stderr
        losses.append(read_run(tmp_path / f"outputs/cached-{cached}")[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "is_random"),
    [
        ({"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}, False),
        ({"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 1.0, "grayscale_probability": 1.0}, False),
        ({"scale": (0.9, 1.0), "ratio": (1.0, 1.0)}, True),
        ({"scale": (1.0, 1.0), "ratio": (0.9, 1.0)}, True),
        *[
            ({"scale": (1.0, 1.0), "ratio": (1.0, 1.0), **change}, True)
            for change in (
                {"flip": 0.5},
                {"rotation": 1.0},
                {"zoom": (0.9, 1.0)},
                {"color_jitter": (0.1, 0.0, 0.0, 0.0)},
                {"grayscale_probability": 0.1},
                {"blur_probability": 0.1},
            )
        ],
    ],
)
def test_what_is_random(changes: dict[str, Any], is_random: bool) -> None:
    assert make_augmentation(**changes).is_random is is_random


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {"patch_dropout": 0.5},
            "the image tower has OwnPatchDropout, by which a picture has other",
        ),
        ({"timm_model_name": "test_vit", "image_size": 160, "timm_drop": 0.3}, "the image tower has Dropout"),
        ({"timm_model_name": "test_resnet", "image_size": 160}, "the image tower has BatchNorm"),
    ],
)
def test_towers_that_are_not_the_same_each_time_are_refused(
    vision: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model(write_json(tmp_path / "m.json", vision_cfg=vision))
    with pytest.raises(UserError, match="the image tower learns, and not its last projection alone"):
        check_locked(model)
    model.visual.requires_grad_(False)
    with pytest.raises(UserError, match=message):
        check_locked(model)


def test_a_locked_residual_network_is_the_same_each_time(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": "test_resnet", "image_size": 160})
    model = make_model(path, lock_image=True)
    assert check_locked(model)  # but for its projection, which learns as with open_clip
    model.visual.requires_grad_(False)
    assert not check_locked(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.augmentation.flip=0.5"], "data.cached_features=true: a picture would have other features each time"),
        (["model.lock_image=false"], "the image tower learns"),
        (["trainer.precision=64-true"], "goes with trainer.precision 32-true, bf16-mixed, 16-mixed, not 64-true"),
    ],
)
def test_what_would_be_wrong_is_told(
    overrides: list[str], message: str, options: list[str], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(compose(*options, "data.cached_features=true", f"paths.run={tmp_path / 'run'}", *overrides))


def test_a_resumed_run_that_is_stopped_before_it_trains_is_where_it_was(
    options: list[str], compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_signalled(*arguments: Any, **more: Any) -> dict[int, np.ndarray]:
        os.kill(os.getpid(), signal.SIGTERM)
        return encode_shard(*arguments, **more)

    given = [*options, "data.cached_features=true", f"paths.run={tmp_path / 'run'}"]
    train(compose(*given, "steps=2"))
    shutil.rmtree(tmp_path / "cache/features")
    monkeypatch.setattr("clipmini.kept_features.encode_shard", is_signalled)
    with pytest.raises(Stopped, match="^stopped by SIGTERM at step 2; .*step-00000002.ckpt is saved, the same command"):
        train(compose(*given))
    signals.stop_listening()
