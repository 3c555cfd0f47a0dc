"""The ONNX towers run in onnxruntime, with any batch and with the features of the model."""

import json
from pathlib import Path

import onnxruntime
import open_clip
import pytest
import torch
import transformers
from conftest import TINY
from test_export import make_changed, run_export
from test_model import make_model, write_json
from torch import Tensor, nn

from clipmini.data.tokenizer import create_tokenizer
from clipmini.errors import UserError
from clipmini.export.onnx_towers import ImageTower, TextTower, write_tower
from clipmini.model import Model, image_size


@torch.no_grad()
def compare(model: Model, name: str, inputs: Tensor, directory: Path) -> None:
    """Compare the features of an ONNX file with the model's own, for 1 and 5 inputs."""
    encode = {"image": model.encode_image, "text": model.encode_text}[name]
    session = onnxruntime.InferenceSession(directory / f"{name}.onnx", providers=["CPUExecutionProvider"])
    for part in (inputs[:1], inputs[:5]):
        (found,) = session.run([f"{name}_features"], {name: part.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), encode(part, normalize=True), rtol=0, atol=2e-6)


@torch.no_grad()
def test_export(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**TINY, "custom_text": True}))
    model = make_model(str(path), init_bias=-10.0)
    model.set_grad_checkpointing()
    run_export(model, "onnx", tmp_path / "out")
    names = ["README.md", "clipmini_export.json", "clipmini_onnx.json", "image.onnx", "text.onnx"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names

    tokenize = create_tokenizer(model.architecture)
    text = tokenize(["a dog", "", "a cat on a mat", "kite " * 50, "!"])
    compare(model, "image", torch.randn(5, 3, 32, 32), tmp_path / "out")
    compare(model, "text", text, tmp_path / "out")
    facts = json.loads((tmp_path / "out/clipmini_onnx.json").read_text())
    assert facts["logit_scale"] == pytest.approx(14.0) and facts["logit_bias"] == -10.0
    assert facts["image"]["size"] == 32 and facts["image"]["mean"] == pytest.approx(model.visual.image_mean)
    assert facts["text"]["context_length"] == 24 and facts["text"]["end_token"] == int(text.max())
    # torch writes down where each line of code lies on the disk of whoever exports.
    for name in ("image.onnx", "text.onnx"):
        content = (tmp_path / "out" / name).read_bytes()
        assert str(Path(open_clip.__file__).parent).encode() not in content and b".py" not in content


@pytest.mark.parametrize(
    "vision_cfg",
    [
        {"timm_model_name": "test_resnet", "image_size": 48},
        {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64},
    ],
    ids=["timm_resnet", "modified_resnet"],
)
def test_image_towers(vision_cfg: dict, tmp_path: Path) -> None:
    model = make_changed(Path(write_json(tmp_path / "m.json")), {"vision_cfg": vision_cfg})
    size = image_size(model)
    write_tower(ImageTower(model), "image", torch.zeros(2, 3, size, size), tmp_path)
    compare(model, "image", torch.randn(5, 3, size, size), tmp_path)


def test_hugging_face_text_tower(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.save_pretrained(tmp_path)
    text_cfg = {"hf_model_name": str(tmp_path), "hf_pooler_type": "mean_pooler"}
    model = make_changed(Path(write_json(tmp_path / "m.json")), {"text_cfg": text_cfg})
    text = torch.randint(1, 40, (5, 24))
    text[:, 9:] = config.pad_token_id  # masked
    write_tower(TextTower(model), "text", text[:2], tmp_path)
    compare(model, "text", text, tmp_path)


def test_a_tower_that_cannot_be_translated(tmp_path: Path) -> None:
    class Undecided(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image if image.sum() > 0 else -image

    with pytest.raises(
        UserError, match="format=onnx: torch.onnx cannot translate the image tower: .*[Dd]ata-dependent"
    ):
        write_tower(Undecided(), "image", torch.zeros(2, 3), tmp_path)
    assert list(tmp_path.iterdir()) == []
