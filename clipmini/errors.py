"""Ends of a run that are told in one message, without a traceback."""

import difflib
from collections.abc import Iterable

STOPPED = 85  # exit code: a run that was asked to stop, and has saved


class UserError(ValueError):
    """A wrong value, file or option, exit code 2; the message names the value, the limit and the key to change."""


class Stopped(Exception):
    """A run was asked to stop and has saved, exit code 85; no KeyboardInterrupt: Lightning exits with 1 after those."""


class ProcessLost(Exception):
    """Another process of the run ended, or did not answer in time; exit code 1, and its own message comes first."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'a' or 'b'?)` for the choices closest to a word, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(choice) for choice in close)}?)" if close else ""
