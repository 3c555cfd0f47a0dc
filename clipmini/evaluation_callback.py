"""Evaluation while a run trains: every process takes its share, so that none waits for another into a time-out."""

import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from clipmini import distributed
from clipmini.callbacks import Monitor
from clipmini.checkpoint import keep_best
from clipmini.data.tokenizer import Tokenize
from clipmini.errors import UserError
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.results import Row, add_row, find_metric, is_best, keep_rows, log_short, read_rows, row_scalars
from clipmini.evaluation.validation import HeldOut, validate
from clipmini.module import ClipModule

log = logging.getLogger(__name__)


class Evaluation(Callback):
    """Evaluates every n steps, keeps the best checkpoint, and is called once more after the last step is saved.

    It changes nothing of the run: not its random numbers, not the mode of its modules, not the order of samples.

    Args:
        evaluator: the sets, and how they are measured.
        held_out: pairs for the validation loss, or None.
        tokenize: of the model.
        output: the run's file of results; a row for each set and step.
        every_n_steps: n; None evaluates at the end only.
        best_metric: `val/loss` or SET/METRIC, by which `best` is saved, or None.
        best: where.

    Raises:
        UserError: n below 1, or a best_metric that cannot come out.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        held_out: HeldOut | None,
        tokenize: Tokenize,
        *,
        output: Path,
        every_n_steps: int | None,
        best_metric: str | None,
        best: Path,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"evaluation.every_n_steps={every_n_steps}: must be 1 or more, or null")
        known = [f"{opened.dataset.name}/" for opened in evaluator.opened] + (["val/"] if held_out else [])
        if best_metric is not None and not best_metric.startswith(tuple(known)):
            raise UserError(
                f"evaluation.best_metric={best_metric}: is val/loss (with data.val) or SET/METRIC of "
                f"evaluation.datasets; there are: {', '.join(known) or 'none'}"
            )
        self.evaluator = evaluator
        self.held_out = held_out
        self.tokenize = tokenize
        self.output = output
        self.every_n_steps = every_n_steps
        self.best_metric = best_metric
        self.best = best
        self.best_value: float | None = None
        self.rows: list[Row] = []  # of the last time

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # what a resumed run does again is written again
            keep_rows(self.output, lambda row: (row.get("step") or 0) <= trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step < trainer.max_steps:
            assert isinstance(module, ClipModule)
            start = time.perf_counter()
            self.evaluate(trainer, module, step)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Monitor):
                    callback.leave_out(time.perf_counter() - start)

    def evaluate(self, trainer: pl.Trainer, module: ClipModule, step: int) -> None:
        """Evaluate the weights as they are; every rank must call it."""
        encoder = self.evaluator.encoder(module.model, self.tokenize, trainer.strategy.root_device)
        scalars: dict[str, float] = {}
        if self.held_out is not None:
            found = validate(self.held_out, encoder, module.loss)
            scalars |= {f"val/{name}": value for name, value in found.items()}
            log.info("step %d: val/loss %.4f, val/accuracy %.1f%%", step, found["loss"], 100 * found["accuracy"])
        self.rows = []
        about = {"model": self.output.parent.name, "step": step}
        for result in self.evaluator.run(encoder, read_rows(self.output), about):
            self.rows.append(result.row)
            scalars |= row_scalars(result.row)
            if trainer.is_global_zero and result.finding is not None:
                add_row(self.output, result.row)
        if step < trainer.max_steps:
            log_short(self.rows, step)
        for logger in trainer.loggers:
            if scalars:
                logger.log_metrics(scalars, step)
                logger.save()
        self.save_if_best(trainer, scalars, step)

    def save_if_best(self, trainer: pl.Trainer, scalars: dict[str, float], step: int) -> None:
        """Save a checkpoint if no earlier one was as good."""
        if self.best_metric is None:
            return
        is_loss = self.best_metric.startswith("val/")
        value = scalars.get(self.best_metric) if is_loss else find_metric(self.rows, self.best_metric)
        if value is None:
            raise UserError(f"evaluation.best_metric={self.best_metric}: there are {', '.join(scalars)}")
        known = [] if self.best_value is None else [self.best_value]
        if is_best(value, known, self.best_metric):
            self.best_value = value
            self.save_best(trainer, self.best.with_name(f"step-{step:08d}.ckpt"))
            log.info("step %d: %s = %.4f is the best so far, kept as %s", step, self.best_metric, value, self.best)

    def save_best(self, trainer: pl.Trainer, same: Path) -> None:
        """Save the best checkpoint, or give what is saved already another name; every rank must call it."""
        if not all(distributed.all_gather_objects(same.exists())):
            trainer.save_checkpoint(self.best)
        elif trainer.is_global_zero:
            keep_best(same)
