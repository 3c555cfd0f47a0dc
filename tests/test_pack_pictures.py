"""Pictures that are packed: kept as they are, made smaller, or given another format, and each kind right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import decode, difference, encode, pack_one, read_rejected, run_pack, write_folder
from PIL import Image, ImageOps


@pytest.mark.parametrize(
    ("extension", "format", "packed"), [("jpeg", "JPEG", "jpg"), ("png", "PNG", "png"), ("webp", "WEBP", "webp")]
)
def test_bytes_stay_where_nothing_has_to_change(
    extension: str, format: str, packed: str, image: Image.Image, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, format, exif=exif, icc_profile=b"a profile")
    nothing_to_do: list[dict[str, Any]] = [{}, {"resize": 48}, {"format": packed}, {"format": packed, "resize": 500}]
    for number, options in enumerate(nothing_to_do):
        assert pack_one(tmp_path / str(number), data, extension, **options) == (packed, data)


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_pictures_are_resized_and_encoded_again(format: str, image: Image.Image, tmp_path: Path) -> None:
    expected = image.resize((30, 24), Image.Resampling.LANCZOS)
    encoded = encode(expected, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[format], quality=90)
    assert pack_one(tmp_path, encode(image, "PNG"), "png", resize=24, format=format) == (format, encoded)


def test_a_format_keeps_the_size(image: Image.Image, tmp_path: Path) -> None:
    extension, data = pack_one(tmp_path, encode(image), "jpg", format="png")
    assert extension == "png" and difference(decode(data), decode(encode(image))) == 0


def test_a_resized_picture_keeps_its_own_format(image: Image.Image, tmp_path: Path) -> None:
    extension, data = pack_one(tmp_path, encode(image, "WEBP"), "webp", resize=24)
    assert extension == "webp" and decode(data).format == "WEBP"


def test_quality_is_used(image: Image.Image, tmp_path: Path) -> None:
    sizes = []
    for quality in (20, 90):
        _, data = pack_one(tmp_path / str(quality), encode(image, "PNG"), "png", format="jpg", quality=quality)
        assert data == encode(image, quality=quality)
        sizes.append(len(data))
    assert sizes[0] < sizes[1]


def test_a_large_jpeg_is_resized_to_the_exact_size(image: Image.Image, tmp_path: Path) -> None:
    large = image.resize((1001, 667), Image.Resampling.BICUBIC)  # decoded at a quarter: 251 x 167
    _, data = pack_one(tmp_path, encode(large), "jpg", resize=80, format="png")
    assert decode(data).size == (120, 80)
    assert difference(decode(data), large.resize((120, 80), Image.Resampling.LANCZOS)) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_comes_out_upright(orientation: int, image: Image.Image, tmp_path: Path) -> None:
    turns = [None, *"FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()]
    turn = turns[orientation - 1]
    stored = image if turn is None else image.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "JPEG", quality=95, exif=exif, subsampling=0)
    _, result = pack_one(tmp_path, data, "jpg", resize=24, format="png")
    assert not decode(result).getexif()
    assert difference(decode(result), image.resize((30, 24), Image.Resampling.LANCZOS)) < 4


def test_the_colour_profile_goes_with_a_new_encoding(image: Image.Image, tmp_path: Path) -> None:
    for format in ("jpg", "png", "webp"):
        data = encode(image, "PNG", icc_profile=b"a profile")
        _, result = pack_one(tmp_path / format, data, "png", format=format, resize=24)
        assert "icc_profile" not in decode(result).info


@pytest.mark.parametrize("kind", "grey LA 16_bit two_colours palette CMYK several_pictures".split())
def test_pictures_of_any_mode_keep_their_colours(kind: str, image: Image.Image, tmp_path: Path) -> None:
    grey = image.convert("L")
    expected, format, picture = {
        "grey": (grey, "JPEG", grey),
        "LA": (grey, "PNG", grey.convert("LA")),
        "16_bit": (grey, "PNG", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        "two_colours": (grey.convert("1"), "PNG", grey.convert("1")),
        "palette": (image.quantize(200), "PNG", image.quantize(200)),
        "CMYK": (image, "JPEG", image.convert("CMYK")),
        "several_pictures": (image, "MPO", image),
    }[kind]
    more = {"save_all": True, "append_images": [ImageOps.invert(image)]} if format == "MPO" else {}
    data = encode(picture, format, **({} if format == "PNG" else {"quality": 95}), **more)
    _, result = pack_one(tmp_path, data, {"JPEG": "jpg", "PNG": "png", "MPO": "jpg"}[format], resize=24, format="png")
    assert decode(result).mode == ("RGBA" if kind == "LA" else "RGB")
    assert difference(decode(result), expected.convert("RGB").resize((30, 24), Image.Resampling.LANCZOS)) < 3


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_white_shines_through_where_a_format_has_no_transparency(
    mode: str, format: str, image: Image.Image, tmp_path: Path
) -> None:
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, 30, 48))
    picture = image.copy()
    picture.putalpha(mask)
    if mode == "P":
        picture = picture.quantize(100)
    _, data = pack_one(tmp_path, encode(picture, "PNG"), "png", format=format, resize=24, quality=100)
    result = decode(data)
    assert result.mode == ("RGB" if format == "jpg" else "RGBA")
    if format != "jpg":
        assert result.getchannel("A").getpixel((5, 12)) == 0 and result.getchannel("A").getpixel((25, 12)) == 255
    else:
        assert np.asarray(result)[12, 5].min() > 245
    expected = image.resize((30, 24), Image.Resampling.LANCZOS).crop((18, 0, 30, 24))
    assert difference(result.crop((18, 0, 30, 24)), expected) < 8


def test_a_picture_that_the_format_cannot_hold_is_left_out(image: Image.Image, tmp_path: Path) -> None:
    wide = {"__key__": "wide", "png": encode(Image.new("RGB", (16_384, 1)), "PNG"), "txt": b"wide"}
    source = write_folder(tmp_path / "source", [wide, {"__key__": "a", "jpg": encode(image), "txt": b"a"}])
    run_pack(source, tmp_path / "output", format="webp")
    ((name, cause, detail),) = read_rejected(tmp_path / "output")
    assert (name, cause) == ("wide.png", "picture") and "16383" in detail
