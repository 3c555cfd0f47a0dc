"""Captions of like lengths are encoded together, at the least cost, and are what they would be else."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import make_model
from test_module import make_batch, make_module

from clipmini import lengths as module_lengths
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.lengths import MAX_PARTS, MULTIPLE, count_used, group_by_length
from clipmini.model import encode_text


def cost(groups: list[tuple[np.ndarray, int]], group_cost: int) -> int:
    return sum(len(rows) * length + group_cost for rows, length in groups)


@pytest.mark.parametrize("group_cost", [0, 30, 200, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_groups_have_the_least_cost(seed: int, group_cost: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 45, size=generator.integers(1, 31))
    groups = group_by_length(counts, 43, group_cost)
    assert sorted(np.concatenate([rows for rows, _ in groups]).tolist()) == list(range(len(counts)))
    for rows, length in groups:
        assert length == 43 or length % MULTIPLE == 0
        assert np.minimum(counts[rows], 43).max() <= length
    rounded = np.minimum(-(-counts // MULTIPLE) * MULTIPLE, 43)
    edges = np.unique(rounded)
    least = min(
        sum(
            int(((rounded > low) & (rounded <= high)).sum()) * high + group_cost
            for low, high in itertools.pairwise((0, *sorted({*chosen, edges[-1]})))
        )
        for number in range(len(edges))
        for chosen in itertools.combinations(edges[:-1], number)
    )
    assert cost(groups, group_cost) == least


def test_groups_of_large_batches_have_few_sizes() -> None:
    counts = np.random.default_rng(0).integers(1, 78, size=512)
    groups = group_by_length(counts, 77, 0)
    assert len(groups) > 5 and all(len(rows) % (512 // MAX_PARTS) == 0 for rows, _ in groups)
    assert all(counts[rows].max() <= length for rows, length in groups)
    assert sorted(np.concatenate([rows for rows, _ in groups]).tolist()) == list(range(512))


def test_tokens_are_counted_up_to_the_last() -> None:
    text = torch.tensor([[5, 0, 7, 0], [5, 7, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert count_used(text, 0).tolist() == [3, 2, 1, 4]
    assert ClipTokenizer(24)(["a dog", ""]).shape[1] == 24
    assert count_used(ClipTokenizer(24)(["a dog", ""]), 0).tolist() == [4, 2]


def test_features_and_gradients_do_not_depend_on_groups(tiny_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(str(tiny_json)).double()
    text = ClipTokenizer(24)(["a dog", "a much longer caption about a cat on a mat", "!", "two cats", "a " * 30])
    lengths = count_used(text, 0)
    found = {}
    for group_cost in (0, 20, 10**6):
        monkeypatch.setitem(module_lengths.GROUP_COST, "cpu", group_cost)
        model.zero_grad()
        features = encode_text(model, text, lengths)
        (features * torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view_as(features)).sum().backward()
        gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        found[len(module_lengths.split(text, lengths)[0])] = (features.detach(), gradients)
    assert len(found) == 3 and 1 in found
    for features, gradients in found.values():
        torch.testing.assert_close(features, found[1][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients, found[1][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_step_does_not_depend_on_groups(
    micro_batch: int | None, tiny_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(12)
    lengths = {f"{name}_length": count_used(batch[name], 0) for name in ("text", "negative_text")}
    assert len({*lengths["text_length"].tolist()}) > 1
    found = []
    for more in ({}, lengths):
        monkeypatch.setitem(module_lengths.GROUP_COST, "cpu", 0)
        module = make_module(str(tiny_json), micro_batch=micro_batch)
        module.training_step({**batch, **more}, 0).backward()
        found.append({name: part.grad for name, part in module.named_parameters() if part.grad is not None})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
