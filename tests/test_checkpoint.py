"""Checkpoints are complete or absent, a resumed run equals an uninterrupted one, and open_clip loads the export."""

import os
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import QUICK
from omegaconf import DictConfig
from PIL import Image
from test_model import make_model

from clipmini import checkpoint
from clipmini.data.decode import EvaluationTransform
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.model import encode_image, encode_text
from clipmini.train import train

Compose = Callable[..., DictConfig]


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for name in ("step-00000020.ckpt", "step-00000003.ckpt", ".step-00000030.ckpt.7.tmp", "step-x.ckpt", "other.ckpt"):
        (tmp_path / name).touch()
    found = checkpoint.list_checkpoints(tmp_path)
    assert [checkpoint.checkpoint_step(path) for path in found] == [3, 20]


@pytest.mark.parametrize(("every", "keep"), [(0, 2), (5, 1)])
def test_limits(every: int, keep: int) -> None:
    with pytest.raises(UserError, match="checkpoint.every_n_steps=.*checkpoint.keep_last="):
        checkpoint.SaveCheckpoints(directory="x", every_n_steps=every, keep_last=keep)


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"state_dict": Evil()}, tmp_path / "step-1.ckpt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpoint.load_checkpoint(tmp_path / "step-1.ckpt")
    assert not (tmp_path / "evil").exists()


def test_another_config_is_refused_by_key() -> None:
    then = {"seed": 0, "model": {"name": "a", "x": [1]}, "trainer": {"precision": "16"}, "steps": 5}
    checkpoint.check_same_run({**then, "trainer": {"precision": "32"}, "steps": 9}, then, Path("run"))
    with pytest.raises(UserError, match=r"run holds a run of another .*model.name: was a, now b; seed: was 0, now 1"):
        checkpoint.check_same_run({**then, "seed": 1, "model": {"name": "b", "x": [1]}}, then, Path("run"))


def run(compose: Compose, tiny_json: Path, shards: Path, directory: Path, *overrides: str) -> Path:
    train(compose(*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={directory}", *overrides))
    return directory


def read_losses(directory: Path) -> list[str]:
    return [line.split(",")[3] for line in (directory / "metrics.csv").read_text().splitlines()]


def test_resumed_equals_uninterrupted(compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    options = ("schedule=constant", "schedule.warmup_steps=0", "data.augmentation.flip=0.5")
    whole = run(compose, tiny_json, shards, tmp_path / "whole", "steps=6", *options)
    parts = run(compose, tiny_json, shards, tmp_path / "parts", "steps=3", *options)
    run(compose, tiny_json, shards, tmp_path / "parts", "steps=6", "data.num_workers=1", *options)

    a, b = (checkpoint.load_checkpoint(path / "checkpoints/step-00000006.ckpt") for path in (whole, parts))
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
    assert a["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["samples"] == 6 * 16
    assert read_losses(whole) == read_losses(parts) and len(read_losses(whole)) == 7
    assert [path.name for path in checkpoint.list_checkpoints(parts / "checkpoints")] == [
        "step-00000004.ckpt",
        "step-00000006.ckpt",
    ]


def test_a_loader_that_lost_its_place_is_not_trained_on(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    directory = run(compose, tiny_json, shards, tmp_path / "run", "steps=2")
    path = directory / "checkpoints/step-00000002.ckpt"
    content = checkpoint.load_checkpoint(path)
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = []  # as Lightning does where the schedule asks it
    torch.save(content, tmp_path / "new")  # the old file is mapped into memory
    os.replace(tmp_path / "new", path)
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


@torch.no_grad()
@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_plain_open_clip_loads_the_export(tower: str, tiny_json: Path, tmp_path: Path) -> None:
    options = {} if tower == "vit" else {"vision_cfg": {"timm_model_name": "test_resnet"}}
    model = make_model(str(tiny_json), image_size=48, **options)
    checkpoint.export_open_clip(model, tmp_path / "model")
    checkpoint.export_open_clip(model, tmp_path / "model")  # replaces the first
    assert sorted(os.listdir(tmp_path)) == ["model"]

    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    picture = Image.effect_noise((60, 70), 90).convert("RGB")
    picture.save(tmp_path / "picture.png")
    ours = EvaluationTransform(48)((tmp_path / "picture.png").read_bytes())
    torch.testing.assert_close(
        encode_image(model, ours[None]),
        loaded.eval().encode_image(preprocess(picture)[None], normalize=True),
        rtol=0,
        atol=1e-5,
    )
    captions = ["a dog", "a cat on a mat"]
    torch.testing.assert_close(
        encode_text(model, ClipTokenizer(24)(captions)),
        loaded.encode_text(tokenizer(captions), normalize=True),
        rtol=0,
        atol=1e-6,
    )
    torch.testing.assert_close(loaded.logit_scale, model.logit_scale)


def test_a_residual_network_of_open_clip_trains(
    compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    tower = "model.vision_cfg={layers:[1,1,1,1],width:8,head_width:16,image_size:32}"
    directory = run(compose, tiny_json, shards, tmp_path / "run", tower, "steps=2")
    open_clip.create_model_and_transforms(f"local-dir:{directory / 'model'}")
    assert {path.stat().st_mode & 0o044 for path in (directory / "model").iterdir()} == {0o044}
