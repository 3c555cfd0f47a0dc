"""Rank, world size and collectives without gradient; torch.distributed is asked when they are called.

W processes, b rows on each of them.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_is_alone = False


def is_distributed() -> bool:
    """Say whether several processes train together."""
    return not _is_alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have this process do for itself what else all of them would do together."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def all_gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of ranks: [b, ...] to [W b, ...]."""
    if not is_distributed():
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size())), rows.contiguous())
    return gathered


def all_gather_uneven(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, [b, ...], of which each may have another number b."""
    counts = [count for (count,) in all_gather_numbers(len(rows))]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    return torch.cat([part[:count] for part, count in zip(all_gather(padded).split(max(counts)), counts, strict=True)])


def reduce_scatter_sum(rows: Tensor) -> Tensor:
    """Sum rows over the processes and return this one's part of them: [W b, ...] to [b, ...]; `rows` is used up."""
    if not is_distributed():
        return rows
    parts = list(rows.chunk(world_size()))
    if dist.get_backend() == "gloo":  # which cannot do it in older torch
        dist.all_reduce(rows)
        return parts[rank()]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts)
    return mine


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over the processes."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: Tensor) -> Tensor:
    """Take the largest of each element over the processes."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average a tensor over the processes."""
    return all_reduce_sum(values) / world_size()


def _all_reduce(values: Tensor, operation: Any) -> Tensor:
    if is_distributed():
        values = values.detach().clone()
        dist.all_reduce(values, operation)
    return values


def all_gather_objects(item: object) -> list:
    """Collect an object of each process, in the order of ranks."""
    if not is_distributed():
        return [item]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def all_gather_numbers(*numbers: int) -> list[list[int]]:
    """Collect numbers of each process, in the order of ranks, without waiting for what a GPU still has to do."""
    if not is_distributed():
        return [list(numbers)]
    gathered = torch.zeros(world_size(), len(numbers), dtype=torch.long)
    dist.all_gather(list(gathered), torch.tensor(numbers), group=_cpu_group(dist.group.WORLD))
    return gathered.tolist()


@functools.lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """Return a group of all processes that takes tensors on the CPU; all of them must call this together."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
