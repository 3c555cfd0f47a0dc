"""A few pictures of a set with the texts nearest to them, right and wrong: what a number means to the eye."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from clipmini.data.health import Fault
from clipmini.data.picture import make_thumbnail
from clipmini.evaluation.sets import EvaluationSet
from clipmini.evaluation.similarity import similarity

SHOWN = 12  # pictures that were right, and as many that were not
NEAREST = 5  # texts of each
PIXELS = 96  # of the longer side


@dataclass(frozen=True)
class Example:
    """A picture and the texts nearest to it.

    Attributes:
        number: of the picture in its set.
        is_hit: whether the nearest is right.
        right: what is right for it.
        nearest: text, cosine, and whether it is right, the nearest first.
    """

    number: int
    is_hit: bool
    right: tuple[str, ...]
    nearest: tuple[tuple[str, float, bool], ...]


def make_examples(
    image: Tensor,
    text: Tensor,
    names: Sequence[str],
    *,
    hits: np.ndarray,
    right: Callable[[int], Sequence[int]],
    kept: Sequence[int],
) -> tuple[Example, ...]:
    """Choose pictures evenly over a set, right and wrong ones, and tell what is nearest to each.

    Args:
        image: unit vectors of pictures, [n, D].
        text: those of classes or captions, [T, D].
        names: of each of the T.
        hits: whether each picture counts as right, bool [n].
        right: returns which of the T are right for a picture.
        kept: number of each picture in the set.
    """
    chosen = [*spread(np.flatnonzero(hits)), *spread(np.flatnonzero(~hits))]
    scores, columns = similarity(image[chosen], text).topk(min(NEAREST, len(names)), dim=1)
    examples = []
    for row, of_row, values in zip(chosen, columns.tolist(), scores.tolist(), strict=True):
        is_right = right(row)
        nearest = ((names[column], score, column in is_right) for column, score in zip(of_row, values, strict=True))
        texts = tuple(names[column] for column in is_right)
        examples.append(Example(int(kept[row]), bool(hits[row]), texts, tuple(nearest)))
    return tuple(examples)


def spread(rows: np.ndarray) -> list[int]:
    """Return SHOWN of many rows, evenly; all if there are no more."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, SHOWN).round().astype(int))].tolist() if len(rows) else []


def show_examples(dataset: EvaluationSet, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return examples with their pictures, so that who shows them needs no data set."""
    return [{**asdict(one), "picture": thumbnail(dataset, one.number)} for one in examples]


def thumbnail(dataset: EvaluationSet, number: int) -> str | None:
    """Return a small picture as a `data:` URL; None if it cannot be read."""
    try:
        return make_url(dataset.pictures.read(number))
    except Fault:
        return None


def make_url(data: bytes) -> str:
    """Return a small copy of a picture as a `data:` URL.

    Raises:
        Fault: it cannot be decoded.
    """
    return f"data:image/webp;base64,{base64.b64encode(make_thumbnail(data, PIXELS)).decode()}"
