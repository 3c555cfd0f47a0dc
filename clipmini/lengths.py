"""Captions of like lengths together, so that one long caption does not make all of a batch as long."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Lengths = TypeVar("Lengths", int, np.ndarray)

# Lengths at which a batch may be cut, few of them: also for torch.compile, and for tensor cores.
MULTIPLE = 8
# Groups end at these parts of a batch, so that there are few shapes: memory that is free fits what is asked for next.
MAX_PARTS = 16
# What another group costs beside its tokens, in tokens: on a GPU the launches of its kernels, on a CPU little.
GROUP_COST = {"cpu": 256, "cuda": 4096}


def count_used(text: Tensor, padding: int) -> np.ndarray:
    """Return how many tokens of each row of int64 [b, L] there are up to the last that is not padding: [b]."""
    used = (text != padding).numpy()
    return np.where(used.any(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1), 1)


def round_up(lengths: Lengths) -> Lengths:
    """Return the next multiples of `MULTIPLE`."""
    return -(-lengths // MULTIPLE) * MULTIPLE


def group_by_length(lengths: np.ndarray, longest: int, group_cost: int) -> list[tuple[np.ndarray, int]]:
    """Cut a batch into groups that are run one after the other, at the least cost in tokens.

    Args:
        lengths: tokens of each caption, [b].
        longest: tokens that there are at all; no group is longer.
        group_cost: what a group costs beside its tokens.

    Returns:
        The numbers of the captions, and the length, of each group.
    """
    rounded = np.minimum(round_up(lengths), longest)
    order = np.argsort(rounded, kind="stable")
    edges, counts = np.unique(rounded, return_counts=True)
    # A group may end where a sixteenth of the batch does: what is left over goes to the next one.
    part = max(1, len(order) // MAX_PARTS)
    ends = np.cumsum(counts) // part * part
    ends[-1] = len(order)
    is_new = np.diff(ends, prepend=0) > 0
    edges, ends = edges[is_new].tolist(), ends[is_new].tolist()
    first = [0, *ends[:-1]]
    # best[i]: the least cost of all captions that are no longer than edge i, and where its last group begins.
    best: list[tuple[int, int]] = []
    for last, (edge, end) in enumerate(zip(edges, ends, strict=True)):
        starts = range(last + 1)
        before = [0 if start == 0 else best[start - 1][0] for start in starts]
        costs = [before[start] + (end - first[start]) * edge + group_cost for start in starts]
        start = int(np.argmin(costs))
        best.append((costs[start], start))
    groups: list[tuple[np.ndarray, int]] = []
    last = len(best) - 1
    while last >= 0:
        start = best[last][1]
        groups.append((order[first[start] : ends[last]], edges[last]))
        last = start - 1
    return groups[::-1]


def split(text: Tensor, lengths: np.ndarray) -> tuple[list[Tensor], Tensor | None]:
    """Split captions, int64 [b, L], into groups of like lengths.

    Returns:
        The groups, [n, length] each, and for every caption of the batch where it is in all of them one after the other,
        int64 [b]; None if there is one group, in the order of the batch.
    """
    cost = GROUP_COST.get(text.device.type, GROUP_COST["cuda"])
    groups = group_by_length(lengths, text.shape[1], cost)
    if len(groups) == 1:
        return [text[:, : groups[0][1]]], None
    order = np.concatenate([rows for rows, _ in groups])
    rows, places = torch.from_numpy(np.stack([order, order.argsort()])).to(text.device, non_blocking=True)
    parts = text[rows].split([len(numbers) for numbers, _ in groups])
    return [part[:, :length] for part, (_, length) in zip(parts, groups, strict=True)], places
