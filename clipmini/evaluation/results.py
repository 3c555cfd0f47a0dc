"""Results: rows of `results.jsonl` (DataComp's fields), tables on the screen, CLIP_benchmark's JSON."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmini.console import log_table
from clipmini.errors import UserError, tell_choices
from clipmini.evaluation.metrics import RECALL_AT, Estimate
from clipmini.evaluation.sets import ClassificationSet, EvaluationSet, hash_content
from clipmini.evaluation.tasks import PROBES, Finding, Protocol
from clipmini.files import locked, write_atomically

log = logging.getLogger(__name__)

Row = dict[str, Any]

# Titles of tables by task, and headings of metrics; those that are shares are written in per cent.
TITLES = {
    "zeroshot_classification": "Zero-shot classification",
    "zeroshot_retrieval": "Zero-shot retrieval",
    "image_caption_selection": "Choice between captions",
    "knn": "Nearest neighbours",
    "linear_probe": "Linear probe",
}
HEADINGS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean recall",
    "acc1_worst_group": "top-1 of the worst group",
    "acc1_gap": "best group less worst",
    "mean_average_precision": "mean average precision",
    **{f"image_retrieval_recall@{k}": f"text to image R@{k}" for k in RECALL_AT},
    "image_retrieval_median_rank": "text to image, median rank",
    **{f"text_retrieval_recall@{k}": f"image to text R@{k}" for k in RECALL_AT},
    "text_retrieval_median_rank": "image to text, median rank",
    "mean_recall@1": "mean R@1",
    "text_acc": "caption for the picture",
    "image_acc": "picture for the caption",
    "acc": "both",
}
MIN_PICTURES = 5  # of a class, on average, where the worst ones are named: else they are the unlucky ones


def make_row(
    dataset: EvaluationSet,
    pictures: str,
    finding: Finding,
    protocol: Protocol,
    estimates: Mapping[str, Estimate],
    about: Mapping[str, Any],
) -> Row:
    """Return what is written of a finding.

    Args:
        pictures: their digest.
        estimates: of its metrics.
        about: what else is known: the model, its step, hashes of weights and protocol.
    """
    metrics = {name: number(found.value) for name, found in estimates.items()}
    if "acc1" in metrics:
        metrics.setdefault("acc5", None)  # as DataComp has it for fewer than 5 classes
    classes = {"classes": len(dataset.class_names)} if isinstance(dataset, ClassificationSet) else {}
    return {
        "key": f"{dataset.name}/{finding.task}" if finding.task in PROBES else dataset.name,
        "dataset": dataset.name,
        "task": finding.task,
        "metrics": {**metrics, "main_metric": metrics[finding.outcome.main]},
        "main_metric": finding.outcome.main,
        "chance": {name: number(found.chance) for name, found in estimates.items()},
        "interval": {name: [number(found.low), number(found.high)] for name, found in estimates.items()},
        **classes,
        "images": finding.outcome.count,
        "unreadable": len(finding.unreadable),
        "language": dataset.language,
        "shuffled": protocol.shuffled,
        "resamples": hash_resamples(pictures, finding, protocol),
        **finding.outcome.facts,
        **finding.facts,
        **about,
    }


def hash_resamples(pictures: str, finding: Finding, protocol: Protocol) -> str:
    """Hash which pictures the bootstrap draws again, and by what seed: what is equal makes intervals that are paired.

    The sentences, the precision and the model's own preparation of pictures are no part of it.
    """
    return hash_content(pictures, finding.unreadable, finding.outcome.count, protocol.seed, protocol.resamples)


def number(value: float) -> float | None:
    """Return a number as JSON can hold it: null for none."""
    return value if math.isfinite(value) else None


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes a result the same one: doing it again would give the same numbers."""
    return tuple(row.get(name) for name in ("key", "weights", "protocol"))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file of results, none if it is not there.

    Raises:
        UserError: it is something else.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path}: is no file; output must be a file of results, or new")
    rows = []
    for number_of_line, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not (isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("metrics"), dict)):
            raise UserError(f"{path}, line {number_of_line}: is no result; output must be a file of results, or new")
        rows.append(row)
    return rows


def add_row(path: Path, row: Row) -> None:
    """Write a row, in place of the same result if that is there; another process may do so at the same time."""
    with locked(path):
        write_rows(path, [*(old for old in read_rows(path) if identity(old) != identity(row)), row])


def keep_rows(path: Path, is_kept: Callable[[Row], bool]) -> None:
    """Rewrite a file of results with some of its rows; another process may add some at the same time."""
    if not path.exists():
        return
    with locked(path):
        rows = read_rows(path)
        kept = [row for row in rows if is_kept(row)]
        if len(kept) < len(rows):
            write_rows(path, kept)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of results, a line for each; it is complete at any time."""
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


# One metric of many


def row_scalars(row: Row) -> dict[str, float]:
    """Return the metrics of a row under the names that they have in metrics.csv and TensorBoard."""
    return {f"evaluation/{row['key']}/{name}": value for name, value in row["metrics"].items() if value is not None}


def find_metric(rows: Sequence[Row], name: str, *, must_exist: bool = True) -> float | None:
    """Return the value of KEY/METRIC, such as imagenet1k/acc1 or imagenet1k/knn/acc1.

    Raises:
        UserError: no row has it, and one must.
    """
    key, _, metric = name.rpartition("/")
    for row in rows:
        if row["key"] == key and metric in row["metrics"]:
            return row["metrics"][metric]
    if not must_exist:
        return None
    known = [f"{row['key']}/{metric}" for row in rows for metric in row["metrics"]]
    raise UserError(f"best_metric={name}: no such metric{tell_choices(name, known)}")


def is_best(value: float, others: Sequence[float], name: str) -> bool:
    """Say whether a value is better than all others; losses and ranks are better when they are lower."""
    if math.isnan(value):
        return False
    is_lower_better = name.endswith(("loss", "median_rank"))
    return all(value < other if is_lower_better else value > other for other in others)


# On the screen


def log_short(rows: Sequence[Row], step: int | None) -> None:
    """Print a line for each result."""
    for row in rows:
        value = row["metrics"]["main_metric"]
        if value is not None:
            log.info("step %s: %s %s %.2f%%", step, row["key"], row["main_metric"], 100 * value)


def log_results(rows: Sequence[Row]) -> None:
    """Print a table for each task: metrics with their intervals, and what chance gives."""
    for task, title in TITLES.items():
        of_task = [row for row in rows if row["task"] == task]
        if of_task:
            table = [line for row in of_task for line in table_lines(row)]
            control = " - control: what belongs together is mixed up" if any(row["shuffled"] for row in of_task) else ""
            log_table(f"{title}{control}", ("data set", "metric", "", "95 % interval", "chance", "of"), table)
            for row in of_task:
                log_remarks(row)


def table_lines(row: Row) -> list[list[str]]:
    """Return a line for each metric of a row."""
    size = f"{row['images']:,} pictures"
    sizes = [size, f"{row['classes']:,} classes"] if "classes" in row else [size]
    names = [name for name in HEADINGS if row["metrics"].get(name) is not None]
    lines = []
    for number, name in enumerate(names):
        value, chance = row["metrics"][name], row["chance"][name]
        low, high = row["interval"][name]
        write = (lambda value: f"{value:.0f}") if name.endswith("median_rank") else percent
        interval = "-" if low is None or high is None else f"{write(low)} - {write(high)}"
        first = row["dataset"] if number == 0 else ""
        size = sizes[number] if number < len(sizes) else ""
        lines.append([first, HEADINGS[name], write(value), interval, "-" if chance is None else write(chance), size])
    return lines


def percent(share: float) -> str:
    """Write a share with as many digits as a small one needs."""
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def log_remarks(row: Row) -> None:
    """Say what a table has no column for."""
    remarks = [f"weights {row['weights']}, protocol {row['protocol']}"]
    if row["unreadable"]:
        remarks.append(f"{row['unreadable']} unreadable pictures left out")
    if "worst_group" in row:
        remarks.append(f"worst group {row['worst_group']}")
    if "image_retrieval_tied" in row:
        ties = f"{percent(row['image_retrieval_tied'])} of captions, {percent(row['text_retrieval_tied'])} of pictures"
        remarks.append(f"ties, counted as misses: {ties}")
    if row["images"] >= MIN_PICTURES * row.get("classes", math.inf):
        remarks += [f"worst classes: {', '.join(row['worst_classes'])}"] if row.get("worst_classes") else []
        remarks += [f"most confused: {', '.join(row['confusions'])}"] if row.get("confusions") else []
    log.info("%s: %s", row["key"], "; ".join(remarks))


# For other programs


def write_clip_benchmark(directory: Path, row: Row, model: str, pretrained: str) -> None:
    """Write a row as CLIP_benchmark does, so that `clip_benchmark build` reads it."""
    content = {
        "dataset": row["dataset"],
        "model": model,
        "pretrained": pretrained,
        "task": row["task"],
        "metrics": {name: value for name, value in row["metrics"].items() if name != "main_metric"},
        "language": row["language"],
    }
    name = file_name(row["key"], row["task"], row["language"], model, pretrained)
    write_atomically(directory / f"{name}.json", json.dumps(content).encode())


def file_name(*parts: str) -> str:
    """Make the name of a file of what makes it another one, as the set and the model."""
    return "-".join(parts).replace("/", "-").replace(" ", "-")
