"""Evaluation while a run trains: every process takes its share, so that none waits for another into a time-out."""

import functools
import logging
import time
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from clipmini import distributed
from clipmini.callbacks import Monitor
from clipmini.checkpoints.disk import checkpoint_path, keep_best
from clipmini.checkpoints.saving import SaveCheckpoints
from clipmini.cluster import signals
from clipmini.data.tokenizer import Tokenize
from clipmini.ema import Weights
from clipmini.errors import UserError
from clipmini.evaluation.details import write_shown
from clipmini.evaluation.encoder import Encoder, Interrupted
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.results import Row, add_row, find_metric, is_best, keep_rows, log_short, read_rows, row_scalars
from clipmini.evaluation.validation import VALIDATION, HeldOut, validate
from clipmini.module import ClipModule
from clipmini.objective import ContrastiveLoss
from clipmini.one_tower import Model

Kind = TypeVar("Kind", bound=Callback)

log = logging.getLogger(__name__)


class Evaluation(Callback):
    """Evaluates every n steps, keeps the best checkpoint, and is called once more after the last step is saved.

    It changes nothing of the run: not its random numbers, not the mode of its modules, not the order of samples. A
    signal that asks the run to stop is not kept waiting: the evaluation is given up, and done when the run goes on.

    Args:
        evaluator: the sets, and how they are measured.
        held_out: pairs for the validation loss, or None.
        tokenize: of the model.
        output: the run's file of results; a row for each set and step.
        shown: directory of what the run's report shows of the last of them.
        at_start: whether the weights that training begins with are evaluated too.
        every_n_steps: n; None evaluates at the end only.
        best_metric: `val/loss` or SET/METRIC, by which `best` is saved, or None.
        best: where.
        weights: which of the module's are evaluated; checkpoints have both.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        held_out: HeldOut | None,
        tokenize: Tokenize,
        *,
        output: Path,
        shown: Path,
        at_start: bool,
        every_n_steps: int | None,
        best_metric: str | None,
        best: Path,
        weights: Weights,
    ) -> None:
        self.evaluator = evaluator
        self.held_out = held_out
        self.tokenize = tokenize
        self.output = output
        self.shown = shown
        self.at_start = at_start
        self.every_n_steps = every_n_steps
        self.best_metric = best_metric
        self.best = best
        self.weights = weights
        self.best_value: float | None = None
        self.evaluated_step = 0  # the last one
        self.rows: list[Row] = []  # of the last time

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "evaluated_step": self.evaluated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self.evaluated_step = state_dict["evaluated_step"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # what a resumed run does again is written again
            keep_rows(self.output, lambda row: (row.get("step") or 0) <= trainer.global_step)
        if self.at_start and trainer.global_step == 0:
            assert isinstance(module, ClipModule)
            self.evaluate(trainer, module, 0)
        if trainer.global_step > self.evaluated_step:  # given up before the run was stopped
            self.evaluate_if_due(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        start = time.perf_counter()
        if self.evaluate_if_due(trainer, module):
            for monitor in find_callbacks(trainer, Monitor):
                monitor.leave_out(time.perf_counter() - start)

    def evaluate_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Evaluate at every n-th step but the last, which is evaluated when all is done; say whether it was one."""
        assert isinstance(module, ClipModule)
        step, every = trainer.global_step, self.every_n_steps
        is_due = every is not None and step > 0 and step % every == 0 and step < trainer.max_steps
        if is_due:
            self.evaluate(trainer, module, step)
        return is_due

    def evaluate_at_end(self, trainer: pl.Trainer, module: ClipModule) -> None:
        """Evaluate what is trained; every rank must call it.

        Raises:
            Stopped: a process is asked to stop.
        """
        if not self.evaluate(trainer, module, trainer.max_steps):
            for saving in find_callbacks(trainer, SaveCheckpoints):
                saving.stop(trainer.max_steps)

    def evaluate(self, trainer: pl.Trainer, module: ClipModule, step: int) -> bool:
        """Evaluate, log and keep what is found; every rank must call it.

        Returns:
            Whether it came to its end: not if a process is asked to stop.
        """
        device = trainer.strategy.root_device
        try:
            with module.holding(self.weights), module.whole_model(device) as model:
                is_stopping = functools.partial(is_asked_to_stop, trainer)
                encoder = self.evaluator.encoder(model, self.tokenize, device, is_asked_to_stop=is_stopping)
                scalars = self.measure(trainer, module.loss, encoder, step)
        except Interrupted:
            log.info("step %d: the evaluation is given up, since the run is to stop; it is done when it goes on", step)
            for saving in find_callbacks(trainer, SaveCheckpoints):
                saving.stop_at_this_step()
            return False
        self.evaluated_step = step
        if step < trainer.max_steps:
            log_short(self.rows, step)
        for logger in trainer.loggers:
            if scalars:
                logger.log_metrics(scalars, step)
                logger.save()
        if step > 0:  # a run has no checkpoint of what it begins with
            self.save_if_best(trainer, scalars, step)
        return True

    def measure(self, trainer: pl.Trainer, loss: ContrastiveLoss, encoder: Encoder, step: int) -> dict[str, float]:
        """Evaluate on the held-out pairs and the sets, and return the numbers as loggers name them."""
        scalars: dict[str, float] = {}
        if self.held_out is not None:
            found = validate(self.held_out, encoder, loss)
            scalars |= dict(zip(VALIDATION, found.values(), strict=True))
            log.info("step %d: val/loss %.4f, val/accuracy %.1f%%", step, found["loss"], 100 * found["accuracy"])
        self.rows = []
        name = self.output.parent.name
        about = {"model": name if self.weights == "trained" else f"{name} average", "step": step}
        for result in self.evaluator.run(encoder, read_rows(self.output), about):
            self.rows.append(result.row)
            scalars |= row_scalars(result.row)
            if trainer.is_global_zero and result.finding is not None:
                add_row(self.output, result.row)
                write_shown(self.shown, result.opened.dataset, result.finding, result.row, result.estimates)
        return scalars

    def save_if_best(self, trainer: pl.Trainer, scalars: dict[str, float], step: int) -> None:
        """Save a checkpoint if no earlier one was as good."""
        if self.best_metric is None:
            return
        is_of_pairs = self.best_metric in VALIDATION
        value = scalars[self.best_metric] if is_of_pairs else find_metric(self.rows, self.best_metric)
        if value is None:
            raise UserError(f"evaluation.best_metric={self.best_metric}: there are {', '.join(scalars)}")
        known = [] if self.best_value is None else [self.best_value]
        if is_best(value, known, self.best_metric):
            before, self.best_value = self.best_value, value  # which is in the checkpoint too
            told = f"step {step}: {self.best_metric} = {value:.4f} is the best so far"
            if self.save_best(trainer, checkpoint_path(self.best.parent, step)):
                log.info("%s, kept as %s", told, self.best)
            else:
                self.best_value = before  # of what is kept, for those to come
                log.warning("%s, but its checkpoint is not saved, so that it is not kept", told)

    def save_best(self, trainer: pl.Trainer, path: Path) -> bool:
        """Save the checkpoint of this step and make best.ckpt a link to it, if it can be; every rank must call it."""
        if not distributed.from_first(path.exists):
            for saving in find_callbacks(trainer, SaveCheckpoints):
                saving.save(trainer)
                saving.writer.wait()
        return distributed.from_first(lambda: keep_if_saved(path))


def check_best_metric(name: str | None, evaluator: Evaluator, model: Model, held_out: HeldOut | None) -> None:
    """See that the metric by which the best checkpoint is kept will come out of a model.

    Raises:
        UserError: it will not.
    """
    if name in VALIDATION and held_out is None:
        raise UserError(f"evaluation.best_metric={name}: is measured on held-out pairs: set data.val")
    if name is not None:
        evaluator.check_metric(name, model, VALIDATION if held_out else ())


def keep_if_saved(path: Path) -> bool:
    """Make best.ckpt a link to a checkpoint, and say whether that could be done."""
    try:
        if path.exists():
            keep_best(path)
            return True
    except OSError as error:
        log.error("%s cannot be kept as the best: %s", path, error)
    return False


def is_asked_to_stop(trainer: pl.Trainer) -> bool:
    """Say whether a signal asks this process to end, if there is what stops the run."""
    return signals.received() is not None and bool(find_callbacks(trainer, SaveCheckpoints))


def find_callbacks(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return those of a run's callbacks that are of a kind; the config may leave any out."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
