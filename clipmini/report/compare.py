"""What tells runs apart: their configs, their results, their curves."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clipmini.annotations import flatten
from clipmini.evaluation.metrics import paired_bounds
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
        "Differences are to the first run. Their intervals are paired: each bootstrap resample draws the same pictures "
        "for both runs. Those that say unpaired take the runs as measured apart from each other, because one of them "
        "kept no resamples or has those of other pictures; they are too wide where the pictures were the same."
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
    rows = [compare_metric(runs, key, metric) for key, metric in list_metrics(runs)]
    rows += [
        row
        for name, title in (("train/loss", "last loss"), ("val/loss", "last val/loss"))
        for row in compare_last(runs, name, title)
    ]
    return Table("Results", columns, rows)


def list_metrics(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the sets and metrics of all runs, in the order of their headings."""
    keys = dict.fromkeys(row["key"] for run in runs for row in run.rows)
    there = {
        (row["key"], name)
        for run in runs
        for row in run.rows
        for name, value in row["metrics"].items()
        if value is not None
    }
    return [(key, name) for key in keys for name in HEADINGS if (key, name) in there]


@dataclass(frozen=True)
class Measured:
    """A metric of a run.

    Attributes:
        error: half the width of its interval, or None.
        draws: its values in bootstrap resamples, none of runs that did not keep them.
    """

    row: Row
    value: float
    error: float | None
    draws: Sequence[float | None]


def compare_metric(runs: Sequence[Run], key: str, metric: str) -> list[str]:
    """Return a row of the table."""
    is_share = not metric.endswith("median_rank")
    write = percent if is_share else "{:.1f}".format
    first, *others = [find_measured(run, key, metric) for run in runs]
    cells = [f"{key}, {HEADINGS[metric]}", ABSENT if first is None else write(first.value)]
    for other in others:
        if first is None or other is None or not is_comparable(first.row, other.row):
            reason = "another protocol" if first and other else ABSENT
            cells += [ABSENT if other is None else write(other.value), ABSENT, reason]
            continue
        scale, unit = (100, " points") if is_share else (1, "")
        difference = f"{scale * (other.value - first.value):+.1f}{unit}"
        cells += [write(other.value), difference, tell_interval(first, other, scale)]
    return cells


def find_measured(run: Run, key: str, metric: str) -> Measured | None:
    """Return what a run has of a metric; None if nothing."""
    row = next((row for row in run.rows if row["key"] == key), None)
    value = None if row is None else row["metrics"].get(metric)
    if row is None or value is None:
        return None
    low, high = row["interval"].get(metric) or (None, None)
    kept = run.shown.get(key, {}).get("draws", {})
    is_of_row = all(kept.get(name) == row.get(name) for name in ("weights", "protocol"))  # and of no earlier one
    draws = kept["values"].get(metric, ()) if kept and is_of_row else ()
    return Measured(row, value, None if low is None or high is None else (high - low) / 2, draws)


def tell_interval(first: Measured, other: Measured, scale: int) -> str:
    """Return the interval of a difference: paired where both have resamples of the same pictures."""
    resamples = first.row.get("resamples")
    if resamples is not None and resamples == other.row.get("resamples") and first.draws and other.draws:
        low, high = paired_bounds(first.draws, other.draws)
        return f"{scale * low:+.1f} to {scale * high:+.1f}"
    if first.error is None or other.error is None:
        return ABSENT
    difference, error = other.value - first.value, math.hypot(other.error, first.error)
    return f"{scale * (difference - error):+.1f} to {scale * (difference + error):+.1f}, unpaired"


def is_comparable(first: Row, other: Row) -> bool:
    """Say whether two rows are of one task on as many pictures and classes; names and prompts are not compared."""
    names: tuple[str, ...] = ("dataset", "task", "images", "classes", "language", "shuffled")
    return all(first.get(name) == other.get(name) for name in names)


def compare_last(runs: Sequence[Run], name: str, title: str) -> Iterator[list[str]]:
    """Yield a row with the last values of a curve."""
    first, *others = [run.curves[name][1][-1] if name in run.curves else None for run in runs]
    if first is not None or any(value is not None for value in others):
        cells = [title, ABSENT if first is None else f"{first:.3f}"]
        for value in others:
            difference = ABSENT if first is None or value is None else f"{value - first:+.3f}"
            cells += [ABSENT if value is None else f"{value:.3f}", difference, ""]
        yield cells
