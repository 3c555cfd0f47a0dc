"""Looks for the pictures of evaluation sets in training shards: each picture is decoded once, and none is kept."""

import functools
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipmini.console import track
from clipmini.data.features import ShardPictures
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.processes import Item, Result, check_stopped, map_in_processes
from clipmini.data.store import ShardStore
from clipmini.evaluation.encoder import AnyPictures, Encoder, load_pictures, make_batches
from clipmini.evaluation.sets import Pictures
from clipmini.model import encode_image
from clipmini.shards.duplicates import Known, Threshold, find_duplicates, find_nearby, load_known
from clipmini.shards.signature import PIXELS, Signatures, sign, squeeze

BLOCK = 256  # pictures that are held at a time
SET_PART = 1024  # pictures of an evaluation set that a process takes at a time


@dataclass
class Tally:
    """What became of some pictures.

    Attributes:
        pictures: all of them.
        plain: those with too little in them to be compared.
        causes: of those that could not be read.
        example: one of these.
    """

    pictures: int = 0
    plain: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def reject(self, key: str, fault: Fault) -> None:
        """Count a picture that could not be read."""
        self.causes[fault.cause] += 1
        self.example = self.example or f"{key}: {fault.detail}"

    def add(self, other: "Tally") -> None:
        """Add what became of others."""
        self.pictures += other.pictures
        self.plain += other.plain
        self.causes += other.causes
        self.example = self.example or other.example


class Pair(NamedTuple):
    """A training picture that is one of an evaluation set, or nearly.

    Attributes:
        number: of the evaluation picture among those of all sets.
        shard: number of the training shard.
        sample: number of the sample in it.
        key: of that.
        distance: bits that differ; None where a model has found the pair.
        score: correlation of the thumbnails, or the model's cosine.
    """

    number: int
    shard: int
    sample: int
    key: str
    distance: int | None
    score: float


@dataclass(frozen=True)
class ShardScan:
    """What was found in a shard; `damage` is what is wrong with it as a whole."""

    shard: Shard
    tally: Tally
    pairs: list[Pair]
    damage: str


def work(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, num_workers: int | None
) -> Iterator[Result]:
    """Yield function(item) of each item, in order, in several processes or, with 0 of them, in this one."""
    if num_workers == 0:
        return track(map(function, items), len(items), description)
    return map_in_processes(function, items, description=description, num_workers=num_workers, preload=(__name__,))


def use_one_thread() -> None:
    """Leave the cores to the other worker processes."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)


def sign_blocks(
    pictures: AnyPictures, name: Callable[[int], str], max_pixels: int, tally: Tally
) -> Iterator[tuple[list[int], Signatures]]:
    """Yield the numbers and the signatures of pictures, some at a time; those that cannot be read are counted.

    Args:
        name: says what a picture is called, for messages.
    """
    for start in range(0, len(pictures), BLOCK):
        check_stopped()
        numbers, squeezed = [], []
        for number in range(start, min(start + BLOCK, len(pictures))):
            try:
                squeezed.append(squeeze(pictures.read(number), max_pixels))
                numbers.append(number)
            except Fault as fault:
                tally.reject(name(number), fault)
        signatures = sign(torch.stack(squeezed) if squeezed else torch.empty(0, 3, PIXELS, PIXELS, dtype=torch.uint8))
        tally.pictures += min(BLOCK, len(pictures) - start)
        tally.plain += int(signatures.is_plain.sum())
        yield numbers, signatures


def sign_part(pictures: Pictures, *, max_pixels: int) -> tuple[Tally, Known]:
    """Sign some pictures of an evaluation set; plain ones are left out."""
    use_one_thread()
    tally, parts = Tally(), []
    for numbers, signatures in sign_blocks(pictures, pictures.key, max_pixels, tally):
        kept = ~signatures.is_plain
        parts.append((np.array(numbers, np.int64)[kept], signatures.bits[kept], signatures.thumbnails[kept]))
    return tally, Known(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def sign_sets(sets: Sequence[Pictures], max_pixels: int, num_workers: int | None) -> tuple[list[Tally], Known]:
    """Sign the pictures of evaluation sets, numbered through all of them.

    Returns:
        What became of those of each set, and the signatures.
    """
    starts = [(number, start) for number, one in enumerate(sets) for start in range(0, len(one), SET_PART)]
    parts = [Pictures(sets[number].places[start : start + SET_PART]) for number, start in starts]
    tallies, known, first = [Tally() for _ in sets], [], 0
    function = functools.partial(sign_part, max_pixels=max_pixels)
    signed = work(function, parts, "reading evaluation sets", num_workers)
    for (number, _), part, (tally, found) in zip(starts, parts, signed, strict=True):
        tallies[number].add(tally)
        known.append(replace(found, numbers=found.numbers + first))
        first += len(part)
    names = ("numbers", "bits", "thumbnails")
    return tallies, Known(*(np.concatenate([getattr(one, name) for one in known]) for name in names))


def scan_shard(
    numbered: tuple[int, Shard], *, store: ShardStore, known_at: Path, max_pixels: int, threshold: Threshold
) -> ShardScan:
    """Find near-duplicates of known pictures in a shard, in a worker process.

    Args:
        known_at: where their signatures are.
    """
    use_one_thread()
    number, shard = numbered
    try:
        index = store.index(shard)
    except Fault as fault:
        return ShardScan(replace(shard, num_samples=0), Tally(), [], f"{fault.cause}: {fault.detail}")
    shard, tally, known = replace(shard, num_samples=len(index)), Tally(), load_known(known_at)
    blocks = sign_blocks(
        ShardPictures(store, shard), lambda sample: f"{shard.path}/{index.key(sample)}", max_pixels, tally
    )
    pairs = [
        Pair(match.column, number, numbers[match.row], index.key(numbers[match.row]), match.distance, match.correlation)
        for numbers, signatures in blocks
        for match in find_duplicates(signatures, known, threshold)
    ]
    store.close(*store.files)
    return ShardScan(shard, tally, pairs, index.damage)


def scan_shards(
    shards: Sequence[Shard],
    store: ShardStore,
    known: Known,
    threshold: Threshold,
    max_pixels: int,
    num_workers: int | None,
) -> Iterator[ShardScan]:
    """Yield what is found in each shard, in order."""
    with tempfile.TemporaryDirectory() as directory:
        known.save(Path(directory))
        function = functools.partial(
            scan_shard, store=store, known_at=Path(directory), max_pixels=max_pixels, threshold=threshold
        )
        yield from work(function, list(enumerate(shards)), "reading training shards", num_workers)


# By embeddings


def encode(encoder: Encoder, pictures: AnyPictures) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the numbers and unit vectors, fp32 [b, D], of pictures, batch by batch; unreadable ones are left out.

    The encoder must be ready.
    """
    batches = make_batches(len(pictures), encoder.batch_size)
    for numbers, images, _ in load_pictures(pictures, encoder.transform, batches, encoder.num_workers):
        if numbers:
            yield numbers, encode_image(encoder.model, images.to(encoder.device)).float()


def encode_sets(encoder: Encoder, sets: Sequence[Pictures]) -> tuple[np.ndarray, Tensor]:
    """Encode the pictures of evaluation sets: their numbers through all sets, int64 [m], and unit vectors [m, D]."""
    pictures = Pictures(tuple(place for one in sets for place in one.places))
    encoded = list(encode(encoder, pictures))
    numbers = np.array([number for numbers, _ in encoded for number in numbers], np.int64)
    width = encoder.model.architecture["embed_dim"]
    return numbers, torch.cat([torch.empty(0, width, device=encoder.device), *(features for _, features in encoded)])


def scan_embeddings(
    shards: Sequence[Shard], store: ShardStore, sets: Sequence[Pictures], encoder: Encoder, min_cosine: float
) -> Iterator[Pair]:
    """Yield the pairs whose embeddings are near each other.

    Args:
        shards: as `scan_shards` has counted them.
    """
    with encoder.ready():
        names, known = encode_sets(encoder, sets)
        for number, shard in track(list(enumerate(shards)), len(shards), "encoding training shards"):
            for numbers, features in encode(encoder, ShardPictures(store, shard)):
                for row, column, cosine in find_nearby(features, known, min_cosine):
                    key = store.key(shard, numbers[row]) or str(numbers[row])
                    yield Pair(int(names[column]), number, numbers[row], key, None, cosine)
            store.close_remote()
