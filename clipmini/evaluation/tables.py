"""Sets as a table of pictures with labels or captions: .csv, .tsv, .jsonl or .parquet."""

import csv
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipmini.data.remote import is_remote
from clipmini.errors import UserError, did_you_mean, tell_choices
from clipmini.evaluation.sets import Pictures, Place, RetrievalSet

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
# Names of columns that are taken where the config gives none: ours, and those of open_clip and img2dataset.
IMAGE_KEYS = ("image", "filepath", "image_path", "path")
LABEL_KEYS = ("label", "class")
CAPTION_KEYS = ("caption", "title", "text")

NUMBER = re.compile(r"-?\d+(\.\d+)?")

Row = Mapping[str, Any]


def read_table(path: Path) -> list[Row]:
    """Read the rows of a .csv, .tsv, .jsonl or .parquet.

    Raises:
        UserError: it cannot be read, or has no rows.
    """
    read = {".parquet": read_parquet, ".jsonl": read_json_lines}.get(path.suffix.lower(), read_csv)
    try:
        rows = read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def read_csv(path: Path) -> list[Row]:
    """Read a .csv or .tsv.

    Raises:
        ValueError: it is none, or a row has too many or too few columns; says where.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            rows: list[Any] = list(reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.reader.line_num}: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number}: not as many columns as the first line has names")
    return rows


def read_json_lines(path: Path) -> list[Row]:
    """Read a .jsonl; blank lines are no rows.

    Raises:
        ValueError: a line that is no JSON object; says which.
    """
    rows: list[Row] = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: no JSON object")
            rows.append(row)
    return rows


def read_parquet(path: Path) -> list[Row]:
    return import_parquet(str(path)).parquet.read_table(path).to_pylist()


def import_parquet(at: str) -> Any:
    """Import pyarrow with its module for parquet.

    Args:
        at: what needs it, for messages.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{at}: parquet needs pyarrow: pip install 'clipmini[parquet]'") from error
    return pyarrow


def choose_column(rows: Sequence[Row], given: str | None, known: Sequence[str], key: str, at: Path) -> str | None:
    """Return the name of a column: the one that is given, or the only known one that is there, or None.

    Raises:
        UserError: the one that is given is not there, or several known ones are.
    """
    columns = list(rows[0])
    if given is not None:
        if given not in columns:
            raise UserError(f"{key}={given}: {at} has no such column{tell_choices(given, columns)}")
        return given
    found = [name for name in known if name in columns]
    if len(found) > 1:
        raise UserError(f"{at} has the columns {' and '.join(found)}: choose one by {key}")
    return found[0] if found else None


def table_places(rows: Sequence[Row], column: str, folder: Path, at: Path) -> list[Place]:
    """Return the picture of each row, a path relative to a folder.

    Raises:
        UserError: no path, or a URL.
    """
    places = []
    for number, row in enumerate(rows, 1):
        path = row.get(column)
        if not isinstance(path, str) or not path or is_remote(path):
            raise UserError(f"{at}, row {number}: {column} is {reprlib.repr(path)}, no path of a picture")
        places.append(Place(path, str(folder / path)))
    return places


def read_groups(rows: Sequence[Row], column: str, at: Path) -> tuple[str, ...]:
    """Return the group of each row.

    Raises:
        UserError: there is no such column, or no group in a row.
    """
    choose_column(rows, column, (), "group_key", at)
    groups = ["" if row.get(column) is None else str(row[column]) for row in rows]
    if "" in groups:
        raise UserError(f"{at}, row {groups.index('') + 1}: no {column}, which is the group_key")
    return tuple(groups)


def number_labels(values: Sequence[Any], class_names: Sequence[str] | None, at: Path) -> tuple[list[str], np.ndarray]:
    """Return the class names and int64 [N] labels: all of them names of classes, or all numbers of given names.

    Raises:
        UserError: no label, numbers without names, or a label that is no class.
    """
    texts = ["" if value is None else str(value).strip() for value in values]
    if "" in texts:
        raise UserError(f"{at}, row {texts.index('') + 1}: no label")
    are_numbers = all(NUMBER.fullmatch(text) for text in texts)
    if class_names is None:
        if are_numbers:
            raise UserError(f"{at}: the labels are numbers: class_names must say what they are called, in their order")
        class_names = sorted(set(texts))
    known: dict[str, int] = {}
    for number, name in enumerate(class_names):
        known.setdefault(name, number)
    if are_numbers and not all(text in known for text in texts):  # never some by name and some by number
        known = {str(number): number for number in range(len(class_names))}
    for number, text in enumerate(texts, 1):
        if text not in known:
            hint = f", from 0 to {len(known) - 1}" if are_numbers else did_you_mean(text, known)
            raise UserError(f"{at}, row {number}: label {text!r} is none of the {len(class_names)} classes{hint}")
    return list(class_names), np.array([known[text] for text in texts], dtype=np.int64)


def pair_rows(name: str, places: Sequence[Place], values: Sequence[Any], language: str, at: Path) -> RetrievalSet:
    """Make a retrieval set of rows; the same picture or the same caption in several rows is one, n to m.

    Raises:
        UserError: no caption.
    """
    pictures: dict[Place, int] = {}
    captions: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    for number, (place, value) in enumerate(zip(places, values, strict=True), 1):
        for text in value if isinstance(value, list) and value else [value]:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{at}, row {number}: {reprlib.repr(text)} is no caption")
            picture = pictures.setdefault(place, len(pictures))
            pairs[picture, captions.setdefault(text.strip(), len(captions))] = None
    return RetrievalSet(
        name, Pictures(tuple(pictures)), tuple(captions), np.array(list(pairs), dtype=np.int64), language
    )
