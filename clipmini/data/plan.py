"""The order of samples: a pure function of the manifest, the seed and a position.

Position g is the g-th sample that training sees; global batch t is positions [t B, (t + 1) B). Neither ranks nor
workers nor a resume can change it. Philox is counter-based, so any epoch's permutation can be drawn directly.
"""

import hashlib
from functools import lru_cache

import numpy as np

from clipmini.data.manifest import Manifest
from clipmini.errors import UserError

CYCLE = 1024  # slots in which the weights of a mixture come out exactly
SLOTS, ORDER, SAMPLE = 1, 2, 3  # what a generator is for; keeps their streams apart


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Return the random numbers of one purpose and one place; nothing else ever uses them."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, *numbers])))


class Plan:
    """Maps positions to samples.

    Every source is drawn without replacement in its own epoch, a new permutation of all its samples each time. Slots
    repeat with a cycle of 1,024 in which each source has its share, rounded. Memory: 8 bytes a sample for each of the
    two epochs of a source that are in use.

    Raises:
        UserError: a weight that rounds to no slot at all.
    """

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self.seed = seed
        self.manifest_digest = manifest.digest()
        self.sizes = [source.num_samples for source in manifest.sources]
        # For each source, the number of its samples before each of its shards: [shards + 1].
        self.starts = [np.cumsum([0, *(shard.num_samples for shard in source.shards)]) for source in manifest.sources]
        self.slots = fill_slots(np.array([source.weight for source in manifest.sources]), seed)  # [CYCLE]
        self.counts = np.bincount(self.slots, minlength=len(self.sizes))  # slots of a source in a cycle
        if not self.counts.all():
            source = manifest.sources[int(self.counts.argmin())]
            raise UserError(
                f"data.train.{source.name}.weight={source.weight:g} is less than 1/{CYCLE} of all weights, so that it "
                "would never be drawn: raise it or leave the source out"
            )
        # How many earlier slots of the cycle have the same source: [CYCLE].
        self.turns = np.array([np.sum(self.slots[:slot] == source) for slot, source in enumerate(self.slots)])

    def digest(self) -> str:
        """Hash everything that decides the order."""
        return hashlib.sha256(f"{self.manifest_digest}/{self.seed}/{CYCLE}".encode()).hexdigest()[:16]

    def lookup(self, position: int) -> tuple[int, int, int]:
        """Return (source, shard, index in the shard) of the sample at a position."""
        cycle, slot = divmod(position, CYCLE)
        source = int(self.slots[slot])
        draw = cycle * int(self.counts[source]) + int(self.turns[slot])
        epoch, offset = divmod(draw, self.sizes[source])
        sample = self.permutation(source, epoch)[offset]
        shard = int(np.searchsorted(self.starts[source], sample, side="right")) - 1
        return source, shard, int(sample - self.starts[source][shard])

    def permutation(self, source: int, epoch: int) -> np.ndarray:
        """Return the order of a source's samples in one of its epochs: int64 [samples]."""
        return draw_permutation(self.seed, source, epoch, self.sizes[source])


@lru_cache(maxsize=16)
def draw_permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    """Permute range(size); the cache makes a lookup cheap within an epoch."""
    return generator(seed, ORDER, source, epoch).permutation(size)


def fill_slots(weights: np.ndarray, seed: int) -> np.ndarray:
    """Give each source its share of a cycle, by largest remainder, and shuffle the cycle once: int64 [CYCLE]."""
    shares = weights / weights.sum() * CYCLE
    counts = np.floor(shares).astype(int)
    rest = np.argsort(counts - shares, kind="stable")[: CYCLE - counts.sum()]
    counts[rest] += 1
    slots = np.repeat(np.arange(len(weights)), counts)
    return generator(seed, SLOTS).permutation(slots)
