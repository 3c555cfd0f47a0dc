"""Some real steps of a run, to measure what all of them will take: memory and time."""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from clipmini.data.features import CaptionFeatureStore, FeatureStore, TeacherFeatures
from clipmini.data.loader import ImageTextData
from clipmini.locked_features import check_locked
from clipmini.model import width_before_projection
from clipmini.module import ClipModule
from clipmini.one_tower import Model
from clipmini.teacher import Teacher

WARM = 2  # steps before those that are timed: the first makes the optimizer's state, and workers start
TIMED = 12
SECONDS = 5.0  # that the steps of a batch may take
FIRST = 8  # pairs of the first steps
GROWTH = 4  # times as many in the next ones
MakeTrainer = Callable[[int, pl.Callback], pl.Trainer]  # of so many steps, and with what watches them
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """What steps of some batch size took.

    Attributes:
        batch: pairs of this process.
        seconds: of a step.
        memory: most at a time, bytes.
        wait: share of the time in which no batch was ready.
    """

    batch: int
    seconds: float
    memory: int
    wait: float


@dataclass(frozen=True)
class Estimate:
    """What steps of the whole batch will take; the values of two measurements, or a line through them."""

    seconds: float
    memory: int
    wait: float
    how: str


class StepTimes(pl.Callback):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waited: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        assert trainer.train_dataloader is not None
        self.waited.append(trainer.train_dataloader.waited)


@dataclass(frozen=True)
class StandIn:
    """Features of no picture and no caption, as wide as those that a run computes before its first step."""

    width: int

    def read(self, *_: object) -> Tensor:
        """Return the same for each: fp32 [D], of length 1."""
        return torch.full((self.width,), 1 / math.sqrt(self.width))


def stand_in_for(teacher: Teacher | None) -> TeacherFeatures | None:
    """Return what stands in for the features of a teacher, which is not asked for any."""
    if teacher is None:
        return None
    found = StandIn(teacher.width)
    return TeacherFeatures(
        cast(FeatureStore, found) if teacher.image else None, cast(CaptionFeatureStore, found) if teacher.text else None
    )


def stand_in_for_locked(model: Model) -> FeatureStore:
    """Return what stands in for the features of a locked image tower.

    Raises:
        UserError: it would give other features each time.
    """
    width = width_before_projection(model) if check_locked(model) else model.architecture["embed_dim"]
    return cast(FeatureStore, StandIn(width))


def has_features(data: ImageTextData) -> bool:
    """Say whether steps read features that a run computes first."""
    return data.features is not None or data.teacher is not None


def measure_steps(
    make_trainer: MakeTrainer, module: ClipModule, data: ImageTextData, batch: int, steps: int
) -> Measured:
    """Train some steps with some batch, as the run would.

    Args:
        make_trainer: takes the number of steps and what watches them.
        batch: pairs.
    """
    times = StepTimes()
    trainer = make_trainer(steps, times)
    data.batch_size, data.num_steps = batch, steps
    reset_memory(trainer.strategy.root_device)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    first = min(WARM, steps - 1)
    ends = [start, *times.ends]
    seconds = ends[-1] - ends[first]
    waited = times.waited[-1] - times.waited[first - 1] if first else times.waited[-1]
    return Measured(batch, seconds / (steps - first), peak_memory(trainer.strategy.root_device), waited / seconds)


def estimate(make_trainer: MakeTrainer, module: ClipModule, data: ImageTextData, batch: int) -> Estimate:
    """Measure larger and larger batches as long as that takes little time, and draw a line through the last two.

    From a micro-batch on: of what it holds at a time there is no more in a larger batch.
    """
    least = min(batch, max(FIRST, module.micro_batch or 0))
    found = [measure_steps(make_trainer, module, data, least, WARM + 2)]
    while found[-1].batch < batch:
        growth = 2 if module.micro_batch else GROWTH
        larger = min(batch, growth * found[-1].batch)
        takes_long = (WARM + 2) * found[-1].seconds * larger / found[-1].batch > SECONDS
        if takes_long and len(found) > 1:
            break
        found.append(measure_steps(make_trainer, module, data, larger, count_steps(found[-1], larger)))
    return extrapolate(found[-2:], batch)


def extrapolate(found: Sequence[Measured], batch: int) -> Estimate:
    """Return what a batch takes, by a line through two smaller ones, unless the last is that batch itself."""
    one, two = found[0], found[-1]
    if two.batch == batch:
        return Estimate(two.seconds, two.memory, two.wait, f"steps of {batch} pairs were made")
    scale = (batch - two.batch) / (two.batch - one.batch)
    seconds = two.seconds + scale * max(0.0, two.seconds - one.seconds)
    memory = two.memory + scale * max(0, two.memory - one.memory)
    how = f"steps of {one.batch} and {two.batch} pairs were made, for {batch}"
    return Estimate(seconds, int(memory), two.wait, how)


def count_steps(first: Measured, batch: int) -> int:
    """Return how many steps of a batch are worth their time."""
    return WARM + max(2, min(TIMED, int(SECONDS / (first.seconds * batch / first.batch))))


def reset_memory(device: torch.device) -> None:
    """Forget how much memory was used before."""
    if device.type == "cuda":
        torch.cuda.init()  # which has no statistics before its first use
        torch.cuda.empty_cache()  # what smaller batches have left would count
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not everywhere; then it is the most since the start
            RESET.write_text("5")  # the most that was resident (proc(5))


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was used since: of the GPU, or of this process without its loader processes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * (found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
