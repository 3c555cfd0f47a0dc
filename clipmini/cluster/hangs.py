"""Runs that hang: they end after some time, and say where."""

import faulthandler
import os
import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from clipmini import distributed
from clipmini.errors import ProcessLost, UserError

# What torch's errors say when another process is gone or silent: gloo's, the store's, NCCL's.
SIGNS_OF_LOSS = (
    *("closed by peer", "reset by peer", "pair closure", "Broken pipe"),
    *("Timed out waiting", "timed out", "Socket Timeout"),
    *("Connection refused", "No route to host", "ncclRemoteError", "collective operation timeout", "unhandled system"),
)


def record_collectives(directory: str) -> None:
    """Have NCCL keep its last collectives, and write them down when one hangs; before torch makes its groups.

    `torchfrtrace` reads them.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.path.join(directory, "collectives_rank_"))


def explain_lost_process(error: Exception, timeout: float) -> None:
    """Tell in one message that another process is gone or silent, if that is what an error of a collective says.

    Raises:
        ProcessLost: it is.
    """
    text = " ".join(str(error).split())
    if any(sign in text for sign in SIGNS_OF_LOSS):
        raise ProcessLost(
            f"another process of this run ended, or did not answer within timeouts.step={timeout:g} seconds; what it "
            f"says itself is the cause, here there is only: {text[:300]}. Nothing is lost, the same command goes on "
            "from the last checkpoint"
        ) from error


class Watchdog(Callback):
    """Ends a run that hangs, and prints where each process is when a step takes too long; the first of all callbacks.

    Args:
        step: seconds that the processes wait for one another in a step, from the second one on.
        stacks: seconds of a step after which a process prints the stacks of its threads to stderr.
        data_timeout: seconds that the loader waits for a batch: it must give up first, since it knows why.

    Raises:
        UserError: values that do not fit together.
    """

    def __init__(self, *, step: float, stacks: float, data_timeout: float) -> None:
        if not data_timeout < step or not 0 < stacks:
            raise UserError(
                f"timeouts.step={step:g} must be above data.timeout={data_timeout:g}, and timeouts.stacks={stacks:g} "
                "above 0"
            )
        self.step = step
        self.stacks = stacks
        self.is_first = True

    def on_train_batch_start(self, *_: Any) -> None:
        if sys.__stderr__ is not None:  # not what took its place, which may be no file
            faulthandler.dump_traceback_later(self.stacks, file=sys.__stderr__)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.is_first:
            self.is_first = False
            distributed.set_timeout(self.step)

    def on_train_end(self, *_: Any) -> None:
        distributed.reset_timeout()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        faulthandler.cancel_dump_traceback_later()
