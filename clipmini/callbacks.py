"""What watches a run: measurements for the loggers and the progress display."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from clipmini import distributed
from clipmini.console import ProgressDisplay
from clipmini.module import ClipModule


class Monitor(Callback):
    """Measures the run, and every n steps writes to the loggers and to the screen.

    Between two writes nothing is read back from the device. Values are means over the processes.

    Args:
        log_every_n_steps: n.
    """

    def __init__(self, *, log_every_n_steps: int) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.display: ProgressDisplay | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.display = ProgressDisplay(trainer.max_steps, trainer.global_step) if trainer.is_global_zero else None
        self.window_start = self.batch_end = time.perf_counter()
        self.window_step = trainer.global_step
        self.waited = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.waited += time.perf_counter() - self.batch_end

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.log_every_n_steps == 0 or step == trainer.max_steps:
            self.write(trainer, module, step)
        if self.display:
            self.display.advance(step)
        self.batch_end = time.perf_counter()

    def write(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Read the last step's measurements and pass them on."""
        assert isinstance(module, ClipModule) and trainer.train_dataloader is not None
        names = sorted(module.last)
        values = distributed.all_reduce_mean(torch.stack([module.last[name].float() for name in names])).tolist()
        now = time.perf_counter()
        seconds = now - self.window_start
        steps_per_second = (step - self.window_step) / seconds
        samples_per_second = steps_per_second * trainer.train_dataloader.batch_size
        metrics = {f"train/{name}": value for name, value in zip(names, values, strict=True)}
        metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["throughput/samples_per_second"] = samples_per_second
        metrics["throughput/data_wait"] = self.waited / seconds
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        if self.display:
            text = (
                f"loss {metrics['train/loss']:.3f}  accuracy {metrics['train/accuracy']:.1%}  "
                f"{samples_per_second:.0f} samples/s  data wait {metrics['throughput/data_wait']:.0%}"
            )
            self.display.update(step, text, (trainer.max_steps - step) / steps_per_second)
        self.window_start, self.window_step, self.waited = time.perf_counter(), step, 0.0

    def on_train_end(self, *_: Any) -> None:
        if self.display:
            self.display.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end()
