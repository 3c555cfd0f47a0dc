"""A page: sections of facts, charts, tables, pictures and texts, and nothing that it would have to fetch."""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = True


@dataclass(frozen=True)
class Pictures:
    """Pictures with what is nearest to each, as `clipmini.evaluation.examples` writes them."""

    title: str
    examples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Side:
    """One of two pictures that are shown side by side: a `data:` URL, or None where it cannot be shown, and a name."""

    picture: str | None
    name: str


@dataclass(frozen=True)
class PicturePairs:
    """Pictures side by side.

    Attributes:
        sides: what the left ones are, and the right ones.
        pairs: left, right, and what is said of both.
    """

    title: str
    sides: tuple[str, str]
    pairs: Sequence[tuple[Side, Side, str]]


@dataclass(frozen=True)
class Section:
    """A part of a page, of which whatever is empty is left out.

    Attributes:
        charts: `<svg>` of `clipmini.report.charts`, put in as they are.
        texts: name and text of what is folded.
    """

    title: str
    text: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Pictures] = ()
    pairs: Sequence[PicturePairs] = ()
    texts: Sequence[tuple[str, str]] = ()

    @property
    def id(self) -> str:
        """Return a name for addresses: its letters may be none that these hold."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.title.lower()).strip('-')}-{zlib.crc32(self.title.encode()):08x}"


def make_page(title: str, about: str, sections: Sequence[Section]) -> bytes:
    """Return the page; what comes from data and configs is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, about=about, sections=sections).encode("utf-8", "replace")
