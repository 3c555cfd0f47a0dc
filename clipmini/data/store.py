"""The bytes of one sample, from any shard."""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from clipmini.data.cache import ShardCache
from clipmini.data.health import Fault
from clipmini.data.index import PairFormat, Shard, ShardIndex, index_file, load_index
from clipmini.data.remote import is_remote
from clipmini.errors import UserError

MAX_OPEN = 384  # shards of a process; more than the streams of a plan touch at a time
MIN_SAVED = 1000  # pairs; smaller shards are indexed faster than an index is read


@dataclass(frozen=True)
class OpenShard:
    """A shard in use."""

    file: int
    index: ShardIndex


class ShardStore:
    """Random access to the samples of shards, wherever they are.

    Holds no open files until a shard is touched, so that it travels to loader workers as it is.

    Args:
        pair_format: what makes a pair.
        cache: where remote shards and the indexes of large ones are kept; None for local shards only.
        max_member_bytes: larger members are refused unread.
    """

    def __init__(self, pair_format: PairFormat, cache: ShardCache | None = None, *, max_member_bytes: int) -> None:
        self.pair_format = pair_format
        self.cache = cache
        self.max_member_bytes = max_member_bytes
        self.opened: OrderedDict[str, OpenShard] = OrderedDict()
        self.missing: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}

    def key(self, shard: Shard, index: int) -> str | None:
        """Return the key of a sample; None if the shard does not hold it."""
        try:
            found = self.index(shard)
        except Fault:
            return None
        return found.key(index) if index < len(found) else None

    def index(self, shard: Shard) -> ShardIndex:
        """Return the index of a shard.

        Raises:
            Fault: the shard is gone.
            UserError: it cannot be fetched, or holds more than was counted.
        """
        return self.open(shard).index

    def read(self, shard: Shard, index: int, *, only: Collection[str] | None = None) -> dict[str, bytes]:
        """Read the members of a sample by extension: all that its format names, or only some of them.

        Raises:
            Fault: the shard or the sample cannot be read, or a member is too large.
            UserError: the shard cannot be fetched, or holds more than was counted.
        """
        opened = self.open(shard)
        if index >= len(opened.index):
            damage, told = opened.index.damage, f"there are {len(opened.index)} pairs, {shard.num_samples} were counted"
            raise Fault("damaged_shard", damage) if damage else Fault("absent_sample", told)
        members = {}
        for extension, (offset, size) in opened.index.members(index).items():
            if only is not None and extension not in only:
                continue
            if size > self.max_member_bytes:
                raise Fault("too_many_bytes", f".{extension} has {size}, data.max_member_bytes={self.max_member_bytes}")
            try:
                data = os.pread(opened.file, size, offset)
            except OSError as error:
                raise Fault("damaged_shard", error) from error
            if len(data) != size:
                raise Fault("damaged_shard", f"ends inside .{extension}")
            members[extension] = data
        return members

    def open(self, shard: Shard) -> OpenShard:
        """Open a shard, or find it open."""
        found = self.opened.get(shard.path)
        if found:
            self.opened.move_to_end(shard.path)
            return found
        if shard.path in self.missing:
            raise Fault("missing_shard", "not found")
        try:
            if is_remote(shard.path):
                assert self.cache is not None
                file = self.cache.open(shard)
            else:
                file = os.open(shard.path, os.O_RDONLY)
            found = self.with_index(file, shard)
        except OSError as error:
            self.missing.add(shard.path)
            raise Fault("missing_shard", error.strerror or error) from error
        if 0 <= shard.num_samples < len(found.index):
            os.close(found.file)
            raise UserError(
                f"{shard.path} holds {len(found.index)} pairs, but {shard.num_samples} were counted, so that some "
                "would never be seen: count again with `clipmini shards index`"
            )
        self.opened[shard.path] = found
        if len(self.opened) > MAX_OPEN:
            os.close(self.opened.popitem(last=False)[1].file)
        return found

    def with_index(self, file: int, shard: Shard) -> OpenShard:
        """Load the index of an open shard, or walk it, and keep that if it was long."""
        kept = self.cache.path(shard, f".{self.pair_format.name}.npz") if self.cache and shard.version else None
        index = load_index(kept, self.pair_format) if kept else None
        try:
            index = index or index_file(file, shard.path, self.pair_format)
        except BaseException:
            os.close(file)
            raise
        if kept and len(index) >= MIN_SAVED and not kept.exists():
            with contextlib.suppress(OSError):  # no room, no rights: it is walked again next time
                index.save(kept)
        return OpenShard(file, index)
