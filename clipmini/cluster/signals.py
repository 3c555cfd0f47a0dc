"""Signals that ask a run to end: they are noted, and the run ends where all of its processes can."""

import os
import signal
import sys
import time
from types import FrameType

# What schedulers send before they kill: SIGTERM, and SIGUSR1 or SIGUSR2 where a job asks for it (NCCL may use SIGUSR1).
OF_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A terminal and torchrun both pass a Ctrl-C on, so that one comes twice.
SECONDS_OF_ONE_CTRL_C = 1.0

_received: signal.Signals | None = None
_first_ctrl_c: float | None = None


def listen() -> None:
    """Note the signals of schedulers from now on; that a run is not ended by them is for the caller to see to."""
    global _received
    _received = None
    for number in OF_SCHEDULERS:
        signal.signal(number, _note)


def listen_to_ctrl_c() -> None:
    """Note the first Ctrl-C too; the second one ends the process at once."""
    global _first_ctrl_c
    _first_ctrl_c = None
    signal.signal(signal.SIGINT, _note_ctrl_c)


def stop_listening_to_ctrl_c() -> None:
    """Let Ctrl-C raise a KeyboardInterrupt again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_listening() -> None:
    """Give these signals back what Python and the system do with them."""
    stop_listening_to_ctrl_c()
    for number in OF_SCHEDULERS:
        signal.signal(number, signal.SIG_DFL)


def ignore() -> None:
    """Ignore the signals of schedulers: the process is about to end, and they would change its exit code."""
    for number in OF_SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)


def received() -> signal.Signals | None:
    """Return the first signal that was noted."""
    return _received


def _note(number: int, _: FrameType | None) -> None:
    global _received
    _received = _received or signal.Signals(number)


def _note_ctrl_c(number: int, frame: FrameType | None) -> None:
    global _first_ctrl_c
    now = time.monotonic()
    if _first_ctrl_c is None:
        _first_ctrl_c = now
        _note(number, frame)
    elif now - _first_ctrl_c > SECONDS_OF_ONE_CTRL_C:
        sys.stderr.write("clipmini: interrupted twice\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
