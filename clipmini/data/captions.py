"""Which caption of a sample is used, and what counts as one."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.errors import UserError


@dataclass(frozen=True)
class Captions:
    """Which caption of a sample is used: `txt`, a key of its json, or several of them with probabilities."""

    probabilities: Mapping[str, float]

    @classmethod
    def from_key(cls, key: str | Mapping[str, float]) -> "Captions":
        """Read `data.caption_key`.

        Raises:
            UserError: probabilities that do not add up to 1.
        """
        probabilities = {key: 1.0} if isinstance(key, str) else dict(key)
        if any(p < 0 for p in probabilities.values()) or not math.isclose(sum(probabilities.values()), 1.0):
            raise UserError(f"data.caption_key={probabilities}: the probabilities must be positive and add up to 1")
        return cls(probabilities)

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that hold the captions."""
        return tuple(sorted({"txt" if key == "txt" else "json" for key in self.probabilities}))

    def draw(self, members: Mapping[str, bytes], draws: Draws) -> str:
        """Return one caption; of a list of captions, each is as likely.

        Raises:
            Fault: there is none.
        """
        key = self.draw_key(draws)
        value = read_value(members, key)
        if isinstance(value, list) and value:
            value = value[draws.below(len(value))]
        return check_caption(value, key)

    def draw_key(self, draws: Draws) -> str:
        """Return one of the keys by their probabilities."""
        keys = list(self.probabilities)
        if len(keys) == 1:
            return keys[0]
        limits = itertools.accumulate(self.probabilities.values())
        drawn = draws.random()
        return next((key for key, limit in zip(keys, limits, strict=True) if drawn < limit), keys[-1])

    def faults(self, members: Mapping[str, bytes]) -> Iterator[Fault]:
        """Yield what is wrong with any caption that could be drawn."""
        for key in self.probabilities:
            try:
                value = read_value(members, key)
            except Fault as fault:
                yield fault
                continue
            for caption in value if isinstance(value, list) and value else [value]:
                try:
                    check_caption(caption, key)
                except Fault as fault:
                    yield fault


def read_value(members: Mapping[str, bytes], key: str) -> Any:
    """Return what a sample has under a caption key: bytes of its .txt, or a value of its .json.

    Raises:
        Fault: no JSON, or no such key.
    """
    if key == "txt":
        return members.get("txt")
    metadata = read_metadata(members["json"]) if "json" in members else {}
    if key not in metadata:
        raise Fault("caption", f"no {key!r} in the .json")
    return metadata[key]


def read_metadata(data: bytes) -> dict[str, Any]:
    """Read the .json of a sample.

    Raises:
        Fault: not JSON, or not an object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Fault("json", error) from error
    if not isinstance(value, dict):
        raise Fault("json", f"{type(value).__name__} in place of an object")
    return value


def check_caption(value: object, key: str = "caption") -> str:
    """Return a caption without a byte order mark and white space around it.

    Args:
        value: text, or its bytes in UTF-8.
        key: where it was, for messages.

    Raises:
        Fault: it is missing, blank, no text, or not UTF-8.
    """
    try:
        caption = value.decode("utf-8-sig") if isinstance(value, bytes) else value
        if isinstance(caption, str):
            caption.encode()  # JSON can hold halves of surrogate pairs, which no tokenizer takes
    except UnicodeError as error:
        raise Fault("caption", f"{key} is not UTF-8: {error}") from error
    if not isinstance(caption, str):
        raise Fault("caption", f"{key} is {'missing' if caption is None else type(caption).__name__ + ', not text'}")
    if not caption.strip():
        raise Fault("caption", f"{key} is blank")
    return caption.strip()


def caption_id(caption: str) -> int:
    """Hash a caption to a signed 64-bit integer; case and white space do not count."""
    digest = hashlib.blake2b(" ".join(caption.lower().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
