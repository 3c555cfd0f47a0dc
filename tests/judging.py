"""Small sets to judge by, written in each layout, and read."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from conftest import write_tar

from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.evaluation.datasets import Opened, open_sets
from clipmini.evaluation.entries import SetEntry
from clipmini.evaluation.sets import ClassificationSet, RetrievalSet


def open_one(path: Path | str, *, with_train: bool = False, **options: Any) -> Opened:
    (opened,) = open_sets([SetEntry(str(path), **options)], "datasets", with_train=with_train)
    return opened


def read_classes(path: Path, **options: Any) -> ClassificationSet:
    dataset = open_one(path, **options).dataset
    assert isinstance(dataset, ClassificationSet)
    return dataset


def read_captions(path: Path, **options: Any) -> RetrievalSet:
    dataset = open_one(path, **options).dataset
    assert isinstance(dataset, RetrievalSet)
    return dataset


def labels_by_name(dataset: ClassificationSet) -> dict[str, str]:
    """Return the class name of each picture by its key."""
    keys = [place.key for place in dataset.pictures.places]
    return {key: dataset.class_names[label] for key, label in zip(keys, dataset.labels, strict=True)}


def write_npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, **options))
    return buffer.getvalue()


def write_wds(root: Path, *shards: Sequence[Mapping[str, Any]], split: str = "test", **files: str) -> Path:
    """Write a set in CLIP_benchmark's layout: members by extension, and files of the root without `.txt`.

    A sample without a key gets one, and a sample without a picture some bytes in its place.
    """
    for number, samples in enumerate(shards):
        rows = []
        for row, sample in enumerate(samples):
            has_picture = any(extension.lower() in IMAGE_EXTENSIONS for extension in sample)
            picture = {} if has_picture else {"png": b"%d-%d" % (number, row)}
            rows.append({"__key__": f"s{number}{row}", **picture, **sample})
        write_tar(root / split / f"{number}.tar", rows)
    (root / split / "nshards.txt").write_text(f"{len(shards)}\n")
    for name, text in files.items():
        (root / f"{name}.txt").write_text(text)
    return root


PETS = {"classnames": "cat\ndog\nowl\n", "zeroshot_classification_templates": "a {c}.\n{c}\n"}


def write_folders(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def write_table(path: Path, *rows: Mapping[str, Any]) -> Path:
    """Write rows to a table of the kind that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path
