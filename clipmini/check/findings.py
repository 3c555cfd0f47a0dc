"""What was found: each with a name, how bad it is, and the key to change."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from clipmini.console import log_table
from clipmini.errors import UserError
from clipmini.redaction import redact_message

log = logging.getLogger(__name__)

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        name: of what was looked at, as in `data.pictures`.
        text: what was found; if it is not ok, with the key to change.
    """

    level: Level
    name: str
    text: str


@dataclass
class Findings:
    """All that was found, in order.

    Attributes:
        explain: tells an error in the words of the user's keys.
        expected: errors that a user can mend.
    """

    found: list[Finding] = field(default_factory=list)
    explain: Callable[[Exception], str] = str
    expected: tuple[type[Exception], ...] = (UserError,)

    def add(self, level: Level, name: str, text: str) -> None:
        self.found.append(Finding(level, name, redact_message(text)))

    def ok(self, name: str, text: str) -> None:
        self.add("ok", name, text)

    def warn(self, name: str, text: str) -> None:
        self.add("warn", name, text)

    def fail(self, name: str, text: str) -> None:
        self.add("fail", name, text)

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Turn what would end the run into a finding, told once, and go on."""
        try:
            yield
        except self.expected as error:
            text = self.explain(error)
            if not any(finding.level == "fail" and finding.text == text for finding in self.found):
                self.fail(name, text)
        except Exception as error:  # what nobody has thought of must not hide what else was found
            self.warn(name, f"could not be checked: {error!r}")

    @property
    def has_failed(self) -> bool:
        return any(finding.level == "fail" for finding in self.found)

    def failed(self, *names: str) -> bool:
        """Say whether one of some things has failed."""
        return any(finding.level == "fail" and finding.name in names for finding in self.found)

    def log(self) -> None:
        """Print a table, and how many there are of each kind."""
        order = {"fail": 0, "warn": 1, "ok": 2}
        ordered = sorted(self.found, key=lambda finding: order[finding.level])
        log_table("Check", ("", "of", "found"), [[one.level, one.name, one.text] for one in ordered], wraps=True)
        counts = Counter(one.level for one in self.found)
        log.info("%d fail, %d warn, %d ok", counts["fail"], counts["warn"], counts["ok"])
