"""What there is to train on: sources, their shards, and how many pairs each shard holds."""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from webdataset.shardlists import expand_urls

from clipmini.data.store import PairFormat, index_shard
from clipmini.errors import UserError


@dataclass(frozen=True)
class Shard:
    """A tar of picture-caption pairs."""

    path: str
    num_samples: int


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
        """Hash what decides the order: names, weights and counts, not the directories they lie in."""
        content = [
            [source.name, source.weight, [[Path(shard.path).name, shard.num_samples] for shard in source.shards]]
            for source in self.sources
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_manifest(train: str | Sequence[str] | Mapping, pair_format: PairFormat) -> Manifest:
    """Find the shards and count their pairs.

    Args:
        train: `data.train`: a directory of tars, a glob, a brace pattern (`00{00..41}.tar`), a list of those, or a
            mapping `name: {shards, weight}`. A weight left out is the number of pairs of the source.
        pair_format: which members of a sample make a pair.

    Raises:
        UserError: no shards, a shard that is not a readable tar, or shards without a single pair.
    """
    mapping = train if isinstance(train, Mapping) else {"train": {"shards": train}}
    sources = []
    for name, entry in mapping.items():
        key = f"data.train.{name}" if isinstance(train, Mapping) else "data.train"
        if not isinstance(entry, Mapping) or "shards" not in entry or set(entry) - {"shards", "weight"}:
            raise UserError(f"{key}={entry!r}: expected {{shards: ..., weight: ...}}")
        shards = read_shards(expand(entry["shards"], key), pair_format, key)
        weight = entry.get("weight")
        weight = sum(shard.num_samples for shard in shards) if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
            raise UserError(f"{key}.weight={weight!r}: expected a number above 0")
        sources.append(Source(str(name), float(weight), shards))
    return Manifest(tuple(sources))


def expand(shards: str | Sequence[str], key: str) -> list[str]:
    """List the shard files that a pattern names, in order.

    Raises:
        UserError: nothing is found, or it is not something that can be read.
    """
    if not isinstance(shards, str):
        if not shards:
            raise UserError(f"{key}=[]: no shards")
        return [path for pattern in shards for path in expand(pattern, key)]
    if shards.startswith("pipe:") or "://" in shards:
        raise UserError(f"{key}={shards}: only local files can be read; copy the shards to a local disk first")
    if Path(shards).is_dir():
        paths = sorted(glob.glob(f"{glob.escape(shards)}/*.tar"))
        if not paths:
            raise UserError(f"{key}={shards}: no shards found, the directory has no .tar files")
        return paths
    paths = [path for pattern in expand_urls(shards) for path in sorted(glob.glob(pattern)) or [pattern]]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{key}={shards}: no shards found, {missing[0]} does not exist (of {len(paths)} shards)")
    return paths


def read_shards(paths: Sequence[str], pair_format: PairFormat, key: str) -> tuple[Shard, ...]:
    """Count the pairs of each shard.

    Raises:
        UserError: not a readable tar, or no pairs at all; the message says which members were found instead.
    """
    shards: list[Shard] = []
    extensions: set[str] = set()
    for path in paths:
        index = index_shard(path, pair_format)
        shards.append(Shard(path, len(index.samples)))
        extensions |= index.extensions
    if not any(shard.num_samples for shard in shards):
        found = ", ".join(sorted(extensions)) or "none"
        raise UserError(
            f"{key}: no picture-caption pairs in {len(paths)} shards, the first is {paths[0]}; "
            f"a pair is {pair_format} of the same name (data.caption_key), found: {found}"
        )
    return tuple(shard for shard in shards if shard.num_samples)
