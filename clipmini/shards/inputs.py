"""Samples to pack or embed, read in parts, one for each file to write: of a folder of pictures, or of other shards."""

import functools
import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmini.data.captions import check_caption, read_metadata
from clipmini.data.health import Fault
from clipmini.data.index import IMAGE_EXTENSIONS, DamagedShard, Member, split_name, walk
from clipmini.data.processes import check_stopped, map_in_processes
from clipmini.errors import UserError, did_you_mean

KEPT = (*IMAGE_EXTENSIONS, "txt", "json")
PRELOAD = ("clipmini.shards.writer",)  # for worker processes; the first to start some loads it for all


@dataclass(frozen=True)
class Sample:
    """A picture in its own format, its caption without white space around it, and what else is known of it.

    Either is empty where no key says where it is.

    Attributes:
        row: number, from 1, of the table's row that holds the picture itself; None of pictures that are elsewhere.
    """

    picture: bytes
    caption: str
    metadata: dict[str, Any]
    row: int | None = None


Item = tuple[str, Callable[[], Sample]]  # where a sample comes from, and what reads it or raises Fault


class Part:
    """Some samples of an input, in order."""

    def __len__(self) -> int:
        """Return how many there are, with those that cannot be used."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item]:
        raise NotImplementedError

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield some of them, counted from the first of this part."""
        return itertools.islice(self, start, stop)


@dataclass(frozen=True)
class Input:
    """All samples of an input.

    Attributes:
        kind: what its samples are.
        num_samples: with those that will be left out.
        digest: changes when the names, sizes or times of the input's files do.
        parts: of as many samples each as a shard shall have, in order; they travel to other processes.
        damage: number of samples before it, path and what is wrong, of each shard that ends too early.
        dropped: files and members that are not kept, by extension.
    """

    kind: str
    num_samples: int
    digest: str
    parts: Sequence[Part]
    damage: tuple[tuple[int, str, str], ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)


def fingerprint(files: Iterable[tuple[str, os.stat_result | None]]) -> str:
    """Hash names, sizes and times of files."""
    digest = hashlib.sha256()
    for name, status in files:
        facts = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(f"{name}\n{facts}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_file(path: str, cause: str) -> bytes:
    """Read a file of a sample.

    Raises:
        Fault: it is not there, or cannot be read.
    """
    try:
        file = Path(path)
        if file.exists() and not file.is_file():  # reading a named pipe would never end
            raise Fault(cause, f"{file.name} is not a file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Fault(cause, f"{os.path.basename(path)}: {reason}") from error


def take_caption(value: object, key: str) -> tuple[str, dict[str, Any]]:
    """Return the caption of a sample and, of a list of captions, the first of them and what its .json shall keep.

    Raises:
        Fault: one of them cannot be used.
    """
    if not isinstance(value, list) or not value:
        return check_caption(value, key), {}
    captions = [check_caption(caption, key) for caption in value]
    return captions[0], {key: captions}


def plain(value: Any) -> Any:
    """Return what JSON can say of a value: dates and decimals as text, null for numbers that are none."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


# Folders of pictures


@dataclass(frozen=True)
class FolderPart(Part):
    """Some pictures of a folder, each with the files beside it.

    Attributes:
        files: relative paths of a picture, of its .txt, which may be missing, and of its .json, if it has one.
    """

    root: str
    files: Sequence[tuple[str, str, str | None]]
    caption_key: str | None

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Item]:
        for picture, text, metadata in self.files:
            yield picture, functools.partial(self.load, picture, text, metadata)

    def load(self, picture: str, text: str, metadata: str | None) -> Sample:
        """Read a picture and the files beside it."""
        caption = "" if self.caption_key is None else check_caption(self.read_caption(picture, text))
        known = {} if metadata is None else plain(read_metadata(self.read(metadata, "json")))
        return Sample(self.read(picture, "picture"), caption, known)

    def read_caption(self, picture: str, text: str) -> str | bytes:
        if self.caption_key == "txt":
            return self.read(text, "caption")
        folder = os.path.dirname(os.path.abspath(os.path.join(self.root, picture)))
        return os.path.basename(folder).replace("_", " ")

    def read(self, path: str, cause: str) -> bytes:
        return read_file(os.path.join(self.root, path), cause)


def open_folder(root: str, caption_key: str | None, samples_per_shard: int) -> Input:
    """Find the pictures in a folder and the folders in it, sorted by relative path; hidden ones are left alone.

    `caption_key=txt` takes the caption from the .txt of the same name beside the picture; `caption_key=folder` takes
    the name of the picture's folder, with underscores as spaces (hyphens stay: they are part of words); None takes no
    captions. A .json of the same name goes along. a.jpg and a.png beside each other are two samples, with one a.txt for
    both.

    Raises:
        UserError: no pictures, or another caption_key.
    """
    if caption_key not in ("txt", "folder", None):
        hint = did_you_mean(caption_key, ("txt", "folder"))
        raise UserError(f"caption_key={caption_key}: of a folder of pictures it is txt or folder{hint}")
    paths: list[str] = []
    beside: dict[str, str] = {}  # paths of .txt and .json by what they are in lower case

    def find() -> Iterator[tuple[str, os.stat_result | None]]:
        for path, status in walk_folder(root, frozenset()):
            stem, extension = split_path(path)
            if extension in IMAGE_EXTENSIONS:
                paths.append(path)
            elif extension in KEPT and status:
                beside[f"{stem}.{extension}"] = path
            if extension in KEPT:
                yield path, status

    digest = fingerprint(find())
    if not paths:
        extensions = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        raise UserError(f"input={root}: no pictures ({extensions}) and no .tar files in it")
    stems = [(path, split_path(path)[0]) for path in sorted(paths)]
    files = [(path, beside.get(f"{stem}.txt", f"{stem}.txt"), beside.get(f"{stem}.json")) for path, stem in stems]
    starts = range(0, len(files), samples_per_shard)
    parts = [FolderPart(root, files[start : start + samples_per_shard], caption_key) for start in starts]
    texts = {name for name in beside if name.endswith(".txt")} if caption_key == "txt" else set()
    lonely = texts - {f"{stem}.txt" for _, stem in stems}
    return Input(
        "pictures", len(paths), digest, parts, dropped={".txt without a picture": len(lonely)} if lonely else {}
    )


def split_path(path: str) -> tuple[str, str]:
    """Split a path into what files beside each other share, and the extension in lower case, without its dot."""
    stem, extension = os.path.splitext(path)
    return stem, extension[1:].lower()


def check_apart(path: str, output: Path) -> None:
    """See that what is written does not become a part of the folder that is read.

    Raises:
        UserError: it would.
    """
    if output.resolve().is_relative_to(Path(path).resolve()):
        raise UserError(f"output={output}: is in input={path}, where all folders are searched; choose another")


def walk_folder(root: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the relative path of each file below a folder, and its status unless it is a link to nothing."""
    status = os.stat(root)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder that holds it
        return
    with os.scandir(root) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_dir():
            for path, found in walk_folder(entry.path, above | {identity}):
                yield f"{entry.name}/{path}", found
        else:
            yield entry.name, entry.stat() if os.path.exists(entry.path) else None


# Shards


@dataclass(frozen=True)
class ShardsPart(Part):
    """Some samples of one or more shards.

    Attributes:
        pieces: path of a shard, its first sample and the one after its last.
        caption_key: `txt` or a key of the .json.
    """

    pieces: Sequence[tuple[str, int, int]]
    caption_key: str

    def __len__(self) -> int:
        return sum(stop - first for _, first, stop in self.pieces)

    def __iter__(self) -> Iterator[Item]:
        for path, first, stop in self.pieces:
            samples, _, _ = group_members(path)
            for key in list(samples)[first:stop]:
                yield key, functools.partial(self.load, path, samples[key])

    def load(self, path: str, members: Mapping[str, Member]) -> Sample:
        """Read the members of a sample."""
        picture = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
        only = f"in {os.path.basename(path)} there is only {', '.join(f'.{extension}' for extension in members)}"
        if picture is None:
            raise Fault("picture", only)
        if self.caption_key == "txt" and "txt" not in members:
            raise Fault("caption", only)
        content = read_members(path, members)
        metadata = plain(read_metadata(content["json"])) if "json" in content else {}
        found = content["txt"] if self.caption_key == "txt" else metadata.get(self.caption_key)
        caption, kept = take_caption(found, self.caption_key)
        return Sample(content[picture], caption, {**metadata, **kept})


def read_members(path: str, members: Mapping[str, Member]) -> dict[str, bytes]:
    """Read members of a shard by extension.

    Raises:
        OSError: the shard is gone, or has changed.
    """
    content = {}
    with open(path, "rb") as file:  # buffered: a single read ends at 2 GB
        for extension, member in members.items():
            file.seek(member.offset)
            content[extension] = file.read(member.size)
            if len(content[extension]) != member.size:
                raise OSError(f"{path} has become shorter")
    return content


def group_members(path: str) -> tuple[dict[str, dict[str, Member]], Counter[str], str]:
    """Walk a shard.

    Returns:
        The members of each key that has any to keep, the number of others by extension, and what is wrong with the tar.
        A second picture of a key is one of the others, and so is what a later member of the same name replaces.
    """
    samples: dict[str, dict[str, Member]] = {}
    dropped: Counter[str] = Counter()
    damage = ""
    with open(path, "rb", buffering=0) as file:
        try:
            for member in walk(file.fileno(), path):
                key, extension = split_name(member.name)
                kept = samples.get(key, {})
                is_second = extension in IMAGE_EXTENSIONS and not kept.keys().isdisjoint(IMAGE_EXTENSIONS)
                if extension in kept or extension not in KEPT or is_second:
                    dropped[f".{extension}"] += 1
                if extension in kept or (extension in KEPT and not is_second):
                    samples.setdefault(key, {})[extension] = member
        except DamagedShard as error:
            damage = str(error)
    return samples, dropped, damage


@dataclass(frozen=True)
class Count:
    """The samples of a shard, its members that are not kept, and what is wrong with it."""

    samples: int
    dropped: Counter[str]
    damage: str


def count_samples(path: str) -> Count:
    """Count the samples of a shard, in a worker process."""
    check_stopped()
    samples, dropped, damage = group_members(path)
    return Count(len(samples), dropped, damage)


def open_shards(
    path: str, tars: Sequence[str], caption_key: str, samples_per_shard: int, num_workers: int | None
) -> Input:
    """Count the samples of shards: a picture, its .txt and its .json of one key; a second picture is dropped.

    `caption_key=txt` takes the caption from the .txt, any other from that key of the .json.

    Raises:
        UserError: no samples, or a compressed tar.
    """
    total = 0
    dropped: Counter[str] = Counter()
    damages = []
    pieces: list[list[tuple[str, int, int]]] = []
    counts = map_in_processes(
        count_samples, tars, description="counting samples", num_workers=num_workers, preload=PRELOAD
    )
    for tar, count in zip(tars, counts, strict=True):
        first = 0
        while first < count.samples:
            position = total + first
            if position % samples_per_shard == 0:
                pieces.append([])
            stop = min(count.samples, first + samples_per_shard - position % samples_per_shard)
            pieces[-1].append((tar, first, stop))
            first = stop
        total += count.samples
        dropped += count.dropped
        if count.damage:
            damages.append((total, tar, count.damage))
    if not total:
        found = ", ".join(sorted(dropped)) or "nothing"
        damaged = f"; {damages[0][1]} {damages[0][2]}" if damages else ""
        raise UserError(f"input={path}: no samples in {len(tars)} shards, found: {found}{damaged}")
    parts = [ShardsPart(some, caption_key) for some in pieces]
    digest = fingerprint((os.path.basename(tar), os.stat(tar)) for tar in tars)
    return Input(f"samples in {len(tars)} shards", total, digest, parts, tuple(damages), dict(dropped))
