"""Numbers from what was found of each picture, query or example, each with what chance gives and a 95 % interval.

Every metric is a function of weights, one for each unit: weights of one give its value, and those of a bootstrap
resample (how often each unit was drawn) one value of its distribution.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Measure = Callable[[np.ndarray], dict[str, float]]  # float64 [units] to values by name

RECALL_AT = (1, 5, 10)
# Names of what comes out.
RETRIEVAL = (
    *(f"{side}_retrieval_recall@{k}" for side in ("text", "image") for k in RECALL_AT),
    *("text_retrieval_median_rank", "image_retrieval_median_rank", "mean_recall@1"),
)
CHOICES = ("text_acc", "image_acc", "acc")
# Sets that DataComp averages by class (https://github.com/mlfoundations/datacomp, eval_utils/main.py), as in vtab-pets.
BALANCED_SETS = re.compile(r"(.*[-_/])?(caltech101|fgvc_aircraft|flowers|pets)")


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        count: units that can be drawn again: pictures, or examples.
        measure: values by name from weights of the units.
        chance: what guessing gets, for each of those names.
        main: the name that stands for the set.
        facts: what is said beside them and has no interval.
        units: columns with a row for each unit, for a file.
    """

    count: int
    measure: Measure
    chance: Mapping[str, float]
    main: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Estimate(NamedTuple):
    """A metric with the bounds of its 95 % interval, what chance gives, and its value in each bootstrap resample."""

    value: float
    low: float
    high: float
    chance: float
    draws: tuple[float, ...] = ()


def estimate(outcome: Outcome, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Measure an outcome, with percentile bootstrap intervals (Efron and Tibshirani, 1993, chapter 13).

    Args:
        resamples: how often the units are drawn again, with replacement; 0 makes intervals as wide as what is unknown.
        seed: of these draws.
    """
    values = outcome.measure(np.ones(outcome.count))
    random = np.random.Generator(np.random.Philox(key=seed))
    drawn: list[dict[str, float]] = []
    for _ in range(resamples):
        times = np.bincount(random.integers(outcome.count, size=outcome.count), minlength=outcome.count)
        drawn.append(outcome.measure(times.astype(np.float64)))
    estimates = {}
    for name, value in values.items():
        draws = tuple(row[name] for row in drawn)
        estimates[name] = Estimate(float(value), *bounds(draws), outcome.chance[name], draws)
    return estimates


def bounds(draws: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of a value that was drawn again and again; NaNs if it never was."""
    low, high = np.nanpercentile(draws, (2.5, 97.5)) if len(draws) else (math.nan, math.nan)
    return float(low), float(high)


def paired_bounds(first: Sequence[float | None], other: Sequence[float | None]) -> tuple[float, float]:
    """Return the 95 % interval of how far a metric is above another one, in the same resamples of the same units.

    What both find easy or hard varies in both alike, and so takes no part in their difference.

    Args:
        first, other: `Estimate.draws` of both, by the same seed, None for NaN: each pair is of one resample.
    """
    return bounds(np.asarray(other, dtype=np.float64) - np.asarray(first, dtype=np.float64))


def main_classification_metric(name: str) -> str:
    """Return the metric that stands for a classification set, as DataComp has it."""
    return "mean_per_class_recall" if BALANCED_SETS.fullmatch(name) else "acc1"


# Classification


def name_classification(num_classes: int, *, has_groups: bool = False) -> tuple[str, ...]:
    """Return the names of what `classification` measures."""
    top = ("acc1", "acc5") if num_classes >= 5 else ("acc1",)
    return (*top, "mean_per_class_recall", *(("acc1_worst_group", "acc1_gap") if has_groups else ()))


def classification(
    ranks: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    name: str = "",
    chance: float | None = None,
    groups: Sequence[str] | None = None,
    units: Mapping[str, Sequence[Any]] | None = None,
) -> Outcome:
    """Measure top-1, top-5 (where there are 5 classes) and mean per-class recall, over the classes that are present.

    Args:
        ranks: int [N], wrong classes that score as high as the right one or higher, for each picture.
        labels: int [N].
        num_classes: C, more than there are in `labels` perhaps.
        name: of the set.
        chance: of a right guess, where that is not 1 / C.
        groups: a name for each picture: the worst group and the distance to the best are measured too.
        units: more columns.
    """
    hits = {"acc1": (ranks < 1).astype(np.float64)}
    if num_classes >= 5:
        hits["acc5"] = (ranks < 5).astype(np.float64)
    guess = 1 / num_classes if chance is None else chance
    chances = {"acc1": guess, "acc5": max(guess, 5 / num_classes), "mean_per_class_recall": 1 / num_classes}
    names, group_numbers = np.unique([] if groups is None else list(groups), return_inverse=True)

    def measure(weights: np.ndarray) -> dict[str, float]:
        found = {metric: float(weights @ hit / weights.sum()) for metric, hit in hits.items()}
        found["mean_per_class_recall"] = float(np.nanmean(recalls(hits["acc1"], labels, weights)))
        if groups is not None:
            by_group = recalls(hits["acc1"], group_numbers, weights)
            found["acc1_worst_group"] = float(np.nanmin(by_group))
            found["acc1_gap"] = float(np.nanmax(by_group) - np.nanmin(by_group))
        return found

    ones = np.ones(len(ranks))
    facts: dict[str, Any] = {"majority": float(np.bincount(labels).max() / len(labels))}
    if groups is not None:
        chances |= {"acc1_worst_group": guess, "acc1_gap": 0.0}
        by_group = recalls(hits["acc1"], group_numbers, ones)
        facts["worst_group"] = str(names[int(np.nanargmin(by_group))])
    chances = {metric: chances[metric] for metric in measure(ones)}
    return Outcome(len(ranks), measure, chances, main_classification_metric(name), facts, units or {})


def recalls(hits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of hits for each label, float64 [largest label + 1]; NaN for one that no unit has."""
    total = np.bincount(labels, weights)
    return np.divide(np.bincount(labels, weights * hits), total, out=np.full(len(total), np.nan), where=total > 0)


def multilabel(scores: np.ndarray, labels: np.ndarray) -> Outcome:
    """Measure mean average precision, over the classes that have pictures.

    Equal scores share one threshold, as in scikit-learn's `average_precision_score`, so that constant scores get the
    share of pictures that have the class, which is less than what a random order gets. NaNs count against the model.

    Args:
        scores: float [N, C].
        labels: 0 or 1 [N, C].
    """
    scores = np.where(np.isnan(scores), np.where(labels > 0, -np.inf, np.inf), scores).T  # [C, N]
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, 1)
    positive = np.take_along_axis(labels.T.astype(np.float64), order, 1)
    is_last = np.ones_like(positive, dtype=bool)  # of those that share a threshold
    is_last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]

    def measure(weights: np.ndarray) -> dict[str, float]:
        weight = weights[order]
        precisions = []
        for row in range(len(order)):
            last = is_last[row]
            found = np.cumsum(weight[row] * positive[row])[last]  # positives down to each threshold
            seen = np.cumsum(weight[row])[last]
            if found[-1] > 0:
                gained = np.diff(found, prepend=0.0)
                precisions.append((gained * found)[seen > 0] @ (1 / seen[seen > 0]) / found[-1])
        return {"mean_average_precision": float(np.mean(precisions)) if precisions else math.nan}

    chances = [chance_of_precision(int(positives), len(labels)) for positives in labels.sum(axis=0) if positives]
    chance = float(np.mean(chances)) if chances else math.nan
    return Outcome(len(labels), measure, {"mean_average_precision": chance}, "mean_average_precision")


def chance_of_precision(num_positive: int, count: int) -> float:
    """Return the mean average precision of a random order, with num_positive of count pictures that have the class.

    A positive at place i has the precision (1 + others before it) / i: on average over places, with the harmonic
    number H of the count, (P - 1) / (N - 1) + (N - P) / (N - 1) * H / N.
    """
    if count == 1:
        return 1.0
    harmonic = float((1 / np.arange(1, count + 1)).sum())
    return (num_positive - 1) / (count - 1) + (count - num_positive) / (count - 1) * harmonic / count


# Retrieval


@dataclass(frozen=True)
class Queries:
    """What was found of the queries of one direction.

    Attributes:
        ranks: int [Q], wrong candidates that score as high as the best right one or higher.
        is_tied: bool [Q], whether a wrong one scores just as high.
        num_right: int [Q], right candidates.
        num_candidates: of all.
        picture: int [Q], the picture that a query belongs to.
    """

    ranks: np.ndarray
    is_tied: np.ndarray
    num_right: np.ndarray
    num_candidates: int
    picture: np.ndarray

    def measure(self, weights: np.ndarray) -> dict[str, float]:
        """Return recalls and the median rank from weights of the pictures."""
        weight = weights[self.picture]
        found = {f"recall@{k}": float(weight @ (self.ranks < k) / weight.sum()) for k in RECALL_AT}
        order = np.argsort(self.ranks, kind="stable")
        middle = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
        return {**found, "median_rank": float(self.ranks[order][min(middle, len(order) - 1)] + 1)}

    def chance(self) -> dict[str, float]:
        """Return what a random order of the candidates gets."""
        low, high = 1, self.num_candidates  # the smallest k by which half of the queries have a hit
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.chance_of_hit(middle) >= 0.5 else (middle + 1, high)
        return {**{f"recall@{k}": self.chance_of_hit(k) for k in RECALL_AT}, "median_rank": float(low)}

    def chance_of_hit(self, k: int) -> float:
        """Return the mean chance of a right one among the first k in random order."""
        numbers, times = np.unique(self.num_right, return_counts=True)
        return sum(
            int(count) * chance_of_hit(int(number), self.num_candidates, k)
            for number, count in zip(numbers, times, strict=True)
        ) / len(self.num_right)


def chance_of_hit(num_right: int, num_candidates: int, k: int) -> float:
    """Return the chance that k of the candidates, drawn without replacement, hold one of the right ones."""
    if k > num_candidates - num_right:
        return 1.0
    few, many = sorted((num_right, k))  # the chance is the same with the two exchanged
    missed = sum(math.log1p(-many / (num_candidates - drawn)) for drawn in range(few))
    return -math.expm1(missed)


def retrieval(image_to_text: Queries, text_to_image: Queries, num_pictures: int) -> Outcome:
    """Measure both directions under CLIP_benchmark's names: `text_retrieval_...` has pictures as queries.

    What is drawn again for the interval is a picture with all its captions, as those are not independent.
    """
    directions = {"text_retrieval": image_to_text, "image_retrieval": text_to_image}

    def combine(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        named = {f"{side}_{name}": value for side, values in parts.items() for name, value in values.items()}
        firsts = [named[f"{side}_recall@1"] for side in directions]
        return {**named, "mean_recall@1": sum(firsts) / len(firsts)}

    return Outcome(
        num_pictures,
        lambda weights: combine({side: queries.measure(weights) for side, queries in directions.items()}),
        combine({side: queries.chance() for side, queries in directions.items()}),
        "mean_recall@1",
        {f"{side}_tied": float(queries.is_tied.mean()) for side, queries in directions.items()},
    )


# Pair choice


def pair_choice(right: Mapping[str, np.ndarray], chance: Mapping[str, float], main: str) -> Outcome:
    """Measure the share of examples in which each choice was right.

    Args:
        right: bool [N] by name.
        chance: by the same names.
        main: one of them.
    """
    count = len(right[main])
    return Outcome(
        count,
        lambda weights: {name: float(weights @ values / weights.sum()) for name, values in right.items()},
        chance,
        main,
        units={name: values.tolist() for name, values in right.items()},
    )
