"""Samples to pack or embed from a table: .csv, .tsv, .jsonl or .parquet, with pictures in it or paths to them."""

import base64
import csv
import functools
import itertools
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clipmini.data.health import Fault
from clipmini.errors import UserError, did_you_mean
from clipmini.shards.inputs import Input, Item, Part, Sample, fingerprint, plain, read_file, take_caption

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".jsonl", ".parquet")
HEAD = 20  # rows that are looked at before anything is packed
BATCH = 100  # rows of a parquet table in memory at once: they may hold pictures
BUFFER = 1 << 20  # bytes; without one, pyarrow reads a whole column of a row group at once
MAX_FIELD = 1 << 30  # characters; Python's own limit of 131,072 is less than a picture in base64
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR")  # of a JPEG, PNG and WebP
MAX_PATH = 4096  # characters; Linux takes no longer path
# Of pyarrow: damage, what is not UTF-8, dates beyond Python's, kinds of compression and columns that it does not know.
ARROW_ERRORS = (OSError, ValueError, ArithmeticError, NotImplementedError)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Row = dict[str, Any]


@dataclass(frozen=True)
class TablePart(Part):
    """Some rows of a table.

    Attributes:
        path: of the table.
        image_key: column with the picture, or None.
        caption_key: column with the caption, or None.
        first: number of the first row, from 0.
        count: rows.
    """

    path: str
    image_key: str | None
    caption_key: str | None
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def rows(self) -> Iterator[Row | Fault]:
        """Yield each row, or what is wrong with it."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item]:
        for number, row in enumerate(self.rows(), self.first + 1):
            place = f"{os.path.basename(self.path)} row {number}"
            key = self.image_key
            path = None if key is None or isinstance(row, Fault) else picture_path(row.get(key))
            yield path or place, functools.partial(self.load, row, number)

    def load(self, row: Row | Fault, number: int) -> Sample:
        """Read the picture that a row names or holds."""
        if isinstance(row, Fault):
            raise row
        rest = dict(row)
        image, text = (rest.pop(key, None) if key is not None else None for key in (self.image_key, self.caption_key))
        for value in (image, text):
            if isinstance(value, Fault):
                raise value
        caption, kept = ("", {}) if self.caption_key is None else take_caption(text, self.caption_key)
        picture = b"" if self.image_key is None else read_picture(image, os.path.dirname(self.path))
        known = {key: value for key, value in rest.items() if not isinstance(value, Fault)}
        return Sample(picture, caption, plain({**known, **kept}), number if holds_picture(image) else None)


def is_base64(text: str) -> bool:
    """Say whether text is a picture in base64, or else a path: base64 has no dots, and paths of pictures have."""
    is_picture = text.startswith(BASE64_STARTS) and "." not in text
    return is_picture or text.startswith("data:image/") or len(text) > MAX_PATH


def picture_path(value: object) -> str | None:
    """Return the path in a picture column, also where it comes with the bytes as in Hugging Face's data sets."""
    value = value.get("path") if isinstance(value, dict) else value
    return value if isinstance(value, str) and not is_base64(value) else None


def holds_picture(value: object) -> bool:
    """Say whether a picture column holds the picture itself, and not only its path."""
    return bool(value.get("bytes")) if isinstance(value, dict) else bool(value) and picture_path(value) is None


def read_picture(value: object, folder: str) -> bytes:
    """Return the bytes that a picture column holds or names.

    Args:
        value: bytes; text, which is base64 or a path; or both as {bytes, path}.
        folder: what paths are relative to.

    Raises:
        Fault: nothing, a URL, or a file that cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not value:
        raise Fault("picture", "it is missing")
    if not isinstance(value, str):
        raise Fault("picture", f"{type(value).__name__} in place of a picture")
    if is_base64(value):
        try:
            return base64.b64decode(value.rpartition(",")[2])
        except ValueError as error:
            raise Fault("picture", f"base64: {error}") from error
    if URL.match(value):
        raise Fault("picture", "a URL, and nothing is downloaded")
    return read_file(os.path.join(folder, value), "picture")


def check_columns(table: str, columns: Sequence[str], image_key: str | None, caption_key: str | None) -> None:
    """See that each of the two columns, or the one that is asked for, is there once.

    Raises:
        UserError: it is not, or they are one.
    """
    for key, column in (("image_key", image_key), ("caption_key", caption_key)):
        if column is None:
            continue
        if column not in columns:
            hint = did_you_mean(column, columns)
            there = textwrap.shorten(", ".join(columns), 300, placeholder=" ...")
            raise UserError(f"{key}={column}: {table} has no such column{hint}; there are: {there}")
        if columns.count(column) > 1:
            raise UserError(f"{key}={column}: {table} has {columns.count(column)} columns of this name")
    if image_key == caption_key is not None:
        raise UserError(f"caption_key={caption_key}: is the column of the pictures too (image_key)")


def check_pictures(image_key: str | None, pictures: Iterable[object]) -> None:
    """See that not all of the pictures are somewhere else.

    Args:
        image_key: their column.
        pictures: of the first rows.

    Raises:
        UserError: they are URLs.
    """
    there = [value for value in pictures if value]
    paths = [picture_path(value) for value in there if not (isinstance(value, dict) and value.get("bytes"))]
    urls = [path for path in paths if path and URL.match(path)]
    if urls and len(urls) == len(there):
        raise UserError(f"image_key={image_key}: holds URLs such as {urls[0]}, and nothing is downloaded")


# Text


@dataclass(frozen=True)
class TextPart(TablePart):
    """Some rows of a .csv, .tsv or .jsonl.

    Attributes:
        offset: byte at which the first row begins.
        header: columns; of a .jsonl none, each row has its own.
    """

    offset: int
    header: tuple[str, ...]

    def rows(self) -> Iterator[Row | Fault]:
        for row, _ in itertools.islice(read_rows(self.path, self.offset), self.count):
            yield parse_row(row, self.header)


def read_rows(path: str, offset: int) -> Iterator[tuple[str | list[str], int]]:
    """Yield the rows of a text table from a byte on, blank lines left out, and the byte at which each ends.

    What is not UTF-8 becomes surrogates, so that it is the caption that is refused and not the table.

    Raises:
        UserError: quotes that CSV does not allow; a quote too many would swallow all rows up to the next.
    """
    position = offset

    def lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode("utf-8", "surrogateescape")

    delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower())
    csv.field_size_limit(MAX_FIELD)
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            rows = csv.reader(lines(), delimiter=delimiter, strict=True) if delimiter else map(str.strip, lines())
            yield from ((row, position) for row in rows if row)
        except csv.Error as error:
            raise UserError(f"input={path}: cannot be read up to byte {position}: {error}") from error


def parse_row(row: str | list[str], header: Sequence[str]) -> Row | Fault:
    """Return a row by column, or what is wrong with it; values of a .csv or .tsv stay text."""
    if isinstance(row, list):
        if len(row) == len(header):
            return dict(zip(header, row, strict=True))
        return Fault("row", f"{len(row)} columns, and the first line has {len(header)}")
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        return Fault("row", str(error))
    return value if isinstance(value, dict) else Fault("row", f"{type(value).__name__} in place of an object")


def open_table(path: str, image_key: str | None, caption_key: str | None, samples_per_shard: int) -> Input:
    """Open a table of any kind; raises what `open_parquet` and `open_text_table` do."""
    is_parquet = path.lower().endswith(".parquet")
    return (open_parquet if is_parquet else open_text_table)(path, image_key, caption_key, samples_per_shard)


def open_text_table(path: str, image_key: str | None, caption_key: str | None, samples_per_shard: int) -> Input:
    """Find where each part of a .csv, .tsv (with a first line of column names) or .jsonl begins.

    Raises:
        UserError: no rows, no such columns, or URLs.
    """
    with open(path, "rb") as file:
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # byte order mark
    rows = read_rows(path, start)
    header: tuple[str, ...] = ()
    if not path.lower().endswith(".jsonl"):
        first, start = next(rows, ([], start))
        header = tuple(first)
        try:
            "".join(header).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"input={path}: is not UTF-8") from error
    head, starts, count = [], [], 0
    for row, end in rows:
        if count % samples_per_shard == 0:
            starts.append(start)
        if count < HEAD:
            head.append(parse_row(row, header))
        count, start = count + 1, end
    if not count:
        raise UserError(f"input={path}: has no rows")
    seen = [row for row in head if not isinstance(row, Fault)]
    if not seen:
        reason = next(row.detail for row in head if isinstance(row, Fault))
        raise UserError(f"input={path}: none of its first {len(head)} rows can be read: {reason}")
    columns = header or tuple(dict.fromkeys(column for row in seen for column in row))
    check_columns(path, columns, image_key, caption_key)
    check_pictures(image_key, () if image_key is None else (row.get(image_key) for row in seen))
    parts = [
        TextPart(path, image_key, caption_key, first, min(samples_per_shard, count - first), offset, header)
        for first, offset in zip(range(0, count, samples_per_shard), starts, strict=True)
    ]
    return Input("rows", count, fingerprint([(os.path.basename(path), os.stat(path))]), parts)


# Parquet


@dataclass(frozen=True)
class ParquetPart(TablePart):
    """Some rows of a .parquet, of whose row groups only those that hold them are read.

    Attributes:
        columns: those that are read.
    """

    columns: tuple[str, ...]

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield some of the rows; no others are read than those of their row groups."""
        return iter(replace(self, first=self.first + start, count=min(stop, self.count) - start))

    def rows(self) -> Iterator[Row | Fault]:
        file = open_parquet_file(self.path)
        stop, end = self.first + self.count, 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if start < stop and end > self.first:
                yield from self.group_rows(file, group, start, stop)

    def group_rows(self, file: Any, group: int, start: int, stop: int) -> Iterator[Row | Fault]:
        """Yield the rows of a row group that belong to this part; `start` and `stop` count from the table's first."""
        try:
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=self.columns, use_threads=False):
                skipped = min(max(self.first - start, 0), batch.num_rows)
                yield from batch_rows(batch.slice(skipped, max(stop - start - skipped, 0)))
                start += batch.num_rows
        except ARROW_ERRORS as error:
            raise UserError(f"input={self.path}: cannot be read from row {start + 1} on: {error}") from error


def batch_rows(batch: Any) -> Iterator[Row]:
    """Yield the rows of a record batch; a value that Python cannot hold is a Fault."""
    columns = [column_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def column_values(name: str, column: Any) -> list[Any]:
    """Return the values of a column; dates and times as text, as Python has no nanoseconds.

    What cannot be read, such as text that is not UTF-8, is a Fault in its place.
    """
    from pyarrow import types

    try:
        return (column.cast("string") if types.is_temporal(column.type) else column).to_pylist()
    except ARROW_ERRORS as error:
        if len(column) == 1:
            return [Fault("row", f"{name}: {error}")]
        return [value for number in range(len(column)) for value in column_values(name, column.slice(number, 1))]


def open_parquet_file(path: str) -> Any:
    """Open a .parquet.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"input={path}: parquet needs pyarrow: pip install 'clipmini[parquet]'") from error
    try:
        return ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except ARROW_ERRORS as error:
        raise UserError(f"input={path}: {error}") from error


def open_parquet(path: str, image_key: str | None, caption_key: str | None, samples_per_shard: int) -> Input:
    """Count the rows of a .parquet; columns of bytes other than the pictures are not read.

    Raises:
        UserError: no rows, no such columns, URLs, or no pyarrow.
    """
    file = open_parquet_file(path)
    fields, count = file.schema_arrow, file.metadata.num_rows
    check_columns(path, fields.names, image_key, caption_key)
    if not count:
        raise UserError(f"input={path}: has no rows")
    columns = tuple(
        field.name for field in fields if field.name in (image_key, caption_key) or "binary" not in str(field.type)
    )
    if image_key is not None:
        try:
            head = next(file.iter_batches(HEAD, columns=[image_key], use_threads=False))
        except ARROW_ERRORS as error:
            raise UserError(f"input={path}: cannot be read: {error}") from error
        check_pictures(image_key, (row[image_key] for row in batch_rows(head)))
    parts = [
        ParquetPart(path, image_key, caption_key, first, min(samples_per_shard, count - first), columns)
        for first in range(0, count, samples_per_shard)
    ]
    return Input("rows", count, fingerprint([(os.path.basename(path), os.stat(path))]), parts)
