"""Reads everything in shards and finds each defect, with its shard and key."""

import functools
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clipmini.data.cache import ShardCache
from clipmini.data.content import Content
from clipmini.data.health import Fault
from clipmini.data.index import IMAGE_EXTENSIONS, DamagedShard, Member, Shard, split_name, walk
from clipmini.data.picture import Picture
from clipmini.data.processes import check_stopped, map_in_processes
from clipmini.data.remote import is_remote
from clipmini.data.store import check_size
from clipmini.errors import UserError

# Defects that do not keep us from reading a shard, besides the causes in `data.health`.
UNSORTED = "unsorted"  # members of a sample stand apart: readers that stream make half samples of them
DUPLICATE = "duplicate"  # two members of one name, or two pictures of one sample: only one of them is seen
CODE = "code"  # a member that other readers would unpickle, and so run what is in it
COUNT = "count"  # another number of pairs than was told or kept
PICKLES = ("pickle", "pkl", "pyd", "pth")  # what webdataset's decoders unpickle (webdataset/autodecode.py)


@dataclass(frozen=True)
class Defect:
    """What is wrong at some place; without a key it is about the whole shard."""

    shard: str
    key: str
    cause: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """What samples are measured by: the values of `data` in the config."""

    content: Content
    max_member_bytes: int
    max_pixels: int

    def is_pair(self, extensions: Collection[str]) -> bool:
        """Say whether members with these extensions are counted as a pair."""
        pair_format = self.content.pair_format
        pictures = pair_format.image_extensions
        has_picture = not pictures or any(extension in pictures for extension in extensions)
        return has_picture and all(extension in extensions for extension in pair_format.caption_extensions)


def find_defects(
    shards: Sequence[Shard], rules: Rules, cache: ShardCache, *, num_workers: int | None
) -> Iterator[Defect]:
    """Yield every defect, shard by shard.

    Args:
        shards: as located; with a count, that is compared too.
        rules: of the config.
        cache: fetches remote shards.
        num_workers: processes; None takes all cores.
    """
    work = functools.partial(verify_shard, rules=rules, cache=cache)
    for defects in map_in_processes(
        work, shards, description="verifying shards", num_workers=num_workers, preload=(__name__,)
    ):
        yield from defects


def verify_shard(shard: Shard, *, rules: Rules, cache: ShardCache) -> list[Defect]:
    """Find the defects of a shard."""
    warnings.simplefilter("ignore")  # Pillow's, of pictures that are odd but can be used
    try:
        file = cache.open(shard) if is_remote(shard.path) else os.open(shard.path, os.O_RDONLY)
    except OSError as error:
        return [Defect(shard.path, "", "missing_shard", error.strerror or str(error))]
    except UserError as error:
        return [Defect(shard.path, "", "missing_shard", str(error))]
    try:
        return list(verify_file(file, shard, rules))
    finally:
        os.close(file)


def verify_file(file: int, shard: Shard, rules: Rules) -> Iterator[Defect]:
    """Yield the defects of an open shard: of its order, of each sample, and of the tar itself."""
    samples: dict[str, list[Member]] = {}
    damage, last = "", ""
    try:
        for member in walk(file, shard.path):
            key, extension = split_name(member.name)
            if key in samples and key != last:
                yield Defect(shard.path, key, UNSORTED, f".{extension} stands apart from the rest of the sample")
            samples.setdefault(key, []).append(member)
            last = key
    except (DamagedShard, UserError) as error:
        damage = str(error)
    num_pairs = 0
    for key, members in samples.items():
        check_stopped()
        by_extension = {split_name(member.name)[1]: member for member in members}
        num_pairs += rules.is_pair(by_extension)
        for cause, detail in itertools.chain(check_names(members), check_content(file, by_extension, rules)):
            yield Defect(shard.path, key, cause, detail)
    if damage:
        yield Defect(shard.path, "", "damaged_shard", damage)
    elif not samples and shard.num_samples != 0:  # `pack` writes and tells one where no sample of a shard can be used
        yield Defect(shard.path, "", "damaged_shard", "is empty")
    if shard.num_samples not in (-1, num_pairs):
        yield Defect(shard.path, "", COUNT, f"holds {num_pairs} pairs, {shard.num_samples} were counted")


def check_names(members: Sequence[Member]) -> Iterator[tuple[str, str]]:
    """Yield cause and detail of what is wrong with the names of a sample's members."""
    extensions = [split_name(member.name)[1] for member in members]
    for extension, count in Counter(extensions).items():
        if count > 1:
            yield DUPLICATE, f"{count} members .{extension}, the last one is read"
        if extension.split(".")[-1] in PICKLES:
            yield CODE, f".{extension} is never read here, but unpickled by others"
    pictures = list(dict.fromkeys(extension for extension in extensions if extension in IMAGE_EXTENSIONS))
    if len(pictures) > 1:
        yield DUPLICATE, f"{len(pictures)} pictures, .{pictures[0]} is read"


def check_content(file: int, members: Mapping[str, Member], rules: Rules) -> Iterator[tuple[str, str]]:
    """Yield cause and detail of what is wrong with the picture and the captions of a sample."""
    captions, needs_picture = rules.content.captions, rules.content.num_views > 0
    picture = next((extension for extension in members if needs_picture and extension in IMAGE_EXTENSIONS), None)
    if picture is None and needs_picture:
        yield "picture", f"missing, there is only {', '.join(f'.{extension}' for extension in members)}"
    content: dict[str, bytes] = {}
    for extension in [name for name in members if name in (picture, *captions.extensions)]:
        member = members[extension]
        try:
            check_size(extension, member.size, rules.max_member_bytes)
        except Fault as fault:
            yield fault.cause, fault.detail
        else:
            content[extension] = os.pread(file, member.size, member.offset)
    faults = (
        [] if picture is None or picture not in content else find_picture_faults(content[picture], rules.max_pixels)
    )
    if not (set(captions.extensions) & set(members)) - set(content):
        faults += captions.faults(content)
    yield from ((fault.cause, fault.detail) for fault in faults)


def find_picture_faults(data: bytes, max_pixels: int) -> list[Fault]:
    """Decode a whole picture as training would, and return what is wrong with it."""
    try:
        picture = Picture(data, max_pixels=max_pixels)
        picture.crop((0, 0, picture.width, picture.height), 32, draft="off")
    except Fault as fault:
        return [fault]
    return []
