"""Plain open_clip loads what a run exports."""

import os
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from test_model import make_model

from clipmini.data.decode import EvaluationTransform
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.model import encode_image, encode_text


@torch.no_grad()
@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_plain_open_clip_loads_the_export(tower: str, tiny_json: Path, tmp_path: Path) -> None:
    options = {} if tower == "vit" else {"vision_cfg": {"timm_model_name": "test_resnet"}}
    model = make_model(str(tiny_json), image_size=48, **options)
    export_open_clip(model, tmp_path / "model")
    export_open_clip(model, tmp_path / "model")  # replaces the first
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
