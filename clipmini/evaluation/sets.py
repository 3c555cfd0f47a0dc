"""What a model is judged by: pictures with labels, with captions, or with choices between two of them."""

import contextlib
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from clipmini.data.health import Fault
from clipmini.errors import UserError


class Place(NamedTuple):
    """Where the bytes of a picture are.

    Attributes:
        key: what the picture is called in messages and files.
        path: a file: the picture, or a tar that holds it.
        offset: of its first byte.
        size: bytes; None for the whole file.
    """

    key: str
    path: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Pictures:
    """The pictures of a set, in the order that counts; travels to other processes.

    Attributes:
        places: of each of them.
    """

    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        """Return what a picture is called."""
        return self.places[index].key

    def read(self, index: int) -> bytes:
        """Read the bytes of a picture.

        Raises:
            Fault: they are not there.
        """
        key, path, offset, size = self.places[index]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read() if size is None else file.read(size)
        except OSError as error:
            raise Fault("picture", f"{path}: {error.strerror}") from error
        if size is not None and len(data) != size:
            raise Fault("damaged_shard", f"{path} ends inside {key}")
        return data

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what the pictures are called and of their sizes: the same wherever they lie."""
        return hash_content([[place.key, find_size(place)] for place in self.places])

    def fingerprint(self) -> str:
        """Hash places, sizes and times, which change when a file does."""
        digest = hashlib.sha256()
        for path in dict.fromkeys(place.path for place in self.places):
            status = os.stat(path) if os.path.exists(path) else None
            facts = (status.st_size, status.st_mtime_ns) if status else None
            digest.update(f"{os.path.abspath(path)}\n{facts}\n".encode("utf-8", "surrogateescape"))
        digest.update(repr(self.places).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find_size(place: Place) -> int | None:
    """Return the size of a picture; None of a file that is not there, which is told when it is read."""
    if place.size is None:
        with contextlib.suppress(OSError):
            return os.stat(place.path).st_size
    return place.size


@dataclass(frozen=True)
class ClassificationSet:
    """Pictures of C classes.

    Attributes:
        name: of the set.
        pictures: N of them.
        labels: int64 [N], or 0 and 1 of uint8 [N, C] where a picture may have several.
        class_names: of the C classes.
        prompts: the sentences for each class.
        groups: a name for each picture, to compare groups of them.
        language: of the sentences.
    """

    name: str
    pictures: Pictures
    labels: np.ndarray
    class_names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...] | None = None
    language: str = "en"

    @property
    def is_multilabel(self) -> bool:
        return self.labels.ndim == 2

    def content(self) -> list[Any]:
        """Return what the protocol is made of, beside the pictures."""
        return [self.name, self.labels.tolist(), self.class_names, self.prompts, self.groups]


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures and captions that belong together, n to m.

    Attributes:
        captions: T of them.
        pairs: int64 [P, 2], a picture and a caption that belong together.
    """

    name: str
    pictures: Pictures
    captions: tuple[str, ...]
    pairs: np.ndarray
    language: str = "en"

    def content(self) -> list[Any]:
        return [self.name, self.captions, self.pairs.tolist()]


@dataclass(frozen=True)
class ChoiceSet:
    """Examples with a right and a wrong caption for a picture, and perhaps a picture for the wrong caption.

    Attributes:
        captions: T of them.
        examples: int64 [E, 4]: a picture, its caption, another caption, and the picture of that or -1.
    """

    name: str
    pictures: Pictures
    captions: tuple[str, ...]
    examples: np.ndarray
    language: str = "en"

    def content(self) -> list[Any]:
        return [self.name, self.captions, self.examples.tolist()]


EvaluationSet: TypeAlias = ClassificationSet | RetrievalSet | ChoiceSet


def hash_content(*content: Any) -> str:
    """Hash anything that JSON can hold: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path, what: str) -> list[str]:
    """Read the lines of a text file without white space around them; blank ones at the end are not lines.

    Args:
        what: it is needed for, for messages.

    Raises:
        UserError: the file is missing, is not UTF-8, has no lines or has a blank one between others, which somebody's
            reader would leave out, so that all labels after it were wrong.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {what} needs it")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    if lines == [""]:
        raise UserError(f"{path} is empty")
    if "" in lines:
        raise UserError(f"{path}, line {lines.index('') + 1}: is blank")
    return lines
