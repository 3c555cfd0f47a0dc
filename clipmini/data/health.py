"""Samples that cannot be used: why, how many, and when it is too many."""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipmini.errors import UserError

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
WINDOW = 10_000  # samples, over all processes, in which the bad ones are counted
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
        return asdict(self)


class Health:
    """Counts the bad samples of this process.

    Args:
        world_size: processes that share the window.
    """

    def __init__(self, world_size: int) -> None:
        self.window = WINDOW // world_size
        self.batches: deque[tuple[int, int]] = deque()  # samples and bad ones of the last batches
        self.seen = 0  # samples in those batches
        self.new: list[BadSample] = []
        self.totals: Counter[str] = Counter()  # by cause, of all processes and since the start, as last added up

    def record(self, num_samples: int, bad: list[BadSample]) -> None:
        """Add a batch."""
        self.batches.append((num_samples, len(bad)))
        self.seen += num_samples
        while len(self.batches) > 1 and self.seen - self.batches[0][0] >= self.window:
            self.seen -= self.batches.popleft()[0]
        self.new += bad

    def in_window(self) -> int:
        """Return how many of the last samples were bad."""
        return sum(bad for _, bad in self.batches)

    def take(self) -> list[BadSample]:
        """Return what was found bad since the last call."""
        new, self.new = self.new, []
        return new


def check_bad_fraction(in_window: int, max_bad_fraction: float, counts: Counter[str], quarantine: object) -> None:
    """Stop a run whose data is too bad.

    Args:
        in_window: bad samples among the last WINDOW of all processes.
        max_bad_fraction: of the window.
        counts: bad samples by cause.
        quarantine: the file that lists them.

    Raises:
        UserError: too many.
    """
    if in_window > max_bad_fraction * WINDOW:
        causes = ", ".join(f"{count} {cause}" for cause, count in counts.most_common())
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


def count_causes(quarantine: Path) -> Counter[str]:
    """Count the bad samples of a run by cause."""
    if not quarantine.exists():
        return Counter()
    with open(quarantine, encoding="utf-8", errors="replace") as file:
        return Counter(row["cause"] for _, row in read_quarantine(file))
