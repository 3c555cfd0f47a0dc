"""The order: every sample once an epoch, weights exact, the same everywhere."""

import hashlib

import numpy as np
import pytest

from clipmini.data.manifest import Manifest, Shard, Source
from clipmini.data.plan import CYCLE, Plan
from clipmini.errors import UserError


def make_source(number: int, sizes: list[int], weight: float) -> Source:
    """Make a source of shards of these sizes."""
    return Source(str(number), weight, tuple(Shard(f"{number}-{index}.tar", size) for index, size in enumerate(sizes)))


def make_plan(*sources: tuple[list[int], float], seed: int = 0) -> Plan:
    """Make a plan of sources, each given by the sizes of its shards and its weight."""
    return Plan(Manifest(tuple(make_source(number, *source) for number, source in enumerate(sources))), seed)


def test_every_sample_once_in_each_epoch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        sizes = [int(size) for size in rng.integers(1, 40, size=rng.integers(1, 12))]
        plan, total = make_plan((sizes, 1.0)), sum(sizes)
        everything = {(0, shard, index) for shard, size in enumerate(sizes) for index in range(size)}
        for epoch in range(3):
            found = [plan.lookup(position) for position in range(epoch * total, (epoch + 1) * total)]
            assert len(found) == total and set(found) == everything


def test_epochs_and_seeds_differ_and_runs_do_not() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        plan = make_plan(([50, 50], 1.0), seed=seed)
        return [plan.lookup(position) for position in range(100 * epoch, 100 * (epoch + 1))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_order_is_the_one_of_yesterday() -> None:
    plan = make_plan(([50, 3, 70], 1.0), ([31], 0.5), seed=7)
    order = str([plan.lookup(position) for position in range(2000)]).encode()
    assert hashlib.sha256(order).hexdigest()[:16] == "dcea581f7677b35a"


def test_mixture_is_exact_in_every_cycle() -> None:
    weights = (0.7, 0.2, 0.1)
    plan = make_plan(*(([1000], weight) for weight in weights))
    for cycle in range(3):
        sources = [plan.lookup(cycle * CYCLE + slot)[0] for slot in range(CYCLE)]
        assert np.abs(np.bincount(sources) - np.array(weights) * CYCLE).max() < 1


def test_each_source_of_a_mixture_keeps_its_own_epochs() -> None:
    plan = make_plan(([7], 1.0), ([11], 2.0))
    draws: dict[int, list[int]] = {0: [], 1: []}
    for position in range(4 * CYCLE):
        source, _, index = plan.lookup(position)
        draws[source].append(index)
    for source, size in ((0, 7), (1, 11)):
        for epoch in range(len(draws[source]) // size):
            assert sorted(draws[source][epoch * size : (epoch + 1) * size]) == list(range(size))


def test_sizes_as_weights_make_epochs_of_the_whole() -> None:
    plan = make_plan(([512], 512.0), ([512], 512.0))
    assert len({plan.lookup(position) for position in range(1024)}) == 1024


def test_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.train.1.weight=0.0001 is less than 1/1024"):
        make_plan(([5], 1.0), ([5], 0.0001))


def test_digest_follows_seed_and_shards() -> None:
    digests = [make_plan(([5], 1.0)), make_plan(([5], 1.0), seed=1), make_plan(([6], 1.0))]
    assert len({plan.digest() for plan in digests}) == 3
    assert make_plan(([5], 1.0)).digest() == digests[0].digest()
