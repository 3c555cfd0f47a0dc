"""The files of an index, as clip-retrieval (https://github.com/rom1504/clip-retrieval) lays them out.

INDEX/img_emb/img_emb_0.npy      unit vectors of pictures, fp16 [n, D], a file for each partition
INDEX/text_emb/text_emb_0.npy    those of their captions, or of texts alone
INDEX/metadata/metadata_0.parquet   image_path, caption, what else is known of each (see `join`), and table_row
INDEX/rejected/rejected_0.jsonl  what could not be used, if there was any
INDEX/index.json                 what all of it was made of and with
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipmini.errors import UserError
from clipmini.files import tell_neighbours, write_atomically
from clipmini.shards.packed import DIGEST, LOCK, check_same

RECORD = "index.json"
TABLE_ROW = "table_row"  # column of the metadata: number, from 1, of the table's row that holds the picture itself
ROW_GROUP = 1000  # rows of metadata that are read for one of them
REQUIRED = {
    *("partitions", "width", "kinds", DIGEST, "input"),
    *("model", "architecture", "weights_of", "weights", "name", "precision"),
}
Kind = Literal["image", "text"]
FOLDERS: dict[Kind, str] = {"image": "img_emb", "text": "text_emb"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Partition:
    """What is kept of a part of the input.

    Attributes:
        embeddings: fp16 [n, D] by kind.
        rows: what is known of each of the n.
        rejected: what could not be used, and why.
    """

    embeddings: Mapping[Kind, np.ndarray]
    rows: Sequence[Row]
    rejected: Sequence[Row]


@dataclass(frozen=True)
class Layout:
    """Where the files of an index lie.

    Attributes:
        partitions: how many there are.
        kinds: what is embedded.
    """

    directory: Path
    partitions: int
    kinds: tuple[Kind, ...]

    def path(self, folder: str, number: int, suffix: str) -> Path:
        """Return the file of a partition; numbers have as many digits as that of all partitions."""
        digits = len(str(self.partitions))
        return self.directory / folder / f"{folder}_{number:0{digits}d}{suffix}"

    def embeddings(self, kind: Kind, number: int) -> Path:
        return self.path(FOLDERS[kind], number, ".npy")

    def metadata(self, number: int) -> Path:
        return self.path("metadata", number, ".parquet")

    def rejected(self, number: int) -> Path:
        return self.path("rejected", number, ".jsonl")

    def is_done(self, number: int) -> bool:
        """Say whether a partition is there: its metadata are written last."""
        return self.metadata(number).is_file()

    def missing(self) -> list[int]:
        """Return the numbers of the partitions that are not there."""
        return [number for number in range(self.partitions) if not self.is_done(number)]

    def write(self, number: int, partition: Partition) -> None:
        """Write a partition, each file whole or not at all, and remove what a killed process left of it."""
        paths = {kind: self.embeddings(kind, number) for kind in self.kinds}
        for path in (*paths.values(), self.metadata(number), self.rejected(number)):
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink(missing_ok=True)
        for kind, path in paths.items():
            content = io.BytesIO()
            np.save(content, partition.embeddings[kind])
            write_atomically(path, content.getvalue())
        self.rejected(number).unlink(missing_ok=True)  # of another try
        if partition.rejected:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in partition.rejected)
            write_atomically(self.rejected(number), "".join(lines).encode("utf-8", "replace"))
        write_atomically(self.metadata(number), make_parquet(partition.rows))

    def read_rejected(self) -> list[Row]:
        """Return what could not be used of all partitions."""
        paths = [path for number in range(self.partitions) if (path := self.rejected(number)).is_file()]
        return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line]


def join(known: Row, own: Row) -> Row:
    """Return what users know of a sample with what is our own; of theirs, what has a name of ours is kept as NAME_.

    It is left out where it is the same, as the caption that img2dataset writes twice.
    """
    joined = {name: value for name, value in known.items() if name not in own}
    for name in known:
        if name in own and known[name] != own[name]:
            other = f"{name}_"
            while other in known or other in own:
                other += "_"
            joined[other] = known[name]
    return {**joined, **own}


def import_pyarrow() -> Any:
    """Import pyarrow.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("metadata of an index are parquet, which needs pyarrow: pip install 'clipmini[parquet]'") from (
            error
        )
    return pyarrow


def make_parquet(rows: Sequence[Row]) -> bytes:
    """Write rows as parquet, a column for each key; what is no single value, or of several types, becomes JSON text."""
    pyarrow = import_pyarrow()
    keys = dict.fromkeys(key for row in rows for key in row) or {"image_path": None}
    columns = {}
    for key in keys:
        values = [to_plain(row.get(key)) for row in rows]
        try:
            columns[to_plain(key)] = pyarrow.array(values, None if rows else pyarrow.string())
        except (ValueError, TypeError, OverflowError):  # pyarrow's own are some of them
            texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            columns[to_plain(key)] = pyarrow.array(texts, pyarrow.string())
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), content, row_group_size=ROW_GROUP)
    return content.getvalue().to_pybytes()


def read_row(path: Path, number: int) -> Row:
    """Read a row that `make_parquet` has written, and few others with it."""
    with import_pyarrow().parquet.ParquetFile(path) as file:
        group = file.read_row_group(number // ROW_GROUP, use_threads=False)
    return group.slice(number % ROW_GROUP, 1).to_pylist()[0]


def to_plain(value: Any) -> Any:
    """Return a single value: lists and mappings as JSON, and text without what UTF-8 cannot say, as names of files."""
    value = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def check_output(directory: Path, record: Row) -> None:
    """See that a directory is new, empty, or that of the same index, and write its record.

    Every process may do so: all write the same.

    Raises:
        UserError: it holds something else.
    """
    record = json.loads(json.dumps(record))  # as it is read again
    names = os.listdir(directory) if directory.exists() else []
    if RECORD not in names:
        if any(name != LOCK and not name.endswith(".tmp") for name in names):
            raise UserError(f"output={directory}: is not empty, and holds no index; choose another")
        write_atomically(directory / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        return
    check_same(directory, record, read_record(directory, "output"))


def read_record(directory: Path, key: str) -> Row:
    """Read what an index was made of and with.

    Args:
        key: that names the directory, for messages.

    Raises:
        UserError: there is none.
    """
    try:
        content = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"{error.strerror}{'' if directory.exists() else tell_neighbours(directory)}"
        raise UserError(f"{key}={directory}: no index there ({RECORD}): {reason}") from error
    except ValueError as error:
        raise UserError(f"{key}={directory}: cannot read its {RECORD}: {error}") from error
    if not isinstance(content, dict) or not REQUIRED <= content.keys():
        raise UserError(f"{key}={directory}: its {RECORD} is not of `clipmini embed`")
    return content
