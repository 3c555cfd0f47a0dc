"""Rank, world size, and collectives that keep gradients; torch.distributed is asked when they are called.

W processes, b rows on each of them.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


def is_distributed() -> bool:
    """Say whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


class AllGather(Function):
    """All rows of all processes; the backward pass sums what every process says of our rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # gloo has no reduce-scatter in older torch
        return gradient.chunk(world_size())[rank()]


def all_gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of ranks: [b, ...] to [W b, ...], with gradient."""
    return AllGather.apply(rows) if is_distributed() else rows


def all_gather_objects(item: object) -> list:
    """Collect an object of each process, in the order of ranks."""
    if not is_distributed():
        return [item]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average a tensor over the processes, without gradient."""
    return all_reduce_sum(values) / world_size()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over the processes, without gradient."""
    if is_distributed():
        values = values.detach().clone()
        dist.all_reduce(values)
    return values
