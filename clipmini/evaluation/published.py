"""Published numbers beside ours.

The numbers are those of open_clip's docs/openclip_results.csv and docs/openclip_retrieval_results.csv
(https://github.com/mlfoundations/open_clip, MIT).
"""

import csv
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from clipmini.console import log_table
from clipmini.errors import UserError, tell_choices

log = logging.getLogger(__name__)

FILE = Path(__file__).with_name("published.csv")
# What a set may be called, beside the name in the file.
OTHER_NAMES = {
    "imagenet": "imagenet1k",
    "imagenet_1k": "imagenet1k",
    "imagenet_v2": "imagenetv2",
    "flickr": "flickr30k",
    "flickr_1k_test_image_text_retrieval": "flickr30k",
    "mscoco_captions": "mscoco",
    "mscoco_2014_5k_test_image_text_retrieval": "mscoco",
    "coco": "mscoco",
}


@cache
def read_published() -> dict[str, dict[tuple[str, str], float]]:
    """Read the numbers: by model, then by data set and metric."""
    with open(FILE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    published: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        columns = {tuple(name.split(" ")): value for name, value in row.items() if name != "model" and value}
        published[row["model"]] = {(name[0], name[1]): float(value) for name, value in columns.items()}
    return published


def check_published(model: str | None) -> None:
    """See that there are numbers of a model.

    Raises:
        UserError: there are none.
    """
    if model is not None and model not in (known := read_published()):
        raise UserError(f"compare_to={model}: no published numbers of it{tell_choices(model, known)}")


def published_name(dataset: str) -> str:
    """Return what a set is called in the file: without `vtab/` or `vtab-` and what else comes before a name."""
    name = re.sub(r"^(vtab|wds)[-_/]", "", dataset.lower()).replace("-", "_")
    return OTHER_NAMES.get(name, name)


def compare(rows: Sequence[Mapping[str, Any]], model: str) -> list[list[str]]:
    """Return rows of a table: set, metric, ours, published, difference in points."""
    table = []
    for row in rows:
        for (dataset, metric), value in read_published()[model].items():
            ours = row["metrics"].get(metric)
            if dataset == published_name(row["dataset"]) and row["key"] == row["dataset"] and ours is not None:
                difference = f"{100 * (ours - value):+.1f}"
                table.append([row["dataset"], metric, f"{ours:.1%}", f"{value:.1%}", difference])
    return table


def log_comparison(rows: Sequence[Mapping[str, Any]], model: str) -> None:
    """Print a table of our numbers and published ones."""
    table = compare(rows, model)
    if not table:
        known = ", ".join(dict.fromkeys(dataset for dataset, _ in read_published()[model]))
        log.info("compare_to=%s: none of these sets has published numbers, which are of %s", model, known)
        return
    log_table(f"Beside {model}", ("data set", "metric", "this model", "published", "points"), table)
