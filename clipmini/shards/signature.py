"""What is kept of a picture to find it again after it was encoded anew, made smaller or cropped: bits and thumbnails.

The bits are those of a perceptual hash (pHash; Zauner, 2010, https://phash.org/docs/pubs/thesis_zauner.pdf): which of
the 64 lowest frequencies of the grey picture are above their median. A crop of 5 % changes up to half of them, so they
are taken of several views of each picture: what was cropped is like one of the views of what was not.

The bits of drawings on white are often alike by chance, so they only nominate; a thumbnail of the same view, in colour,
must agree. The package imagehash has such bits of whole pictures alone, and needs scipy and PyWavelets.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipmini.data.picture import Picture

PIXELS = 64  # of each side: pictures are squeezed to this square first
FREQUENCIES = 8  # of each axis
BITS = FREQUENCIES**2
THUMBNAIL = 12  # pixels of each side
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
MIN_CONTRAST = 4.0  # levels of 256: what varies less is plain, and its bits are those of noise
Interval = tuple[float, float]
WHOLE, INNER, NARROW, FIRST, LAST = (0.0, 1.0), (0.025, 0.975), (0.05, 0.95), (0.0, 0.95), (0.05, 1.0)
# What is left of rows and columns: first all, then less of every edge, then 5 % less of one edge or two.
VIEWS: tuple[tuple[Interval, Interval], ...] = (
    *((WHOLE, WHOLE), (INNER, INNER), (NARROW, NARROW)),
    *((WHOLE, FIRST), (WHOLE, LAST), (FIRST, WHOLE), (LAST, WHOLE)),
    *((FIRST, FIRST), (FIRST, LAST), (LAST, FIRST), (LAST, LAST)),
)


@dataclass(frozen=True)
class Signatures:
    """What is kept of n pictures.

    Attributes:
        bits: uint8 [n, views, 8], 8 bits in each.
        thumbnails: uint8 [n, views, 3, 12, 12].
        is_plain: bool [n]: too little is in them to tell one from another.
    """

    bits: np.ndarray
    thumbnails: np.ndarray
    is_plain: np.ndarray


def squeeze(data: bytes, max_pixels: int) -> Tensor:
    """Decode a picture to uint8 [3, 64, 64], upright, with white behind it; large JPEGs are decoded at a part of it.

    Raises:
        Fault: it cannot be decoded, or is too large.
    """
    picture = Picture(data, max_pixels=max_pixels)
    return picture.crop((0, 0, picture.width, picture.height), PIXELS, draft="auto")


@torch.no_grad()
def sign(pictures: Tensor) -> Signatures:
    """Return the signatures of squeezed pictures, uint8 [n, 3, 64, 64]."""
    pixels = pictures.float()
    grey = (pixels * torch.tensor(LUMA)[:, None, None]).sum(1)
    bits = torch.stack([take_bits(grey, *view) for view in VIEWS], 1)
    thumbnails = torch.stack([shrink(pixels, *view) for view in VIEWS], 1)
    whole = thumbnails[:, 0].flatten(2)
    contrast = (whole - whole.mean(2, keepdim=True)).square().mean(2).sqrt().amax(1)  # of the channel that varies most
    rounded = thumbnails.round().clamp(0, 255).byte()
    return Signatures(np.packbits(bits.numpy(), axis=2), rounded.numpy(), (contrast < MIN_CONTRAST).numpy())


def take_bits(grey: Tensor, rows: Interval, columns: Interval) -> Tensor:
    """Hash a view of grey pictures, fp32 [n, 64, 64]: bool [n, 64]."""
    coefficients = (cosines(rows) @ grey @ cosines(columns).T).flatten(1)
    # The first one is the brightness, and far from all others.
    return coefficients > coefficients[:, 1:].median(1, keepdim=True).values


def shrink(pixels: Tensor, rows: Interval, columns: Interval) -> Tensor:
    """Average a view of pictures, fp32 [n, 3, 64, 64]: [n, 3, 12, 12]."""
    return averages(rows) @ pixels @ averages(columns).T


def cosines(interval: Interval) -> Tensor:
    """Return the DCT-II of what an interval covers of a row of pixels: fp32 [8, 64]."""
    covered, middles = cover(*interval)
    return covered * torch.cos(math.pi * torch.arange(FREQUENCIES)[:, None] * middles)


def averages(interval: Interval) -> Tensor:
    """Return the weights of a row of pixels in those of a thumbnail of an interval: fp32 [12, 64]."""
    start, end = interval
    edges = [start + (end - start) * number / THUMBNAIL for number in range(THUMBNAIL + 1)]
    covered = torch.stack([cover(*part)[0] for part in zip(edges[:-1], edges[1:], strict=True)])
    return covered / covered.sum(1, keepdim=True)


def cover(start: float, end: float) -> tuple[Tensor, Tensor]:
    """Return how much of each pixel an interval covers, and where in it, from 0 to 1, the middle of that is."""
    left = torch.arange(PIXELS).clamp_min(start * PIXELS)
    right = torch.arange(1, PIXELS + 1).clamp_max(end * PIXELS)
    return (right - left).clamp_min(0), ((left + right) / 2 / PIXELS - start) / (end - start)
