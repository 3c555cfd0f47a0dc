"""Low-rank changes: as peft's where it has them, what learns, what is merged, several processes, wrong values."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import peft
import pytest
import torch
from conftest import QUICK
from forked import run_forked
from omegaconf import DictConfig
from test_model import make_model, write_json
from test_one_tower import read_losses
from torch import Tensor, nn

from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.lora import add_lora, merge_lora
from clipmini.model import Model, encode_image, encode_text
from clipmini.sources import load_model
from clipmini.train import train

IMAGE = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXT = ClipTokenizer(24)(["a dog", "a much longer caption about a cat on a mat", "!"])
OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8.0, "image": None, "text": None}


def make(path: Path | str, **changes: Any) -> Model:
    model = make_model(str(path)).double()
    add_lora(model, **{**OPTIONS, **changes})
    return model


def move(model: Model) -> None:
    """Give the changes values, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.05)


def features(model: Model) -> Tensor:
    return torch.cat([encode_image(model, IMAGE), encode_text(model, TEXT)])


def test_convolutions_are_pefts(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": "test_resnet", "image_size": 160})
    images = IMAGE.repeat(1, 1, 5, 5)
    ours, theirs, plain = make(path, image=["conv1", "layer1.0.conv2"], text=[]), *(make_model(path) for _ in range(2))
    for model in (ours, theirs.double(), plain.double()):
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.data.fill_(1.0)  # a new network begins with blocks that do nothing
    move(ours)
    config = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=r".*(layer\d\.\d\.conv1|layer1\.0\.conv2)$")
    peft.inject_adapter_in_model(config, theirs)
    moved = {name: value for name, value in ours.named_parameters() if "lora_" in name}
    for name, value in moved.items():
        layer_path, _, part = name.replace(".parametrizations.weight.0", "").rpartition(".")
        weight = getattr(theirs.get_submodule(layer_path), part)["default"].weight
        weight.data.copy_(value.view_as(weight))
    assert len(moved) == sum("lora_" in name for name, _ in theirs.named_parameters()) > 4
    found, expected = encode_image(ours, images), encode_image(theirs, images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - encode_image(plain, images)).abs().max() > 1e-3


def learning(model: Model) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_begins_as_the_model_and_trains_changes_alone(tiny_json: Path) -> None:
    model, plain = make(tiny_json), make_model(str(tiny_json)).double()
    assert torch.equal(features(model), features(plain))
    layers = ("attn.parametrizations.in_proj_weight", "attn.out_proj.parametrizations.weight")
    layers += ("mlp.c_fc.parametrizations.weight", "mlp.c_proj.parametrizations.weight")
    towers = ("visual.transformer.resblocks.0", "transformer.resblocks.0")
    expected = {f"{tower}.{layer}.0.lora_{x}" for tower in towers for layer in layers for x in "AB"}
    assert learning(model) == {*expected, "logit_scale"}
    move(model)
    assert (features(model) - features(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [1, 4])
def test_is_pefts(rank: int, tiny_json: Path) -> None:
    ends = ["c_fc", "c_proj"]  # attention is another layer in peft, see below
    ours = make(tiny_json, rank=rank, image=ends, text=ends)
    move(ours)
    theirs = make_model(str(tiny_json)).double()
    config = peft.LoraConfig(r=rank, lora_alpha=8.0, target_modules=ends)
    peft.inject_adapter_in_model(config, theirs)
    for name, value in ours.named_parameters():
        if "lora_" in name:
            path, _, part = name.replace(".parametrizations.weight.0", "").rpartition(".")
            getattr(theirs.get_submodule(path), part)["default"].weight.data.copy_(value)
    found, expected = features(ours), features(theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for model, of_model in ((ours, found), (theirs, expected)):
        (of_model * torch.arange(of_model.numel()).view_as(of_model)).sum().backward()
        assert model.visual.transformer.resblocks[0].mlp.c_fc.weight.requires_grad is (model is ours)
    gradients = [
        [value.grad for name, value in model.named_parameters() if "lora_" in name] for model in (ours, theirs)
    ]
    assert len(gradients[0]) == len(gradients[1]) == 8
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)


def test_attention_is_that_of_changed_weights(tiny_json: Path) -> None:
    model, plain = make(tiny_json), make_model(str(tiny_json)).double()
    move(model)
    state = model.state_dict()
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            path, _, weight = name.rpartition(".")
            prefix = f"{path}.parametrizations.{weight}.0"
            if f"{prefix}.lora_A" in state:
                value += 8 / 4 * state[f"{prefix}.lora_B"] @ state[f"{prefix}.lora_A"]
    torch.testing.assert_close(features(model), features(plain), rtol=0, atol=1e-12)
    merged = merge_lora(state)
    assert merged.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-12)


def test_merged_on_export(tiny_json: Path, tmp_path: Path) -> None:
    model = make(tiny_json).float()
    move(model)
    export_open_clip(model, tmp_path / "model")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    ours = load_model(str(tmp_path / "model")).model
    torch.testing.assert_close(features(ours), features(model), rtol=0, atol=1e-6)
    expected = theirs.eval().encode_text(TEXT, normalize=True)
    torch.testing.assert_close(encode_text(model, TEXT), expected, rtol=0, atol=1e-6)


def test_some_layers_of_one_tower(tiny_json: Path) -> None:
    model = make(tiny_json, image=["attn"], text=[])
    changed = {name for name in learning(model) if "lora_" in name}
    prefix = "visual.transformer.resblocks.0.attn.parametrizations.in_proj_weight.0"
    assert changed == {f"{prefix}.lora_A", f"{prefix}.lora_B"}
    assert {"token_embedding.weight", "text_projection"} <= learning(model)  # that tower is trained as it is
    assert "visual.proj" not in learning(model)
    assert not any("lora" in name for name in make(tiny_json, rank=0).state_dict())


@pytest.mark.parametrize("vision", [{"timm_model_name": "test_vit", "image_size": 160}])
def test_towers_of_timm(vision: dict[str, Any], tmp_path: Path) -> None:
    model = make(write_json(tmp_path / "m.json", vision_cfg=vision), text=[], image=["qkv", "fc1"])
    layers = {name.split(".parametrizations")[0] for name in learning(model) if "lora_" in name}
    assert layers and all(name.endswith(("attn.qkv", "mlp.fc1")) for name in layers)


def start_and_options(tiny_json: Path, shards: Path, tmp_path: Path) -> list[str]:
    torch.manual_seed(3)
    export_open_clip(make_model(str(tiny_json)), tmp_path / "start")
    given = [*QUICK, "name=run", "model.name=null", f"model.pretrained={tmp_path / 'start'}", f"data.train={shards}"]
    return [
        *given,
        "lora.rank=2",
        "optimizer.lr=1e-2",
        "schedule.warmup_steps=0",
        "steps=3",
        "checkpoint.every_n_steps=2",
    ]


def test_a_run_changes_nothing_but_low_ranks(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    options = start_and_options(tiny_json, shards, tmp_path)
    losses = []
    for processes, micro_batch in ((1, "null"), (2, "3")):
        (tmp_path / str(processes)).mkdir()
        given = ["train", *options, f"micro_batch={micro_batch}"]
        result = run_forked(given, tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
        losses.append(read_losses(tmp_path / f"{processes}/outputs/run"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    run = tmp_path / "1/outputs/run"
    start = load_model(str(tmp_path / "start")).model.state_dict()
    for source in (run, run / "model"):
        trained = load_model(str(source)).model.state_dict()
        changes = {name: value - start[name] for name, value in trained.items() if not value.equal(start[name])}
        assert {name.rpartition(".")[2] for name in changes} == {"weight", "in_proj_weight", "logit_scale"}
        assert all(torch.linalg.matrix_rank(value, rtol=1e-4) <= 2 for value in changes.values() if value.ndim == 2)
    # Resumed at the second step it is the same run.
    whole = load_model(str(run)).model.state_dict()
    shutil.rmtree(run / "checkpoints/step-00000003.ckpt")
    again = run_forked(["train", *options, "micro_batch=null"], tmp_path / "1")
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr
    assert all(value.equal(whole[name]) for name, value in load_model(str(run)).model.state_dict().items())


def test_another_rank_is_another_run(
    compose: Callable[..., DictConfig], tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    options = [*start_and_options(tiny_json, shards, tmp_path), f"paths.run={tmp_path / 'run'}"]
    train(compose(*options))
    with pytest.raises(UserError, match="lora.rank: was 2, now 3"):
        train(compose(*options, "lora.rank=3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "lora.rank=-1: must be 0 or more"),
        ({"alpha": 0.0}, "lora.alpha=0.0: must be above 0"),
        ({"image": ["attention"]}, "lora.image: the tower has no layer 'attention'.*: .*attn.out_proj, mlp.c_fc"),
        ({"text": ["c_fc", "x"]}, "lora.text: the tower has no layer 'x'"),
    ],
)
def test_wrong_values_are_told(changes: dict[str, Any], message: str, tiny_json: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(tiny_json, **changes)


def test_needs_a_trained_model(
    compose: Callable[..., DictConfig], tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="lora.rank=4: changes weights that stay as they are: set model.pretrained"):
        given = [f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={tmp_path / 'run'}", "lora.rank=4"]
        train(compose(*QUICK, *given))
