"""What watches a run: measurements for the loggers and the progress display, bad samples, the ledger."""

import csv
import io
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from clipmini import distributed
from clipmini.console import ProgressDisplay
from clipmini.data.health import BadSample, check_bad_fraction, read_causes, read_quarantine
from clipmini.files import filter_rows
from clipmini.module import ClipModule

log = logging.getLogger(__name__)

LEDGER_HEADER = "step,position,key\n"


class Reading(NamedTuple):
    """What was measured up to a step, in some seconds, as loggers name it."""

    step: int
    seconds: float
    metrics: dict[str, float]


class Monitor(Callback):
    """Measures the run, and every n steps writes to the loggers and to the screen.

    Between two writes nothing is read back from the device. What the step measures is averaged over the processes; the
    time and the wait for data are those of the first.

    Args:
        log_every_n_steps: n.
    """

    def __init__(self, *, log_every_n_steps: int) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.display: ProgressDisplay | None = None
        self.reading: Reading | None = None  # the last

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.display = ProgressDisplay(trainer.max_steps, trainer.global_step) if trainer.is_global_zero else None
        self.start_window(trainer)

    def start_window(self, trainer: pl.Trainer) -> None:
        """Begin to measure what is written next."""
        assert trainer.train_dataloader is not None
        self.window_start = time.perf_counter()
        self.window_step = trainer.global_step
        self.waited_before = trainer.train_dataloader.waited

    def leave_out(self, seconds: float) -> None:
        """Do not count time in which nothing was trained."""
        self.window_start += seconds

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.log_every_n_steps == 0 or step == trainer.max_steps:
            self.write(trainer, module, step)
            self.start_window(trainer)
        if self.display:
            self.display.advance(step)

    def write(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Read the last step's measurements and pass them on."""
        assert isinstance(module, ClipModule) and trainer.train_dataloader is not None
        names = sorted(module.last)
        measured = [*(module.last[name].float() for name in names), *module.guard.unread()]
        values = distributed.all_reduce_mean(torch.stack(measured)).tolist()
        module.guard.take(step, values[len(names) :])
        now = time.perf_counter()
        seconds = now - self.window_start
        steps_per_second = (step - self.window_step) / seconds
        samples_per_second = steps_per_second * trainer.train_dataloader.batch_size
        metrics = {f"train/{name}": value for name, value in zip(names, values, strict=False)}
        metrics["train/bad_steps"] = module.guard.total
        metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["throughput/samples_per_second"] = samples_per_second
        metrics["checkpoint/failures"] = getattr(trainer.strategy.checkpoint_io, "failures", 0)
        metrics["throughput/data_wait"] = (trainer.train_dataloader.waited - self.waited_before) / seconds
        bad = trainer.train_dataloader.health.totals
        metrics |= {"data/bad_samples": bad.total(), **{f"data/{cause}": count for cause, count in bad.items()}}
        self.reading = Reading(step, seconds, metrics)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        if self.display:
            accuracy = metrics.get("train/accuracy")  # squared differences alone have none
            text = (
                f"loss {metrics['train/loss']:.3f}  {'' if accuracy is None else f'accuracy {accuracy:.1%}  '}"
                f"{samples_per_second:.0f} samples/s  data wait {metrics['throughput/data_wait']:.0%}"
            )
            self.display.update(step, text, (trainer.max_steps - step) / steps_per_second)

    def on_train_end(self, *_: Any) -> None:
        if self.display:
            self.display.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end()


class DataHealth(Callback):
    """Collects the bad samples of all processes, lists them, and stops a run that has too many, on all at once.

    Args:
        quarantine: the file with a line of JSON for each of them, as trained: a resumed run takes back what it repeats.
        max_bad_fraction: of the last 10,000 samples.
        every_n_steps: how often.
    """

    def __init__(self, *, quarantine: str, max_bad_fraction: float, every_n_steps: int) -> None:
        self.quarantine = Path(quarantine)
        self.max_bad_fraction = max_bad_fraction
        self.every_n_steps = every_n_steps
        self.next_warning = 1
        self.largest = 0  # number of bad samples in a window

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert trainer.train_dataloader is not None
        self.health = trainer.train_dataloader.health
        samples = trainer.train_dataloader.samples

        def choose(file: TextIO) -> Iterable[str]:
            return (line for line, row in read_quarantine(file) if row["position"] < samples)

        if trainer.is_global_zero:
            filter_rows(self.quarantine, choose)
            self.health.add(read_causes(self.quarantine))
        known = distributed.all_gather_objects((self.health.totals, self.health.recent))
        self.health.totals, self.health.recent = known[0]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self.collect(trainer)
            check_bad_fraction(self.largest, self.max_bad_fraction, self.health.totals, self.quarantine)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, _: dict[str, Any]) -> None:
        self.collect(trainer)  # the list must be as far as the checkpoint

    def collect(self, trainer: pl.Trainer) -> None:
        """Put together what the processes have found; every rank must call it."""
        everyone = distributed.all_gather_objects(self.health.take())
        bad = sorted((bad for of_rank in everyone for bad in of_rank), key=lambda bad: bad.position)
        self.largest = max(self.largest, self.health.add((sample.position, sample.cause) for sample in bad))
        if bad and trainer.is_global_zero:
            self.append(bad)
            self.warn(trainer.global_step)

    def warn(self, step: int) -> None:
        """Tell the first bad samples, and then whenever there are twice as many."""
        total = self.health.totals.total()
        if total >= self.next_warning:
            self.next_warning = 2 * total
            causes = ", ".join(f"{count} {cause}" for cause, count in self.health.totals.most_common())
            log.warning("%d bad samples by step %d (%s), see %s", total, step, causes, self.quarantine)

    def append(self, bad: Iterable[BadSample]) -> None:
        with open(self.quarantine, "a", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(sample.row()) + "\n" for sample in bad)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "health") and (left := self.health.take()):
            self.append(left)


class Ledger(Callback):
    """Writes down every sample as it was trained, where batches carry keys (`data.ledger=true`).

    A file for each process, `rank-00000.csv` and so on, with `step,position,key`. A resumed run takes back the steps
    that it repeats, also those of processes that are no more.

    Args:
        directory: where the files go.
    """

    def __init__(self, *, directory: str) -> None:
        self.directory = Path(directory)
        self.file: TextIO | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step

        def choose(file: TextIO) -> Iterator[str]:
            yield LEDGER_HEADER
            for row in csv.reader(file):
                if len(row) == 3 and row[0] != "step" and int(row[0]) <= step:
                    yield to_csv([(int(row[0]), int(row[1]), row[2])])

        for path in self.directory.glob("rank-*.csv"):
            number = int(path.stem.removeprefix("rank-"))
            if number == trainer.global_rank or (trainer.is_global_zero and number >= trainer.world_size):
                filter_rows(path, choose)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: dict[str, Any], _: int
    ) -> None:
        if "key" not in batch:
            return
        if self.file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / f"rank-{trainer.global_rank:05d}.csv"
            self.file = open(path, "a", newline="", encoding="utf-8", errors="replace")
            if not path.stat().st_size:
                self.file.write(LEDGER_HEADER)
        step = trainer.global_step
        self.file.write(to_csv((step, *pair) for pair in zip(batch["position"], batch["key"], strict=True)))
        self.file.flush()  # before the checkpoint of this step is there

    def on_train_end(self, *_: Any) -> None:
        if self.file:
            self.file.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end()


def to_csv(rows: Iterable[Iterable[object]]) -> str:
    """Write rows as lines of CSV; text in quotes, as keys may hold anything."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
    return text.getvalue()
