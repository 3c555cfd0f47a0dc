"""The files of a run, as far as it has come, to plain data."""

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipmini.data.health import read_causes
from clipmini.errors import UserError
from clipmini.evaluation.details import shown_path
from clipmini.evaluation.results import Row, read_rows
from clipmini.files import tell_neighbours
from clipmini.sources import read_run_config

METRICS, RESULTS, ENVIRONMENT, QUARANTINE = "metrics.csv", "results.jsonl", "environment.jsonl", "quarantine.jsonl"
SHOWN = "evaluation"  # directory of what is shown of each result
Curve = tuple[list[int], list[float]]  # steps and values


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        directory: of its files.
        name: that of the directory, or as much of its path as tells it from others.
        config: as it was composed.
        curves: what was measured over the steps, by name.
        rows: results of the last evaluation of each set.
        shown: examples and confused classes, by key of the row.
        environment: what it ran on, each time that it was started.
        causes: bad samples.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    curves: dict[str, Curve]
    rows: list[Row]
    shown: dict[str, dict[str, Any]]
    environment: list[dict[str, Any]]
    causes: Counter[str]

    def called(self, name: str) -> "Run":
        """Return it under another name."""
        return replace(self, name=name)

    @property
    def steps(self) -> int:
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @property
    def batch_size(self) -> int:
        """Pairs of a step; 0: not known, as the config may name a variable in place of a number."""
        told = [start.get("batch_size") for start in self.environment] + [self.config.get("batch_size")]
        return next((size for size in told if isinstance(size, int)), 0)

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size

    @property
    def seconds(self) -> float:
        """How long the training took, without evaluations and stops: each window's samples by its rate."""
        steps, rates = self.curves.get("throughput/samples_per_second", ([], []))
        counts = (step - before for before, step in zip([0, *steps], steps, strict=False))
        return sum(count * self.batch_size / rate for count, rate in zip(counts, rates, strict=True) if rate > 0)


def read_run(directory: Path) -> Run:
    """Read a run.

    Raises:
        UserError: there is none, or nothing was measured yet.
    """
    if not directory.is_dir():
        raise UserError(f"run={directory}: no such directory{tell_neighbours(directory)}")
    path = directory / METRICS
    if not path.is_file():
        raise UserError(
            f"run={directory}: has no {METRICS}: no run of `clipmini train`, or one that measured nothing yet"
        )
    config = read_run_config(directory) if (directory / "config.yaml").is_file() else None
    curves = read_curves(path)
    if not curves:
        raise UserError(f"run={directory}: its {METRICS} has no measurements yet")
    newest: dict[str, Row] = {}
    for row in read_rows(directory / RESULTS):
        newest[row["key"]] = row
    return Run(
        directory.resolve(),
        directory.resolve().name,
        config or {},
        curves,
        list(newest.values()),
        {key: found for key in newest if (found := read_object(shown_path(directory / SHOWN, key)))},
        read_lines(directory / ENVIRONMENT),
        Counter(cause for _, cause in read_causes(directory / QUARANTINE)),
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """Read the columns of `metrics.csv`; what is empty or not finite is left out.

    Raises:
        UserError: it is something else.
    """
    curves: dict[str, Curve] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                for name, text in row.items():
                    if text and math.isfinite(value := float(text)):
                        steps, values = curves.setdefault(name, ([], []))
                        steps.append(step)
                        values.append(value)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error!r}") from error
    return curves


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read lines of JSON; one that was cut by a kill is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
