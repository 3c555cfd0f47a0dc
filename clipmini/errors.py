"""Ends of a run that are told in one message, without a traceback."""

import difflib
from collections.abc import Iterable

STOPPED = 85  # exit code: a run that was asked to stop, and has saved

TOLD = 50  # choices of a list that are told one by one


class UserError(ValueError):
    """A wrong value, file or option, exit code 2; the message names the value, the limit and the key to change."""


class Stopped(Exception):
    """A run was asked to stop and has saved, exit code 85; no KeyboardInterrupt: Lightning exits with 1 after those."""


class ProcessLost(Exception):
    """Another process of the run ended, or did not answer in time; exit code 1, and its own message comes first."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'a' or 'b'?)` for the choices closest to a word, in any case of letters, or nothing."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(by_folded[folded]) for folded in close)}?)" if close else ""


def tell_choices(word: object, choices: Iterable[str]) -> str:
    """Return the choices closest to a word, and all there are or, of a long list, how many: ends a message."""
    known = list(choices)
    which = f"there are: {', '.join(known) or 'none'}" if len(known) <= TOLD else f"{len(known)} are known"
    return f"{did_you_mean(str(word), known)}; {which}"


def check_choice(key: str, value: object, choices: Iterable[str | None]) -> None:
    """See that a value is one of a short list, in which None is null.

    Raises:
        UserError: it is none.
    """
    known = list(choices)
    if value not in known:
        names = ["null" if choice is None else choice for choice in known]
        raise UserError(f"{key}={value}: is one of {', '.join(names)}{did_you_mean(str(value), names)}")
