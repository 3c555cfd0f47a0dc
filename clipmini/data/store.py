"""The bytes of one sample: an index of where each member lies in its tar, and reads at that offset."""

import os
import tarfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from clipmini.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class PairFormat:
    """Which members of a sample make a pair: a picture, and what holds its captions (`txt`, `json` or both)."""

    caption_extensions: tuple[str, ...] = ("txt",)
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS

    @property
    def read(self) -> frozenset[str]:
        """The only members whose bytes are ever read."""
        return frozenset((*self.image_extensions, *self.caption_extensions))

    def is_pair(self, extensions: Iterable[str]) -> bool:
        """Say whether these members are a picture and its captions."""
        found = set(extensions)
        return found.issuperset(self.caption_extensions) and not found.isdisjoint(self.image_extensions)

    def __str__(self) -> str:
        captions = " and ".join(f".{extension}" for extension in self.caption_extensions)
        return f"a picture ({', '.join(f'.{extension}' for extension in self.image_extensions)}) and {captions}"


@dataclass(frozen=True)
class Sample:
    """Where the members of one sample lie."""

    key: str
    members: dict[str, tuple[int, int]]  # extension -> (offset, bytes)


@dataclass(frozen=True)
class ShardIndex:
    """The pairs of a shard in the order of their first member, and the extensions of everything in it."""

    samples: tuple[Sample, ...]
    extensions: frozenset[str]


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its base name, as webdataset does: key and extension."""
    directory, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{directory}/{stem}" if directory else stem, extension.lower()


def index_shard(path: str, pair_format: PairFormat) -> ShardIndex:
    """Walk the headers of a tar. Members of one key belong together wherever they stand.

    Raises:
        UserError: not a readable tar.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    extensions = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                key, extension = split_name(member.name)
                extensions.add(f".{extension}")
                if extension in pair_format.read:
                    members.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read the shard {path}: {error}") from error
    samples = tuple(Sample(key, found) for key, found in members.items() if pair_format.is_pair(found))
    return ShardIndex(samples, frozenset(extensions))


class ShardStore:
    """Random access to the samples of local shards.

    Holds no open files and no indexes until a shard is touched, so that it travels to loader workers as it is.
    """

    def __init__(self, pair_format: PairFormat) -> None:
        self.pair_format = pair_format
        self.indexes: dict[str, ShardIndex] = {}
        self.files: dict[str, int] = {}

    def __getstate__(self) -> dict:
        return {"pair_format": self.pair_format, "indexes": {}, "files": {}}

    def key(self, path: str, index: int) -> str:
        """Return the key of a sample."""
        return self.index(path).samples[index].key

    def index(self, path: str) -> ShardIndex:
        """Return the index of a shard, walked at the first touch."""
        if path not in self.indexes:
            self.indexes[path] = index_shard(path, self.pair_format)
        return self.indexes[path]

    def read(self, path: str, index: int, *, only: Collection[str] | None = None) -> dict[str, bytes]:
        """Read the members of a sample by extension: all that its format names, or only some of them.

        Raises:
            OSError: the tar ends too early, or cannot be read.
        """
        sample = self.index(path).samples[index]
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        members = {}
        for extension, (offset, size) in sample.members.items():
            if only is not None and extension not in only:
                continue
            data = os.pread(self.files[path], size, offset)
            if len(data) != size:
                raise OSError(f"{path} ends inside {sample.key}.{extension}")
            members[extension] = data
        return members
