"""What is embedded: a folder of pictures, a table, shards or an evaluation set, in partitions read one by one."""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipmini.data.captions import is_text, member_of, read_metadata, read_value
from clipmini.data.counts import count_pairs
from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import locate
from clipmini.data.remote import is_remote
from clipmini.data.store import ShardStore
from clipmini.errors import UserError
from clipmini.evaluation import wds
from clipmini.evaluation.datasets import open_sets
from clipmini.evaluation.entries import read_entries
from clipmini.evaluation.sets import ClassificationSet, Pictures, RetrievalSet
from clipmini.shards.inputs import Input, Item, Part, Sample, check_apart, open_folder, plain, take_caption
from clipmini.shards.pack import holds_shards
from clipmini.shards.tables import TABLES, open_table


@dataclass(frozen=True)
class Request:
    """What is to be embedded, and where it is.

    Attributes:
        path: a folder, a table, shards as in `data.train`, or an evaluation set's directory.
        image_key: column of a table with the pictures; None: there are none.
        caption_key: of a folder `txt` or `folder`, of a table a column, of shards as in `data`; None: no texts.
        metadata: of shards: whether what the .json holds goes along; each sample must have one.
        rows_per_partition: of what is no shard.
    """

    path: str
    image_key: str | None
    caption_key: str | None
    metadata: bool
    rows_per_partition: int

    @property
    def has_pictures(self) -> bool:
        return not is_table(self.path) or self.image_key is not None


def is_table(path: str) -> bool:
    """Say whether a path names a table."""
    return path.lower().endswith(TABLES)


def open_input(request: Request, store: ShardStore, output: Path) -> Input:
    """Find out what there is to embed.

    Args:
        store: reads shards; see `pair_format`.
        output: where the index will be.

    Raises:
        UserError: there is nothing, or nothing that can be read; or the index would be a part of it.
    """
    path, caption_key, rows = request.path, request.caption_key, request.rows_per_partition
    try:
        if os.path.isfile(path) and is_table(path):
            return open_table(path, request.image_key, caption_key, rows)
        if os.path.isdir(path) and wds.is_wds(Path(path)):
            return open_evaluation_set(request)
        if os.path.isdir(path) and not holds_shards(path):
            check_apart(path, output)
            return open_folder(path, caption_key, rows)
    except OSError as error:
        raise UserError(f"input={path}: {error}") from error
    if os.path.isfile(path) and not path.endswith(".tar"):
        raise UserError(f"input={path}: is neither a folder nor {', '.join(TABLES)} or .tar")
    return open_shards(request, store)


# Shards


def pair_format(request: Request) -> PairFormat:
    """Return what the samples of shards must have."""
    of_caption = {member_of(request.caption_key)} if request.caption_key is not None else set()
    return PairFormat(tuple(sorted(of_caption | ({"json"} if request.metadata else set()))))


@dataclass(frozen=True)
class ShardPart(Part):
    """The samples of a shard."""

    store: ShardStore
    shard: Shard
    caption_key: str | None

    def __len__(self) -> int:
        return self.shard.num_samples

    def __iter__(self) -> Iterator[Item]:
        for number in range(self.shard.num_samples):
            key = self.store.key(self.shard, number) or str(number)
            yield f"{self.path}/{key}", functools.partial(self.load, number)

    @property
    def path(self) -> str:
        return self.shard.path if is_remote(self.shard.path) else os.path.abspath(self.shard.path)

    def load(self, number: int) -> Sample:
        """Read the members of a sample."""
        members = self.store.read(self.shard, number)
        picture = next(members[name] for name in self.store.pair_format.image_extensions if name in members)
        metadata = plain(read_metadata(members["json"])) if "json" in members else {}
        if self.caption_key is None:
            return Sample(picture, "", metadata)
        caption, kept = take_caption(read_value(members, self.caption_key), self.caption_key)
        return Sample(picture, caption, metadata if is_text(self.caption_key) else {**metadata, **kept})


def open_shards(request: Request, store: ShardStore) -> Input:
    """Find and count shards, each of which is a partition.

    Raises:
        UserError: there are none, or nothing tells when what is in them changes.
    """
    assert store.cache is not None
    found = locate(request.path, "input", store.cache.remote, allow_pipe=False, pipe_key=None)
    shards = count_pairs(found, store.pair_format, store.cache, "input")
    if unknown := [shard.path for shard in shards if is_remote(shard.path) and not shard.version]:
        raise UserError(f"input={request.path}: nothing tells when the content of {unknown[0]} changes")
    digest = hashlib.sha256("\n".join(shard.identity() for shard in shards).encode()).hexdigest()
    parts = [ShardPart(store, shard, request.caption_key) for shard in shards]
    return Input(f"pairs in {len(shards)} shards", sum(shard.num_samples for shard in shards), digest, parts)


# Evaluation sets


@dataclass(frozen=True)
class SetPart(Part):
    """Some pictures of an evaluation set, each with its captions or the name of its class."""

    pictures: Pictures
    captions: Sequence[str]
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Item]:
        for number in self.numbers:
            place = self.pictures.places[number]
            yield f"{os.path.abspath(place.path)}/{place.key}", functools.partial(self.load, number)

    def load(self, number: int) -> Sample:
        """Read a picture."""
        return Sample(self.pictures.read(number), "", {"caption": self.captions[number]})


def open_evaluation_set(request: Request) -> Input:
    """Read a set in CLIP_benchmark's layout; its texts are what a model is judged by, and are not embedded.

    Raises:
        UserError: its texts are asked for, or it is not complete.
    """
    if request.caption_key is not None:
        raise UserError(
            f"caption_key={request.caption_key}: {request.path} is an evaluation set, of which only pictures are "
            "embedded: set caption_key=null"
        )
    (opened,) = open_sets(read_entries([request.path], "input"), "input")
    dataset = opened.dataset
    assert isinstance(dataset, ClassificationSet | RetrievalSet)  # all that this layout holds
    captions = tell_pictures(dataset)
    starts = range(0, len(dataset.pictures), request.rows_per_partition)
    ends = (min(start + request.rows_per_partition, len(captions)) for start in starts)
    parts = [SetPart(dataset.pictures, captions, range(start, end)) for start, end in zip(starts, ends, strict=True)]
    return Input("pictures", len(captions), dataset.pictures.fingerprint(), parts)


def tell_pictures(dataset: ClassificationSet | RetrievalSet) -> list[str]:
    """Return what belongs to each picture of a set: its captions, or the names of its classes, a line each."""
    lines: list[list[str]] = [[] for _ in range(len(dataset.pictures))]
    if isinstance(dataset, RetrievalSet):
        pairs, texts = dataset.pairs, dataset.captions
    else:
        labels, texts = dataset.labels, dataset.class_names
        pairs = np.argwhere(labels) if dataset.is_multilabel else np.stack([np.arange(len(labels)), labels], axis=1)
    for picture, text in pairs.tolist():
        lines[picture].append(texts[text])
    return ["\n".join(found) for found in lines]
