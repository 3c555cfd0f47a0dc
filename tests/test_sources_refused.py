"""Models that are not there, damaged files and weights of another model are refused by what is wrong with them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TINY, save_checkpoint
from test_sources import make, save, save_weights
from torch import Tensor

from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.model import Model, open_clip_config
from clipmini.sources import load_model


@pytest.fixture(scope="module")
def model(tiny_json: Path) -> Model:
    return make(tiny_json)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-32/opnai", r"^model=ViT-B-32/opnai: ViT-B-32 has no tag 'opnai' \(did .* 'openai'\?\); there are: op"),
        ("ViT-B32/openai", r"^model=ViT-B32/openai: neither a file nor .*\(did you mean 'ViT-B-32/openai'"),
        ("nowhere/model.pt", "^model=nowhere/model.pt: neither a file nor a directory, and no NAME/TAG of open_clip"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "captioning models"),
        ("local-dir:/nowhere", "^model=/nowhere: /nowhere/open_clip_config.json cannot be read: .*No such file"),
    ],
)
def test_sources_that_are_not_there_are_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(source)


def test_weights_that_cannot_be_fetched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tag: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    with pytest.raises(UserError, match="^model=RN50/cc12m: open_clip has no such weights .* fetch them: no network"):
        load_model("RN50/cc12m")


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^model={tmp_path}: neither a run .* nor an open_clip directory"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "open_clip_config.json cannot be read: .*line 1"),
        ("[1]", "open_clip_config.json holds no mapping"),
        ('{"model_cfg": {"embed_dim": 3}}', "model_cfg needs embed_dim, vision_cfg and text_cfg"),
        (json.dumps({"model_cfg": {**TINY, "embed_dim": "wide"}}), "open_clip cannot make it"),
        (json.dumps({"model_cfg": TINY}), r"no weights in it \(open_clip_model.safetensors\)"),
    ],
)
def test_broken_directories_are_refused(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(UserError, match=f"^model={tmp_path}: .*{message}"):
        load_model(str(tmp_path))


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda weights: weights.pop("ln_final.bias"), r'Missing key.*"ln_final.bias"'),
    "unknown": (lambda weights: weights.update(other=torch.zeros(1)), r'Unexpected key.*"other"'),
    "shape": (
        lambda weights: weights.update({"text_projection": torch.zeros(32, 16)}),
        r"size mismatch for text_projection: .*\[32, 16\].*\[32, 32\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_weights_of_another_model_are_refused_by_name(
    change: Callable, message: str, model: Model, tiny_json: Path, tmp_path: Path
) -> None:
    weights = dict(model.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=f"^model={tmp_path}/weights.pt does not fit this model: .*{message}"):
        load_model(str(tmp_path / "weights.pt"), architecture=str(tiny_json))
    export_open_clip(model, tmp_path / "published")
    save_weights(weights, tmp_path / "published/open_clip_model.safetensors")
    where = "open_clip_model.safetensors does not fit open_clip_config.json"
    with pytest.raises(UserError, match=f"^model={tmp_path}/published: {where}: .*{message}"):
        load_model(str(tmp_path / "published"))
    state = {f"model.{name}": value for name, value in weights.items()}
    path = save(model, tmp_path / "mine.ckpt", state_dict=state)
    with pytest.raises(UserError, match=f"^model={path}: .*{message}"):
        load_model(str(path))


class Evil:
    """Makes a directory when it is unpickled by who runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "mine.ckpt"])
def test_no_code_in_a_file_is_run(name: str, model: Model, tiny_json: Path, tmp_path: Path) -> None:
    content = {"state_dict": {**model.state_dict(), "x": Evil(tmp_path / "evil")}}
    content = {**content, "open_clip_config": open_clip_config(model), "global_step": 1}
    (save_checkpoint if name.endswith("ckpt") else torch.save)(content, tmp_path / name)
    architecture = None if name.endswith("ckpt") else str(tiny_json)
    with pytest.raises(
        UserError, match=f"^model={tmp_path}/{name}: cannot be read.*, or holds code, which is not run$"
    ):
        load_model(str(tmp_path / name), architecture=architecture)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut"])
def test_damaged_files_are_refused(damage: str, name: str, model: Model, tiny_json: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    save_weights(model.state_dict(), path)
    if damage == "cut":
        os.truncate(path, path.stat().st_size * 2 // 3)
    else:
        path.write_bytes(b"" if damage == "empty" else b"garbage" * 99)
    with pytest.raises(UserError, match=f"^model={path}: cannot be read.*: .") as caught:
        load_model(str(path), architecture=str(tiny_json))
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_refused(model: Model, tmp_path: Path) -> None:
    path = save(model, tmp_path / "mine.ckpt")
    os.truncate(path / "rank-00000.pt", 1000)
    with pytest.raises(UserError, match=f"^model={path}: rank-00000.pt has 1,000 bytes of"):
        load_model(str(path))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(model: Model, tmp_path: Path) -> None:
    path = save(model, tmp_path / "run/checkpoints/step-00000001.ckpt")
    os.truncate(path / "rank-00000.pt", 1000)
    told = f"^model={tmp_path}/run: none of the checkpoints in {tmp_path}/run/checkpoints is valid"
    with pytest.raises(UserError, match=f"{told}$"):
        load_model(str(tmp_path / "run"))
    export_open_clip(model, tmp_path / "run/model")
    with pytest.raises(UserError, match=f"{told}; {tmp_path}/run/model is what the run exported$"):
        load_model(str(tmp_path / "run"))


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}, {"state_dict": {}, "global_step": 1}])
def test_other_checkpoints_are_refused(content: Any, tmp_path: Path) -> None:
    save_checkpoint(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="/other.ckpt: is no checkpoint of clipmini$"):
        load_model(str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize("content", [[1], {}, {"state_dict": {}}, torch.zeros(2)])
def test_files_without_weights_are_refused(content: Any, tiny_json: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="/other.pt: holds no weights by their names$"):
        load_model(str(tmp_path / "other.pt"), architecture=str(tiny_json))


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        ("weights.pt", None, "/weights.pt: weights alone do not say of what model they are: set architecture="),
        ("weights.pt", "ViT-B32", r"/weights.pt: architecture=ViT-B32: no such model \(did you mean 'ViT-B-32'"),
        ("weights.pt", "nowhere.json", "/weights.pt: architecture=nowhere.json: no such file"),
        ("notes.txt", None, r"/notes.txt: neither a .ckpt of a run nor a file of weights \(.pt, .pth, "),
        ("mine.ckpt", "ViT-B-32", r"^architecture=ViT-B-32: is for files of weights \(.*\), not .*/mine.ckpt"),
        ("", "ViT-B-32", "^architecture=ViT-B-32: is for files of weights"),
    ],
)
def test_wrong_architectures_are_refused(
    name: str, architecture: str | None, message: str, model: Model, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / (name or "other"))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / name), architecture=architecture)


def test_an_architecture_that_is_no_json_is_refused(model: Model, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="/weights.pt: architecture=.*/broken.json: .*line 1"):
        load_model(str(tmp_path / "weights.pt"), architecture=str(tmp_path / "broken.json"))
