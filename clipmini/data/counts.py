"""How many pairs each shard holds: as counted before, as files beside the shards say, or by walking the headers."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipmini.console import track
from clipmini.data.cache import ShardCache
from clipmini.data.index import PairFormat, Shard, ShardIndex, index_file, index_shard
from clipmini.data.locate import base_name, parent
from clipmini.data.processes import map_in_processes
from clipmini.data.remote import is_remote
from clipmini.data.threads import map_in_threads
from clipmini.data.told import REQUESTS, read_told_counts
from clipmini.errors import UserError
from clipmini.files import write_atomically
from clipmini.redaction import redact_addresses

log = logging.getLogger(__name__)

INDEX_NAME = "clipmini-index.json"
ALONE_SECONDS = 1.0  # what takes less needs neither help nor a file that saves it the next time
MAX_TOLD = 10  # extensions in a message


@dataclass(frozen=True)
class Count:
    """What is known of a shard.

    Attributes:
        num_pairs: pictures with captions.
        damage: what is wrong with the tar, if it was walked; these pairs are before that.
        extensions: of all members, if it was walked just now.
    """

    num_pairs: int
    damage: str = ""
    extensions: tuple[str, ...] = ()


def count_pairs(
    shards: Sequence[Shard], pair_format: PairFormat, cache: ShardCache, key: str, *, again: bool = False
) -> list[Shard]:
    """Fill in the pairs of each shard.

    Args:
        key: of the config, for messages.
        again: walk all of them, whatever was counted before, and keep that.

    Raises:
        UserError: a shard that cannot be read, or no pairs at all; the message says what was found instead.
    """
    digest = hashlib.sha256("\n".join(shard.path for shard in shards).encode()).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        try:
            # The first process of a node counts, the others read what it kept.
            stack.enter_context(cache.lock(f"count-{digest}"))
        except UserError:
            if any(is_remote(shard.path) for shard in shards):
                raise  # local shards do not need the cache: each process counts by itself
        start = time.monotonic()
        counts = {} if again else read_known_counts(shards, pair_format, cache)
        walked = walk_shards([shard for shard in shards if shard.path not in counts], pair_format, cache)
        counts |= walked
        if again or time.monotonic() - start > ALONE_SECONDS:
            KeptCounts(shards, pair_format, cache).write(counts, must=again)
    for path, count in counts.items():
        if count.damage:
            log.warning("%s %s: %d pairs before that can be read", path, count.damage, count.num_pairs)
    if not any(count.num_pairs for count in counts.values()):
        extensions = sorted({extension for count in walked.values() for extension in count.extensions})
        found = ", ".join(extensions[:MAX_TOLD]) + (" ..." if len(extensions) > MAX_TOLD else "")
        damaged = next((f"; {path} {count.damage}" for path, count in counts.items() if count.damage), "")
        raise UserError(
            f"{key}: no picture-caption pairs in {len(shards)} shards, the first is {shards[0].path}; a pair is "
            f"{pair_format} of the same name up to the first dot ({cache.under}caption_key), found: {found or 'none'}"
            f"{damaged}"
        )
    return [replace(shard, num_samples=counts[shard.path].num_pairs) for shard in shards]


def read_known_counts(shards: Sequence[Shard], pair_format: PairFormat, cache: ShardCache) -> dict[str, Count]:
    """Read what was counted before, else what files beside the shards tell, by path."""
    counts = KeptCounts(shards, pair_format, cache).read()
    rest = [shard for shard in shards if shard.path not in counts]
    return counts | {path: Count(told) for path, told in read_told_counts(rest, cache.remote).items()}


def count_shard(path: str, pair_format: PairFormat) -> Count:
    """Count the pairs of a local shard."""
    return make_count(index_shard(path, pair_format))


def make_count(index: ShardIndex) -> Count:
    """Take what is told of a shard from its index."""
    return Count(len(index), index.damage, index.extensions)


def walk_shards(shards: Sequence[Shard], pair_format: PairFormat, cache: ShardCache) -> dict[str, Count]:
    """Walk the headers of shards, by path: remote ones are fetched for that, many at a time.

    Raises:
        UserError: a shard that cannot be read.
    """

    def fetch_and_count(shard: Shard) -> Count:
        file = cache.open(shard)
        try:
            return make_count(index_file(file, shard.path, pair_format))
        finally:
            os.close(file)

    near = [shard for shard in shards if not is_remote(shard.path)]
    far = [shard for shard in shards if is_remote(shard.path)]
    found: dict[str, Count] = {}
    try:
        for shard, count in zip(near, walk_local([shard.path for shard in near], pair_format), strict=True):
            found[shard.path] = count
        if far:
            hint = "; `clipmini shards index` keeps the counts" if any(shard.version for shard in far) else ""
            log.info("fetching %d shards to count their pairs%s", len(far), hint)
            counts = track(map_in_threads(fetch_and_count, far, REQUESTS), len(far), "counting pairs")
            for shard, count in zip(far, counts, strict=True):
                found[shard.path] = count
    except OSError as error:
        raise UserError(f"cannot read the shard {error.filename or error}: {error.strerror or error}") from error
    return found


def walk_local(paths: Sequence[str], pair_format: PairFormat) -> Iterator[Count]:
    """Count the pairs of local shards: alone for a moment, then with all cores."""
    start, done = time.monotonic(), 0
    while done < len(paths) and time.monotonic() - start < ALONE_SECONDS:
        yield count_shard(paths[done], pair_format)
        done += 1
    rest = paths[done:]
    if rest:
        yield from map_in_processes(
            functools.partial(count_shard, pair_format=pair_format), rest, description="counting pairs"
        )


class KeptCounts:
    """Counts of earlier runs, in a file beside the shards or, where that cannot be written, in the cache.

    `{format: {shard: [bytes, version, pairs, damage]}}`; what is said of a shard that has changed since is not used.
    """

    def __init__(self, shards: Sequence[Shard], pair_format: PairFormat, cache: ShardCache) -> None:
        self.shards = shards
        self.format = pair_format.name
        directories = sorted({parent(shard.path) for shard in shards})
        digest = hashlib.sha256("\n".join(directories).encode()).hexdigest()[:32]
        self.paths = [cache.directory / "counts" / f"{digest}.json"]
        self.name = lambda shard: name_of(shard.path)
        if len(directories) == 1 and not is_remote(directories[0]):
            self.paths.insert(0, Path(directories[0]) / INDEX_NAME)
            self.name = lambda shard: base_name(shard.path)

    def read(self) -> dict[str, Count]:
        """Return the counts of the shards that are as they were, by path; where two files tell, by the newer one."""
        found = {}
        for path in sorted(self.paths, key=modified):
            kept = self.read_file(path)
            for shard in self.shards:
                match kept.get(self.name(shard)):
                    case [shard.size, shard.version, int(num_pairs), str(damage)] if shard.version and num_pairs >= 0:
                        found[shard.path] = Count(num_pairs, damage)
        return found

    def read_file(self, path: Path) -> dict[str, Any]:
        """Return what a file says of our format; empty where it is missing or broken."""
        content = read_json(path).get(self.format)
        return content if isinstance(content, dict) else {}

    def write(self, counts: Mapping[str, Count], *, must: bool) -> None:
        """Keep counts by path, of shards that tell when they change; what is kept of others stays.

        Raises:
            UserError: it must be kept and cannot.
        """
        shards = [shard for shard in self.shards if shard.version]
        if must and len(shards) < len(self.shards):
            rest = len(self.shards) - len(shards)
            log.warning("the counts of %d shards are not kept: nothing tells when they change", rest)
        if not shards:
            return
        new = {}
        for shard in shards:
            count = counts[shard.path]
            new[self.name(shard)] = [shard.size, shard.version, count.num_pairs, count.damage]
        problems = []
        for path in self.paths:
            content = {**read_json(path), self.format: {**self.read_file(path), **new}}
            try:
                write_atomically(path, json.dumps(content).encode())
            except OSError as error:
                problems.append(str(error))
                continue
            log.info("the counts of %d shards are kept in %s", len(new), path)
            return
        if must:
            raise UserError(f"the counts cannot be kept ({'; '.join(problems)}): set paths.cache")


def name_of(path: str) -> str:
    """Return a path to keep: without the credentials of an address, and with a hash where it had some."""
    clean = redact_addresses(path)
    return path if clean == path else f"{clean}#{hashlib.sha256(path.encode()).hexdigest()[:16]}"


def modified(path: Path) -> float:
    """Return when a file was written, seconds; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that we wrote; empty where it is missing or broken."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}
