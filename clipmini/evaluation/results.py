"""Results in a file (DataComp's `results.jsonl`) and on the screen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipmini.checkpoint import write_atomically
from clipmini.console import log_table
from clipmini.evaluation.datasets import ClassificationSet

Result = tuple[ClassificationSet, Mapping[str, float]]


def write_results(path: Path, results: Sequence[Result], step: int) -> None:
    """Write one line for each data set, in DataComp's fields: key, dataset, metrics with main_metric."""
    lines = [
        json.dumps(
            {
                "key": dataset.name,
                "dataset": dataset.name,
                "metrics": {**metrics, "main_metric": metrics["acc1"]},
                "classes": len(dataset.class_names),
                "images": len(dataset.samples),
                "step": step,
            }
        )
        for dataset, metrics in results
    ]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def log_results(results: Sequence[Result]) -> None:
    """Print the table at the end of a run."""
    rows = [
        [
            dataset.name,
            str(len(dataset.class_names)),
            str(len(dataset.samples)),
            f"{metrics['acc1']:.1%}",
            f"{metrics['chance1']:.2%}",
            f"{metrics['acc5']:.1%}",
            f"{metrics['chance5']:.2%}",
        ]
        for dataset, metrics in results
    ]
    columns = ("data set", "classes", "pictures", "top-1", "chance", "top-5", "chance")
    log_table("Zero-shot classification", columns, rows)
