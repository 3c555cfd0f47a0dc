"""What guards and averages the weights costs nothing in a step: no collective more, nothing read from the device."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import in_processes, make_guard
from faulty import run
from test_guard import options, take_step
from test_module import make_batch, make_module
from torch import Tensor

from clipmini.ema import WeightAverage


class Collectives(pl.Callback):
    """Counts what c10d does in steps that log and save nothing, also in C++."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.counts: dict[str, int] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            self.profiler.stop()
            events = self.profiler.key_averages()
            self.counts = {event.key: event.count for event in events if event.key.startswith(("c10d::", "gloo:"))}


def count_collectives(directory: Path, arguments: list[str], features: list[list[str]]) -> list[dict[str, int]]:
    """Count collectives of three ordinary steps with overrides; in the first run there is no guard either."""
    counts = []
    for number, overrides in enumerate(features):
        counter = Collectives()
        with pytest.MonkeyPatch.context() as patch:
            if number == 0:
                patch.setattr("clipmini.guard.Guard.mark", lambda self, loss, features: loss)
                patch.setattr("clipmini.guard.Guard.judge", lambda self, norm: None)
                patch.setattr("clipmini.guard.Guard.hold", lambda self, *_, **__: None)
                patch.setattr("clipmini.guard.Guard.finish", lambda self, *_: None)
            run(directory / str(number), {}, *arguments, *overrides, more=(counter,))
        counts.append(counter.counts)
    return counts


def test_collective_count(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    features = [
        ["callbacks.checkpoint=null", "callbacks.watchdog=null"],  # without agreement on signals, without saving
        [],
        ["ema.decay=0.9", "ema.warmup=true", "bad_steps.skip_spikes=true", "checkpoint.every_n_minutes=5"],
    ]
    arguments = [*options(tiny_json, shards), "trainer.log_every_n_steps=100", "preemption.check_every_seconds=9999"]
    for counts in in_processes(2, count_collectives, tmp_path, tmp_path, arguments, features):
        assert counts[0].get("c10d::allreduce_", 0) >= 3 and counts[1] == counts[0] and counts[2] == counts[0]


class Gradients(pl.Callback):
    """Counts gradients that are there when a step begins."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.counts.append(sum(parameter.grad is not None for parameter in module.parameters()))


def test_no_gradient_is_kept_through_a_forward_pass(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    gradients = Gradients()
    run(tmp_path, {}, *options(tiny_json, shards), more=(gradients,))
    assert len(gradients.counts) >= 4 and not any(gradients.counts)


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu")


def test_nothing_is_read_back_in_a_step(tiny_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(str(tiny_json)).float()
    module.guard = make_guard(skip_spikes=True, window=2)
    average = WeightAverage(decay=0.9, warmup=True)
    average.start(module.model)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    batch = make_batch(4)
    take_step(module, optimizer, batch)  # the first is decided by the host
    reads: list[str] = []

    def spy(name: str) -> Callable:
        original = getattr(torch.Tensor, name)

        def read(self: Tensor, *arguments: Any, **more: Any) -> Any:
            stack = [frame for frame in traceback.extract_stack()[:-1] if "/clipmini/" in frame.filename]
            reads.append(f"{Path(stack[-1].filename).name}:{stack[-1].name}" if stack else "torch")
            return original(self, *arguments, **more)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, spy(name))
    for _ in range(3):
        take_step(module, optimizer, batch)
        average.update(module.model, module.guard.bad)
    assert set(reads) <= {"losses.py:check_inputs"}  # which looks at the scale on a CPU only
    assert reads
    module.guard.read(4)
    assert reads[-1] == "guard.py:read"
