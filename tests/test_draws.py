"""Random numbers: the same for ever, even, and of their place alone."""

import numpy as np
import pytest

from clipmini.data.draws import Draws, Purpose, permutation


def test_numbers_are_those_of_yesterday() -> None:
    draws = Draws(7, 12345)
    assert [round(draws.random(), 12) for _ in range(3)] == [0.177760340187, 0.816865608018, 0.913546889549]
    assert permutation(10, 7, Purpose.BLOCK, 1, 2, 3).tolist() == [0, 5, 4, 6, 7, 2, 9, 3, 1, 8]


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4096])
def test_permutations_hold_everything_once(size: int) -> None:
    assert sorted(permutation(size, 0, Purpose.SHARDS, 3).tolist()) == list(range(size))


def test_permutations_are_even() -> None:
    counts = np.zeros((5, 5))
    for place in range(5000):
        counts[np.arange(5), permutation(5, 0, Purpose.BLOCK, place).astype(int)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.8)


def test_places_purposes_and_seeds_are_kept_apart() -> None:
    found = [
        permutation(50, seed, purpose, *place).tolist()
        for seed in (0, 1)
        for purpose in (Purpose.SHARDS, Purpose.BLOCK)
        for place in ((0,), (1,), (0, 1), (1, 1), (0, 0, 1))
    ]
    assert len({str(order) for order in found}) == len(found)


def test_numbers_are_even() -> None:
    draws = Draws(0)
    values = np.array([draws.random() for _ in range(20_000)])
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, 20)[0] - 1000).max() < 5 * np.sqrt(1000)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03
    whole = np.bincount([draws.below(7) for _ in range(7000)], minlength=7)
    assert len(whole) == 7 and np.abs(whole - 1000).max() < 5 * np.sqrt(1000)
    bounded = [draws.uniform(-2, 3) for _ in range(1000)]
    assert -2 <= min(bounded) < -1.9 and 2.9 < max(bounded) < 3
