"""What the launcher (torchrun, srun or none) and the hardware give: processes, nodes, devices, precision."""

import contextlib
import datetime
import gc
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from clipmini import distributed
from clipmini.cluster.fsdp import FullyShardedStrategy
from clipmini.data.processes import count_cores
from clipmini.errors import Stopped, UserError, check_choice

RESERVED_STEPS = 0xFFFFFFF0  # numbers of steps that are no srun's: batch scripts, shells of salloc (slurm.h)


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
    """Read what torchrun or srun set; one process without them.

    Raises:
        UserError: the nodes have different numbers of processes.
    """
    environment = os.environ
    if TorchElasticEnvironment.detect():
        world_size, local, rank, nodes = (
            int(environment[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "GROUP_WORLD_SIZE")
        )
        if world_size != local * nodes:
            raise UserError(
                f"torchrun made {world_size} processes on {nodes} nodes, {local} of them on this one: each node must "
                "have the same number, so give all of them the same --nproc-per-node"
            )
        return Launch("torchrun", world_size, local, rank)
    if is_started_by_srun():
        # The variables of the step: those of the job, such as SLURM_NTASKS_PER_NODE, may be of another number of tasks.
        layout = environment["SLURM_STEP_TASKS_PER_NODE"]  # 8, 8(x4) or 8(x3),4
        tasks = re.fullmatch(r"(\d+)(\(x\d+\))?", layout)
        if tasks is None:
            raise UserError(
                f"srun made {layout} tasks on the nodes (SLURM_STEP_TASKS_PER_NODE): each node must have the same "
                "number, so give srun --nodes and --ntasks-per-node in place of --ntasks"
            )
        rank = int(environment["SLURM_PROCID"])
        return Launch("srun", int(environment["SLURM_STEP_NUM_TASKS"]), int(tasks[1]), rank)
    return Launch("none", 1, 1, 0)


def is_started_by_srun() -> bool:
    """Say whether srun started this process: not a batch script, nor a shell that `srun --pty` or salloc opened."""
    if int(os.environ.get("SLURM_STEP_ID", RESERVED_STEPS)) >= RESERVED_STEPS:
        return False
    return not ("SLURM_PTY_PORT" in os.environ and sys.stdin is not None and sys.stdin.isatty())


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


def check_compiler(accelerator: str) -> None:
    """See that torch can compile for a device.

    Raises:
        UserError: there is no C++ compiler, which it takes for a CPU.
    """
    compiler = os.environ.get("CXX", "g++")
    if accelerator == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"compile=true: on a CPU torch needs a C++ compiler, and there is no {compiler} (CXX)")


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
    """Resolve `trainer.strategy`: `auto` is DDP on several processes, and `fsdp` not Lightning's, which is FSDP1."""
    if strategy == "fsdp":
        return FullyShardedStrategy(world_size=processes.world_size)
    return "ddp" if strategy == "auto" and processes.world_size > 1 else strategy


def check_sharding(strategy: object, precision: str, *, has_local_batch_norm: bool) -> None:
    """See that weights in shards can be trained exactly.

    Raises:
        UserError: they cannot.
    """
    if strategy != "fsdp":
        return
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"trainer.precision={precision}: trainer.strategy=fsdp trains in 32-true or bf16-mixed")
    if has_local_batch_norm:
        raise UserError(
            "trainer.strategy=fsdp: this model has BatchNorm, which would be another one on each process where there "
            "is no GPU: set trainer.strategy=ddp or take a model without it"
        )


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
    check_choice("device", device, ("auto", "cpu", "cuda"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; device=cpu works without one")
    return own_gpu(processes)


def train_device(accelerator: str, processes: Launch) -> torch.device:
    """Return the device that this process trains on, for the group of all processes."""
    is_gpu = choose_accelerator(accelerator) in ("gpu", "cuda")
    return own_gpu(processes) if is_gpu else torch.device("cpu")


def own_gpu(processes: Launch) -> torch.device:
    """Return the GPU of this process."""
    local_rank = choose_environment(processes).local_rank() if processes.has_launcher else 0
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each task only its own GPU


@contextlib.contextmanager
def joined(processes: Launch, device: torch.device, timeout: float = distributed.DEFAULT_TIMEOUT) -> Iterator[None]:
    """Have the processes that a launcher made work together.

    They are let go at the end, while Python is still whole: the threads of a group that lives on would end the process
    by SIGABRT when they meet an interpreter that is not (https://github.com/pytorch/pytorch/pull/179291).

    Args:
        timeout: seconds in which all must come.
    """
    if processes.world_size == 1 or torch.distributed.is_initialized():  # by a caller of ours, who also lets them go
        yield
        return
    environment = choose_environment(processes)
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=processes.rank,
        world_size=processes.world_size,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    distributed.set_patience(timeout)
    is_whole = False
    try:
        yield
        is_whole = True
    except Stopped:  # all of them together
        is_whole = True
        raise
    finally:
        distributed.forget_groups()
        gc.collect()  # what Lightning leaves in cycles holds groups too
        if is_whole or device.type == "cpu":  # NCCL would wait for what others no longer send
            torch.distributed.destroy_process_group()


def take_over_signals(trainer: pl.Trainer) -> None:
    """Keep Lightning from handling signals, which it does in ways that can hang, and from telling them every step.

    Its handler of SIGTERM has a collective, which dead-locks where processes are signalled around another one
    (https://github.com/Lightning-AI/pytorch-lightning/issues/20806), and every batch ends with a broadcast and a wait
    for the device (https://github.com/Lightning-AI/pytorch-lightning/issues/21487).
    """
    for owner, name in (
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ):
        assert callable(getattr(owner, name)), f"{type(owner).__name__}.{name} is gone from this Lightning"
        setattr(owner, name, lambda: None)


def choose_environment(processes: Launch) -> ClusterEnvironment:
    """Tell Lightning who made the processes; its own guess takes an sbatch script without srun for a launcher."""
    if processes.launcher == "torchrun":
        return TorchElasticEnvironment()
    if processes.launcher == "srun":
        return SlurmStep(processes)
    return LightningEnvironment()


class SlurmStep(SLURMEnvironment):
    """The processes of one srun; Lightning reads the variables of the whole job, of which a step may be a part.

    Args:
        processes: as read from the step.
    """

    def __init__(self, processes: Launch) -> None:
        self.processes = processes
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        """Lightning refuses `--ntasks` without `--ntasks-per-node`; what srun made of it was checked."""

    @property
    def main_address(self) -> str:
        """The first node of the step, unless MASTER_ADDR says otherwise."""
        nodes = os.environ["SLURM_STEP_NODELIST"]
        return os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))

    @property
    def main_port(self) -> int:
        """A port that all tasks come to without asking, unless MASTER_PORT says otherwise: 15000 to 24999."""
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        # Jobs that run side by side have numbers close to each other, steps of a job small ones.
        return int(os.environ.setdefault("MASTER_PORT", str(15000 + (job + 1009 * step) % 10000)))

    def world_size(self) -> int:
        return self.processes.world_size

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Both come from the step itself."""
