"""Which caption of a sample is used, and what counts as one."""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.errors import UserError

SAME = "same"  # as a second caption: the first one


@dataclass(frozen=True)
class Captions:
    """Which captions of a sample are used: a text member (`txt`), a key of its json, or several with probabilities.

    Attributes:
        probabilities: of each key; none where captions are not used.
        hard_negatives: key of the json with captions that are wrong for the picture, or None.
        second_key: of another caption that belongs to the picture, SAME for the first one again, or None.
    """

    probabilities: Mapping[str, float]
    hard_negatives: str | None = None
    second_key: str | None = None

    @classmethod
    def from_key(
        cls, key: str | Mapping[str, float] | None, hard_negatives: str | None = None, second_key: str | None = None
    ) -> "Captions":
        """Read `data.caption_key`, `data.hard_negatives` and `data.second_caption_key`.

        Raises:
            UserError: probabilities that do not add up to 1, or further captions where there are no first ones.
        """
        if key is None:
            for name, value in (("hard_negatives", hard_negatives), ("second_caption_key", second_key)):
                if value is not None:
                    raise UserError(f"data.{name}={value}: needs captions, and data.caption_key=null takes none")
            return cls({})
        probabilities = {key: 1.0} if isinstance(key, str) else {str(name): p for name, p in key.items()}
        if any(p < 0 for p in probabilities.values()) or not math.isclose(sum(probabilities.values()), 1.0):
            raise UserError(f"data.caption_key={probabilities}: the probabilities must be positive and add up to 1")
        return cls(probabilities, hard_negatives, second_key)

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that hold the captions."""
        second = {self.second_key} - {None, SAME}
        in_json = {"json"} if self.hard_negatives else set()
        return tuple(sorted({member_of(str(key)) for key in {*self.probabilities, *second}} | in_json))

    def draw_all(self, members: Mapping[str, bytes], draws: Draws, further: Draws) -> dict[str, str]:
        """Return the captions of a sample by their names in a batch.

        Args:
            draws: for the first one.
            further: for all others, which so leave what else is drawn for a sample as it is without them.

        Raises:
            Fault: one is missing, or cannot be used.
        """
        if not self.probabilities:
            return {}
        drawn = {"text": self.draw(members, draws)}
        if self.hard_negatives:
            drawn["negative_text"] = self.draw_negative(members, further)
        if self.second_key is not None:
            drawn["text_2"] = self.draw_second(members, further, drawn["text"])
        return drawn

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

    def list_first(self, members: Mapping[str, bytes]) -> list[str]:
        """Return every caption that `draw` may return."""
        found = []
        for key in self.probabilities:
            with contextlib.suppress(Fault):
                value = read_value(members, key)
                for caption in value if isinstance(value, list) else [value]:
                    with contextlib.suppress(Fault):
                        found.append(check_caption(caption, key))
        return found

    def draw_second(self, members: Mapping[str, bytes], draws: Draws, first: str) -> str:
        """Return another caption; of a list of captions, each that is not the first one is as likely.

        Raises:
            Fault: there is none.
        """
        assert self.second_key is not None
        if self.second_key == SAME:
            return first
        value = read_value(members, self.second_key)
        if isinstance(value, list):
            others = self.list_others(value, first)
            value = others[draws.below(len(others))]
        return check_caption(value, self.second_key)

    def list_others(self, captions: Sequence[Any], first: str) -> list[Any]:
        """Return what a list of captions holds beside the first one.

        Raises:
            Fault: nothing.
        """
        others = [caption for caption in captions if not isinstance(caption, str) or caption.strip() != first]
        if not others:
            raise Fault("caption", f"{self.second_key} has no second caption")
        return others

    def draw_negative(self, members: Mapping[str, bytes], draws: Draws) -> str:
        """Return one of the hard negatives, each as likely; blank if the sample has none.

        Raises:
            Fault: what there is cannot be used.
        """
        values = self.read_negatives(members)
        return check_caption(values[draws.below(len(values))], str(self.hard_negatives)) if values else ""

    def read_negatives(self, members: Mapping[str, bytes]) -> list[Any]:
        """Return all hard negatives of a sample, a caption or a list of captions in its json."""
        if self.hard_negatives is None or "json" not in members:
            return []
        value = read_metadata(members["json"]).get(self.hard_negatives)
        return value if isinstance(value, list) else [] if value is None else [value]

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
        found: list[tuple[str, Any]] = []
        for key in (*self.probabilities, *sorted({str(self.second_key)} - {"None", SAME, *self.probabilities})):
            try:
                value = read_value(members, key)
            except Fault as fault:
                yield fault
            else:
                found += [(key, caption) for caption in (value if isinstance(value, list) and value else [value])]
        with contextlib.suppress(Fault):  # told above, or by nothing that is drawn
            found += [(str(self.hard_negatives), caption) for caption in self.read_negatives(members)]
        for key, caption in found:
            try:
                check_caption(caption, key)
            except Fault as fault:
                yield fault
        yield from self.second_faults(members)

    def second_faults(self, members: Mapping[str, bytes]) -> Iterator[Fault]:
        """Yield that a list of captions has no second one, where that could be so when the first is drawn."""
        if self.second_key in (None, SAME):
            return
        with contextlib.suppress(Fault):  # told as that of any caption
            value = read_value(members, str(self.second_key))
            for first in self.list_first(members) if isinstance(value, list) and value else []:
                try:
                    self.list_others(value, first)
                except Fault as fault:
                    yield fault
                    return


def member_of(key: str) -> str:
    """Return the member that holds what a caption key names: `txt` or `OTHER.txt` itself, or the .json."""
    return key if is_text(key) else "json"


def is_text(extension: str) -> bool:
    """Say whether a member is a caption as plain text."""
    return extension == "txt" or extension.endswith(".txt")


def read_value(members: Mapping[str, bytes], key: str) -> Any:
    """Return what a sample has under a caption key: bytes of a text member, or a value of its .json.

    Raises:
        Fault: no JSON, or no such key.
    """
    if is_text(key):
        return members.get(key)
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


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Hash captions: int64 [n], 0 for a blank one; case and white space do not count."""
    return torch.tensor([caption_id(caption) for caption in captions])


def caption_id(caption: str) -> int:
    """Hash a caption to a signed 64-bit integer that is 0 for a blank one only."""
    words = " ".join(caption.lower().split())
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little", signed=True) or 1) if words else 0
