"""Weights and optimizer state in shards, a part of each tensor on each process (FSDP2), and whole again.

The rows of a tensor [n, ...] over W processes: ceil(n / W) for each of the first ones, what is left for the next, and
none for the last ones if there are too few; so torch.chunk cuts, and FSDP2.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clipmini.blocks import find_blocks
from clipmini.distributed import full

SHARDED = "sharded"  # the key under which a state says which of its tensors are in parts

_is_recomputing = False


def shard_modules(root: nn.Module, mesh: DeviceMesh, *, forward: str) -> None:
    """Cut the parameters of a module into shards.

    Each block of a tower is put together when its turn comes, and is dropped after it; what is in no block stays whole
    from the first forward pass of a step to the end of its backward pass. Parameters without dimensions cannot be cut:
    they stay as they are, and their gradients are of this process alone.

    Args:
        root: its parameters must be equal on all processes.
        mesh: the processes, in one dimension.
        forward: the method that the forward pass of a step calls, on all processes as often.
    """
    for parameter in root.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no channels_last weights
    for block in find_blocks(root):
        fully_shard(block, mesh=mesh)
        block.register_forward_hook(reshard_recomputed)
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.register_forward_pre_hook(need_gradient, prepend=True)  # before FSDP2's own
    fully_shard(root, mesh=mesh, ignored_params={parameter for parameter in root.parameters() if parameter.ndim == 0})
    register_fsdp_forward_method(root, forward)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Have each block drop its weights after its part of a forward pass that is done again for the backward pass.

    FSDP2 would keep them all: it takes for granted that a block's backward pass follows at once.
    """
    global _is_recomputing
    _is_recomputing = True
    try:
        yield
    finally:
        _is_recomputing = False


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return what `torch.utils.checkpoint` enters for a forward pass, and for the same one again."""
    return contextlib.nullcontext(), recomputing()


def need_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have a block's input need a gradient, also where all before it is frozen.

    FSDP2 drops a block's weights when the gradient of its input is there. Without one they stay to the end of the step,
    and where a second micro-batch runs the block again, they are dropped after its forward pass and not fetched again.
    """
    first, *rest = inputs
    if torch.is_grad_enabled() and not first.requires_grad:
        return first.detach().requires_grad_(), *rest
    return inputs


def reshard_recomputed(block: nn.Module, *_: Any) -> None:
    if _is_recomputing:
        assert isinstance(block, FSDPModule)
        block.reshard()


class Skeleton:
    """A module without its weights, made before they are cut, to put them whole into it.

    What runs it needs no other process, so that each can do another number of batches.
    """

    def __init__(self, module: nn.Module) -> None:
        bare: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            for parameter in module.parameters()
        }
        self.module = copy.deepcopy(module, bare)

    def fill(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Return a copy with the weights and buffers that a sharded module has now; every process must call it."""
        whole = {name: full(tensor.detach()).to(device) for name, tensor in module.state_dict().items()}
        filled = copy.deepcopy(self.module)
        filled.load_state_dict(whole, assign=True)
        return filled.to(device)


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor that belong to this process.

    Attributes:
        rows: in memory on the CPU.
        shape: of the whole tensor.
    """

    rows: Tensor
    shape: torch.Size


def shard_like(value: Tensor | Rows, like: Tensor | None) -> Tensor:
    """Cut a tensor, or take the rows that are cut already, as another tensor of its shape is cut.

    No other process is asked. What has another shape, or is like a tensor that is not cut, is returned as it is.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.rows if isinstance(value, Rows) else value
    mesh = like.device_mesh
    rows = value.rows if isinstance(value, Rows) else value[own_rows(len(value), mesh.get_local_rank(), mesh.size())]
    local = torch.empty(rows.shape, dtype=rows.dtype, device=like.device).copy_(rows)
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=torch.empty_like(like).stride()
    )


def own_rows(count: int, rank: int, world_size: int) -> slice:
    """Return which of so many rows belong to a process."""
    size = -(-count // world_size)
    return slice(min(rank * size, count), min((rank + 1) * size, count))


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Put a tensor together of the rows of all processes that wrote it."""
    return torch.cat(list(parts))


def cut(parts: Sequence[Tensor], *, rank: int, world_size: int) -> Rows:
    """Take the rows of one process from those of all processes that wrote them, and read no others."""
    count = sum(map(len, parts))
    mine = own_rows(count, rank, world_size)
    pieces, first = [], 0
    for part in parts:
        pieces.append(part[max(0, mine.start - first) : max(0, mine.stop - first)])
        first += len(part)
    return Rows(torch.cat(pieces), torch.Size([count, *parts[0].shape[1:]]))


@dataclass(frozen=True)
class LocalState:
    """A process's part of a state.

    Attributes:
        state: dicts and lists as they were, with the local part of each tensor that is in shards.
        sharded: where those are, `optimizer_states/0/state/12/exp_avg`, and the shape and dtype of the whole.
        local: the same parts by where they are.
    """

    state: dict[str, Any]
    sharded: dict[str, dict[str, Any]]
    local: dict[str, Tensor]

    def content(self, rank: int) -> dict[str, Any]:
        """Return what a process must keep for `merge`: the first one all but the others' parts, the others theirs."""
        return {**self.state, SHARDED: self.sharded} if rank == 0 else {"local": self.local}


def take_local(state: dict[str, Any]) -> LocalState:
    """Take this process's part of a state in which tensors are in shards; no other process is asked.

    Raises:
        ValueError: a tensor is cut in another way than by its rows, over a mesh of one dimension.
    """
    sharded: dict[str, dict[str, Any]] = {}
    local: dict[str, Tensor] = {}

    def take(path: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        (placement, *more) = value.placements
        if more or not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(f"{path}: {value.placements} is not [Shard(0)]")
        part = value.to_local().detach()
        if placement.is_shard(0):
            sharded[path] = describe(value)
            local[path] = part
        return part

    return LocalState(map_leaves(state, take), sharded, local)


def merge(
    parts: Sequence[Mapping[str, Any]], join: Callable[[Sequence[Tensor]], Tensor | Rows] = concatenate
) -> dict[str, Any]:
    """Put a state together of what `LocalState.content` gave on each process, in the order of ranks.

    A tensor exists twice only while it is put together, if the parts are mapped into memory, as
    `torch.load(mmap=True)` does.

    Args:
        join: makes a tensor of its parts.

    Raises:
        ValueError: a part is missing, or does not fit.
    """
    first, *others = parts
    if SHARDED not in first:
        return first  # type: ignore[return-value]
    sharded = first[SHARDED]

    def put_together(path: str, value: Any) -> Any:
        if path not in sharded:
            return value
        missing = [rank for rank, part in enumerate(others, 1) if path not in part["local"]]
        if missing:
            raise ValueError(f"{path}: the part of rank {missing[0]} is missing")
        tensors = [value, *(part["local"][path] for part in others)]
        count = sum(map(len, tensors))
        for tensor in tensors:
            if describe(tensor, count) != sharded[path]:
                raise ValueError(f"{path}: a part of {describe(tensor, count)} does not fit {sharded[path]}")
        return join(tensors)

    return map_leaves({name: value for name, value in first.items() if name != SHARDED}, put_together)


def describe(tensor: Tensor, count: int | None = None) -> dict[str, Any]:
    """Return shape and dtype of a tensor, as plain data, or of one with another number of rows."""
    shape = list(tensor.shape) if count is None else [count, *tensor.shape[1:]]
    return {"shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}


def map_leaves(tree: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """Make a tree of dicts, lists and tuples again, with function(path, leaf) for each leaf."""
    prefix = f"{path}/" if path else ""
    if type(tree) in (dict, OrderedDict):
        return {key: map_leaves(value, function, f"{prefix}{key}") for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(value, function, f"{prefix}{number}") for number, value in enumerate(tree))
    return function(path, tree)
