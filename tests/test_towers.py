"""Layers of towers: the ones that open_clip locks, and how much slower the early ones learn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import options, read_ledgers, read_losses, run
from test_model import make_model, write_json
from timm.optim import param_groups_layer_decay

from clipmini import optim
from clipmini.errors import UserError
from clipmini.model import Model, encode_image, image_size
from clipmini.towers import decay_learning_rates, list_layers

DEEP = {"vision_cfg": {"layers": 3}, "text_cfg": {"layers": 3}}
TIMM = {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160}}
BATCH_NORM = {"vision_cfg": {"timm_model_name": "test_efficientnet", "image_size": 160}}
RESNET = {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16}}


def make(path: Path, changes: dict[str, Any], **options: Any) -> Model:
    write_json(path, **{key: value for key, value in changes.items() if key != "custom_text"})
    custom = {"custom_text": True} if "custom_text" in changes else {}
    path.write_text(json.dumps({**json.loads(path.read_text()), **custom}))
    return make_model(str(path), **options)


def hugging_face(directory: Path, family: str) -> dict[str, Any]:
    """Save a small model, and say how a text tower is made of it."""
    if family == "mt5":
        sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2}
        transformers.MT5Config(**sizes).save_pretrained(directory)
    else:
        kind = {"roberta": transformers.RobertaConfig, "bert": transformers.BertConfig}[family]
        sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 16}
        kind(num_attention_heads=2, **sizes).save_pretrained(directory)
    return {"text_cfg": {"hf_model_name": str(directory), "hf_pooler_type": "mean_pooler"}}


def learning(model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("changes", [DEEP, TIMM], ids=["vit", "timm"])
def test_locks_the_image_layers_that_open_clip_locks(changes: dict, unlocked: int, tmp_path: Path) -> None:
    theirs = make(tmp_path / "m.json", changes)
    theirs.lock_image_tower(unlocked_groups=unlocked)
    ours = make(tmp_path / "m.json", changes, lock_image=True, lock_image_unlocked_groups=unlocked)
    assert learning(ours) == learning(theirs)
    assert not learning(ours) >= {name for name, _ in ours.visual.named_parameters(prefix="visual")}


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["clip", "custom text", "class embedding", "roberta", "mt5"])
def test_locks_the_text_layers_that_open_clip_locks(kind: str, unlocked: int, tmp_path: Path) -> None:
    changes = {
        "clip": DEEP,
        "custom text": {**DEEP, "custom_text": True},
        "class embedding": {"text_cfg": {"layers": 3, "embed_cls": True}, "custom_text": True},
    }.get(kind) or hugging_face(tmp_path / "hf", kind)
    theirs = make(tmp_path / "m.json", changes)
    theirs.lock_text_tower(unlocked_layers=unlocked, freeze_layer_norm=True)
    ours = make(tmp_path / "m.json", changes, lock_text=True, lock_text_unlocked_layers=unlocked)
    assert learning(ours) == learning(theirs)
    assert learning(ours) < learning(make(tmp_path / "m.json", changes))


def test_layer_norms_of_a_locked_text_tower_can_learn(tmp_path: Path) -> None:
    hugging_face_ones = [hugging_face(tmp_path / family, family) for family in ("bert", "mt5")]
    for changes, count in zip((DEEP, *hugging_face_ones), (14, 14, 7), strict=True):  # T5's have no biases
        locked = learning(make(tmp_path / "m.json", changes, lock_text=True))
        more = learning(make(tmp_path / "m.json", changes, lock_text=True, lock_text_freeze_layer_norm=False)) - locked
        assert len(more) == count
        assert all(re.search("ln_|LayerNorm|layer_norm", name) for name in more)


def test_towers_without_layers_in_open_clip(tmp_path: Path) -> None:
    changes = hugging_face(tmp_path / "bert", "bert")
    model = make(tmp_path / "m.json", changes, lock_text=True, lock_text_unlocked_layers=1)
    last = {name for name in learning(model) if name.startswith("text.transformer.")}
    assert last and all(name.startswith("text.transformer.encoder.layer.2.") for name in last)
    pooled = {"vision_cfg": {"layers": 3, "attentional_pool": True, "attn_pooler_heads": 2}}
    layers = list_layers(make(tmp_path / "m.json", pooled), "image")
    assert len(layers) == 5 and "visual.attn_pool.query" in layers[3] and layers[4] == ["visual.proj"]


def test_a_residual_network_is_locked_by_stages(tmp_path: Path) -> None:
    model = make(tmp_path / "m.json", RESNET, lock_image=True, lock_image_unlocked_groups=2)
    assert {name.split(".")[1] for name in learning(model) if name.startswith("visual.")} == {"layer4", "attnpool"}


@pytest.mark.parametrize(("unlocked", "freeze"), [(0, True), (0, False), (2, True)])
@pytest.mark.parametrize("changes", [BATCH_NORM, RESNET], ids=["timm", "resnet"])
def test_statistics_of_locked_layers(changes: dict, unlocked: int, freeze: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    names = {"lock_image": True, "lock_image_unlocked_groups": unlocked, "lock_image_freeze_bn_stats": freeze}
    model, plain = make(path, changes, **names), make(path, changes)
    size = image_size(plain)
    picture = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    torch.testing.assert_close(encode_image(model, picture), encode_image(plain, picture))  # activations are kept
    before = {name: value.clone() for name, value in model.visual.named_buffers() if "running" in name}
    encode_image(model.train(), picture)
    moved = {name for name, value in model.visual.named_buffers() if name in before and not value.equal(before[name])}
    locked = {name for layer in list_layers(plain, "image")[: -unlocked or None] for name in layer}
    of_locked = {name for name in before if f"visual.{name.rpartition('.')[0]}.weight" in locked}
    assert moved == (set(before) - of_locked if freeze else set(before))
    assert (set(before) == of_locked) == (unlocked == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lock_image_unlocked_groups": 1}, "groups=1, but nothing is locked: set model.lock_image=true"),
        ({"lock_text_unlocked_layers": 1}, "layers=1, but nothing is locked: set model.lock_text=true"),
        (
            {"lock_image": True, "lock_image_unlocked_groups": 5},
            "unlocked_groups=5: must be from 0 to 4",
        ),
        ({"lock_text": True, "lock_text_unlocked_layers": -1}, "=-1: must be .*, as this tower has 5 groups of layers"),
        ({"lock_image": True, "lock_text": True}, "leave nothing to train but the scale"),
    ],
)
def test_wrong_locks_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path / "m.json", DEEP, **options)


def test_towers_of_timm_that_do_not_name_their_layers(tmp_path: Path) -> None:
    changes = {"vision_cfg": {"timm_model_name": "poolformer_s12", "image_size": 64}}
    model = make(tmp_path / "m.json", changes, lock_image=True)
    assert {name for name in learning(model) if name.startswith("visual.")} == {"visual.head.proj.weight"}
    with pytest.raises(UserError, match="MetaFormer does not say what its layers are: set layer_decay"):
        make(tmp_path / "m.json", changes, lock_image=True, lock_image_unlocked_groups=1)
    changes = {"vision_cfg": {"timm_model_name": "levit_128s", "image_size": 224}}
    with pytest.raises(UserError, match=r"lock_image_freeze_bn_stats=true: the averages of BatchNorm1d \(.* cannot be"):
        make(tmp_path / "m.json", changes, lock_image=True)


def test_early_layers_learn_slower(tmp_path: Path) -> None:
    model = make(tmp_path / "m.json", DEEP)
    shares = decay_learning_rates(model, {"image": 0.5, "text": 0.1})
    first, last = "transformer.resblocks.0.ln_1.weight", "transformer.resblocks.2.ln_1.weight"
    image = {"visual.conv1.weight": 4, f"visual.{first}": 3, f"visual.{last}": 1, "visual.ln_post.weight": 1}
    assert {name: shares[name] for name in image} == {name: 0.5**distance for name, distance in image.items()}
    text = {"token_embedding.weight": 4, "positional_embedding": 4, first: 3, last: 1, "ln_final.bias": 1}
    assert {name: shares[name] for name in text} == {name: 0.1**distance for name, distance in text.items()}
    assert learning(model) - shares.keys() == {"visual.proj", "text_projection", "logit_scale"}
    assert decay_learning_rates(model, {"image": 1.0, "text": 1.0}) == {}
    for decay in (0.0, 1.5):
        with pytest.raises(UserError, match=f"layer_decay.text={decay}: must be above 0, up to 1"):
            decay_learning_rates(model, {"image": 1.0, "text": decay})


@pytest.mark.parametrize("changes", [TIMM, BATCH_NORM], ids=["vit", "efficientnet"])
def test_layers_of_timm_learn_as_timm_has_it(changes: dict, tmp_path: Path) -> None:
    model = make(tmp_path / "m.json", changes)
    ours = decay_learning_rates(model, {"image": 0.7, "text": 1.0})
    trunk = model.visual.trunk
    names = {id(value): f"visual.trunk.{name}" for name, value in trunk.named_parameters()}
    theirs = {
        names[id(value)]: group["lr_scale"]
        for group in param_groups_layer_decay(trunk, layer_decay=0.7)
        for value in group["params"]
    }
    assert ours == pytest.approx({name: 0.7 * share for name, share in theirs.items()})  # a projection follows


def test_a_step_is_as_much_shorter(tmp_path: Path) -> None:
    model = make(tmp_path / "m.json", DEEP)
    shares = decay_learning_rates(model, {"image": 0.5, "text": 0.25})
    optimizer = torch.optim.SGD(optim.parameter_groups([model], shares), lr=0.5)
    optim.apply_shares(optimizer)
    schedule = optim.constant(optimizer, total_steps=8, warmup_steps=2, warmup_fraction=0.5)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    schedule.step()
    for name, value in model.named_parameters():
        step = 0.5 * 0.5 * shares.get(name, 1.0)  # half of the rate, in the warm-up
        torch.testing.assert_close(before[name] - value.detach(), torch.full_like(value, step), rtol=1e-4, atol=1e-6)
    assert max(schedule.get_last_lr()) == optimizer.param_groups[0]["lr"] == 0.5


def test_the_same_run_with_any_number_of_processes(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    slower = ("layer_decay.image=0.5", "model.lock_text=true", "model.lock_text_unlocked_layers=2")
    given = options(tiny_json, shards, *slower, "steps=6")
    for processes in (1, 2):
        run(tmp_path / str(processes), processes, given)
    assert read_ledgers(tmp_path / "2") == read_ledgers(tmp_path / "1")
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "1"), abs=1e-5)
    run(tmp_path / "plain", 1, [*given, "layer_decay.image=1.0"])
    assert read_losses(tmp_path / "plain")[-1] != pytest.approx(read_losses(tmp_path / "1")[-1], abs=1e-5)
