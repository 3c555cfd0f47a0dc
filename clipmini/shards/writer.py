"""Writes one shard: each picture is decoded and, if asked for, made smaller or given another format."""

import functools
import io
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from webdataset import TarWriter

from clipmini.data.health import Fault
from clipmini.data.picture import Picture, to_eight_bits, to_rgb, turn_upright
from clipmini.data.processes import check_stopped
from clipmini.errors import UserError
from clipmini.files import write_atomically
from clipmini.shards.inputs import Item, Sample

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}  # extension: name in Pillow
EXTENSIONS = {"MPO": "jpg", **{name: extension for extension, name in FORMATS.items()}}  # MPO: JPEGs of some phones
MTIME = 0  # a fixed time stamp in the tars keeps their bytes equal


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards besides the content of the input; `pack` explains each."""

    input: str
    caption_key: str
    image_key: str
    samples_per_shard: int
    resize: int | None
    format: str | None
    quality: int
    max_pixels: int


@dataclass(frozen=True)
class Job:
    """A shard to write.

    Attributes:
        shard: path.
        report: path of what `write_shard` tells of it.
        first: position of its first sample in the input.
        part: its samples.
        settings: how to write them.
    """

    shard: Path
    report: Path
    first: int
    part: Iterable[Item]
    settings: Settings

    @property
    def is_done(self) -> bool:
        return self.shard.exists() and self.report.exists()


@dataclass(frozen=True)
class Report:
    """What came of a shard.

    Attributes:
        pairs: in it.
        rejected: position in the input and line of rejected.jsonl of each sample that is left out.
    """

    pairs: int
    rejected: list[tuple[int, dict[str, str]]]


def read_report(job: Job) -> Report:
    """Read what `write_shard` left."""
    content = json.loads(job.report.read_bytes())
    return Report(content["pairs"], [(position, line) for position, line in content["rejected"]])


def write_shard(job: Job) -> None:
    """Write a shard, in a worker process.

    Raises:
        Stopped: it was interrupted, and the shard is not there.
        OSError: the disk is full, or the like.
        UserError: the input cannot be read on.
    """
    Image.MAX_IMAGE_PIXELS = None  # max_pixels takes its place
    warnings.simplefilter("ignore")  # Pillow's, of pictures that are odd but can be used
    write_atomically(job.shard, functools.partial(write_samples, job))


def write_samples(job: Job, stream: BinaryIO) -> None:
    """Write the tar of a shard and, before that has its name, its report: a shard that is there has one."""
    digits = max(4, len(str(job.settings.samples_per_shard - 1)))
    pairs, rejected = 0, []
    with TarWriter(stream, mtime=MTIME, encoder=False) as writer:
        for number, (source, sample) in enumerate(make_samples(job)):
            if isinstance(sample, Fault):
                rejected.append((job.first + number, rejected_line(source, sample.cause, sample.detail)))
            else:
                writer.write({"__key__": f"{job.shard.stem}{number:0{digits}d}", **sample})
                pairs += 1
    write_atomically(job.report, to_json({"pairs": pairs, "rejected": rejected}))


def make_samples(job: Job) -> Iterator[tuple[str, dict[str, bytes] | Fault]]:
    """Yield where each sample comes from with its members by extension, or what is wrong with it.

    Raises:
        UserError: the input cannot be read on.
    """
    try:
        for source, load in job.part:
            check_stopped()
            try:
                yield source, make_members(source, load(), job.settings)
            except Fault as fault:
                yield source, fault
            except RecursionError:
                yield source, Fault("json", "is nested too deep")
    except OSError as error:  # those of writing do not come up here
        raise UserError(f"input={job.settings.input}: cannot be read any more: {error}") from error


def rejected_line(source: str, cause: str, detail: str) -> dict[str, str]:
    """Return a line of rejected.jsonl."""
    return {"source": source, "cause": cause, "detail": detail}


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Write JSON with sorted keys; names of files that are not UTF-8 become escapes that Python reads back."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=separators, indent=indent)
    return text.encode("utf-8", "backslashreplace")


def make_members(source: str, sample: Sample, settings: Settings) -> dict[str, bytes]:
    """Return the members of a sample by extension; a `source` that its .json has already stays.

    Raises:
        Fault: the picture cannot be used.
    """
    extension, picture = convert_picture(sample.picture, settings)
    metadata = {"source": source, **sample.metadata}
    return {extension: picture, "txt": sample.caption.encode(), "json": to_json(metadata)}


def convert_picture(data: bytes, settings: Settings) -> tuple[str, bytes]:
    """Decode a picture, and return its extension and bytes: its own where neither size nor format have to change.

    A new encoding is upright, and has neither EXIF nor colour profile, which training does not look at either.

    Raises:
        Fault: more than max_pixels, found before it is decoded, or it cannot be decoded.
    """
    picture = Picture(data, max_pixels=settings.max_pixels)
    image, size = picture.image, (picture.width, picture.height)
    try:
        own = EXTENSIONS[str(image.format)]
        extension = settings.format or own
        smaller = shrink(size, settings.resize)
        if smaller == size and extension == own:
            image.load()
            return extension, data
        if smaller != size:
            # A JPEG decodes to a half, a quarter or an eighth in a fraction of the time; twice the size is left for
            # the filter to do its work on.
            image.draft(None, (2 * min(smaller), 2 * min(smaller)))
        image = to_eight_bits(turn_upright(image)).resize(smaller, Image.Resampling.LANCZOS)
        return extension, encode_picture(image, extension, settings.quality)
    except MemoryError:
        raise
    except Exception as error:  # on broken files, Pillow raises errors of all kinds
        raise Fault("picture", str(error) or type(error).__name__) from error


def shrink(size: tuple[int, int], shortest: int | None) -> tuple[int, int]:
    """Return the width and height whose shorter one is `shortest`, or the same where they are not larger."""
    if shortest is None or min(size) <= shortest:
        return size
    width, height = (max(1, round(side * shortest / min(size))) for side in size)
    return width, height


def encode_picture(image: Image.Image, extension: str, quality: int) -> bytes:
    """Encode an RGB or RGBA picture; in a JPEG, white shines through it."""
    if extension == "jpg":
        image = to_rgb(image)
    image.info = {}  # the colour profile of a CMYK picture would be wrong for RGB, and encoders copy it
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[extension], **({} if extension == "png" else {"quality": quality}))
    return buffer.getvalue()
