"""What there is to train on: sources, their shards, and how many pairs each shard holds."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipmini.data.cache import ShardCache
from clipmini.data.counts import count_pairs
from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import base_name, locate
from clipmini.errors import UserError


@dataclass(frozen=True)
class Source:
    """Shards that are drawn from with one weight."""

    name: str
    weight: float  # share of all samples seen, before normalisation over the sources
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """All sources of a run."""

    sources: tuple[Source, ...]

    @property
    def num_samples(self) -> int:
        return sum(source.num_samples for source in self.sources)

    def digest(self) -> str:
        """Hash what decides the order: names, weights and counts, not the places they lie in."""
        content = [
            [source.name, source.weight, [[base_name(shard.path), shard.num_samples] for shard in source.shards]]
            for source in self.sources
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SourceEntry:
    """What the config says of a source.

    Attributes:
        key: where that is in the config.
        weight: None where it is left to the number of pairs.
    """

    name: str
    key: str
    shards: str | Sequence[str]
    weight: float | None


def read_sources(
    train: str | Sequence[str] | Mapping, part: str = "train", *, under: str = "data."
) -> list[SourceEntry]:
    """Read `data.train` or another part: what `locate` takes, or a mapping `name: {shards, weight}`.

    Args:
        under: what the key of the config begins with.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(train, Mapping):
        return [SourceEntry(part, f"{under}{part}", check_paths(train, f"{under}{part}"), None)]
    entries = []
    for name, entry in train.items():
        key = f"{under}{part}.{name}"
        if not isinstance(entry, Mapping) or "shards" not in entry or set(entry) - {"shards", "weight"}:
            raise UserError(f"{key}={entry!r}: expected {{shards: ..., weight: ...}}")
        shards = check_paths(entry["shards"], f"{key}.shards")
        weight = entry.get("weight")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
        if weight is not None and not is_number:
            raise UserError(f"{key}.weight={weight!r}: expected a number above 0")
        entries.append(SourceEntry(str(name), key, shards, weight))
    if not entries:
        raise UserError(f"{under}{part}={{}}: no shards")
    return entries


def check_paths(shards: object, key: str) -> str | list[str]:
    """Return what names shards.

    Raises:
        UserError: it is no text, as a name that is a number.
    """
    if isinstance(shards, str) or (isinstance(shards, list) and all(isinstance(path, str) for path in shards)):
        return shards
    raise UserError(f"{key}={shards!r}: expected a path or a list of paths")


def read_manifest(
    train: str | Sequence[str] | Mapping,
    pair_format: PairFormat,
    cache: ShardCache,
    *,
    allow_pipe: bool = False,
    part: str = "train",
) -> Manifest:
    """Find the shards and count their pairs.

    Args:
        train: see `read_sources`. A weight left out is the number of pairs of the source.
        pair_format: which members of a sample make a pair.
        cache: how to reach remote shards, and where counts are kept.
        allow_pipe: whether commands may be run.
        part: the key of the config below `data`.

    Raises:
        UserError: no shards, one that cannot be read, or shards without a single pair.
    """
    sources = []
    for entry in read_sources(train, part):
        found = locate(entry.shards, entry.key, cache.remote, allow_pipe=allow_pipe)
        shards = tuple(shard for shard in count_pairs(found, pair_format, cache, entry.key) if shard.num_samples)
        weight = sum(shard.num_samples for shard in shards) if entry.weight is None else entry.weight
        sources.append(Source(entry.name, float(weight), shards))
    return Manifest(tuple(sources))
