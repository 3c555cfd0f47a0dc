"""Lightning's side of training with weights and optimizer state in shards."""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from clipmini import distributed
from clipmini.checkpoints.disk import load_parts
from clipmini.cluster.sharding import Rows, cut, merge, shard_like, take_local
from clipmini.errors import UserError

MESH = "data_parallel"  # the name that Lightning has for it


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints whose form is that of any other strategy.

    Lightning's own would write and read checkpoints itself, past the CheckpointIO. Here a state that is taken holds
    tensors in shards where others hold whole ones, for `take_local`, and a state that is loaded holds whole ones, of
    which each process takes its part: what was saved by any number of processes under any strategy goes on under any
    other. The optimizer's state is by the number of a parameter, as PyTorch's optimizers have it.
    """

    def __init__(self, *, world_size: int) -> None:
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError(f"trainer.strategy=fsdp: needs torch 2.7 or newer, this is {torch.__version__}")
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)

    def setup_environment(self) -> None:
        # Lightning's mesh has a second dimension, of one process, and with it groups whose time-outs nobody sets.
        self._setup_distributed()
        self._device_mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=(MESH,))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of parameters without dimensions over the processes, which FSDP2 leaves alone."""
        assert self.model is not None
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        gradients = [gradient for gradient in found if not isinstance(gradient, DTensor)]
        if gradients:
            mean = distributed.all_reduce_mean(torch.stack(gradients))
            torch._foreach_copy_(gradients, list(mean.unbind()))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        content = take_local(checkpoint).content(self.global_rank)
        about = {**checkpoint["about"], "parts": self.world_size}
        self.checkpoint_io.save_checkpoint({**content, "about": about}, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # Not by the CheckpointIO, which would put everything together on each process.
        own = functools.partial(cut, rank=self.global_rank, world_size=self.world_size)
        return merge(load_parts(Path(checkpoint_path)), own)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        now = self.lightning_module.state_dict()
        state = {name: shard_like(tensor, now.get(name)) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                number: {
                    name: shard_like(value, parameters[number]) if isinstance(value, Tensor | Rows) else value
                    for name, value in of_parameter.items()
                }
                for number, of_parameter in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})
