"""Which of many pictures are near-duplicates of known ones: by their signatures, or by the cosines of embeddings.

Both sides are taken in chunks: what is held of them at a time does not grow with their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmini.evaluation.similarity import similarity
from clipmini.shards.signature import BITS, Signatures

CHUNK = 512  # known pictures at a time
CONFIRMED = 4096  # pairs of thumbnails at a time
ENCODED = 8192  # known embeddings at a time


@dataclass(frozen=True)
class Threshold:
    """When two pictures are near-duplicates.

    Attributes:
        max_distance: of the 64 bits, so many may differ at most.
        min_correlation: of the thumbnails, at least.
    """

    max_distance: int
    min_correlation: float


class Match(NamedTuple):
    """A near-duplicate: its number, that of the known picture, and how alike they are in their likest views."""

    row: int
    column: int
    distance: int
    correlation: float


@dataclass(frozen=True)
class Known:
    """Signatures of m pictures that are looked for; arrays may lie in files.

    Attributes:
        numbers: int64 [m], what they are called.
        bits, thumbnails: as in `Signatures`.
    """

    numbers: np.ndarray
    bits: np.ndarray
    thumbnails: np.ndarray

    def save(self, directory: Path) -> None:
        """Write the arrays, so that many processes read them without a copy for each."""
        for name in ("numbers", "bits", "thumbnails"):
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)


def load_known(directory: Path) -> Known:
    """Open what `Known.save` has written; only what is looked at is read."""
    names = ("numbers", "bits", "thumbnails")
    return Known(*(np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names))


@torch.no_grad()
def find_duplicates(signatures: Signatures, known: Known, threshold: Threshold) -> Iterator[Match]:
    """Yield the pairs that are near-duplicates in some view; plain pictures are none."""
    kept = torch.from_numpy(np.flatnonzero(~signatures.is_plain))
    bits = to_signs(signatures.bits)[kept]
    thumbnails = torch.from_numpy(signatures.thumbnails)[kept]
    for start in range(0, len(known.numbers) if len(kept) else 0, CHUNK):
        part = slice(start, start + CHUNK)
        pairs, distances = nominate(bits, to_signs(known.bits[part]), threshold.max_distance)
        others = torch.from_numpy(np.array(known.thumbnails[part]))
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for first in range(0, len(pairs), CONFIRMED):
            some = pairs[first : first + CONFIRMED]
            scores = correlate(thumbnails[some[:, 0], some[:, 2]], others[some[:, 1], some[:, 3]])
            for number in (scores >= threshold.min_correlation).nonzero()[:, 0].tolist():
                row, column = some[number, :2].tolist()
                found = (float(scores[number]), -int(distances[first + number]))
                best[row, column] = max(best.get((row, column), found), found)
        for (row, column), (correlation, distance) in sorted(best.items()):
            yield Match(int(kept[row]), int(known.numbers[start + column]), -distance, correlation)


def to_signs(bits: np.ndarray) -> Tensor:
    """Return bits as -1 and 1, whose inner products tell how many are equal: fp32 [n, views, 64]."""
    return torch.from_numpy(np.unpackbits(bits, axis=2)).float() * 2 - 1


def nominate(bits: Tensor, known: Tensor, max_distance: int) -> tuple[Tensor, Tensor]:
    """Compare the whole of each picture with all views of each other one, both ways.

    Args:
        bits: of n pictures, as `to_signs` returns them.
        known: of m pictures.

    Returns:
        int64 [k, 4], the numbers of both pictures and of their views, and the distances, int64 [k].
    """
    found = []
    for views, others in ((slice(0, 1), slice(None)), (slice(1, None), slice(0, 1))):
        left, right = bits[:, views], known[:, others]
        products = left.flatten(0, 1) @ right.flatten(0, 1).T  # each bit that differs takes 2 off 64
        rows, columns = (products >= BITS - 2 * max_distance).nonzero(as_tuple=True)
        places = (rows // left.shape[1], columns // right.shape[1])
        of_views = (rows % left.shape[1] + (views.start or 0), columns % right.shape[1])
        found.append((torch.stack([*places, *of_views], 1), ((BITS - products[rows, columns]) / 2).long()))
    return torch.cat([pairs for pairs, _ in found]), torch.cat([distances for _, distances in found])


def correlate(one: Tensor, other: Tensor) -> Tensor:
    """Return the correlation of each thumbnail with another, uint8 [k, 3, 12, 12]: fp32 [k].

    Each channel has its own mean taken off, or a tint alone would be a likeness.
    """
    pixels = [thumbnails.float().flatten(2) for thumbnails in (one, other)]
    left, right = (F.normalize((one - one.mean(2, keepdim=True)).flatten(1), dim=1) for one in pixels)
    return (left * right).sum(1)


def find_nearby(features: Tensor, known: Tensor, min_cosine: float) -> Iterator[tuple[int, int, float]]:
    """Yield row, column and cosine of unit vectors [n, D] and [m, D] that are near each other."""
    for start in range(0, len(known), ENCODED):
        scores = similarity(features, known[start : start + ENCODED])
        rows, columns = (scores >= min_cosine).nonzero(as_tuple=True)
        yield from zip(rows.tolist(), (columns + start).tolist(), scores[rows, columns].tolist(), strict=True)
