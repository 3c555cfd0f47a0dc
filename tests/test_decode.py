"""Pictures of all kinds come out right; random choices follow the position alone."""

import io
import json
from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import torch
from conftest import make_augmentation, read_sample
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipmini.data.decode import (
    DECODE_ERRORS,
    Captions,
    Decoder,
    EvaluationTransform,
    caption_id,
    open_image,
)
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError

STRONG = make_augmentation(
    flip=0.5,
    rotation=10,
    translation=0.1,
    zoom=(0.8, 1.1),
    shear=5,
    color_jitter=(0.3, 0.3, 0.3, 0.1),
    color_jitter_probability=0.8,
    grayscale_probability=0.2,
)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_decoder(seed: int = 0) -> Decoder:
    return Decoder(32, STRONG, Captions.from_key("txt"), ClipTokenizer(16), seed)


def test_position_and_seed_are_all_that_counts() -> None:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    first = make_decoder()(sample_members(sample), 5)
    again = make_decoder()(sample_members(sample), 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image"], make_decoder()(sample_members(sample), 6)["image"])
    assert not torch.equal(first["image"], make_decoder(seed=1)(sample_members(sample), 5)["image"])


def sample_members(sample: dict) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if name != "__key__"}


def test_batch_fields() -> None:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    fields = make_decoder()(sample_members(sample), 0)
    assert fields["image"].dtype == torch.uint8 and fields["image"].shape == (3, 32, 32)
    assert fields["text"].dtype == torch.int64 and fields["text"].shape == (16,)
    assert fields["id"].dtype == torch.int64 and fields["id"].shape == ()


def test_equal_captions_have_equal_ids() -> None:
    assert caption_id("A  dog") == caption_id("a dog") != caption_id("a cat")


RED = (200, 30, 30)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: encode(Image.new("RGB", (40, 30), RED), "JPEG", quality=95), RED),
        (lambda: encode(Image.new("L", (40, 30), 90), "PNG"), (90, 90, 90)),
        (lambda: encode(Image.new("RGB", (40, 30), RED).quantize(4), "PNG"), RED),
        (lambda: encode(Image.new("RGBA", (40, 30), (*RED, 0)), "PNG"), (255, 255, 255)),
        (lambda: encode(Image.new("LA", (40, 30), (90, 255)), "PNG"), (90, 90, 90)),
        (lambda: encode(Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)), "PNG"), (128, 128, 128)),
        (lambda: encode(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
        (lambda: encode(Image.new("RGB", (40, 30), RED), "WEBP", lossless=True), RED),
    ],
    ids=["jpeg", "grey", "palette", "transparent", "grey with alpha", "16 bit", "cmyk", "webp"],
)
def test_kinds_of_pictures(make: Callable[[], bytes], expected: tuple[int, int, int]) -> None:
    image = open_image(make())
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 4


def test_pictures_are_turned_upright() -> None:
    image = Image.new("RGB", (40, 30), "white")
    image.paste((0, 0, 0), (0, 0, 40, 5))  # black at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = open_image(encode(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (30, 40)
    assert np.asarray(turned)[:, -2].mean() < 20  # black at the right


@pytest.mark.parametrize("data", [b"", b"not a picture", encode(Image.new("RGB", (64, 64)), "JPEG")[:300]])
def test_broken_pictures_raise_what_the_loader_catches(data: bytes) -> None:
    with pytest.raises(DECODE_ERRORS):
        make_decoder()({"jpg": data, "txt": b"a"}, 0)


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (32, 32), (20, 20)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_evaluation_transform_is_open_clips(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    ours = EvaluationTransform(32, mode)(encode(image, "PNG"))
    config = PreprocessCfg(size=32, resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = image_transform_v2(config, is_train=False)(image)
    torch.testing.assert_close(ours.float() / 255, theirs, rtol=0, atol=1e-6)
    assert open_clip.__version__.startswith("3.")


def test_captions_from_json_and_lists_with_probabilities() -> None:
    members = {"txt": b" plain ", "json": json.dumps({"name": "n", "many": ["x", "y"]}).encode()}
    captions = Captions.from_key({"txt": 0.5, "name": 0.25, "many": 0.25})
    assert captions.extensions == ("json", "txt")
    rng = np.random.default_rng(0)
    drawn = [captions.draw(members, rng) for _ in range(4000)]
    shares = {caption: drawn.count(caption) / 4000 for caption in set(drawn)}
    assert shares == pytest.approx({"plain": 0.5, "n": 0.25, "x": 0.125, "y": 0.125}, abs=0.03)


@pytest.mark.parametrize("caption", [b"", b"  \n", b"\xff\xfe\xfa"])
def test_captions_that_cannot_be_used(caption: bytes) -> None:
    with pytest.raises(DECODE_ERRORS):
        Captions.from_key("txt").draw({"txt": caption}, np.random.default_rng(0))


@pytest.mark.parametrize("value", [{}, {"name": 3}, {"name": []}, [], "text"])
def test_json_without_a_caption(value: object) -> None:
    with pytest.raises(DECODE_ERRORS):
        Captions.from_key("name").draw({"json": json.dumps(value).encode()}, np.random.default_rng(0))


@pytest.mark.parametrize("key", [{"txt": 0.5}, {"txt": 1.5, "name": -0.5}, {}])
def test_probabilities_must_add_up(key: dict) -> None:
    with pytest.raises(UserError, match="data.caption_key="):
        Captions.from_key(key)
