"""An export is open_clip's or transformers' own model with the same features, or it is not there."""

import io
import json
import os
import re
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from conftest import read_sample
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from test_model import make_model, write_json

from clipmini.errors import UserError
from clipmini.export import command, hugging_face, parity
from clipmini.export.inputs import encode, make_inputs
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.model import Model


def run_export(model: Model, format: str, output: Path, **changes: Any) -> None:
    options = {"name": "tiny", "config": None, "results": [], "command": "clipmini export model=tiny"}
    command.export(model, format=format, output=output, **{**options, **changes})


@pytest.fixture
def no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the fresh process, for what is not about it."""
    monkeypatch.setattr(command, "check_parity", lambda *_: {"image": 0.0, "text": 0.0})


@torch.no_grad()
def test_open_clip(tiny_json: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(str(tiny_json), init_bias=-10.0).to(torch.float64).train()
    before = deepcopy(model.state_dict())
    with caplog.at_level("INFO", "clipmini"):
        run_export(model, "open_clip", tmp_path / "new/out", license="mit")
    # What is left is how sums are rounded: the blocks of a run compute less than open_clip's.
    (image, text) = re.findall(r"parity: image (\S+), text (\S+) \(limit 1e-04\)", caplog.text)[0]
    assert float(image) < 1e-6 and float(text) < 1e-6
    assert model.training and all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    assert os.listdir(tmp_path / "new") == ["out"]
    names = ["README.md", "clipmini_export.json", "open_clip_config.json", "open_clip_model.safetensors"]
    assert sorted(os.listdir(tmp_path / "new/out")) == names
    assert len({(tmp_path / "new/out" / name).stat().st_mode for name in names}) == 1
    assert "license: mit" in (tmp_path / "new/out/README.md").read_text()
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'new/out'}")
    inputs = make_inputs(model)
    torch.testing.assert_close(encode(loaded.eval(), inputs), encode(model.float().eval(), inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.logit_bias, model.logit_bias)


def test_inputs_are_of_all_lengths(tiny_json: Path) -> None:
    inputs = make_inputs(make_model(str(tiny_json)))
    assert inputs["image"].shape == (4, 3, 32, 32)
    assert (inputs["text"] != 0).sum(dim=1).tolist() == [2, 4, 13, 24]


@torch.no_grad()
def test_hugging_face(tiny_json: Path, tmp_path: Path) -> None:
    model = make_model(str(tiny_json))
    run_export(model, "hf", tmp_path / "out")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")
    samples = read_sample("train/noto-00000.tar", 6)
    # Not square, and larger than the model: resizing and cropping must be the same.
    pictures = [Image.open(io.BytesIO(sample["webp"])).convert("RGB").resize((70, 55)) for sample in samples]
    captions = [sample["txt"].decode() for sample in samples] + ["", "Two CATS, on a mat!", "kite " * 50]
    inputs = processor(text=captions, images=pictures, padding=True, truncation=True, return_tensors="pt")
    found = theirs(**inputs)

    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    image = torch.stack([transform(picture) for picture in pictures])
    text = open_clip.tokenizer.SimpleTokenizer(context_length=24)(captions)
    features = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
    # Its image processor resizes tensors and open_clip Pillow's images: seen 2 levels of 255, 6e-5 in the features.
    torch.testing.assert_close(found.image_embeds, features[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.text_embeds, features[1], rtol=0, atol=1e-5)
    same = theirs(input_ids=inputs["input_ids"], pixel_values=image)
    torch.testing.assert_close(same.image_embeds, features[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(same.logits_per_image, 14 * features[0] @ features[1].T, rtol=0, atol=1e-4)
    alone = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert alone(captions, truncation=True)["input_ids"] == processor.tokenizer(captions, truncation=True)["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"quick_gelu": True},
        {"custom_text": True, "nonscalar_logit_scale": True},
        {
            "vision_cfg": {"layers": 2, "mlp_ratio": 3.0, "head_width": 8, "patch_size": 8},
            "text_cfg": {"layers": 3, "heads": 4, "width": 64, "context_length": 11, "vocab_size": 49410},
            "embed_dim": 16,
        },
        {
            "vision_cfg": {"norm_kwargs": {"eps": 0.1}, "act_kwargs": {"approximate": "tanh"}},
            "text_cfg": {"norm_kwargs": {"eps": 0.01}, "pool_type": "eos", "eos_id": 49407},
        },
    ],
    ids=["quick_gelu", "custom_text", "sizes", "norms"],
)
def test_hugging_face_architectures(changes: dict, tmp_path: Path) -> None:
    path = Path(write_json(tmp_path / "m.json"))
    model = make_changed(path, changes)
    for parameter in model.parameters():  # at the start biases are 0 and attention is even: much could be mixed up
        parameter.add_(torch.randn_like(parameter) * 0.3)
    hugging_face.check_architecture(model)
    hugging_face.write_clip_model(model, tmp_path / "out")
    inputs = make_inputs(model)
    image, text = parity.encode_hugging_face(tmp_path / "out", inputs["image"], inputs["text"])
    normalize = torch.nn.functional.normalize
    found = {"image": normalize(image, dim=-1), "text": normalize(text, dim=-1)}
    torch.testing.assert_close(found, encode(model, inputs), rtol=0, atol=1e-5)


def make_changed(path: Path, changes: dict[str, Any]) -> Model:
    """Make the tiny model of a file with changes of any field of its JSON."""
    tiny = json.loads(path.read_text())
    merged = {key: {**tiny[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    path.write_text(json.dumps({**tiny, **merged}))
    return make_model(str(path))


@pytest.mark.parametrize(
    ("changes", "lack"),
    [
        ({"vision_cfg": {"timm_model_name": "test_resnet"}}, r"timm tower \(test_resnet\); use format=open_clip or"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8}}, r"residual network \(vision_cfg.layers=\[1, 1, 1, 1\]"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, r"layer scale \(vision_cfg.ls_init_value\)"),
        ({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}}, "vision_cfg.attentional_pool"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type=avg"),
        ({"vision_cfg": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre"),
        ({"vision_cfg": {"image_size": [32, 48]}}, "not square"),
        ({"vision_cfg": {"norm_kwargs": {"bias": False}}}, "vision_cfg.norm_kwargs"),
        ({"text_cfg": {"no_causal_mask": True}}, "text_cfg.no_causal_mask"),
        ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type=last"),
        ({"text_cfg": {"pool_type": "eos"}}, "text_cfg.eos_id=2"),
        ({"text_cfg": {"proj_bias": True}}, "text_cfg.proj_type, proj_bias"),
        ({"text_cfg": {"proj_type": "none"}}, "text_cfg.proj_type, proj_bias"),
        ({"text_cfg": {"qk_norm": True}}, "text_cfg.block_type, qk_norm"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "text_cfg.hf_tokenizer_name, tokenizer_kwargs"),
        ({"text_cfg": {"embed_cls": True}, "custom_text": True}, "text_cfg.embed_cls"),
        (
            {"vision_cfg": {"no_ln_pre": True}, "text_cfg": {"pool_type": "first"}},
            r"vision_cfg.no_ln_pre\), no pooling of captions .*pool_type=first\); use format",
        ),
    ],
)
def test_what_clip_model_lacks(changes: dict, lack: str, tmp_path: Path) -> None:
    model = make_changed(Path(write_json(tmp_path / "m.json")), changes)
    with pytest.raises(UserError, match=f"format=hf: transformers' CLIPModel has no .*{lack}"):
        run_export(model, "hf", tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.json"]


def test_clip_model_has_no_bias_and_no_padding(tiny_json: Path, tmp_path: Path) -> None:
    model = make_model(str(tiny_json), init_bias=-10.0)
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, "resize_mode": "longest"}
    with pytest.raises(
        UserError, match=r"no bias of similarities \(loss.init_bias\), no padding .*resize_mode=longest"
    ):
        run_export(model, "hf", tmp_path / "out")


def test_squashed_pictures(tiny_json: Path) -> None:
    preprocess = make_model(str(tiny_json)).visual.preprocess_cfg
    changes = {"resize_mode": "squash", "interpolation": "bilinear"}
    config = hugging_face.make_preprocessor_config({**preprocess, **changes}, 32)
    processor = transformers.CLIPImageProcessor(**config)
    picture = Image.effect_noise((50, 90), 90).convert("RGB")
    found = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    expected = image_transform_v2(PreprocessCfg(**{**preprocess, **changes}), is_train=False)(picture)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # a level of 255 is 0.015


def test_other_features_leave_nothing(tiny_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def write_scaled(model: Model, directory: Path) -> None:
        model = deepcopy(model)
        model.visual.class_embedding.mul_(1.01)
        export_open_clip(model, directory)

    changed = replace(command.FORMATS["open_clip"], write=write_scaled)
    monkeypatch.setitem(command.FORMATS, "open_clip", changed)
    with pytest.raises(UserError, match=r"other features.*parity: image \d\.\de-0[1-4], text 0.0e\+00 \(limit 1e-04\)"):
        run_export(make_model(str(tiny_json)), "open_clip", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_export_that_does_not_load(
    tiny_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_parity: None
) -> None:
    model = make_model(str(tiny_json))
    run_export(model, "open_clip", tmp_path / "out")
    older = (tmp_path / "out/clipmini_export.json").stat().st_ino

    def write_half(model: Model, directory: Path) -> None:
        export_open_clip(model, directory)
        os.truncate(directory / "open_clip_model.safetensors", 1000)

    monkeypatch.setitem(command.FORMATS, "open_clip", replace(command.FORMATS["open_clip"], write=write_half))
    monkeypatch.setattr(command, "check_parity", parity.check_parity)
    with pytest.raises(UserError, match="cannot be loaded in a fresh process: .*[Ss]afetensor"):
        run_export(model, "open_clip", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/clipmini_export.json").stat().st_ino == older


def test_no_numbers_and_other_shapes_differ() -> None:
    a = torch.ones(2, 3)
    assert parity.difference(a, a) == 0
    assert parity.difference(a, a[:1]) == float("inf")
    assert parity.difference(a, torch.tensor([[1.0, 1, 1], [1, float("nan"), 1]])) == float("inf")


def test_an_older_export_is_replaced_as_a_whole(tiny_json: Path, tmp_path: Path, no_parity: None) -> None:
    model = make_model(str(tiny_json))
    run_export(model, "hf", tmp_path / "out")
    assert (tmp_path / "out/vocab.json").exists()
    (tmp_path / "link").symlink_to("out")
    run_export(model, "open_clip", tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["link", "out"] and (tmp_path / "link").is_symlink()
    assert not (tmp_path / "out/vocab.json").exists()
    (tmp_path / "empty").mkdir()
    run_export(model, "open_clip", tmp_path / "empty")


def test_nothing_else_is_replaced(tiny_json: Path, tmp_path: Path, no_parity: None) -> None:
    model = make_model(str(tiny_json))
    run_export(model, "open_clip", tmp_path / "out")
    (tmp_path / "out/notes/mine.txt").parent.mkdir()
    (tmp_path / "out/notes/mine.txt").write_text("mine")
    export_open_clip(model, tmp_path / "model")
    (tmp_path / "file").touch()
    for name, message in (
        ("out", r"no export wrote \(notes/mine.txt\)"),
        ("model", r"\(open_clip_config.json, open_clip_model.safetensors\); give a directory that is new"),
        ("file", "is a file"),
        ("file/out", "cannot be written"),
    ):
        with pytest.raises(UserError, match=f"output=.*{message}"):
            run_export(model, "open_clip", tmp_path / name)
    assert (tmp_path / "out/notes/mine.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "model", "out"]


def test_the_older_export_stays_where_renaming_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError):
        command.replace(tmp_path / "out", tmp_path / "work")
    assert os.listdir(tmp_path / "out") == ["old"]


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("hf", "transformers", "hf"), ("onnx", "onnxscript", "onnx"), ("onnx", "onnxruntime", "onnx")],
)
def test_missing_packages(
    format: str, package: str, extra: str, tiny_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"format={format} needs {package}: pip install 'clipmini\[{extra}\]'"):
        run_export(make_model(str(tiny_json)), format, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_unknown_format(tiny_json: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"format=onx: no such format \(did you mean 'onnx'\?\); there are: open_clip, hf"
    ):
        run_export(make_model(str(tiny_json)), "onx", tmp_path / "out")
