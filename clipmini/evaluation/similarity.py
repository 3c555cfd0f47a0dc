"""Similarities in which ties can be seen: equal embeddings score equally to the last bit.

A matrix product does not promise that. Its kernels sum in different orders at the edges of a matrix, for few rows, for
another shape or on more threads: a model that gives one and the same unit vector to everything then has scores up to
4e-7 apart, and a right one may come first by nothing but its place. So rows are rounded to multiples of a power of two
that are few enough bits for fp64 to hold every product and every partial sum exactly: no order of summation matters.
"""

import math

import torch
from torch import Tensor

BITS = 26  # of a row; products have twice as many, and fp64 holds integers of 53
BLOCK = 4096  # rows of b that exist in fp64 at a time


@torch.no_grad()
def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of rows, equal for equal rows: fp32 [n, m].

    They are off by about 1e-7 for unit vectors, as those of a product in fp32 are. A row that is not finite gives NaN.

    Args:
        a: [n, D], floating point; taken as fp32.
        b: [m, D].
    """
    scores = a.new_empty(len(a), len(b), dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        rows = to_grid(a)
        for start in range(0, len(b), BLOCK):
            block = slice(start, start + BLOCK)
            scores[:, block] = rows @ to_grid(b[block]).T
    return scores


@torch.no_grad()
def similarity_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of a [n, D] with that of b [n, D], the bits of `similarity`: fp32 [n]."""
    return (to_grid(a) * to_grid(b)).sum(1).float()


def to_grid(rows: Tensor) -> Tensor:
    """Round rows so that their inner products are exact in any order of summation: fp64 [n, D].

    With 2^e above the largest magnitude of a row and 4^h >= D, its entries become multiples of 2^(e + h - 26). The D
    products of two rows are multiples of 2^(e + e' + 2 h - 52), and no sum of some of them is above 2^(e + e' + 2 h).
    The step depends on nothing but the row, and its largest magnitude on no order.
    """
    rows = rows.float().double()
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-60)
    power = largest / largest.frexp().mantissa
    step = power * 2.0 ** (math.ceil(math.log2(rows.shape[1]) / 2) - BITS)
    return (rows * step.reciprocal()).round_().mul_(step)


def count_not_below(logits: Tensor, label: Tensor) -> Tensor:
    """Count the wrong classes whose logit is not below the right one's: int64 [n].

    Equal logits count against the model, and so do NaNs, so that a collapsed model scores nothing.

    Args:
        logits: [n, C].
        label: int64 [n].
    """
    right = logits.gather(1, label[:, None])
    return (~(logits < right)).sum(dim=1) - 1
