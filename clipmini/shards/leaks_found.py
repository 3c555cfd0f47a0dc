"""What a search for leaks has found: for each evaluation picture the likest of the training data, and how many."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from clipmini.data.index import Shard
from clipmini.errors import UserError
from clipmini.evaluation.sets import EvaluationSet
from clipmini.redaction import redact_message
from clipmini.shards.scan import Pair, Tally

HASH, MODEL = "hash", "model"  # what finds a pair


class Found:
    """Takes pairs as they are found; holds one for each evaluation picture and kind.

    Args:
        sets: that are looked for.
        shards: of the training data.
        has_model: whether embeddings are compared too.

    Attributes:
        best: the likest pair by what has found it and the number of the evaluation picture.
        counts: how many pairs there are of each.
        of_sets: what became of the pictures of each set.
        of_training: and of those of the training data.
        damaged: shards that could not be read, or not to their end.
    """

    def __init__(self, sets: Sequence[EvaluationSet], shards: Sequence[Shard], *, has_model: bool) -> None:
        self.sets = sets
        self.shards = shards
        self.kinds = (HASH, MODEL) if has_model else (HASH,)
        self.starts = [0, *accumulate(len(dataset.pictures) for dataset in sets)]
        self.best: dict[tuple[str, int], Pair] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.of_sets: list[Tally] = []
        self.of_training = Tally()
        self.damaged = 0

    def add(self, pair: Pair) -> dict[str, Any]:
        """Take a pair, and return what a file says of it."""
        kind = HASH if pair.distance is not None else MODEL
        place = (kind, pair.number)
        self.counts[place] += 1
        if place not in self.best or rank(pair) > rank(self.best[place]):
            self.best[place] = pair
        number, index = self.locate(pair.number)
        score = {"correlation": pair.score} if kind == HASH else {"cosine": pair.score}
        return {
            "set": self.sets[number].name,
            "eval": self.sets[number].pictures.key(index),
            "shard": self.shard_path(pair),
            "key": pair.key,
            "found_by": kind,
            **({"distance": pair.distance} if kind == HASH else {}),
            **{name: round(value, 4) for name, value in score.items()},
        }

    def locate(self, number: int) -> tuple[int, int]:
        """Return the set of an evaluation picture, and its number there."""
        of_set = bisect_right(self.starts, number) - 1
        return of_set, number - self.starts[of_set]

    def shard_path(self, pair: Pair) -> str:
        """Return the path of the training shard of a pair, without secrets."""
        return redact_message(self.shards[pair.shard].path)

    def of_set(self, number: int) -> dict[str, list[int]]:
        """Return the numbers of the pictures of a set that were found, by what has found them, ascending."""
        pictures = range(self.starts[number], self.starts[number + 1])
        return {kind: [picture for picture in pictures if (kind, picture) in self.best] for kind in self.kinds}

    def check_sets(self) -> None:
        """See that there is something to look for.

        Raises:
            UserError: not one picture of a set could be read.
        """
        for dataset, tally in zip(self.sets, self.of_sets, strict=True):
            check_readable(tally, f"eval: {dataset.name}")

    def check_training(self) -> None:
        """See that there was something to look in.

        Raises:
            UserError: not one training picture could be read.
        """
        check_readable(self.of_training, f"train: {len(self.shards)} shards")

    def tell_training(self) -> str:
        """Say what was looked at."""
        tally, damaged = self.of_training, f", {self.damaged:,} of them damaged" if self.damaged else ""
        counts = f"{tally.causes.total():,} unreadable, {tally.plain:,} too plain to be compared"
        return f"{tally.pictures:,} pictures in {len(self.shards):,} shards{damaged}; {counts}"


def rank(pair: Pair) -> tuple[float, int]:
    """Return what is larger for a pair that is more alike."""
    return pair.score, -(pair.distance or 0)


def check_readable(tally: Tally, what: str) -> None:
    """See that a picture could be read.

    Raises:
        UserError: not one.
    """
    if tally.causes.total() >= tally.pictures:
        raise UserError(f"{what}: not one of {tally.pictures:,} pictures can be read ({tally.example or 'none there'})")
