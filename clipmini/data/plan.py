"""The order of samples: a pure function of the manifest, the seed and a position.

Position g is the g-th sample that training sees; global batch t is positions [t B, (t + 1) B). Neither ranks nor
workers nor a resume can change it. A source's epoch is laid out like this:

1. its shards are permuted and their samples put in one row;
2. the row is cut into C streams of equal length, give or take one sample;
3. every stream is cut into blocks of M samples, and each block is permuted;
4. position p of the epoch is the next sample of stream p mod C.

So a batch mixes C parts of the data, samples are shuffled over a window of C M, and only the few shards that the
current blocks touch are read at a time. Memory: a few numbers for each shard, and the blocks in use.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clipmini.annotations import Limits
from clipmini.data.draws import Purpose, permutation
from clipmini.data.manifest import Manifest
from clipmini.errors import UserError

CYCLE = 1024  # slots in which the weights of a mixture come out exactly
VERSION = 2  # of the rules above; part of the digest


class Places(NamedTuple):
    """Where samples are: int64 [n] each."""

    source: np.ndarray
    epoch: np.ndarray  # of its source
    stream: np.ndarray  # of its epoch
    offset: np.ndarray  # in its stream, before the blocks are permuted
    shard: np.ndarray  # of its source
    sample: np.ndarray  # index in its shard


class EpochOrder:
    """One epoch of a source.

    Args:
        sizes: samples of each shard, int64 [shards].
        shuffle_streams: C, if the source has so many blocks; else as many as it has, so that a source smaller than a
            block is permuted as a whole.
        shuffle_block: M, samples.
        seed, source, epoch: what the permutations are drawn from.
    """

    def __init__(
        self, sizes: np.ndarray, *, shuffle_streams: int, shuffle_block: int, seed: int, source: int, epoch: int
    ) -> None:
        self.shards = permutation(len(sizes), seed, Purpose.SHARDS, source, epoch).astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes[self.shards])])  # where each shard begins in the row
        size = int(self.starts[-1])
        self.num_streams = min(shuffle_streams, -(-size // shuffle_block))
        # Where each stream begins in the row: [streams + 1].
        self.streams = np.arange(self.num_streams + 1) * size // self.num_streams
        self.lengths = np.diff(self.streams)
        self.longer = np.flatnonzero(self.lengths > size // self.num_streams)  # those with one sample more
        self.block = shuffle_block
        self.origin = seed, source, epoch
        self.permutations: dict[tuple[int, int], np.ndarray] = {}

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the streams and the offsets in them of positions of the epoch."""
        offset, stream = np.divmod(positions, self.num_streams)
        is_rest = offset == self.lengths.min()  # the last round, which only the longer streams take part in
        stream[is_rest] = self.longer[stream[is_rest]]
        return stream, offset

    def lookup(self, stream: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards and the indices in them of samples of streams."""
        row = np.empty(len(stream), np.int64)
        block, inner = np.divmod(offset, self.block)
        group = stream * (int(block.max()) + 1) + block
        by_group = np.argsort(group, kind="stable")
        for rows in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
            first = rows[0]
            start = self.streams[stream[first]] + block[first] * self.block
            row[rows] = start + self.permute_block(int(stream[first]), int(block[first]))[inner[rows]]
        place = np.searchsorted(self.starts, row, side="right") - 1
        return self.shards[place], row - self.starts[place]

    def permute_block(self, stream: int, block: int) -> np.ndarray:
        """Return the order of a block: int32 [its samples]."""
        found = self.permutations.pop((stream, block), None)
        if found is None:
            size = min(self.block, int(self.lengths[stream]) - block * self.block)
            seed, source, epoch = self.origin
            # Source and epoch share a word: both stay below 2^32.
            drawn = permutation(size, seed, Purpose.BLOCK, source << 32 | epoch, stream, block)
            found = drawn.astype(np.int32)
            if len(self.permutations) > 2 * self.num_streams:
                del self.permutations[next(iter(self.permutations))]
        self.permutations[stream, block] = found  # the newest last
        return found

    def shards_of_block(self, stream: int, block: int) -> np.ndarray | None:
        """Return the shards that a block touches, or None where the stream has ended."""
        start = int(self.streams[stream]) + block * self.block
        end = min(start + self.block, int(self.streams[stream + 1]))
        if start >= end:
            return None
        first, last = np.searchsorted(self.starts, [start, end - 1], side="right") - 1
        return self.shards[first : last + 1]


class Plan:
    """Maps positions to samples.

    Every source is drawn without replacement in its own epoch. Slots repeat with a cycle of 1,024 in which each source
    has its share, rounded.

    Args:
        manifest: what there is.
        seed: decides the order.
        shuffle_streams: C.
        shuffle_block: M, samples.

    Raises:
        UserError: a weight that rounds to no slot at all, or values out of range.
    """

    def __init__(self, manifest: Manifest, *, seed: int, shuffle_streams: int, shuffle_block: int) -> None:
        Limits(least=1).check("data.shuffle_streams", shuffle_streams)
        Limits(least=1).check("data.shuffle_block", shuffle_block)
        self.seed = seed
        self.shuffle_streams = shuffle_streams
        self.shuffle_block = shuffle_block
        self.manifest_digest = manifest.digest()
        self.sizes = [np.array([shard.num_samples for shard in source.shards]) for source in manifest.sources]
        self.totals = np.array([sizes.sum() for sizes in self.sizes])
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
        self.orders: dict[tuple[int, int], EpochOrder] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "orders": {}}  # drawn again where it is needed

    def digest(self) -> str:
        """Hash everything that decides the order."""
        rules = f"{self.manifest_digest}/{self.seed}/{CYCLE}/{self.shuffle_streams}/{self.shuffle_block}/{VERSION}"
        return hashlib.sha256(rules.encode()).hexdigest()[:16]

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the source, its epoch and the place in that epoch of positions."""
        cycle, slot = np.divmod(positions, CYCLE)
        source = self.slots[slot]
        epoch, place = np.divmod(cycle * self.counts[source] + self.turns[slot], self.totals[source])
        return source, epoch, place

    def streams(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return source, epoch, stream and offset in the stream of positions."""
        source, epoch, place = self.places(positions)
        stream, offset = np.empty_like(place), np.empty_like(place)
        for order, rows in self.orders_of(source, epoch):
            stream[rows], offset[rows] = order.split(place[rows])
        return source, epoch, stream, offset

    def lookup(self, positions: Sequence[int] | np.ndarray) -> Places:
        """Find the samples at positions, int64 [n]; a batch at a time is much quicker than one by one."""
        source, epoch, stream, offset = self.streams(np.asarray(positions, np.int64))
        shard, index = np.empty_like(stream), np.empty_like(stream)
        for order, rows in self.orders_of(source, epoch):
            shard[rows], index[rows] = order.lookup(stream[rows], offset[rows])
        return Places(source, epoch, stream, offset, shard, index)

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """Return the positions of a global batch, int64 [batch_size], those of one stream side by side.

        Ranks take consecutive parts of it, so that each reads its own streams and few shards are read twice.
        """
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        source, _, stream, _ = self.streams(positions)
        return positions[np.lexsort((positions, stream, source))]

    def following(self, position: int, count: int) -> tuple[int, int]:
        """Return (shard, index) of the sample `count` places further in the epoch of a position, which goes round.

        That is one of the next stream: a shard that is missing has no part in most of them.
        """
        source, epoch, place = self.places(np.array([position]))
        order = self.order(int(source[0]), int(epoch[0]))
        shard, index = order.lookup(*order.split((place + count) % self.totals[source]))
        return int(shard[0]), int(index[0])

    def shards_of_block(self, source: int, epoch: int, stream: int, block: int) -> np.ndarray:
        """Return the shards of a block of a stream; the one after the last is the first of the next epoch."""
        found = self.order(source, epoch).shards_of_block(stream, block)
        return self.shards_of_block(source, epoch + 1, stream, 0) if found is None else found

    def orders_of(self, source: np.ndarray, epoch: np.ndarray) -> Iterator[tuple[EpochOrder, np.ndarray]]:
        """Yield each epoch of a source that occurs, and in which rows, bool [n]."""
        for number, turn in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            yield self.order(number, turn), (source == number) & (epoch == turn)

    def order(self, source: int, epoch: int) -> EpochOrder:
        """Return the order of a source's epoch; the last few are kept."""
        found = self.orders.pop((source, epoch), None)
        if found is None:
            found = EpochOrder(
                self.sizes[source],
                shuffle_streams=self.shuffle_streams,
                shuffle_block=self.shuffle_block,
                seed=self.seed,
                source=source,
                epoch=epoch,
            )
            if len(self.orders) > 3 * len(self.sizes):
                del self.orders[next(iter(self.orders))]
        self.orders[source, epoch] = found  # the newest last
        return found


def fill_slots(weights: np.ndarray, seed: int) -> np.ndarray:
    """Give each source its share of a cycle, by largest remainder, and shuffle the cycle once: int64 [CYCLE]."""
    shares = weights / weights.sum() * CYCLE
    counts = np.floor(shares).astype(int)
    rest = np.argsort(counts - shares, kind="stable")[: CYCLE - counts.sum()]
    counts[rest] += 1
    slots = np.repeat(np.arange(len(weights)), counts)
    return slots[permutation(CYCLE, seed, Purpose.SLOTS)]
