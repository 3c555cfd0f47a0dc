"""The model is open_clip's: same features, same weights, and only cuts that change nothing."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from conftest import TINY

from clipmini.data.tokenizer import ClipTokenizer, create_tokenizer, trim
from clipmini.errors import UserError
from clipmini.model import Model, create_model, encode_image, encode_text, padding, synchronize_batch_norm


def make_model(name: str, **options: Any) -> Model:
    torch.manual_seed(0)
    return create_model(name=name, **{"init_scale": 14.0, "init_bias": None, **options}).eval()


def write_json(path: Path, **changes: Any) -> str:
    """Write the tiny model's JSON with changes to its towers."""
    path.write_text(json.dumps({**TINY, **{key: {**TINY[key], **value} for key, value in changes.items()}}))
    return str(path)


CAPTIONS = ["a dog", "a much longer caption about a cat on a mat", "!"]


@torch.no_grad()
def test_features_are_open_clips(tiny_json: Path) -> None:
    model = make_model(str(tiny_json))
    picture = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    expected = model.encode_image((picture / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(encode_image(model, picture), expected, rtol=1e-5, atol=1e-6)
    text = ClipTokenizer(24)(CAPTIONS)
    torch.testing.assert_close(encode_text(model, text), model.encode_text(text, normalize=True), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
def test_trimmed_captions_have_equal_features(custom_text: bool, pool_type: str, tmp_path: Path) -> None:
    changes = {"text_cfg": {"pool_type": pool_type, "eos_id": 49407}}
    path = Path(write_json(tmp_path / "m.json", **changes))
    path.write_text(json.dumps({**json.loads(path.read_text()), "custom_text": custom_text}))
    model = make_model(str(path))
    text = ClipTokenizer(24)(CAPTIONS)
    short = trim(text, padding(model))
    assert short.shape[1] < 24
    # Nothing looks past the end token; what is left is how a kernel rounds sums of another length.
    torch.testing.assert_close(encode_text(model, short), model.encode_text(text, normalize=True), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}])
def test_captions_are_not_trimmed_where_that_changes_features(changes: dict, tmp_path: Path) -> None:
    model = make_model(write_json(tmp_path / "m.json", text_cfg=changes))
    assert padding(model) is None
    text = ClipTokenizer(24)(CAPTIONS)
    torch.testing.assert_close(encode_text(model, text), model.encode_text(text, normalize=True))


def test_state_dict_and_scale_are_open_clips(tiny_json: Path) -> None:
    open_clip.add_model_config(tiny_json)
    theirs = open_clip.create_model("tiny")
    model = make_model(str(tiny_json), init_scale=20.0)
    theirs.load_state_dict(model.state_dict())
    assert float(theirs.logit_scale.exp()) == pytest.approx(20.0)
    assert model.logit_bias is None
    assert float(make_model(str(tiny_json), init_bias=-10.0).logit_bias) == -10.0


def test_same_seed_same_weights_as_open_clip(tiny_json: Path) -> None:
    open_clip.add_model_config(tiny_json)
    ours = make_model(str(tiny_json), init_scale=1 / 0.07).state_dict()
    torch.manual_seed(0)
    theirs = open_clip.create_model("tiny").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_image_size_makes_another_grid(tiny_json: Path) -> None:
    model = make_model(str(tiny_json), image_size=48)
    assert model.visual.positional_embedding.shape[0] == 3 * 3 + 1
    assert model.architecture["vision_cfg"]["image_size"] == 48


def test_timm_image_tower(tiny_json: Path) -> None:
    model = make_model(str(tiny_json), vision_cfg={"timm_model_name": "test_resnet"}, image_size=40)
    assert encode_image(model, torch.zeros(2, 3, 40, 40, dtype=torch.uint8)).shape == (2, 32)


def test_timm_tower_of_a_size_that_open_clip_cannot_load(tiny_json: Path) -> None:
    with pytest.raises(UserError, match="image_size=64: open_clip loads the timm tower test_vit at 160 pixels only"):
        make_model(str(tiny_json), vision_cfg={"timm_model_name": "test_vit"}, image_size=64)


@torch.no_grad()
def test_hugging_face_text_tower(tiny_json: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "on", "mat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    text_cfg = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path), "hf_pooler_type": "mean_pooler"}
    model = make_model(str(tiny_json), text_cfg=text_cfg)
    text = create_tokenizer(model.architecture)(["a dog", "a cat on a mat"])
    short = trim(text, padding(model))
    assert text.shape[1] == 24 and short.shape[1] == 7
    torch.testing.assert_close(encode_text(model, short), model.encode_text(text, normalize=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ViT-B32"}, r"model.name=ViT-B32: no such model \(did you mean 'ViT-B-32'"),
        ({"name": "nowhere.json"}, "model.name=nowhere.json: no such file"),
        ({"name": "vit_tiny", "image_size": 7}, "image_size=7: must be at least 8, the size of the model's patches"),
        ({"name": "coca_ViT-B-32"}, "captioning models"),
        (
            {"name": "vit_tiny", "vision_cfg": {"layer": 2}},
            r"unknown key model.vision_cfg.layer \(did .* 'layers'",
        ),
        ({"name": "vit_tiny", "vision_cfg": {"width": "wide"}}, "model.vision_cfg.width='wide' has the wrong type"),
        (
            {"name": "vit_tiny", "vision_cfg": {"timm_model_name": "resnet10x"}},
            r"model.vision_cfg.timm_model_name=resnet10x: no such model of timm \(did you mean 'resnet10t'",
        ),
        (
            {"name": "vit_tiny", "text_cfg": {"heads": 5}},
            "model: open_clip cannot make it from .*must be divis",
        ),
        ({"name": "vit_tiny", "text_cfg": {"hf_model_name": "/nowhere"}}, "model: open_clip cannot make it .*nowhere"),
    ],
)
def test_wrong_models_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "model.name=.*/m.json: is not JSON: "),
        (b"\xff", "model.name=.*/m.json: is not JSON: "),
        (b"[]", "model.name=.*/m.json: the model JSON has no mapping 'vision_cfg'"),
        (b'{"vision_cfg": {}, "text_cfg": 5}', "the model JSON has no mapping 'text_cfg'"),
        (
            b'{"vision_cfg": {"layer": 2}, "text_cfg": {}}',
            r"unknown key model.name=.*/m.json: vision_cfg.layer \(did you mean 'layers'",
        ),
    ],
)
@pytest.mark.parametrize("is_started", [False, True])
def test_what_is_no_model_file_is_told(
    is_started: bool, content: bytes, message: str, tiny_json: Path, tmp_path: Path
) -> None:
    start = make_model(str(tiny_json)) if is_started else None
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_model(str(tmp_path / "m.json"), start=start)
    with pytest.raises(UserError, match=r"m.jso.json: no such file \(did you mean 'm.json'\?\)"):
        make_model(str(tmp_path / "m.jso.json"))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])  # the second has activations inside BatchNorm
def test_synchronized_batch_norm_is_the_same_model(name: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": name, "image_size": 160})
    model = make_model(path)
    picture = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    expected, names = encode_image(model, picture), list(model.state_dict())
    model = synchronize_batch_norm(model)
    assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in model.modules())
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    assert list(model.state_dict()) == names
    torch.testing.assert_close(encode_image(model, picture), expected, rtol=0, atol=0)
