"""What was found of each picture, class and pair of classes: in a few words for a row of results, and as files."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipmini.evaluation.examples import show_examples
from clipmini.evaluation.metrics import Estimate
from clipmini.evaluation.results import Row, file_name, number
from clipmini.evaluation.sets import ClassificationSet, EvaluationSet
from clipmini.evaluation.tables import import_parquet
from clipmini.evaluation.tasks import Finding
from clipmini.files import write_atomically

CONFUSED = 30  # classes that a report shows
DIGITS = 6  # after the point, of what is kept of each bootstrap resample


def class_table(dataset: ClassificationSet, finding: Finding) -> list[Row]:
    """Return a row for each class that has pictures: how many, their recall, and what they are taken for most often."""
    assert finding.labels is not None and finding.predictions is not None
    table = []
    for label in np.unique(finding.labels):
        predictions = finding.predictions[finding.labels == label]
        taken_for = Counter(predictions[predictions != label].tolist())
        other, times = taken_for.most_common(1)[0] if taken_for else (None, 0)
        hits = np.asarray(finding.outcome.units["rank"])[finding.labels == label] == 1
        table.append(
            {
                "class": dataset.class_names[label],
                "pictures": len(predictions),
                "recall": float(hits.mean()),
                "taken_for": "" if other is None else dataset.class_names[other],
                "times": times,
            }
        )
    return table


def class_facts(dataset: ClassificationSet, finding: Finding, shown: int = 5) -> dict[str, Any]:
    """Return the worst classes and the most frequent confusions, in words."""
    table = class_table(dataset, finding)
    worst = sorted(table, key=lambda row: (row["recall"], -row["pictures"], row["class"]))[:shown]
    confused = sorted(table, key=lambda row: (-row["times"], row["class"]))[:shown]
    return {
        "worst_classes": [f"{row['class']} {row['recall']:.0%} of {row['pictures']}" for row in worst],
        "confusions": [f"{row['class']} as {row['taken_for']} {row['times']}x" for row in confused if row["times"]],
        "absent_classes": len(dataset.class_names) - len(table),
    }


def write_shown(
    directory: Path, dataset: EvaluationSet, finding: Finding, row: Row, estimates: Mapping[str, Estimate]
) -> None:
    """Write what pages say of a result beside its row.

    These are pictures with the texts nearest to them, the most confused classes, and the metrics in each bootstrap
    resample: by them two runs can be compared without what was found of each picture, whatever the metric.
    """
    table: list[Row] = []
    if isinstance(dataset, ClassificationSet) and finding.predictions is not None:
        table = sorted(class_table(dataset, finding), key=lambda row: (-row["times"], row["recall"], row["class"]))
    draws = {name: [number(round(value, DIGITS)) for value in one.draws] for name, one in estimates.items()}
    content = {
        "examples": show_examples(dataset, finding.examples),
        "classes": table[:CONFUSED],
        "draws": {"weights": row["weights"], "protocol": row["protocol"], "values": draws},
    }
    text = json.dumps(content, ensure_ascii=False)
    write_atomically(shown_path(directory, row["key"]), text.encode("utf-8", "replace"))


def shown_path(directory: Path, key: str) -> Path:
    """Return the file of `write_shown` for the key of a row of results."""
    return directory / f"{key.replace('/', '-')}.json"


def confusion_table(dataset: ClassificationSet, finding: Finding) -> list[Row]:
    """Return how often each class was taken for each other one, for the pairs that occur."""
    assert finding.labels is not None and finding.predictions is not None
    pairs = Counter(zip(finding.labels.tolist(), finding.predictions.tolist(), strict=True))
    return [
        {"class": dataset.class_names[label], "prediction": dataset.class_names[prediction], "pictures": count}
        for (label, prediction), count in sorted(pairs.items())
    ]


def write_details(
    directory: Path, dataset: EvaluationSet, finding: Finding, file_format: str, model: str, weights: str
) -> None:
    """Write what was found of each picture and, of a classification, each class and each confusion.

    Args:
        model, weights: for the files' names: another model's may lie there too.
    """
    stem = file_name(dataset.name, finding.task, model, weights)
    units = finding.outcome.units
    if units:
        rows = [dict(zip(units, values, strict=True)) for values in zip(*units.values(), strict=True)]
        write_table(directory / f"{stem}-predictions.{file_format}", rows)
    if isinstance(dataset, ClassificationSet) and finding.predictions is not None:
        write_table(directory / f"{stem}-classes.{file_format}", class_table(dataset, finding))
        write_table(directory / f"{stem}-confusion.{file_format}", confusion_table(dataset, finding))


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as .csv or .parquet.

    Raises:
        UserError: pyarrow is not installed.
    """
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))
        return
    pyarrow = import_parquet(str(path))
    table = pyarrow.Table.from_pylist(list(rows))
    write_atomically(path, lambda file: pyarrow.parquet.write_table(table, file))
