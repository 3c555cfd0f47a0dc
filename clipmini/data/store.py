"""The bytes of one sample, from any shard."""

import contextlib
import functools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from errno import EMFILE, ENFILE, ENOMEM
from typing import Any, TypeVar

from clipmini.data.cache import ShardCache
from clipmini.data.captions import is_text
from clipmini.data.health import Fault
from clipmini.data.index import PairFormat, Shard, ShardIndex, index_file, load_index
from clipmini.data.remote import is_remote
from clipmini.errors import UserError

MAX_OPEN = 128  # files of a process; as many as the streams of a plan touch at a time, and what every system allows
MAX_INDEXES = 512  # of shards, some 200 KB each, in memory
MIN_SAVED = 1000  # pairs; smaller shards are indexed faster than an index is read
MAX_CAPTION_BYTES = 1 << 20  # of a .txt or .json: larger ones take minutes and gigabytes to parse
TRIES = 3  # of what a disk or a network file system fails to do

Result = TypeVar("Result")


class ShardStore:
    """Random access to the samples of shards, wherever they are.

    Holds no open files until a shard is touched, so that it travels to loader workers as it is.

    Args:
        pair_format: what makes a pair.
        cache: where remote shards and the indexes of large ones are kept; None for local shards only.
        max_member_bytes: larger members are refused unread.

    Attributes:
        under: what the keys that messages name begin with, see `ShardCache`.
    """

    def __init__(self, pair_format: PairFormat, cache: ShardCache | None = None, *, max_member_bytes: int) -> None:
        self.pair_format = pair_format
        self.cache = cache
        self.under = "data." if cache is None else cache.under
        self.max_member_bytes = max_member_bytes
        self.files: OrderedDict[str, int] = OrderedDict()  # by path, the last used last
        self.indexes: OrderedDict[str, ShardIndex] = OrderedDict()
        self.missing: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": OrderedDict(), "indexes": OrderedDict()}

    def key(self, shard: Shard, index: int) -> str | None:
        """Return the key of a sample; None if the shard does not hold it."""
        try:
            found = self.index(shard)
        except Fault:
            return None
        return found.key(index) if index < len(found) else None

    def index(self, shard: Shard) -> ShardIndex:
        """Return the index of a shard; raises what `read` does."""
        return self.persist(shard, lambda: self.open_index(shard))

    def read(self, shard: Shard, index: int, *, only: Collection[str] | None = None) -> dict[str, bytes]:
        """Read the members of a sample by extension: all that its format names, or only some of them.

        Raises:
            Fault: the shard or the sample cannot be read, or a member is too large.
            UserError: the shard cannot be fetched, or holds more than was counted, or the system refuses files.
        """
        return self.persist(shard, functools.partial(self.read_once, shard, index, only))

    def read_picture(self, shard: Shard, index: int) -> bytes:
        """Read the picture of a sample; raises what `read` does."""
        (data,) = self.read(shard, index, only=self.pair_format.image_extensions).values()
        return data

    def read_once(self, shard: Shard, index: int, only: Collection[str] | None) -> dict[str, bytes]:
        found, file = self.open_index(shard), self.open_file(shard)
        if index >= len(found):
            cause = "damaged_shard" if found.damage else "absent_sample"
            raise Fault(cause, found.damage or tell_missing(found, shard, self.under))
        members = {}
        for extension, (offset, size) in found.members(index).items():
            if only is None or extension in only:
                check_size(extension, size, self.max_member_bytes, self.under)
                members[extension] = os.pread(file, size, offset)
                if len(members[extension]) != size:
                    raise Fault("damaged_shard", f"ends inside .{extension}")
        return members

    def persist(self, shard: Shard, action: Callable[[], Result]) -> Result:
        """Do something with a shard, a few times where the disk or the network file system fails.

        Raises:
            Fault: there is no such shard, or it cannot be read.
            UserError: the system refuses more open files, or memory.
        """
        if shard.path in self.missing:
            raise Fault("missing_shard", "not found")
        for attempt in range(1, TRIES + 1):
            try:
                return action()
            except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
                self.missing.add(shard.path)
                raise Fault("missing_shard", error.strerror or error) from error
            except OSError as error:
                self.close(*self.files)  # too many of them may be the reason, or one that a server has forgotten
                if attempt == TRIES and error.errno in (EMFILE, ENFILE, ENOMEM):
                    raise UserError(f"cannot open {shard.path}: {error.strerror}; ulimit has the limits") from error
                if attempt == TRIES:
                    raise Fault("damaged_shard", error.strerror or error) from error
                time.sleep(0.5 * attempt)
        raise AssertionError

    def open_file(self, shard: Shard) -> int:
        """Return a descriptor of a shard."""
        if shard.path in self.files:
            self.files.move_to_end(shard.path)
        elif is_remote(shard.path):
            assert self.cache is not None
            self.files[shard.path] = self.cache.open(shard)
        else:
            self.files[shard.path] = os.open(shard.path, os.O_RDONLY)
        if len(self.files) > MAX_OPEN:
            self.close(next(iter(self.files)))
        return self.files[shard.path]

    def close(self, *paths: str) -> None:
        """Close shards; their indexes stay."""
        for path in paths:
            os.close(self.files.pop(path))

    def close_remote(self) -> None:
        """Close remote shards: what is deleted from the cache takes its room as long as it is open."""
        self.close(*(path for path in self.files if is_remote(path)))

    def open_index(self, shard: Shard) -> ShardIndex:
        """Return the index of a shard, and open that if it is not known."""
        found = self.indexes.get(shard.path)
        if found is not None:
            self.indexes.move_to_end(shard.path)
            return found
        found = self.load_index(shard)
        if 0 <= shard.num_samples < len(found):
            raise UserError(
                f"{shard.path} holds {len(found)} pairs, but {shard.num_samples} were counted, so that some would "
                "never be seen: count again with `clipmini shards index`"
            )
        if len(self.indexes) >= MAX_INDEXES:
            self.indexes.popitem(last=False)
        self.indexes[shard.path] = found
        return found

    def load_index(self, shard: Shard) -> ShardIndex:
        """Read the index of a shard, or walk it, and keep that if it was long."""
        kept = self.cache.path(shard, f".{self.pair_format.name}.npz") if self.cache and shard.version else None
        index = load_index(kept, self.pair_format) if kept else None
        index = index or index_file(self.open_file(shard), shard.path, self.pair_format)
        if kept and len(index) >= MIN_SAVED and not kept.exists():
            with contextlib.suppress(OSError):  # no room, no rights: it is walked again next time
                index.save(kept)
        return index


def check_size(extension: str, size: int, max_member_bytes: int, under: str = "data.") -> None:
    """Refuse a member that is too large.

    Args:
        under: what the key of the limit begins with.

    Raises:
        Fault: it is.
    """
    if size > max_member_bytes:
        raise Fault("too_many_bytes", f".{extension} has {size}, {under}max_member_bytes={max_member_bytes}")
    if size > MAX_CAPTION_BYTES and (extension == "json" or is_text(extension)):
        raise Fault("too_many_bytes", f".{extension} has {size}, a caption may have {MAX_CAPTION_BYTES}")


def tell_missing(index: ShardIndex, shard: Shard, under: str) -> str:
    """Tell how many pairs there are of those that were counted; see `check_size`."""
    told = f"there are {len(index)} pairs, {shard.num_samples} were counted"
    found = ", ".join(index.extensions[:10]) or "none"
    return told if len(index) else f"{told}; a pair is {index.pair_format} ({under}caption_key), found: {found}"
