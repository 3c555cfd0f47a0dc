"""Near-duplicates: changed pictures of every kind are found, drawings of the same thing in another style are not."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import read_sample
from PIL import Image

from clipmini.shards import duplicates
from clipmini.shards.duplicates import Known, Threshold, find_duplicates, find_nearby
from clipmini.shards.signature import VIEWS, Signatures, sign, squeeze

THRESHOLD = Threshold(max_distance=12, min_correlation=0.965)  # those of conf/commands/leaks.yaml
TRAIN = [f"{style}-0000{number}.tar" for style in ("noto", "fluent") for number in range(4)]
EVAL = "wds_twemoji/test/0.tar"


def cut(image: Image.Image, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom)))
    )


def scale(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


# What is done to a picture, the quality of the JPEG then, and the share that must be found; beside it what was measured
# on 300 pictures of the sample.
KINDS: dict[str, tuple[Callable[[Image.Image], Image.Image], int, float]] = {
    "quality 60": (lambda image: image, 60, 1.0),  # 1.000
    "quality 30": (lambda image: image, 30, 0.97),  # 0.997
    "half the size": (lambda image: scale(image, 0.5), 90, 1.0),  # 1.000
    "three quarters of the size": (lambda image: scale(image, 0.75), 90, 1.0),  # 1.000
    "5 % off every edge": (lambda image: cut(image, 0.05, 0.05, 0.05, 0.05), 90, 1.0),  # 1.000
    "2.5 % off every edge": (lambda image: cut(image, 0.025, 0.025, 0.025, 0.025), 90, 0.97),  # 0.997
    "5 % off the left": (lambda image: cut(image, left=0.05), 90, 1.0),  # 1.000
    "5 % off two edges": (lambda image: cut(image, top=0.05, right=0.05), 90, 1.0),  # 1.000
    "all of it": (lambda image: scale(cut(image, 0.05, 0.05, 0.05, 0.05), 0.5), 60, 0.92),  # 0.983
}


def change(data: bytes, kind: str) -> bytes:
    action, quality, _ = KINDS[kind]
    buffer = io.BytesIO()
    action(Image.open(io.BytesIO(data)).convert("RGB")).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sign_all(pictures: Sequence[bytes]) -> Signatures:
    return sign(torch.stack([squeeze(data, 10**8) for data in pictures]))


def as_known(signatures: Signatures) -> Known:
    return Known(np.arange(len(signatures.bits)), signatures.bits, signatures.thumbnails)


@pytest.fixture(scope="module")
def training() -> list[bytes]:
    """Every fourth picture of the sample's training part."""
    return [sample["webp"] for name in TRAIN for sample in read_sample(f"train/{name}", 10**6)[::4]]


@pytest.fixture(scope="module")
def signed(training: list[bytes]) -> Signatures:
    return sign_all(training)


def test_bits_are_those_of_a_dct_written_out(training: list[bytes]) -> None:
    """Against sums in float64, for a whole picture and for one that is cropped to whole pixels."""
    pixels = squeeze(training[7], 10**8)
    grey = np.einsum("chw,c->hw", pixels.numpy().astype(np.float64), (0.299, 0.587, 0.114))
    found = np.unpackbits(sign(pixels[None]).bits[0, 0]).reshape(8, 8)
    values = np.empty((8, 8))
    for u in range(8):
        for v in range(8):
            values[u, v] = sum(
                grey[y, x] * math.cos(math.pi * u * (2 * y + 1) / 128) * math.cos(math.pi * v * (2 * x + 1) / 128)
                for y in range(64)
                for x in range(64)
            )
    median = np.median(values.ravel()[1:])
    is_sure = np.abs(values - median) > 1e-6 * np.abs(values).max()
    assert is_sure.sum() == 63  # the median itself is one of them
    assert np.array_equal(found[is_sure], (values > median)[is_sure]) and 31 <= found.sum() <= 32


def test_a_view_is_what_the_whole_of_a_cropped_picture_is() -> None:
    """But for what is next to the median: 5 % of 320 pixels are 16, so both see the same pixels."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9, generator=generator), (320, 320), mode="bicubic")
    image = Image.fromarray((smooth[0] * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy())
    for number, (rows, columns) in enumerate(VIEWS):
        box = [round(320 * edge) for edge in (columns[0], rows[0], columns[1], rows[1])]
        buffers = [io.BytesIO(), io.BytesIO()]
        for buffer, picture in zip(buffers, (image, image.crop(tuple(box))), strict=True):
            picture.save(buffer, "PNG")
        signatures = sign_all([buffer.getvalue() for buffer in buffers])
        differ = np.unpackbits(signatures.bits[0, number] ^ signatures.bits[1, 0]).sum()
        levels = np.abs(signatures.thumbnails[0, number].astype(int) - signatures.thumbnails[1, 0]).max()
        assert differ <= 2 and levels <= 2, VIEWS[number]
        assert number == 0 or not np.array_equal(signatures.thumbnails[0, 0], signatures.thumbnails[1, 0])


def test_a_large_jpeg_has_the_signature_of_the_small_one(training: list[bytes]) -> None:
    """Decoding at a part of the size changes nothing that counts."""
    image = Image.open(io.BytesIO(training[3])).convert("RGB")
    buffers = [io.BytesIO() for _ in range(2)]
    image.resize((1024, 1024), Image.Resampling.BICUBIC).save(buffers[0], "JPEG", quality=95)
    image.save(buffers[1], "PNG")
    large, small = sign_all([buffer.getvalue() for buffer in buffers]).bits[:, 0]
    assert np.unpackbits(large ^ small).sum() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_changed_pictures_are_found(kind: str, training: list[bytes], signed: Signatures) -> None:
    chosen = list(range(0, len(training), len(training) // 60))
    changed = sign_all([change(training[number], kind) for number in chosen])
    for known, others, is_known in ((as_known(changed), signed, True), (as_known(signed), changed, False)):
        matches = list(find_duplicates(others, known, THRESHOLD))  # whichever of both was changed
        places = {(match.row, match.column) if is_known else (match.column, match.row) for match in matches}
        found = sum((number, place) in places for place, number in enumerate(chosen))
        assert found >= KINDS[kind][2] * len(chosen), kind


def test_little_else_is_found(training: list[bytes], signed: Signatures) -> None:
    """The same emoji in another style is no duplicate. Of all training pictures it is 7 of 1,610, 0.43 %."""
    other = sign_all([sample["webp"] for sample in read_sample(EVAL, 1610)])
    matches = list(find_duplicates(signed, as_known(other), THRESHOLD))
    assert len({match.column for match in matches}) <= 0.01 * 1610
    # It is the thumbnails that tell them apart: by the bits alone many are alike.
    by_bits = find_duplicates(signed, as_known(other), Threshold(THRESHOLD.max_distance, -1.0))
    assert len({match.column for match in by_bits}) > 0.1 * 1610


def test_chunks_find_what_all_pairs_show(signed: Signatures, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Signatures(*(array[:150] for array in (signed.bits, signed.thumbnails, signed.is_plain)))
    known = as_known(Signatures(*(array[60:200] for array in (signed.bits, signed.thumbnails, signed.is_plain))))
    threshold = Threshold(20, 0.8)
    expected: dict[tuple[int, int], tuple[float, int]] = {}
    for row in range(150):
        for column in range(140):
            for one, other in [(0, view) for view in range(len(VIEWS))] + [(view, 0) for view in range(1, len(VIEWS))]:
                distance = int(np.unpackbits(part.bits[row, one] ^ known.bits[column, other]).sum())
                if distance <= threshold.max_distance:
                    both = [
                        pixels.astype(np.float64) - pixels.mean((1, 2), keepdims=True)
                        for pixels in (part.thumbnails[row, one], known.thumbnails[column, other])
                    ]
                    correlation = (both[0] * both[1]).sum() / np.sqrt((both[0] ** 2).sum() * (both[1] ** 2).sum())
                    if correlation >= threshold.min_correlation:
                        found = (correlation, -distance)
                        expected[row, column] = max(expected.get((row, column), found), found)
    assert len(expected) > 100 and all((60 + number, number) in expected for number in range(90))
    for chunk, confirmed in ((512, 4096), (7, 5)):
        monkeypatch.setattr(duplicates, "CHUNK", chunk)
        monkeypatch.setattr(duplicates, "CONFIRMED", confirmed)
        matches = {match[:2]: match for match in find_duplicates(part, known, threshold)}
        assert matches.keys() == expected.keys()
        for place, (correlation, distance) in expected.items():
            assert matches[place].correlation == pytest.approx(correlation, abs=1e-5)
            assert matches[place].distance == -distance


def test_near_embeddings_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.randn(n, 4, generator=generator)) for n in (50, 60))
    scores = one.double() @ other.double().T
    expected = {(row, column) for row, column in (scores >= 0.9).nonzero().tolist()}
    for chunk in (7, 8192):
        monkeypatch.setattr(duplicates, "ENCODED", chunk)
        found = {(row, column): cosine for row, column, cosine in find_nearby(one, other, 0.9)}
        assert found.keys() == expected and len(found) > 20
        assert all(cosine == pytest.approx(float(scores[place]), abs=1e-6) for place, cosine in found.items())
