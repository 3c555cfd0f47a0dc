"""Random numbers that are a function of the seed and of what they are for, and of nothing else.

Taken from the raw words of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): numpy keeps
those the same in every version, which it does not promise of its distributions (NEP 19).
"""

from enum import IntEnum
from functools import cached_property

import numpy as np


class Purpose(IntEnum):
    """What numbers are for; keeps their streams apart."""

    SLOTS = 1
    SHARDS = 2
    BLOCK = 3
    SAMPLE = 4


def philox(seed: int, purpose: Purpose, *place: int) -> np.random.Philox:
    """Return the generator of one purpose and one place: up to three numbers below 2^64."""
    counter = np.zeros(4, np.uint64)  # the first word counts what is drawn
    counter[1 : 1 + len(place)] = place
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter)


def permutation(size: int, seed: int, purpose: Purpose, *place: int) -> np.ndarray:
    """Permute range(size): uint64 [size]."""
    # Random high bits, the number itself in the low ones: sorting these is several times quicker than an argsort.
    bits = np.uint64(size.bit_length())
    words = philox(seed, purpose, *place).random_raw(size) << bits | np.arange(size, dtype=np.uint64)
    words.sort()
    return words & ((np.uint64(1) << bits) - np.uint64(1))


class Draws:
    """The random numbers of one sample, one after the other."""

    def __init__(self, seed: int, *place: int) -> None:
        self.place = seed, place
        self.words: list[int] = []

    @cached_property
    def generator(self) -> np.random.Philox:
        """The generator, made for the first number: most samples draw none of what is for further captions."""
        seed, place = self.place
        return philox(seed, Purpose.SAMPLE, *place)

    def random(self) -> float:
        """Draw from [0, 1) with 53 bits."""
        if not self.words:
            self.words = self.generator.random_raw(16).tolist()[::-1]
        return (self.words.pop() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """Draw from [low, high)."""
        return low + (high - low) * self.random()

    def below(self, limit: int) -> int:
        """Draw an integer from 0 to limit - 1; every one as likely, to 2^-53 times the limit."""
        return int(self.random() * limit)
