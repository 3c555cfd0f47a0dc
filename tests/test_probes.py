"""Probes against scikit-learn and loops, and on embeddings that tell nothing."""

import logging
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipmini.errors import UserError
from clipmini.evaluation import probes
from clipmini.evaluation.probes import linear_probe, nearest_neighbours

NUM_CLASSES, WIDTH = 5, 12


def make_set(count: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make unit vectors around one for each class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    around = torch.eye(NUM_CLASSES, WIDTH)[labels] + noise * torch.randn(count, WIDTH, generator=generator)
    return F.normalize(around, dim=-1), labels


def make_sets(noise: float) -> dict[str, Any]:
    (train, train_labels), (test, test_labels) = make_set(90, noise), make_set(40, noise, seed=1)
    return {"train": train, "train_labels": train_labels, "test": test, "test_labels": test_labels}


def constant(sets: dict[str, Any], value: float) -> dict[str, Any]:
    return {**sets, **{name: torch.full_like(sets[name], value) for name in ("train", "test")}}


def vote_by_hand(sets: dict[str, Any], k: int, temperature: float) -> list[list[float]]:
    votes = []
    for row in sets["test"].double():
        scores = (sets["train"].double() @ row).tolist()
        nearest = sorted(range(len(scores)), key=scores.__getitem__)[-k:]
        found = [0.0] * NUM_CLASSES
        for neighbour in nearest:
            found[int(sets["train_labels"][neighbour])] += math.exp(scores[neighbour] / temperature)
        votes.append(found)
    return votes


def test_both_tell_apart_what_is_apart() -> None:
    sets = make_sets(0.05)
    ranks, predictions = nearest_neighbours(**sets, num_classes=NUM_CLASSES, k=7)
    assert (ranks == 0).all() and torch.equal(predictions, sets["test_labels"])
    ranks, predictions, _ = linear_probe(**sets, num_classes=NUM_CLASSES, l2=None, seed=0)
    assert (ranks == 0).all() and torch.equal(predictions, sets["test_labels"])


# Nearest neighbours


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 7, 90])
def test_votes_equal_a_loop(k: int, temperature: float, chunk_size: int) -> None:
    sets = make_sets(0.5)
    options = {"k": k, "temperature": temperature, "chunk_size": chunk_size}
    ranks, predictions = nearest_neighbours(**sets, num_classes=NUM_CLASSES, **options)
    assert 0 < (ranks > 0).sum() < len(ranks)
    for votes, label, rank, prediction in zip(
        vote_by_hand(sets, k, temperature), sets["test_labels"].tolist(), ranks.tolist(), predictions, strict=True
    ):
        assert rank == sum(not vote < votes[label] for vote in votes) - 1
        assert votes[prediction] == max(votes)


def count(scores: list[float], train_labels: list[int], label: int, k: int) -> list[float]:
    arguments = torch.tensor([scores]), torch.tensor(train_labels), torch.tensor([label])
    return probes.count_votes(*arguments, 3, k, 1.0)[0].tolist()


def test_open_places_go_to_other_classes() -> None:
    # One is certain, and of the three that tie at 0 two are among the nearest three.
    scores, weight = [1.0, 0.0, 0.0, 0.0, -1.0], math.exp(-1)
    assert count(scores, [0, 0, 1, 1, 2], 0, 3) == pytest.approx([1, 2 * weight, 0])
    assert count(scores, [0, 0, 1, 1, 2], 1, 3) == pytest.approx([1 + weight, weight, 0])
    assert count(scores, [0, 0, 0, 1, 2], 0, 3) == pytest.approx([1 + weight, weight, 0])
    assert count(scores, [0, 0, 0, 1, 2], 2, 3) == pytest.approx([1 + 2 * weight, weight, 0])
    assert count(scores, [0, 0, 1, 1, 2], 0, 4) == pytest.approx([1 + weight, 2 * weight, 0])  # none is open


def test_votes_are_the_worst_of_all_ways_to_fill_the_places() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        labels = torch.randint(3, (8,), generator=generator).tolist()
        scores = (torch.randint(3, (8,), generator=generator) / 2).tolist()
        k, label = (int(torch.randint(high, (), generator=generator)) for high in (8, 3))
        last = sorted(scores)[-k - 1]
        certain = Counter({number: 0.0 for number in range(3)})
        for score, number in zip(scores, labels, strict=True):
            certain[number] += math.exp(score - max(scores)) * (score > last)
        tied = [number for score, number in zip(scores, labels, strict=True) if score == last]
        places = k + 1 - sum(score > last for score in scores)
        ways = [[tied[i] for i in range(len(tied)) if mask >> i & 1] for mask in range(1 << len(tied))]
        counts = [Counter(way) for way in ways if len(way) == places]
        weight = math.exp(last - max(scores))
        expected = [
            certain[number] + weight * (min if number == label else max)(way[number] for way in counts)
            for number in range(3)
        ]
        assert count(scores, labels, label, k + 1) == pytest.approx(expected)


@pytest.mark.parametrize("value", [12**-0.5, 0.0, torch.nan])
@pytest.mark.parametrize("k", [1, 20])
def test_collapsed_embeddings_find_no_class(k: int, value: float) -> None:
    sets = constant(make_sets(0.05), value)
    ranks, predictions = nearest_neighbours(**sets, num_classes=NUM_CLASSES, k=k, chunk_size=9)
    assert (ranks >= 1).all() and (predictions != sets["test_labels"]).all()


def test_what_is_nan_is_no_neighbour() -> None:
    sets = make_sets(0.5)
    options = {"num_classes": NUM_CLASSES, "k": 7}
    expected, _ = nearest_neighbours(**sets, **options)
    train = torch.cat([torch.full((9, WIDTH), torch.nan), sets["train"]])
    labels = torch.cat([torch.zeros(9, dtype=torch.long), sets["train_labels"]])
    ranks, _ = nearest_neighbours(**{**sets, "train": train, "train_labels": labels}, **options)
    assert torch.equal(ranks, expected)


@pytest.mark.parametrize("k", [0, 91])
def test_more_neighbours_than_pictures_are_told(k: int) -> None:
    with pytest.raises(UserError, match=f"knn_k={k}: must be 1 to 90, the number of training pictures"):
        nearest_neighbours(**make_sets(0.5), num_classes=NUM_CLASSES, k=k)


# Linear probe


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_weights_equal_those_of_scikit_learn(l2: float) -> None:
    sets = make_sets(0.5)
    train, labels = sets["train"].double(), sets["train_labels"]
    weights = torch.zeros(NUM_CLASSES, WIDTH + 1, dtype=torch.float64)
    assert probes.fit(probes.add_one(train), labels, weights, l2, 1000) <= probes.TOLERANCE
    theirs = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000).fit(train.numpy(), labels.numpy())
    torch.testing.assert_close(weights[:, :-1], torch.from_numpy(theirs.coef_), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights[:, -1], torch.from_numpy(theirs.intercept_), rtol=1e-4, atol=1e-4)

    ranks, predictions, used = linear_probe(**sets, num_classes=NUM_CLASSES, l2=l2, seed=0)
    assert used == l2 and predictions.tolist() == theirs.predict(sets["test"].double().numpy()).tolist()
    logits = torch.from_numpy(theirs.decision_function(sets["test"].double().numpy()))
    assert torch.equal(ranks, (logits >= logits.gather(1, sets["test_labels"][:, None])).sum(1) - 1)


def test_l2_is_chosen_on_held_out_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (len(probes.STRENGTHS), max(probes.STRENGTHS), min(probes.STRENGTHS)) == (9, 1e2, 1e-6)
    monkeypatch.setattr(probes, "STRENGTHS", (1.0, 1e-2, 1e-3, 1e-4))
    sets = make_sets(0.5)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    held_out, kept = order[:18], order[18:]
    quality = {}
    for l2 in probes.STRENGTHS:
        weights = torch.zeros(NUM_CLASSES, WIDTH + 1, dtype=torch.float64)
        probes.fit(probes.add_one(sets["train"][kept]), sets["train_labels"][kept], weights, l2, 1000)
        logits, labels = probes.add_one(sets["train"][held_out]) @ weights.T, sets["train_labels"][held_out]
        quality[l2] = int((logits.argmax(1) == labels).sum()), -float(F.cross_entropy(logits, labels))
    best = max(quality, key=quality.__getitem__)
    assert 1e-4 < best < 1.0
    found = linear_probe(**sets, num_classes=NUM_CLASSES, l2=None, seed=3)
    again = linear_probe(**sets, num_classes=NUM_CLASSES, l2=best, seed=0)
    assert found[2] == best and torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("value", [12**-0.5, 0.0])
@pytest.mark.parametrize("l2", [None, 1e-3])
def test_collapsed_embeddings_get_the_most_frequent_class(l2: float | None, value: float) -> None:
    sets = constant(make_sets(0.5), value)
    sets["train_labels"][:10] = 1
    ranks, predictions, _ = linear_probe(**sets, num_classes=NUM_CLASSES, l2=l2, seed=0)
    assert (predictions == 1).all() and torch.equal(ranks == 0, sets["test_labels"] == 1)


def test_a_class_without_pictures_and_fp16_and_inference_mode() -> None:
    sets = make_sets(0.05)
    half = {name: value.half() if value.is_floating_point() else value for name, value in sets.items()}
    with torch.inference_mode():
        ranks, _, _ = linear_probe(**half, num_classes=NUM_CLASSES + 2, l2=1e-4, seed=0)
        neighbours, _ = nearest_neighbours(**half, num_classes=NUM_CLASSES + 2, k=5)
    assert (ranks == 0).all() and (neighbours == 0).all()


def test_equal_logits_are_no_hit() -> None:
    ranks, predictions = probes.rank_and_predict(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([0, 1]))
    assert ranks.tolist() == [1, 0] and predictions.tolist() == [1, 1]


def test_too_few_iterations_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        linear_probe(**make_sets(0.5), num_classes=NUM_CLASSES, l2=1e-6, seed=0, max_iterations=3)
    assert r"l2=1e-06) did not converge in 3 iterations: its gradient is " in caplog.text
    caplog.clear()
    linear_probe(**make_sets(0.5), num_classes=NUM_CLASSES, l2=1e-2, seed=0)
    assert not caplog.text


@pytest.mark.parametrize(("name", "kind"), [("train", "training"), ("test", "test")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_embeddings_that_are_not_finite_are_told(name: str, kind: str, value: float) -> None:
    sets = make_sets(0.5)
    sets[name][:2, 3] = value
    with pytest.raises(UserError, match=f"the linear probe: 2 of {len(sets[name])} {kind} embeddings are not finite"):
        linear_probe(**sets, num_classes=NUM_CLASSES, l2=1.0, seed=0)


def test_too_few_pictures_to_choose_l2_on_are_told() -> None:
    sets = make_sets(0.5)
    few = {**sets, "train": sets["train"][:4], "train_labels": sets["train_labels"][:4]}
    with pytest.raises(UserError, match="l2 cannot be chosen on 4 training pictures"):
        linear_probe(**few, num_classes=NUM_CLASSES, l2=None, seed=0)
