"""The order: every sample once an epoch, weights exact, well shuffled, and the same everywhere."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from clipmini.data.index import Shard
from clipmini.data.manifest import Manifest, Source
from clipmini.data.plan import CYCLE, Plan
from clipmini.errors import UserError


def make_plan(
    *sources: tuple[list[int], float], seed: int = 0, shuffle_streams: int = 4, shuffle_block: int = 10
) -> Plan:
    """Make a plan of sources, each given by the sizes of its shards and its weight."""
    manifest = Manifest(
        tuple(
            Source(str(number), weight, tuple(Shard(f"{number}-{index}.tar", size) for index, size in enumerate(sizes)))
            for number, (sizes, weight) in enumerate(sources)
        )
    )
    return Plan(manifest, seed=seed, shuffle_streams=shuffle_streams, shuffle_block=shuffle_block)


def find(plan: Plan, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Return source, shard and index of the samples at some positions."""
    places = plan.lookup(range(start, stop))
    return list(zip(places.source.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))


def test_every_sample_once_in_each_epoch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        sizes = rng.integers(1, 40, size=rng.integers(1, 12)).tolist()
        streams, block = int(rng.integers(1, 9)), int(rng.integers(1, 60))
        plan, total = make_plan((sizes, 1.0), shuffle_streams=streams, shuffle_block=block), sum(sizes)
        everything = {(0, shard, index) for shard, size in enumerate(sizes) for index in range(size)}
        for epoch in range(3):
            found = find(plan, epoch * total, (epoch + 1) * total)
            assert len(found) == total and set(found) == everything, (sizes, streams, block)


def test_lookup_of_one_position_is_that_of_many() -> None:
    plan = make_plan(([50, 3, 70], 1.0), ([31], 0.5))
    positions = np.random.default_rng(0).permutation(3000)[:500]
    many = plan.lookup(positions)
    for row, position in enumerate(positions.tolist()):
        assert [column[row] for column in many] == [column[0] for column in plan.lookup([position])]


def test_order_does_not_depend_on_what_was_looked_up_before() -> None:
    sources = ([50, 3, 70], 1.0), ([31], 0.5)
    expected = find(make_plan(*sources), 5000, 5100)
    plan = make_plan(*sources)
    for start in (9000, 0, 4990, 123):
        find(plan, start, start + 200)
    assert find(plan, 5000, 5100) == expected
    assert find(pickle.loads(pickle.dumps(plan)), 5000, 5100) == expected


def test_epochs_and_seeds_differ_and_runs_do_not() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        return find(make_plan(([50, 50], 1.0), seed=seed), 100 * epoch, 100 * (epoch + 1))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


GOLDEN = "9802ea2cabe497f4"
ORDER = """
import hashlib
from test_plan import find, make_plan
plan = make_plan(([50, 3, 70, 200], 1.0), ([31], 0.5), seed=7, shuffle_streams=3, shuffle_block=17)
print(hashlib.sha256(str(find(plan, 0, 20_000)).encode()).hexdigest()[:16])
"""


def test_order_is_the_one_of_yesterday() -> None:
    # In a process of its own, whose hashes of strings are salted in another way.
    found = subprocess.run(
        [sys.executable, "-c", ORDER], cwd=__file__.rsplit("/", 1)[0], capture_output=True, text=True
    )
    assert found.stdout.strip() == GOLDEN, found.stderr


def test_mixture_is_exact_in_every_cycle() -> None:
    weights = (0.7, 0.2, 0.1)
    plan = make_plan(*(([1000], weight) for weight in weights))
    first = None
    for cycle in range(5):
        counts = np.bincount(plan.lookup(range(cycle * CYCLE, (cycle + 1) * CYCLE)).source)
        first = counts if first is None else first
        assert (counts == first).all() and counts.sum() == CYCLE
        assert np.abs(counts - np.array(weights) * CYCLE).max() < 1


def test_each_source_of_a_mixture_keeps_its_own_epochs() -> None:
    sizes = [[7, 6], [11], [2, 40, 1]]
    plan = make_plan(*((shards, weight) for shards, weight in zip(sizes, (1.0, 2.0, 5.0), strict=True)))
    found = find(plan, 0, 4 * CYCLE)
    for source, shards in enumerate(sizes):
        drawn, total = [place for place in found if place[0] == source], sum(shards)
        everything = {(source, shard, index) for shard, size in enumerate(shards) for index in range(size)}
        for epoch in range(len(drawn) // total):
            assert set(drawn[epoch * total : (epoch + 1) * total]) == everything


def test_sizes_as_weights_make_epochs_of_the_whole() -> None:
    assert len(set(find(make_plan(([512], 512.0), ([512], 512.0)), 0, 1024))) == 1024


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_parts_of_a_batch_make_the_batch(world_size: int) -> None:
    plan = make_plan(([200, 100], 1.0), ([150], 2.0))
    for step in (0, 1, 17):
        batch = plan.batch(step, 48)
        assert sorted(batch.tolist()) == list(range(48 * step, 48 * (step + 1)))
        assert np.concatenate(np.split(batch, world_size)).tolist() == batch.tolist()


def test_ranks_read_streams_of_their_own() -> None:
    plan = make_plan(([1000] * 8, 1.0), shuffle_streams=8, shuffle_block=100)
    for step in range(20):
        streams = [set(plan.lookup(part).stream.tolist()) for part in np.split(plan.batch(step, 64), 4)]
        assert sum(map(len, streams)) == len(set().union(*streams)) == 8  # none is read by two


def test_a_batch_mixes_as_many_parts_as_there_are_streams() -> None:
    plan = make_plan(([500] * 40, 1.0), shuffle_streams=16, shuffle_block=250)
    for step in range(50):
        assert len(set(plan.lookup(plan.batch(step, 64)).shard.tolist())) >= 16


def rows_of(plan: Plan, epoch: int, sizes: list[int]) -> np.ndarray:
    """Return for each position of an epoch where its sample stands in the row of permuted shards."""
    order, total = plan.order(0, epoch), sum(sizes)
    places = plan.lookup(range(epoch * total, (epoch + 1) * total))
    rank = np.argsort(order.shards)
    return order.starts[rank[places.shard]] + places.sample


def test_blocks_are_shuffled_through_and_through() -> None:
    sizes = [1000] * 20
    plan = make_plan((sizes, 1.0), shuffle_streams=4, shuffle_block=1000)
    rows = rows_of(plan, 0, sizes)
    table = np.zeros((10, 10))
    neighbours = 0
    for stream in range(4):
        of_stream = rows[stream::4].reshape(-1, 1000)  # its blocks, in the order of visits
        for block in of_stream:
            inner = block - block.min()
            assert sorted(inner.tolist()) == list(range(1000))
            np.add.at(table, (np.arange(1000) // 100, inner // 100), 1)
            neighbours += int((np.diff(inner) == 1).sum())
    expected = table.sum() / 100
    chi2 = float(((table - expected) ** 2 / expected).sum())
    # 81 degrees of freedom: mean 81, standard deviation 12.7; 20 blocks have 20 pairs of neighbours by chance.
    assert 40 < chi2 < 135 and neighbours < 45


def test_small_sources_are_shuffled_as_a_whole() -> None:
    sizes = [100] * 20
    rows = rows_of(make_plan((sizes, 1.0), shuffle_streams=64, shuffle_block=10_000), 0, sizes)
    moved = np.abs(rows - np.arange(2000)).mean()
    assert moved == pytest.approx(2000 / 3, rel=0.1)  # as of a random permutation


def test_following_samples_are_the_next_of_the_epoch_and_come_round() -> None:
    plan = make_plan(([12, 13], 1.0), ([5], 1.0), shuffle_streams=2, shuffle_block=5)
    of_first = [position for position in range(200) if plan.lookup([position]).source[0] == 0][:50]
    places = plan.lookup(of_first)
    found = list(zip(places.shard.tolist(), places.sample.tolist(), strict=True))
    for row, position in enumerate(of_first):
        start = row - row % 25  # of its epoch
        for count in (1, 2, 24, 25, 30):
            assert plan.following(position, count) == found[start + (row - start + count) % 25]
    assert int(places.stream[0]) != int(places.stream[1])  # so that one missing shard does not make all of them bad


def test_shards_of_blocks_are_those_that_are_read() -> None:
    sizes = [7, 30, 2, 45, 16]
    plan = make_plan((sizes, 1.0), shuffle_streams=3, shuffle_block=8)
    read: dict[tuple[int, int, int], set[int]] = {}
    places = plan.lookup(range(2 * sum(sizes)))
    for _, epoch, stream, offset, shard, _ in zip(*(column.tolist() for column in places), strict=True):
        read.setdefault((epoch, stream, offset // 8), set()).add(shard)
    for (epoch, stream, block), shards in read.items():
        assert set(plan.shards_of_block(0, epoch, stream, block).tolist()) == shards
    last = max(block for epoch, stream, block in read if (epoch, stream) == (0, 1))
    assert set(plan.shards_of_block(0, 0, 1, last + 1).tolist()) == read[1, 1, 0]


def test_memory_does_not_grow_with_the_samples() -> None:
    code = (
        "from test_plan import make_plan\n"
        "plan = make_plan(([10_000] * 40_000, 1.0), shuffle_streams=64, shuffle_block=10_000)\n"
        "for step in range(0, 100_000, 1_000): plan.lookup(plan.batch(step, 4096))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/", 1)[0], capture_output=True, text=True)
    assert 0 < int(found.stdout) < 200 * 1024, found.stderr  # KiB, with the interpreter and its packages


def test_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.train.1.weight=0.0001 is less than 1/1024"):
        make_plan(([5], 1.0), ([5], 0.0001))


@pytest.mark.parametrize("name", ["shuffle_streams", "shuffle_block"])
def test_wrong_shuffling_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^data.{name}=0: must be 1 or more$"):
        make_plan(([5], 1.0), **{name: 0})


def test_digest_follows_all_that_decides_the_order() -> None:
    plans = [
        make_plan(([5], 1.0)),
        make_plan(([5], 1.0), seed=1),
        make_plan(([6], 1.0)),
        make_plan(([5], 1.0), shuffle_streams=2),
        make_plan(([5], 1.0), shuffle_block=2),
    ]
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert make_plan(([5], 1.0)).digest() == plans[0].digest()
