"""Metrics against scikit-learn, loops and simulations; their intervals against the normal distribution."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score

from clipmini.evaluation import metrics
from clipmini.evaluation.metrics import Outcome, Queries

RANDOM = np.random.default_rng(0)
NUM_PICTURES = 60
# How often each picture was drawn again: some not at all.
TIMES = RANDOM.integers(0, 4, NUM_PICTURES)
REPEATED = np.repeat(np.arange(NUM_PICTURES), TIMES)


def values(outcome: Outcome) -> dict[str, float]:
    return outcome.measure(np.ones(outcome.count))


def make_classification(indices: np.ndarray | None = None, num_classes: int = 7) -> Outcome:
    """Make ranks of random logits, in a set whose last class has no pictures."""
    random = np.random.default_rng(1)
    labels = random.integers(num_classes - 1, size=NUM_PICTURES)
    ranks = random.integers(num_classes, size=NUM_PICTURES) // 2
    groups = np.array(list("xyz"))[random.integers(3, size=NUM_PICTURES)]
    indices = np.arange(NUM_PICTURES) if indices is None else indices
    return metrics.classification(ranks[indices], labels[indices], num_classes, groups=groups[indices].tolist())


def make_multilabel(indices: np.ndarray | None = None) -> tuple[Outcome, np.ndarray, np.ndarray]:
    """Make scores with many ties, and labels of which one class has none."""
    random = np.random.default_rng(2)
    scores = random.integers(12, size=(NUM_PICTURES, 5)) / 4
    labels = random.integers(3, size=(NUM_PICTURES, 5)) // 2 * [1, 1, 1, 1, 0]
    indices = np.arange(NUM_PICTURES) if indices is None else indices
    return metrics.multilabel(scores[indices], labels[indices]), scores, labels


def make_queries(ranks: np.ndarray, picture: np.ndarray, num_right: np.ndarray | None = None) -> Queries:
    num_right = np.ones(len(ranks), dtype=int) if num_right is None else num_right
    return Queries(ranks, np.zeros(len(ranks), dtype=bool), num_right, 50, picture)


def make_retrieval(indices: np.ndarray | None = None) -> Outcome:
    """Make ranks of pictures, and of three captions each; what is drawn is a picture with its captions."""
    random = np.random.default_rng(3)
    pictures, captions = random.integers(14, size=NUM_PICTURES), random.integers(14, size=(NUM_PICTURES, 3))
    indices = np.arange(NUM_PICTURES) if indices is None else indices
    numbers = np.arange(len(indices))
    return metrics.retrieval(
        make_queries(pictures[indices], numbers),
        make_queries(captions[indices].ravel(), np.repeat(numbers, 3)),
        len(indices),
    )


def make_choice(indices: np.ndarray | None = None) -> Outcome:
    right = np.random.default_rng(4).integers(2, size=(2, NUM_PICTURES)).astype(bool)
    indices = np.arange(NUM_PICTURES) if indices is None else indices
    return metrics.pair_choice({"text": right[0][indices], "image": right[1][indices]}, {"text": 0.5}, "text")


@pytest.mark.parametrize(
    "make", [make_classification, lambda indices=None: make_multilabel(indices)[0], make_retrieval, make_choice]
)
def test_weights_measure_what_units_that_come_so_often_do(make: Callable[..., Outcome]) -> None:
    assert make().measure(TIMES.astype(float)) == pytest.approx(values(make(REPEATED)))


# Intervals


def test_an_interval_is_close_to_that_of_the_normal_distribution() -> None:
    right = np.arange(2000) < 600
    found = metrics.estimate(metrics.pair_choice({"text": right}, {"text": 0.5}, "text"), resamples=2000, seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    assert found["text"].value == 0.3 and found["text"].chance == 0.5
    assert (found["text"].low, found["text"].high) == pytest.approx((0.3 - half, 0.3 + half), abs=half / 10)


def test_intervals_repeat_by_seed() -> None:
    first, again, other = (metrics.estimate(make_classification(), resamples=50, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert {name: one.value for name, one in other.items()} == values(make_classification())
    assert all(one.low <= one.value <= one.high for name, one in first.items() if "group" not in name)


def test_without_resamples_nothing_is_known_of_the_interval() -> None:
    outcome = metrics.pair_choice({"text": np.array([True, False])}, {"text": 0.5}, "text")
    found = metrics.estimate(outcome, resamples=0, seed=0)
    assert found["text"].value == 0.5 and math.isnan(found["text"].low) and math.isnan(found["text"].high)


def test_a_paired_interval_is_that_of_differences_in_each_resample() -> None:
    """Against a plain loop; of the same pictures it is much narrower than if they knew nothing of each other."""
    random = np.random.default_rng(6)
    first = random.random(300) < 0.4
    other = first ^ (random.random(300) < 0.05)
    draws = [
        metrics.estimate(metrics.pair_choice({"text": right}, {"text": 0.5}, "text"), resamples=200, seed=7)["text"]
        for right in (first, other)
    ]
    drawing = np.random.Generator(np.random.Philox(key=7))
    differences = []
    for _ in range(200):
        pictures = drawing.integers(300, size=300)
        hits = sum(int(other[picture]) - int(first[picture]) for picture in pictures)
        differences.append(hits / 300)
    differences.sort()

    def percentile(share: float) -> float:
        place = share * (len(differences) - 1)
        below = math.floor(place)
        return differences[below] + (place - below) * (differences[below + 1] - differences[below])

    low, high = metrics.paired_bounds(draws[0].draws, draws[1].draws)
    assert (low, high) == pytest.approx((percentile(0.025), percentile(0.975)))
    assert high - low < 0.6 * math.hypot(*(one.high - one.low for one in draws))
    missing = metrics.paired_bounds([*draws[0].draws, None], [*draws[1].draws, 1.0])
    assert missing == pytest.approx((low, high))  # a resample in which one of them has no value


# Classification


@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # the one without pictures
def test_classification_equals_scikit_learn() -> None:
    random = np.random.default_rng(5)
    labels, scores = random.integers(6, size=200), random.normal(size=(200, 7))
    scores[np.arange(200), labels] += 1
    ranks = np.array([(row >= row[label]).sum() - 1 for row, label in zip(scores, labels, strict=True)])
    outcome = metrics.classification(ranks, labels, 7, units={"key": range(200)})
    found = values(outcome)
    assert found["acc1"] == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    top5 = np.argsort(scores)[:, -5:]
    assert found["acc5"] == pytest.approx(np.mean([label in row for label, row in zip(labels, top5, strict=True)]))
    assert outcome.chance == pytest.approx({"acc1": 1 / 7, "acc5": 5 / 7, "mean_per_class_recall": 1 / 7})
    assert outcome.facts == {"majority": np.bincount(labels).max() / 200} and outcome.units == {"key": range(200)}


def test_the_worst_group_and_the_gap_by_hand() -> None:
    ranks, labels = np.array([0, 1, 0, 0, 2, 0]), np.array([0, 0, 1, 1, 1, 1])
    outcome = metrics.classification(ranks, labels, 2, groups=["sea", "sea", "land", "land", "land", "air"], chance=0.6)
    expected = {"acc1": 4 / 6, "mean_per_class_recall": (1 / 2 + 3 / 4) / 2, "acc1_worst_group": 0.5, "acc1_gap": 0.5}
    assert values(outcome) == pytest.approx(expected)
    assert outcome.facts == {"majority": 4 / 6, "worst_group": "sea"}
    assert outcome.chance == {"acc1": 0.6, "mean_per_class_recall": 0.5, "acc1_worst_group": 0.6, "acc1_gap": 0.0}
    without_air = outcome.measure(np.array([1.0, 1, 1, 1, 1, 0]))
    assert (without_air["acc1_worst_group"], without_air["acc1_gap"]) == pytest.approx((1 / 2, 2 / 3 - 1 / 2))


def test_collapsed_classification_is_a_miss_everywhere() -> None:
    outcome = metrics.classification(np.full(30, 9), np.arange(30) % 10, 10)
    assert values(outcome) == {"acc1": 0.0, "acc5": 0.0, "mean_per_class_recall": 0.0}


@pytest.mark.parametrize(
    ("name", "main"),
    [("", "acc1"), ("wds_cars", "acc1"), ("wds_vtab-pets", "mean_per_class_recall"), ("wds_vtab-pets-2", "acc1")]
    + [(f"wds_{name}", "mean_per_class_recall") for name in ("fgvc_aircraft", "vtab-flowers", "vtab-caltech101")],
)
def test_the_main_metric_is_that_of_datacomp(name: str, main: str) -> None:
    assert metrics.classification(np.zeros(2, dtype=int), np.array([0, 1]), 2, name=name).main == main


# Labels of which a picture has several


def test_average_precision_equals_scikit_learn() -> None:
    outcome, scores, labels = make_multilabel()
    for weights in (np.ones(NUM_PICTURES), TIMES.astype(float), RANDOM.random(NUM_PICTURES)):
        expected = np.mean(
            [average_precision_score(labels[:, row], scores[:, row], sample_weight=weights) for row in range(4)]
        )
        assert outcome.measure(weights)["mean_average_precision"] == pytest.approx(expected)
    assert labels[:, :4].mean() < outcome.chance["mean_average_precision"] < 1


@pytest.mark.parametrize("value", [0.3, -math.inf, math.nan])
def test_collapsed_scores_get_the_share_of_positives_which_is_below_chance(value: float) -> None:
    _, scores, labels = make_multilabel()
    outcome = metrics.multilabel(np.full_like(scores, value), labels)
    share = labels[:, labels.any(axis=0)].mean()
    assert values(outcome)["mean_average_precision"] == pytest.approx(share)
    assert share < outcome.chance["mean_average_precision"]


def test_no_labels_have_no_average_precision() -> None:
    outcome = metrics.multilabel(np.zeros((3, 2)), np.zeros((3, 2)))
    assert math.isnan(values(outcome)["mean_average_precision"])
    assert math.isnan(outcome.chance["mean_average_precision"])


# Retrieval


def test_retrieval_by_hand() -> None:
    outcome = metrics.retrieval(
        Queries(np.array([0, 4, 20]), np.array([True, False, False]), np.array([1, 2, 1]), 50, np.arange(3)),
        Queries(np.array([0, 0, 9, 30]), np.zeros(4, dtype=bool), np.ones(4, dtype=int), 3, np.array([0, 1, 1, 2])),
        3,
    )
    recalls = {"text_retrieval": (1 / 3, 2 / 3, 2 / 3), "image_retrieval": (2 / 4, 2 / 4, 3 / 4)}
    expected = {f"{side}_recall@{k}": recalls[side][part] for side in recalls for part, k in enumerate((1, 5, 10))}
    expected |= {"text_retrieval_median_rank": 5, "image_retrieval_median_rank": 1, "mean_recall@1": 5 / 12}
    assert values(outcome) == pytest.approx(expected)
    assert outcome.main == "mean_recall@1" and outcome.chance.keys() == expected.keys()
    assert outcome.facts == {"text_retrieval_tied": 1 / 3, "image_retrieval_tied": 0.0}
    weighted = outcome.measure(np.array([0.0, 1.0, 2.0]))
    assert weighted["image_retrieval_recall@1"] == pytest.approx(1 / 4)
    assert (weighted["text_retrieval_median_rank"], weighted["image_retrieval_median_rank"]) == (21, 10)


def test_chance_of_retrieval_is_that_of_random_orders() -> None:
    num_right = np.array([1, 1, 2, 5, 30, 45])
    queries = make_queries(np.zeros(6, dtype=int), np.arange(6), num_right)
    first = np.argsort(RANDOM.random((4000, 6, 50)), axis=2)  # the place of each candidate
    ranks = np.stack([first[:, row, :number].min(1) for row, number in enumerate(num_right)], axis=1)
    chance = queries.chance()
    for k in metrics.RECALL_AT:
        assert chance[f"recall@{k}"] == pytest.approx((ranks < k).mean(), abs=0.01)
    found = [np.mean(ranks < k) for k in range(1, 51)]
    assert chance["median_rank"] == 1 + next(number for number, value in enumerate(found) if value >= 0.5)


def test_chance_is_certain_where_few_are_wrong() -> None:
    assert metrics.chance_of_hit(1, 50, 50) == metrics.chance_of_hit(41, 50, 10) == 1.0
    assert metrics.chance_of_hit(40, 50, 10) == pytest.approx(1 - 1 / math.comb(50, 10))
    assert metrics.chance_of_hit(1, 10**5, 10) == pytest.approx(1e-4)


def test_the_median_rank_is_the_least_that_half_of_the_queries_reach() -> None:
    def median(ranks: list[int], weights: list[float]) -> float:
        return make_queries(np.array(ranks), np.arange(len(ranks))).measure(np.array(weights))["median_rank"]

    assert median([7, 0, 3], [1, 1, 1]) == 4 and median([7, 0, 3, 1], [1, 1, 1, 1]) == 2
    assert median([7, 0, 3], [5, 1, 1]) == 8 and median([7, 0, 3], [0, 3, 0]) == 1


def test_collapsed_retrieval_is_never_above_chance() -> None:
    worst = make_queries(np.full(20, 49), np.arange(20))
    outcome = metrics.retrieval(worst, worst, 20)
    for name, value in values(outcome).items():
        assert value >= outcome.chance[name] if name.endswith("median_rank") else value <= outcome.chance[name]


# Pair choice


def test_choices_are_shares_of_the_examples() -> None:
    right = {"text": np.array([True, False, True, True]), "group": np.array([False, False, True, False])}
    outcome = metrics.pair_choice(right, {"text": 0.5, "group": 1 / 6}, "group")
    assert values(outcome) == {"text": 0.75, "group": 0.25} and outcome.main == "group" and outcome.count == 4
    assert outcome.chance == {"text": 0.5, "group": 1 / 6}
    assert outcome.units == {"text": [True, False, True, True], "group": [False, False, True, False]}


@pytest.mark.parametrize(("num_positive", "count"), [(1, 1), (3, 3), (1, 7), (5, 30)])
def test_chance_of_average_precision_is_that_of_random_orders(num_positive: int, count: int) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(count) < num_positive
    found = [average_precision_score(labels, random.permutation(count)) for _ in range(1000)]
    assert metrics.chance_of_precision(num_positive, count) == pytest.approx(np.mean(found), abs=0.02)
