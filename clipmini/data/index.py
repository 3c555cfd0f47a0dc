"""Where the members of a shard lie: one walk over the headers of a tar, kept as a few arrays."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from clipmini.errors import UserError
from clipmini.files import write_atomically

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes; a tar consists of such blocks
END = bytes(BLOCK)  # what follows the last member
ADLER_BASE = 65521
MAX_EXTENSION = 1 << 16  # bytes of pax records
MAX_NAME = 4096  # bytes; Linux takes no longer path
MAX_SIZE = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar of picture-caption pairs.

    Attributes:
        path: a local path, a URL, or `pipe:` and a command.
        num_samples: pairs in it.
        size: bytes; -1 if that is not known.
        version: changes when the content does: time of the last change, ETag or the like.
    """

    path: str
    num_samples: int
    size: int = -1
    version: str = ""

    def identity(self) -> str:
        """Hash what tells this shard's content from any other's, also from one with the same base name."""
        return hashlib.sha256(f"{self.path}\n{self.size}\n{self.version}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class PairFormat:
    """Which members of a sample make a pair: a picture, and what holds its captions (`txt`, `json` or both).

    Without image extensions it is captions alone, and without captions pictures alone.
    """

    caption_extensions: tuple[str, ...] = ("txt",)
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS

    @property
    def read(self) -> frozenset[str]:
        """The only members whose bytes are ever read."""
        return frozenset((*self.image_extensions, *self.caption_extensions))

    @property
    def name(self) -> str:
        """Short form, for the names of files."""
        return "-".join((*(() if self.image_extensions else ("text",)), *self.caption_extensions)) or "pictures"

    def __str__(self) -> str:
        pictures = f"a picture ({', '.join(f'.{extension}' for extension in self.image_extensions)})"
        captions = [f".{extension}" for extension in self.caption_extensions]
        return " and ".join([*([pictures] if self.image_extensions else []), *captions])


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


class DamagedShard(Exception):
    """A tar that cannot be read from some place on; the members before it can."""


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its base name, as webdataset does: key and extension."""
    directory, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{directory}/{stem}" if directory else stem, extension.lower()


def walk(file: int, path: str) -> Iterator[Member]:
    """Yield the files in a tar, in order: ustar, GNU long names, pax names and sizes.

    Args:
        file: descriptor.
        path: for messages.

    Raises:
        DamagedShard: cut short, or a header that is none.
        UserError: a compressed file.
    """
    size = os.fstat(file).st_size
    offset = 0
    renamed: dict[str, str] = {}  # what an extension header says of the next member
    while True:
        header = os.pread(file, BLOCK, offset)
        if offset == 0:
            check_first_block(header, path)
        if header == END:
            check_end(file, offset + BLOCK, size)
            return
        if len(header) < BLOCK:
            where = "inside a header" if header else "without the two empty blocks of a complete tar"
            raise DamagedShard(f"ends {where}, at byte {size}")
        try:
            kind, name, length = parse_header(header)
            is_extension = kind in b"xLg"
            length = length if is_extension else int(renamed.get("size", length))
            if length < 0:
                raise ValueError(f"a size of {length}")
        except ValueError as error:
            raise DamagedShard(f"has no tar header at byte {offset}: {error}") from error
        data = offset + BLOCK
        offset = data + -(-length // BLOCK) * BLOCK
        if data + length > size:
            raise DamagedShard(f"ends inside {renamed.get('path', name)}, at byte {size}")
        if is_extension:
            renamed |= read_names(kind, os.pread(file, min(length, MAX_EXTENSION), data))
            continue
        if kind in b"0\0":
            yield Member(renamed.get("path", name), data, length)
        renamed = {}


def check_first_block(header: bytes, path: str) -> None:
    """Refuse what was compressed as a whole: no member of it can be read without all before it."""
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if header.startswith(magic):
            raise UserError(
                f"{path} is a tar compressed by {name}: samples are read at random, so shards must be plain .tar; "
                "decompress it once (pictures in it are compressed already)"
            )


def parse_header(header: bytes) -> tuple[bytes, str, int]:
    """Return the type, name and size of a member.

    Raises:
        ValueError: the checksum, a number or the length is wrong.
    """
    if len(header) < BLOCK:
        raise ValueError("too short")
    # The sum of all bytes, with the checksum's own field as spaces; zlib sums fast, modulo a prime.
    checksum = header[148:156]
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(checksum) + 8 * ord(" ")
    if (total - parse_number(checksum)) % ADLER_BASE:
        raise ValueError("wrong checksum")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[263:265] == b"00":  # GNU tars keep other things there
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return header[156:157], name.decode("utf-8", "surrogateescape"), parse_number(header[124:136])


def parse_number(field: bytes) -> int:
    """Read an octal number, or a binary one where GNU tar needs more digits."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b"\0 ") or b"0", 8)


def read_names(kind: bytes, content: bytes) -> dict[str, str]:
    """Return what an extension header (GNU's L, pax's x) says of the next member: its `path` and `size`.

    Raises:
        DamagedShard: pax records are `LENGTH KEY=VALUE` and a newline, and these are not; or a name is too long.
    """
    found: dict[str, bytes] = {"path": content.rstrip(b"\0")} if kind == b"L" else {}
    if kind == b"x" and b"path=" not in content and b"size=" not in content:
        return {}  # most only tell the time to a fraction of a second
    start = 0
    while kind == b"x" and start < len(content):
        digits = content[start : start + 8].split(b" ")[0]  # enough for MAX_EXTENSION
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(content) - start:
            raise DamagedShard(f"has a pax header that cannot be read: {content[start : start + 20]!r}")
        key, _, value = content[start + len(digits) + 1 : start + length].rstrip(b"\n").partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        start += length
    if any(len(value) > MAX_NAME for value in found.values()):
        raise DamagedShard(f"has a name of more than {MAX_NAME} bytes")
    return {name: value.decode("utf-8", "surrogateescape") for name, value in found.items()}


def check_end(file: int, offset: int, size: int) -> None:
    """See that nothing follows the end of a tar, as it does in tars that were joined, or that have a hole.

    Raises:
        DamagedShard: something does.
    """
    while offset < size:
        rest = os.pread(file, 1 << 16, offset)
        if rest.strip(b"\0"):
            raise DamagedShard(f"has data after its end, at byte {offset}")
        offset += 1 << 16


@dataclass(frozen=True)
class ShardIndex:
    """The pairs of a shard, in the order of their first member.

    Attributes:
        pair_format: what makes a pair.
        names: keys, joined; UTF-8.
        ends: where each key ends in `names`, uint32 [n].
        blocks: where the picture, if there are any, and each caption member begin, in blocks, uint32 [n, members].
        sizes: their bytes, uint32 of the same shape; what is larger counts as the largest number.
        kinds: which of the image extensions the picture has, uint8 [n].
        extensions: of everything in the shard.
        damage: what is wrong with the tar, or nothing.
    """

    pair_format: PairFormat
    names: bytes
    ends: np.ndarray
    blocks: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    extensions: tuple[str, ...]
    damage: str

    def __len__(self) -> int:
        return len(self.ends)

    def key(self, index: int) -> str:
        """Return the key of a pair."""
        start = int(self.ends[index - 1]) if index else 0
        return self.names[start : int(self.ends[index])].decode("utf-8", "surrogateescape")

    def members(self, index: int) -> dict[str, tuple[int, int]]:
        """Return (offset, bytes) of the members of a pair by extension, the picture first."""
        pictures = self.pair_format.image_extensions
        extensions = (*([pictures[self.kinds[index]]] if pictures else []), *self.pair_format.caption_extensions)
        places = zip(self.blocks[index].tolist(), self.sizes[index].tolist(), strict=True)
        return {extension: (block * BLOCK, size) for extension, (block, size) in zip(extensions, places, strict=True)}

    def save(self, path: Path) -> None:
        """Write the index so that `load_index` can read it."""
        write_atomically(
            path,
            lambda file: np.savez(
                file,
                names=np.frombuffer(self.names, np.uint8),
                ends=self.ends,
                blocks=self.blocks,
                sizes=self.sizes,
                kinds=self.kinds,
                extensions=np.array(self.extensions, np.str_),
                damage=np.array(self.damage),
            ),
        )


def load_index(path: Path, pair_format: PairFormat) -> ShardIndex | None:
    """Read an index, or None where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("ends", "blocks", "sizes", "kinds")}
            extensions = tuple(file["extensions"].tolist())
            return ShardIndex(
                pair_format, file["names"].tobytes(), **arrays, extensions=extensions, damage=str(file["damage"])
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def index_shard(path: str | Path, pair_format: PairFormat) -> ShardIndex:
    """Walk the headers of a local tar.

    Raises:
        OSError: the file cannot be opened.
        UserError: it is compressed.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        return index_file(file, str(path), pair_format)
    finally:
        os.close(file)


def index_file(file: int, path: str, pair_format: PairFormat) -> ShardIndex:
    """Walk the headers of an open tar. Members of one key belong together wherever they stand."""
    damage = ""
    extensions: set[str] = set()
    samples: dict[str, dict[str, Member]] = {}
    try:
        for member in walk(file, path):
            key, extension = split_name(member.name)
            extensions.add(f".{extension}")
            if extension in pair_format.read:
                samples.setdefault(key, {})[extension] = member
    except DamagedShard as error:
        damage = str(error)
    return build_index(samples, pair_format, extensions, damage)


def build_index(
    samples: dict[str, dict[str, Member]], pair_format: PairFormat, extensions: Iterable[str], damage: str
) -> ShardIndex:
    """Turn the members of all samples into arrays; samples that make no pair are left out."""
    keys, kinds, rows = [], [], []
    for key, members in samples.items():
        pictures = [extension for extension in members if extension in pair_format.image_extensions][:1]
        is_missing = len(pictures) < bool(pair_format.image_extensions)
        if is_missing or not all(extension in members for extension in pair_format.caption_extensions):
            continue
        keys.append(key.encode("utf-8", "surrogateescape"))
        kinds.append(pair_format.image_extensions.index(pictures[0]) if pictures else 0)
        row = [members[extension] for extension in (*pictures, *pair_format.caption_extensions)]
        rows.append([(member.offset // BLOCK, min(member.size, MAX_SIZE)) for member in row])
    width = bool(pair_format.image_extensions) + len(pair_format.caption_extensions)
    places = np.array(rows, np.uint32).reshape(len(rows), width, 2)
    return ShardIndex(
        pair_format,
        b"".join(keys),
        np.cumsum([len(key) for key in keys], dtype=np.uint32),
        np.ascontiguousarray(places[..., 0]),
        np.ascontiguousarray(places[..., 1]),
        np.array(kinds, np.uint8),
        tuple(sorted(extensions)),
        damage,
    )
