"""What the launcher (torchrun, srun or none) and the hardware give: processes, nodes, devices, precision."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from clipmini.data.processes import count_cores
from clipmini.errors import UserError


@dataclass(frozen=True)
class Launch:
    """The processes of this run as the launcher made them."""

    launcher: Literal["torchrun", "srun", "none"]
    world_size: int
    local_world_size: int
    rank: int

    @property
    def has_launcher(self) -> bool:
        return self.launcher != "none"

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def num_cores(self) -> int:
        """The cores of each process: srun gives every task its own, others leave all to all."""
        return count_cores() if self.launcher == "srun" else max(1, count_cores() // self.local_world_size)


def read_launch() -> Launch:
    """Read what torchrun or srun set; one process without them."""
    environment = os.environ
    if TorchElasticEnvironment.detect():
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")
        return Launch("torchrun", *(int(environment[name]) for name in names))
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in environment:  # inside srun, not only inside sbatch
        tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment["SLURM_NNODES"])
        return Launch("srun", tasks, tasks // nodes, int(environment["SLURM_PROCID"]))
    return Launch("none", 1, 1, 0)


def check_batch(processes: Launch, *, batch_size: int, micro_batch: int | None) -> None:
    """See that the global batch splits evenly over the processes, and each part into micro-batches.

    Raises:
        UserError: it does not.
    """
    if batch_size < 1 or batch_size % processes.world_size:
        raise UserError(f"batch_size={batch_size}: must be a positive multiple of the {processes.world_size} processes")
    local = batch_size // processes.world_size
    if micro_batch is not None and not 1 <= micro_batch <= local:
        raise UserError(f"micro_batch={micro_batch}: must be from 1 to the {local} pairs of a process, or null")


def choose_accelerator(accelerator: str) -> str:
    """Resolve `trainer.accelerator`: `auto` is a GPU if there is one, and a CPU else.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if accelerator == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: torch sees no GPU here; trainer=cpu trains without one")
    return accelerator


def choose_precision(precision: str, accelerator: str) -> str:
    """Resolve `trainer.precision`: `auto` is bf16 (fp32 parameters) where the device computes in it, and fp32 else."""
    if precision != "auto":
        return precision
    if accelerator == "gpu":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = accelerator == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if has_bf16 else "32-true"


def check_processes(processes: Launch, *, devices: str | int, num_nodes: str | int, strategy: object) -> None:
    """Compare what the config asks for with what the launcher made.

    Raises:
        UserError: they differ, or several processes are asked for without a launcher.
    """
    hint = "several devices need a launcher, as in `torchrun --nproc-per-node 8 -m clipmini train ...`, or srun"
    if devices != "auto" and devices != processes.local_world_size:
        raise UserError(f"trainer.devices={devices}: there are {processes.local_world_size} processes a node; {hint}")
    if num_nodes != "auto" and num_nodes != processes.num_nodes:
        raise UserError(f"trainer.num_nodes={num_nodes}: there are {processes.num_nodes} nodes; {hint}")
    if strategy != "auto" and not processes.has_launcher:
        raise UserError(f"trainer.strategy={strategy}: {hint}")


def choose_strategy(strategy: object, processes: Launch) -> object:
    """Resolve `trainer.strategy`: `auto` is DDP on several processes."""
    return "ddp" if strategy == "auto" and processes.world_size > 1 else strategy


def can_synchronize_batch_norm(processes: Launch, accelerator: str) -> bool:
    """Say whether several processes train on devices for which torch has SyncBatchNorm."""
    return processes.world_size > 1 and accelerator in ("gpu", "cuda")


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or how many threads the CPU has for this process."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def choose_device(device: str, processes: Launch) -> torch.device:
    """Resolve `device` of the commands that do not train: `auto` is this process's GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device}: is auto, cpu or cuda")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; device=cpu works without one")
    local_rank = choose_environment(processes).local_rank() if processes.has_launcher else 0
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each task only its own GPU


@contextlib.contextmanager
def joined(processes: Launch, device: torch.device) -> Iterator[None]:
    """Have the processes that a launcher made work together, without Lightning's Trainer."""
    if processes.world_size == 1:
        yield
        return
    environment = choose_environment(processes)
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=processes.rank, world_size=processes.world_size
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def choose_environment(processes: Launch) -> ClusterEnvironment:
    """Tell Lightning who made the processes; its own guess takes an sbatch script without srun for a launcher."""
    if processes.launcher == "torchrun":
        return TorchElasticEnvironment()
    if processes.launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()
