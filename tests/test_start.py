"""Runs that start from trained models of any origin, and weights between those and what they train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import QUICK, TINY
from omegaconf import DictConfig
from test_model import make_model, write_json

from clipmini import config
from clipmini.errors import UserError
from clipmini.export import command
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.export.run import run as run_export
from clipmini.export.wise import interpolate_
from clipmini.model import Model, set_preprocess
from clipmini.sources import load_model, load_start
from clipmini.train import train

Compose = Callable[..., DictConfig]


def make_start(path: Path, **options: Any) -> Model:
    """Make a model with other weights than a seed of 0 gives, and another mean of pictures."""
    torch.manual_seed(7)
    model = make_model(str(path), **options)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    set_preprocess(model, {**model.visual.preprocess_cfg, "mean": (0.5, 0.4, 0.3)})
    return model


def start_of(pretrained: Path | str, name: str | None) -> Model:
    return load_start(str(pretrained), name).model


def weights(model: Model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.fixture
def directory(tiny_json: Path, tmp_path: Path) -> Path:
    """An open_clip directory."""
    export_open_clip(make_start(tiny_json), tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.parametrize("name", [None, "tiny"])
def test_weights_and_mean_are_taken(name: str | None, directory: Path, tiny_json: Path) -> None:
    named = str(tiny_json) if name else None
    start = start_of(directory, named)
    model = make_model(named, start=start)  # type: ignore[arg-type]
    torch.testing.assert_close(weights(model), weights(make_start(tiny_json)), rtol=0, atol=0)
    assert model.visual.pixel_mean.ravel().tolist() == pytest.approx([127.5, 102.0, 76.5])
    assert model.architecture["vision_cfg"] == start.architecture["vision_cfg"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_is_taken_alone(tower: str, directory: Path, tiny_json: Path, tmp_path: Path) -> None:
    larger = {"layers": 2, "width": 64}
    other = {"image": {"text_cfg": larger}, "text": {"vision_cfg": larger}}[tower]
    named = write_json(tmp_path / "other.json", **other)
    start = start_of(directory, None)
    found = weights(make_model(named, start=start, pretrained_towers=tower))
    made, taken = weights(make_model(named)), weights(start)
    for name, value in found.items():
        is_taken = name.startswith("visual.") == (tower == "image") and name != "logit_scale"
        assert value.equal(taken[name] if is_taken else made[name]), name
    with pytest.raises(UserError, match="model.pretrained is of another model than model.name=.*layers is 1, not 2"):
        make_model(named, start=start)


def test_a_run_its_checkpoint_and_its_export_are_the_same_start(
    directory: Path, compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    given = [*QUICK, f"data.train={shards}", f"paths.run={tmp_path / 'run'}", "model.name=null", "steps=2"]
    train(compose(*given, f"model.pretrained={directory}", "model.lock_image=true"))
    trained = weights(load_model(str(tmp_path / "run")).model)
    start = weights(make_start(tiny_json))
    same = {name for name, value in trained.items() if value.equal(start[name])}
    assert same == {name for name in start if name.startswith("visual.")}  # it began there, and one tower was locked
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-00000002.ckpt")
    for source in (tmp_path / "run", checkpoint, tmp_path / "run/model", f"local-dir:{tmp_path}/run/model"):
        model = make_model(None, start=start_of(source, None))  # type: ignore[arg-type]
        torch.testing.assert_close(weights(model), trained, rtol=0, atol=0)
    train(compose(*given, f"model.pretrained={directory}", "model.lock_image=true"))  # goes on, and is done
    train(compose(*given[:-1], "steps=3", f"model.pretrained={directory}", "model.lock_image=true"))


@pytest.mark.parametrize("changes", [{"image_size": 48}, {"text_cfg": {"context_length": 30}}])
def test_positions_are_interpolated_as_open_clip_does(changes: dict, directory: Path, tiny_json: Path) -> None:
    model = make_model(str(tiny_json), start=start_of(directory, str(tiny_json)), **changes)
    expected = make_model(str(tiny_json), **changes)
    open_clip.load_checkpoint(expected, str(directory / "open_clip_model.safetensors"))
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)


def test_a_file_of_weights_of_a_named_model(tiny_json: Path, tmp_path: Path) -> None:
    torch.save(make_start(tiny_json).state_dict(), tmp_path / "weights.pt")
    model = make_model(str(tiny_json), start=start_of(tmp_path / "weights.pt", str(tiny_json)))
    torch.testing.assert_close(weights(model), weights(make_start(tiny_json)), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"model.pretrained=.*weights.pt: .*does not fit this model"):
        start_of(tmp_path / "weights.pt", "vit_tiny")


def test_a_model_with_its_text_tower_apart(tiny_json: Path, tmp_path: Path) -> None:
    (tmp_path / "apart.json").write_text(json.dumps({**TINY, "custom_text": True}))
    model = make_model(str(tmp_path / "apart.json"), start=make_start(tiny_json))
    expected = {name.removeprefix("text."): value for name, value in weights(model).items()}
    torch.testing.assert_close(expected, weights(make_start(tiny_json)), rtol=0, atol=0)


@pytest.mark.parametrize(("before", "now", "bias"), [(-10.0, None, None), (None, -5.0, -5.0), (-10.0, -5.0, -10.0)])
def test_the_bias_of_another_loss(before: float | None, now: float | None, bias: float | None, tiny_json: Path) -> None:
    start = make_model(str(tiny_json), init_bias=before)
    model = make_model(str(tiny_json), start=start, init_bias=now)
    assert (model.logit_bias is None) == (bias is None) and (bias is None or model.logit_bias.item() == bias)
    assert ("init_logit_bias" in model.architecture) == (bias is not None)


def test_quick_gelu_comes_with_the_weights(tiny_json: Path, tmp_path: Path) -> None:
    (tmp_path / "quick.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    start = make_start(tmp_path / "quick.json")
    model = make_model(str(tiny_json), start=start)
    picture = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(picture), start.encode_image(picture))
    assert model.architecture["quick_gelu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_cfg": {"head_width": 8}},
            "than .*: vision_cfg.head_width is 16, not 8; model.name=null takes",
        ),
        (
            {"text_cfg": {"heads": 4}},
            "than model.name=.*: text_cfg.heads is 2, not 4; model.name=null takes",
        ),
    ],
)
def test_a_start_of_another_model(changes: dict, message: str, tiny_json: Path, tmp_path: Path) -> None:
    other = write_json(tmp_path / "other.json", **changes)  # of the same shapes
    with pytest.raises(UserError, match=message):
        make_model(other, start=make_start(tiny_json))


def test_no_start(tiny_json: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.name=null: there is no model.pretrained whose model it could be"):
        make_model(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model.pretrained=a does not fit: .*size mismatch"):
        make_model(str(tiny_json), start=make_start(tiny_json), pretrained="a", embed_dim=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model.pretrained=.*empty: neither a run \(checkpoints"):
        start_of(tmp_path / "empty", None)
    torch.save(make_start(tiny_json).state_dict(), tmp_path / "alone.pt")
    with pytest.raises(UserError, match=r"model.pretrained=.*alone.pt: weights alone .*: set model.name="):
        start_of(tmp_path / "alone.pt", None)
    with pytest.raises(UserError, match="model.pretrained=openai: neither a file nor a tag of vit_tiny, nor a run"):
        start_of("openai", "vit_tiny")
    with pytest.raises(UserError, match=r"model.pretrained=opnai.*did you mean 'openai'"):
        start_of("opnai", "ViT-B-32")
    with pytest.raises(UserError, match="model.pretrained=nowhere: neither a file nor a tag of None, nor a run"):
        start_of("nowhere", None)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_between(
    share: float, directory: Path, tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "check_parity", lambda *_: {"image": 0.0, "text": 0.0})  # has tests of its own
    given = [*QUICK, f"data.train={shards}", f"paths.run={tmp_path / 'run'}", "model.name=null", "optimizer.lr=0.01"]
    train(config.compose("train", [*given, f"model.pretrained={directory}", "image_size=48", "steps=2"]))
    for source in (tmp_path / "run", tmp_path / "run/model"):
        output = tmp_path / f"{source.name}-{share}"
        assert run_export([f"model={source}", f"wise={share}", f"output={output}"]) == 0
        found = weights(load_model(str(output)).model)
        trained = weights(load_model(str(source)).model)
        start = weights(make_model(str(tiny_json), start=make_start(tiny_json), image_size=48))
        for name, value in found.items():
            expected = (1 - share) * start[name].double() + share * trained[name].double()
            torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)
            assert share not in (0.0, 1.0) or value.equal(expected.float())
        assert not any(trained[name].equal(start[name]) for name in ("visual.proj", "text_projection"))


def test_wrong_shares_are_refused(tiny_json: Path) -> None:
    model = make_model(str(tiny_json))
    with pytest.raises(UserError, match="wise=1.5: must be from 0 to 1"):
        interpolate_(model, 1.5, None, "outputs/x")
    for given in (None, {"model": {"pretrained": None}}):
        with pytest.raises(UserError, match="wise=0.5: no weights are known that outputs/x started from; it"):
            interpolate_(model, 0.5, given, "outputs/x")
    with pytest.raises(UserError, match="model.pretrained=gone: neither a file nor"):
        interpolate_(model, 0.5, {"model": {"pretrained": "gone", "name": None}}, "outputs/x")
