"""Batches of a torch loader whose workers may die: told where a batch is waited for, and in one message."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from clipmini.errors import UserError

SIGNAL_SECONDS = 5.0  # that the signal of a death may come after the end of its pipe


def read_batches(loader: DataLoader, settings: str) -> Iterator[Any]:
    """Yield the batches of a loader.

    Args:
        settings: the keys that its user may change, with their values, for the message.

    Raises:
        UserError: a worker died, or a batch did not come in time.
    """
    try:
        with deaths_raised():
            batches = iter(loader)
        while True:
            with deaths_raised():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (ConnectionError, EOFError) as error:
                    if not loader.num_workers or str(error).startswith("Caught"):
                        raise
                    time.sleep(SIGNAL_SECONDS)  # ended by the signal, if one comes, which says of what it died
                    died = f"DataLoader worker died while it sent a batch ({error or type(error).__name__})"
                    raise RuntimeError(died) from error
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # an error of the data set begins with "Caught"
            raise
        raise UserError(
            f"the data did not come: {' '.join(str(error).split())} ({settings}; a worker that is killed may have had "
            "too little memory); nothing that is saved is lost, the same command goes on"
        ) from error


@contextlib.contextmanager
def deaths_raised() -> Iterator[None]:
    """Have torch tell of workers that died in here, and only in here.

    Its own handler of SIGCHLD raises wherever the main process is just then: in the middle of a log line, where the
    exception is swallowed, or while another one is being reported.

    Raises:
        RuntimeError: a worker has died, in here or before.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
