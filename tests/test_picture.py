"""Pictures of all kinds come out right, are refused from their headers, and are the same bits everywhere."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import read_sample
from PIL import Image, ImageOps

from clipmini.data import picture as picture_module
from clipmini.data.health import Fault
from clipmini.data.picture import Picture, open_image

RED = (200, 30, 30)
MAX_PIXELS = 50_000_000


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def emoji(number: int, size: int) -> Image.Image:
    """Return a picture of the embedded sample, enlarged, over a coloured background."""
    sample = read_sample("train/noto-00000.tar", number + 1)[number]
    image = Image.open(io.BytesIO(sample["webp"])).convert("RGB")
    return image.resize((size, size * 3 // 4), Image.Resampling.BICUBIC)


def crop_all(data: bytes, size: int = 32, draft: str = "off") -> torch.Tensor:
    picture = Picture(data, max_pixels=MAX_PIXELS)
    return picture.crop((0, 0, picture.width, picture.height), size, draft=draft)  # type: ignore[arg-type]


KINDS = {
    "jpeg": (lambda: encode(Image.new("RGB", (40, 30), RED), "JPEG", quality=95), RED),
    "grey jpeg": (lambda: encode(Image.new("L", (40, 30), 90), "JPEG", quality=95), (90, 90, 90)),
    "progressive": (lambda: encode(Image.new("RGB", (40, 30), RED), "JPEG", quality=95, progressive=True), RED),
    "cmyk jpeg": (lambda: encode(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "grey": (lambda: encode(Image.new("L", (40, 30), 90), "PNG"), (90, 90, 90)),
    "one bit": (lambda: encode(Image.new("1", (40, 30), 1), "PNG"), (255, 255, 255)),
    "palette": (lambda: encode(Image.new("RGB", (40, 30), RED).quantize(4), "PNG"), RED),
    "palette with a transparent colour": (
        lambda: encode(Image.new("RGB", (40, 30), RED).quantize(4), "PNG", transparency=0),
        (255, 255, 255),
    ),
    "transparent": (lambda: encode(Image.new("RGBA", (40, 30), (*RED, 0)), "PNG"), (255, 255, 255)),
    "half transparent": (lambda: encode(Image.new("RGBA", (40, 30), (0, 0, 0, 128)), "PNG"), (127, 127, 127)),
    "grey with alpha": (lambda: encode(Image.new("LA", (40, 30), (90, 255)), "PNG"), (90, 90, 90)),
    "16 bit": (lambda: encode(Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)), "PNG"), (128, 128, 128)),
    "webp": (lambda: encode(Image.new("RGB", (40, 30), RED), "WEBP", lossless=True), RED),
    "transparent webp": (lambda: encode(Image.new("RGBA", (40, 30), (*RED, 0)), "WEBP"), (255, 255, 255)),
}


@pytest.mark.parametrize(("make", "expected"), KINDS.values(), ids=KINDS)
def test_kinds_of_pictures(make: Callable[[], bytes], expected: tuple[int, int, int]) -> None:
    image = open_image(make())
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 4
    cropped = crop_all(make())
    assert cropped.dtype == torch.uint8 and cropped.shape == (3, 32, 32)
    assert (cropped.permute(1, 2, 0).int() - torch.tensor(expected)).abs().max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_the_crop_as_it_turns_the_picture(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(emoji(3, 160), format, exif=exif, **({"quality": 95} if format != "PNG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert open_image(data).tobytes() == upright.tobytes()
    picture = Picture(data, max_pixels=MAX_PIXELS)
    assert (picture.width, picture.height) == upright.size
    box = (13, 7, 13 + 61, 7 + 83)
    expected = crop_all(encode(upright.crop(box), "PNG"), 48)
    # A turned picture is resized before it is turned: the same filter, to two roundings.
    assert (picture.crop(box, 48, draft="off").int() - expected.int()).abs().max() <= 2


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encode(emoji(0, 64), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert crop_all(data).shape == (3, 32, 32)


def test_crop_is_pillows_bicubic_to_two_roundings() -> None:
    image = emoji(5, 400)
    picture = Picture(encode(image, "PNG"), max_pixels=MAX_PIXELS)
    for box in ((0, 0, 400, 300), (17, 40, 391, 285), (100, 100, 110, 120), (30, 2, 254, 226)):
        expected = np.asarray(image.crop(box).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(picture.crop(box, 224, draft="off").permute(1, 2, 0).int().numpy() - expected)
        assert difference.max() <= 2 and (difference > 1).mean() < 1e-3


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of which there is only the header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000)])
def test_too_many_pixels_are_refused_from_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(Fault) as caught:
        Picture(png_header(*size), max_pixels=MAX_PIXELS)
    assert caught.value.cause == "too_many_pixels"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        encode(Image.new("RGB", (64, 64)), "JPEG")[:300],
        encode(Image.effect_noise((64, 64), 90), "JPEG")[:-600],
        encode(Image.effect_noise((64, 64), 90), "PNG")[:-600],
        encode(Image.effect_noise((64, 64), 90).convert("RGB"), "WEBP")[:-600],
        encode(Image.new("RGB", (64, 64)), "GIF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=["empty", "text", "jpeg header", "cut jpeg", "cut png", "cut webp", "gif", "eps"],
)
def test_what_cannot_be_decoded_is_a_fault(data: bytes) -> None:
    for function in (crop_all, open_image):
        with pytest.raises(Fault) as caught:
            function(data)
        assert caught.value.cause == "picture" and "0x" not in caught.value.detail


def test_a_jpeg_of_a_thousand_scans_is_not_decoded() -> None:
    data = encode(emoji(0, 64), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    end = data.rindex(b"\xff\xd9")
    with pytest.raises(Fault, match="1010 scans"):
        crop_all(data[:end] + data[scan:end] * 1000 + data[end:])
    assert crop_all(data).shape == (3, 32, 32)


def large_jpeg(size: int) -> bytes:
    return encode(emoji(7, size), "JPEG", quality=95)


@pytest.mark.parametrize(
    ("size", "box", "divisor"),
    [
        (1024, (0, 0, 1024, 768), 2),  # 768 / 2 = 384 >= 1.5 x 224, 768 / 4 is not
        (1024, (0, 0, 400, 400), 1),  # 400 / 2 < 336
        (1400, (10, 20, 1390, 1000), 2),
        (2800, (0, 0, 2800, 2100), 4),
    ],
)
def test_draft_only_where_enough_pixels_are_left(size: int, box: tuple[int, int, int, int], divisor: int) -> None:
    picture = Picture(large_jpeg(size), max_pixels=MAX_PIXELS)
    assert picture.choose_divisor(box[2] - box[0], box[3] - box[1], 224) == divisor
    full, draft = picture.crop(box, 224, draft="off"), Picture(picture.data, max_pixels=MAX_PIXELS)
    drafted = draft.crop(box, 224, draft="auto")
    error = (full.float() - drafted.float()).square().mean()
    assert (error == 0) == (divisor == 1)
    assert 10 * torch.log10(255**2 / error) > 35  # dB


def test_png_is_never_drafted() -> None:
    data = encode(emoji(7, 1024), "PNG")
    assert torch.equal(crop_all(data, 64, "auto"), crop_all(data, 64, "off"))


@pytest.mark.parametrize("draft", ["off", "auto"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_simplejpeg_gives_the_bits_of_pillow(options: dict, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    for mode in ("RGB", "L"):
        for size in (200, 333, 1024):
            data = encode(emoji(2, size).convert(mode), "JPEG", **options)
            fast = crop_all(data, 64, draft)
            with monkeypatch.context() as without:
                without.setattr(picture_module, "simplejpeg", None)
                assert torch.equal(crop_all(data, 64, draft), fast), (mode, size)


def test_what_simplejpeg_rejects_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    data = bytearray(encode(emoji(2, 200), "JPEG"))
    data[-400:-390] = b"\xff\x00" * 5  # noise in the last rows: libjpeg warns, and goes on
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(bytes(data), "RGB")
    found = crop_all(bytes(data), 64)
    monkeypatch.setattr(picture_module, "simplejpeg", None)
    assert torch.equal(crop_all(bytes(data), 64), found)


BITS = """
import hashlib, sys, torch
from clipmini.data.picture import Picture
torch.set_num_threads(int(sys.argv[1]))
picture, digest = Picture(sys.stdin.buffer.read(), max_pixels=10**8), hashlib.sha256()
for box in ((0, 0, 400, 300), (17, 40, 391, 285), (100, 100, 110, 120)):
    digest.update(picture.crop(box, 224, draft="off").numpy().tobytes())
print(digest.hexdigest()[:16])
"""


def test_the_same_bits_on_processors_with_and_without_vectors() -> None:
    found = set()
    for capability, threads in (("default", "1"), ("avx2", "1"), ("avx512", "2")):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", BITS, threads]
        result = subprocess.run(command, env=environment, input=large_jpeg(400), capture_output=True)
        assert result.returncode == 0, result.stderr
        found.add(result.stdout.strip())
    assert len(found) == 1 and len(found.pop()) == 16
