"""What tells runs apart: their configs, their results, their curves."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from clipmini.checkpoints.resume import flatten
from clipmini.evaluation.results import HEADINGS, Row, percent
from clipmini.redaction import redact
from clipmini.report.page import Section, Table
from clipmini.report.read import Run
from clipmini.report.sections import draw_curves

NOT_TOLD = ("name", "paths")  # which differ by themselves
ABSENT = "-"


def compare_sections(runs: Sequence[Run]) -> list[Section]:
    """Return the sections of a page."""
    text = (
        "Differences are to the first run. Their intervals take the runs as measured apart from each other, and are "
        "too wide where both saw the same pictures."
    )
    return [
        Section("Results", text=text, tables=[list_metric_differences(runs)]),
        Section("Config differences", tables=[list_config_differences(runs)]),
        Section("Curves", charts=draw_curves(runs)),
    ]


def list_config_differences(runs: Sequence[Run]) -> Table:
    """Return the keys whose values are not the same in all runs."""
    flat = [flatten(redact(run.config)) for run in runs]
    keys = sorted(set().union(*flat))
    rows = [
        [key, *(str(found.get(key, ABSENT)) for found in flat)]
        for key in keys
        if key.split(".")[0] not in NOT_TOLD and any(found.get(key) != flat[0].get(key) for found in flat)
    ]
    return Table("Config differences", ("key", *(run.name for run in runs)), rows or [["none", *("" for _ in runs)]])


def list_metric_differences(runs: Sequence[Run]) -> Table:
    """Return each metric of the sets that were evaluated, and how far those of the others are from the first one's."""
    columns = ["metric", runs[0].name]
    for run in runs[1:]:
        columns += [run.name, "difference", "95 % interval"]
    rows = [row for key, metric in list_metrics(runs) if (row := compare_metric(runs, key, metric))]
    rows += [
        row
        for name, title in (("train/loss", "last loss"), ("val/loss", "last val/loss"))
        for row in compare_last(runs, name, title)
    ]
    return Table("Results", columns, rows)


def list_metrics(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the sets and metrics of all runs, in the order of their headings."""
    keys = dict.fromkeys(row["key"] for run in runs for row in run.rows)
    there = {(row["key"], name) for run in runs for row in run.rows for name in row["metrics"]}
    return [(key, name) for key in keys for name in HEADINGS if (key, name) in there]


def compare_metric(runs: Sequence[Run], key: str, metric: str) -> list[str] | None:
    """Return a row of the table; None if the first run has no such number."""
    found = [next((row for row in run.rows if row["key"] == key), None) for run in runs]
    first = measured(found[0], metric)
    if first is None:
        return None
    is_share = not metric.endswith("median_rank")
    write = percent if is_share else "{:.1f}".format
    cells = [f"{key}, {HEADINGS[metric]}", write(first[0])]
    for row in found[1:]:
        other = measured(row, metric)
        if other is None or not is_comparable(found[0], row):
            cells += [ABSENT if other is None else write(other[0]), ABSENT, "another protocol" if other else ABSENT]
            continue
        scale, unit = (100, " points") if is_share else (1, "")
        difference = scale * (other[0] - first[0])
        interval = ABSENT
        if other[1] is not None and first[1] is not None:
            error = scale * math.hypot(other[1], first[1])
            interval = f"{difference - error:+.1f} to {difference + error:+.1f}"
        cells += [write(other[0]), f"{difference:+.1f}{unit}", interval]
    return cells


def measured(row: Row | None, metric: str) -> tuple[float, float | None] | None:
    """Return a value and half the width of its interval, None where there is none."""
    value = None if row is None else row["metrics"].get(metric)
    if row is None or value is None:
        return None
    low, high = row["interval"].get(metric) or (None, None)
    return value, None if low is None or high is None else (high - low) / 2


def is_comparable(first: Row | None, other: Row | None) -> bool:
    """Say whether two rows are of one task on as many pictures and classes; names and prompts are not compared."""
    names: tuple[str, ...] = ("dataset", "task", "images", "classes", "language", "shuffled")
    return all(first.get(name) == other.get(name) for name in names) if first and other else False


def compare_last(runs: Sequence[Run], name: str, title: str) -> Iterator[list[str]]:
    """Yield a row with the last values of a curve."""
    last: list[Any] = [run.curves[name][1][-1] if name in run.curves else None for run in runs]
    if last[0] is not None:
        cells = [title, f"{last[0]:.3f}"]
        for value in last[1:]:
            cells += [ABSENT, ABSENT, ""] if value is None else [f"{value:.3f}", f"{value - last[0]:+.3f}", ""]
        yield cells
