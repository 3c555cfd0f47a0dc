"""Samples that cannot be used: why, how many, and when it is too many."""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipmini.errors import UserError
from clipmini.redaction import redact_message

# Why a sample cannot be used.
CAUSES = (
    "missing_shard",  # the file is gone, or cannot be opened
    "damaged_shard",  # it is cut short, or no tar from some place on
    "absent_sample",  # it has fewer pairs than were counted
    "too_many_bytes",  # a member over data.max_member_bytes
    "too_many_pixels",  # a picture over data.max_pixels
    "picture",  # there is none, or it cannot be decoded
    "caption",  # there is none, or it is blank or no text
    "json",  # it cannot be read
    "row",  # of a table that is packed: it cannot be read
)
WINDOW = 10_000  # samples in which the bad ones are counted
MAX_IN_A_ROW = 100  # samples tried for one place


class Fault(Exception):
    """A sample that cannot be used.

    Args:
        cause: one of CAUSES.
        detail: the rest of the story, on one line.
    """

    def __init__(self, cause: str, detail: object) -> None:
        assert cause in CAUSES
        self.cause = cause
        self.detail = " ".join(str(detail).split())
        super().__init__(cause, self.detail)


@dataclass(frozen=True)
class BadSample:
    """A sample whose place was taken by another."""

    position: int
    source: str
    shard: str
    index: int
    key: str | None
    cause: str
    detail: str

    def row(self) -> dict[str, Any]:
        """Return what `quarantine.jsonl` says of it."""
        return {**asdict(self), "shard": redact_message(self.shard), "detail": redact_message(self.detail)}


class Health:
    """The bad samples of a run.

    Attributes:
        new: those that this process has found since they were last taken.
        totals: by cause, of all processes and since the start.
        recent: positions of the last bad ones, no two further apart than the window.
    """

    def __init__(self) -> None:
        self.new: list[BadSample] = []
        self.totals: Counter[str] = Counter()
        self.recent: deque[int] = deque()

    def take(self) -> list[BadSample]:
        """Return what this process found since the last call."""
        new, self.new = self.new, []
        return new

    def add(self, causes: Iterable[tuple[int, str]]) -> int:
        """Add the positions and causes of bad samples of all processes, by position.

        Returns:
            The largest number of positions with bad samples in any window that ends at one of them.
        """
        largest = 0
        for position, cause in causes:
            self.totals[cause] += 1
            if not self.recent or position > self.recent[-1]:
                self.recent.append(position)
            while self.recent[0] <= position - WINDOW:
                self.recent.popleft()
            largest = max(largest, len(self.recent))
        return largest


def check_bad_fraction(in_window: int, max_bad_fraction: float, totals: Counter[str], quarantine: object) -> None:
    """Stop a run whose data is too bad.

    Args:
        in_window: bad samples among the last WINDOW.
        max_bad_fraction: of the window.
        totals: bad samples by cause.
        quarantine: the file that lists them.

    Raises:
        UserError: too many.
    """
    if in_window > max_bad_fraction * WINDOW:
        causes = ", ".join(f"{count} {cause}" for cause, count in totals.most_common())
        raise UserError(
            f"{in_window} of the last {WINDOW} samples cannot be used, more than "
            f"data.max_bad_fraction={max_bad_fraction:g} allows (in all: {causes}): {quarantine} lists them; mend the "
            "shards (`clipmini shards verify` finds all that is wrong), or allow more"
        )


def read_quarantine(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a quarantine file with what they say; one that was cut by a kill is left out."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        yield line, row


def read_causes(quarantine: Path) -> Iterator[tuple[int, str]]:
    """Yield position and cause of the bad samples of a run."""
    if quarantine.exists():
        with open(quarantine, encoding="utf-8", errors="replace") as file:
            yield from ((row["position"], row["cause"]) for _, row in read_quarantine(file))
