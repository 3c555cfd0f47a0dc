"""Where the time of a step goes: a table of its parts, and a Chrome trace (`clipmini train profile=true`)."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from clipmini.annotations import Limits
from clipmini.console import log_table
from clipmini.module import ClipModule, no_span

log = logging.getLogger(__name__)

PARTS = ("data wait", "host to device", "encode image", "encode text", "loss", "backward", "optimizer")
TRACED_STEPS = 2  # after those that are measured: tracing takes time itself


class Spans:
    """Sums the seconds of the parts of steps: on a GPU those of its stream, by events, else those of the clock.

    A part inside another one counts as that one, as what micro-batches compute again in the backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []
        self.is_inside = False

    def now(self) -> Any:
        """Return this moment, or what will be it on the GPU."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure a part."""
        if self.is_inside:
            yield
            return
        self.is_inside, start = True, self.now()
        try:
            yield
        finally:
            self.is_inside = False
            self.marks.append((name, start, self.now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; waits for the GPU."""
        if self.is_gpu:
            torch.cuda.synchronize()
        total = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self.marks:
            total[name] += start.elapsed_time(end) / 1000 if self.is_gpu else end - start
        return total


class Profile(Callback):
    """Measures some steps of the first process, and traces two more.

    Args:
        directory: where table.txt and trace.json go; the latter is for chrome://tracing or https://ui.perfetto.dev.
        is_on: whether at all.
        first_step: steps that are made before, while memory is taken and kernels are chosen.
        steps: that are measured.
    """

    def __init__(
        self,
        *,
        directory: str,
        is_on: bool,
        first_step: Annotated[int, Limits(least=1)],
        steps: Annotated[int, Limits(least=1)],
    ) -> None:
        self.directory = Path(directory)
        self.is_on = is_on
        self.first_step = first_step
        self.steps = steps
        self.spans: Spans | None = None
        self.trace: Any = None
        self.done = 0  # steps of this process

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if not self.is_on or not trainer.is_global_zero:
            return
        assert isinstance(module, ClipModule)
        self.done += 1
        if self.done == self.first_step:
            self.begin(trainer, module)
        elif self.done == self.first_step + self.steps:
            self.end(trainer)
            self.trace = torch.profiler.profile()
            module.span = torch.profiler.record_function
            self.trace.start()
        elif self.done == self.first_step + self.steps + TRACED_STEPS:
            self.write_trace(module)

    def begin(self, trainer: pl.Trainer, module: ClipModule) -> None:
        assert trainer.train_dataloader is not None
        self.spans = Spans(trainer.strategy.root_device)
        module.span = self.spans.span
        self.waited = trainer.train_dataloader.waited
        self.start = self.spans.now()

    def end(self, trainer: pl.Trainer) -> None:
        """Write and print the table."""
        assert self.spans is not None and trainer.train_dataloader is not None
        end = self.spans.now()
        seconds = self.spans.seconds()
        whole = self.start.elapsed_time(end) / 1000 if self.spans.is_gpu else end - self.start
        seconds["data wait"] = trainer.train_dataloader.waited - self.waited
        rows = [*seconds.items(), ("rest", max(0.0, whole - sum(seconds.values()))), ("step", whole)]
        cells = [(name, f"{1000 * value / self.steps:.1f}", f"{value / whole:.1%}") for name, value in rows]
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [f"{name:16}{milliseconds:>10}{share:>8}\n" for name, milliseconds, share in cells]
        (self.directory / "table.txt").write_text("".join([f"{'':16}{'ms a step':>10}{'share':>8}\n", *lines]))
        log_table(f"Where the time of {self.steps} steps went", ("", "ms a step", "share"), cells)

    def write_trace(self, module: ClipModule) -> None:
        self.trace.stop()
        self.trace.export_chrome_trace(str(self.directory / "trace.json"))
        module.span = no_span
        log.info("%s: for chrome://tracing or https://ui.perfetto.dev", self.directory / "trace.json")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        needed = self.first_step + self.steps + TRACED_STEPS
        if not self.is_on or not trainer.is_global_zero or self.done >= needed:
            return
        log.warning("profile=true: the run has had %d steps here, and %d are needed", self.done, needed)
        if self.trace is not None:
            assert isinstance(module, ClipModule)
            self.write_trace(module)
