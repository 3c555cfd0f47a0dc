"""Rank, world size and collectives without gradient; torch.distributed is asked when they are called.

W processes, b rows on each of them.
"""

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from clipmini.errors import UserError

Result = TypeVar("Result")

DEFAULT_TIMEOUT = 1800.0  # seconds

_is_alone = False
_patience = _timeout = DEFAULT_TIMEOUT  # see `set_patience`


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


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded (DTensor); without gradient it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded (DTensor); every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor, whole or sharded as the target is, into one that may be sharded; every rank must call it."""
    if isinstance(target, DTensor) and not isinstance(whole, DTensor):
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    target.copy_(whole)


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


def begin_all_reduce_max(numbers: Sequence[int]) -> Callable[[], list[int]]:
    """Begin to take the largest of each number over the processes; what is returned waits for the result."""
    values = torch.tensor(numbers)
    work = dist.all_reduce(values, dist.ReduceOp.MAX, group=_cpu_group(dist.group.WORLD), async_op=True)

    def wait() -> list[int]:
        work.wait()
        return values.tolist()

    return wait


def from_first(action: Callable[[], Result]) -> Result:
    """Do something in the first process, and return its result, or raise its UserError, in all of them."""
    result: Result | UserError | None = None
    if rank() == 0:
        try:
            result = action()
        except UserError as error:
            result = error
    result = all_gather_objects(result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def set_patience(seconds: float) -> None:
    """Have collectives fail after this long while nothing shorter is set, and within `patient`."""
    global _patience
    _patience = seconds
    set_timeout(seconds)


def set_timeout(seconds: float) -> None:
    """Have collectives fail when another process does not come for this long."""
    global _timeout
    _timeout = seconds
    if is_distributed():
        # Older torch has it under a private name only, which newer torch warns of.
        set_timeout_of = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for group in {dist.group.WORLD, _cpu_group(dist.group.WORLD)}:
            set_timeout_of(datetime.timedelta(seconds=seconds), group)


def reset_timeout() -> None:
    """Take back what `set_timeout` said."""
    set_timeout(_patience)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Wait for one another longer than a step may take, where one process has more to do."""
    before = _timeout
    set_timeout(_patience)
    try:
        yield
    finally:
        set_timeout(before)


def forget_groups() -> None:
    """Let go of the groups that were made here, so that they can be ended."""
    _cpu_group.cache_clear()


@functools.lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """Return a group of all processes that takes tensors on the CPU; all of them must call this together."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
