"""When checkpoints are saved, and how a run ends when it is asked to: one callback, the last of all."""

import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

import clipmini
from clipmini import distributed
from clipmini.annotations import Limits
from clipmini.checkpoints import disk
from clipmini.checkpoints.writer import DurableCheckpointIO
from clipmini.cluster import signals, slurm
from clipmini.cluster.agreement import Agreement
from clipmini.errors import Stopped, UserError

log = logging.getLogger(__name__)

# What one process may want of all of them.
STOP, SAVE, GIVE_UP = "stop", "save", "give up"


class SaveCheckpoints(Callback):
    """Saves by steps, minutes and samples, at the end, and when a signal asks the run to stop.

    Args:
        directory: where `step-00001000.ckpt` and its like go.
        every_n_steps: how often.
        every_n_minutes: also this long after the last one; None does not look at the time.
        every_n_samples: also when this many more samples have been seen, or None.
        keep_last: how many stay; at least 2, since the newest may turn out to be damaged.
        keep_every_n_steps: those of multiples of this stay for good, or None.
        max_failures: so many checkpoints in a row that cannot be written end the run.
        check_every_seconds: about how often several processes tell each other of signals.
        requeue: under SLURM, put the job back into the queue after a signal that is not Ctrl-C.

    Raises:
        UserError: a limit that is too low.
    """

    def __init__(
        self,
        *,
        directory: str,
        every_n_steps: int,
        every_n_minutes: float | None,
        every_n_samples: int | None,
        keep_last: int,
        keep_every_n_steps: int | None,
        max_failures: int,
        check_every_seconds: float,
        requeue: bool,
    ) -> None:
        Limits(least=1).check("checkpoint.every_n_steps", every_n_steps)
        Limits(least=0.01).check("checkpoint.every_n_minutes", every_n_minutes, float | None)
        Limits(least=1).check("checkpoint.every_n_samples", every_n_samples, int | None)
        Limits(least=2).check("checkpoint.keep_last", keep_last)
        Limits(least=1).check("checkpoint.keep_every_n_steps", keep_every_n_steps, int | None)
        Limits(least=1).check("checkpoint.max_failures", max_failures)
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.every_n_samples = every_n_samples
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.max_failures = max_failures
        self.requeue = requeue
        self.agreement = Agreement([STOP, SAVE, GIVE_UP], every_seconds=check_every_seconds)
        self.agreed: set[str] = set()  # what all processes know of without an exchange
        self.saved_step: int | None = None  # the newest that was begun: all know that, and only the first how it ended
        self.failed_in_a_row = 0
        self.random_states: list[dict[str, Any]] | None = None  # to go back to before the first step

    # What is in a checkpoint beside what Lightning puts there.

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, content: dict[str, Any]) -> None:
        assert trainer.train_dataloader is not None
        content["about"] = {
            "step": trainer.global_step,
            **trainer.train_dataloader.state_dict(),  # samples, and the digest of the plan
            "world_size": trainer.world_size,
            "parts": 1,
            "versions": {
                "clipmini": clipmini.__version__,
                "pytorch-lightning": pl.__version__,
                "torch": str(torch.__version__),  # its own class of text would not load
            },
        }
        content["random_states"] = distributed.all_gather_objects(get_random_state())

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, content: dict[str, Any]) -> None:
        self.random_states = content["random_states"]
        self.saved_step = content["global_step"]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.random_states is not None:  # only here: making the loader's workers draws a number
            set_random_state(self.random_states[trainer.global_rank % len(self.random_states)])
            self.random_states = None

    # When.

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, DurableCheckpointIO)
        self.writer = writer
        self.writer.committed = lambda: disk.prune(self.directory, self.keep_last, self.keep_every_n_steps)
        self.last_save = time.monotonic()
        signals.listen_to_ctrl_c()
        self.ask()
        if STOP in self.agreement.at_start(trainer.global_step):
            self.stop(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        self.look_at_writer()
        self.ask()
        agreed = self.agreement.at_step(step) | self.agreed
        if step == trainer.max_steps or STOP in agreed:
            self.writer.background = False  # nothing is trained beside it, so that it need not be copied
            self.save(trainer)
            self.finish()
        elif SAVE in agreed or self.is_due(trainer):
            self.save(trainer)
        if GIVE_UP in agreed:
            raise UserError(self.tell_failures())
        if STOP in agreed and step < trainer.max_steps:
            self.stop(step)

    def stop_at_this_step(self) -> None:
        """Have the run end after this step; every rank must call it."""
        self.agreed = {STOP}

    def is_due(self, trainer: pl.Trainer) -> bool:
        assert trainer.train_dataloader is not None
        step, batch_size = trainer.global_step, trainer.train_dataloader.batch_size
        of_samples = self.every_n_samples
        by_samples = of_samples is not None and step * batch_size // of_samples > (step - 1) * batch_size // of_samples
        return step % self.every_n_steps == 0 or by_samples

    def ask(self) -> None:
        """Tell the other processes, at the next exchange, what this one has noticed."""
        if signals.received():
            self.agreement.want(STOP)
        minutes = self.every_n_minutes
        if minutes is not None and distributed.rank() == 0 and time.monotonic() - self.last_save > 60 * minutes:
            self.agreement.want(SAVE)
            self.last_save = time.monotonic()
        if self.failed_in_a_row >= self.max_failures:
            self.agreement.want(GIVE_UP)

    # How.

    def save(self, trainer: pl.Trainer) -> Path:
        """Begin to write the checkpoint of this step, once, also if that failed; every rank must call it."""
        path = disk.checkpoint_path(self.directory, trainer.global_step)
        if self.saved_step != trainer.global_step:
            with distributed.patient():
                self.writer.wait()
                self.look_at_writer()
                trainer.save_checkpoint(path, weights_only=False)
            self.saved_step = trainer.global_step
            self.last_save = time.monotonic()
        return path

    def look_at_writer(self) -> None:
        """Notice how the last write ended."""
        if (ended := self.writer.take_result()) is None:
            return
        path, error = ended
        if error is None:
            self.failed_in_a_row = 0
            return
        self.failed_in_a_row += 1
        if not isinstance(error, OSError):
            raise error
        log.error("%s is not saved: %s; the run goes on, and saves again when it is due", path, error)

    def finish(self) -> None:
        """Wait for the last checkpoint; every rank must call it.

        Raises:
            UserError: it cannot be written.
        """
        self.writer.wait()
        self.look_at_writer()
        self.agreement.at_end()
        with distributed.patient():
            has_failed = any(distributed.all_gather_objects(self.failed_in_a_row > 0))
        if has_failed:
            raise UserError(self.tell_failures())

    def tell_failures(self) -> str:
        return (
            f"checkpoints cannot be written to {self.directory} (checkpoint.max_failures={self.max_failures}; what was "
            "wrong is above): make room there, and the same command goes on from the newest one"
        )

    def stop(self, step: int) -> None:
        """End the run, after its checkpoint is on the disk, and have SLURM start it again if it is to.

        Raises:
            Stopped: always.
        """
        received = {number.name: None for number in distributed.all_gather_objects(signals.received()) if number}
        name = " and ".join(received)
        path = disk.checkpoint_path(self.directory, step)
        where = f"{path} is saved" if path.exists() else "there is nothing to save"
        again = "the same command goes on from there"
        # All wait for it: srun may kill the first process when another one has ended.
        if self.requeue and set(received) != {"SIGINT"} and distributed.from_first(slurm.requeue):
            again = "SLURM starts the job again"
        raise Stopped(f"stopped by {name} at step {step}; {where}, {again}")

    def on_train_end(self, *_: Any) -> None:
        signals.stop_listening_to_ctrl_c()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        signals.stop_listening_to_ctrl_c()
        if hasattr(self, "writer"):
            self.writer.hurry()
            self.writer.wait()  # what is being written is good


def get_random_state() -> dict[str, Any]:
    """Return the state of all random number generators of this process, as plain data."""
    numpy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": keys}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    keys = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": keys}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
