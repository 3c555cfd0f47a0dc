"""Tables in Parquet that are packed: values of every type, and what cannot be read."""

import base64
import datetime
import decimal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from packing import (
    URL,
    metadata_of,
    pack_table,
    rejected,
    write_parquet,
)

from clipmini.errors import UserError


def make_column(kind: str, jpeg_files: list[bytes]) -> Any:
    """Make a column of pictures as it is found in data sets."""
    names = [f"pictures/{number}.jpg" for number in range(5)]
    return {
        "bytes": jpeg_files,
        "large bytes": pyarrow.array(jpeg_files, pyarrow.large_binary()),
        "bytes and path": [{"bytes": data, "path": f"{URL}?{number}"} for number, data in enumerate(jpeg_files)],
        "path in a struct": [{"bytes": None, "path": name} for name in names],
        "path": names,
        "dictionary of paths": pyarrow.array(names).dictionary_encode(),
        "base64": [base64.b64encode(data).decode() for data in jpeg_files],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["bytes", "large bytes", "bytes and path", "path in a struct", "path", "dictionary of paths", "base64"]
)
def test_parquet_holds_or_names_pictures(kind: str, jpeg_files: list[bytes], tmp_path: Path) -> None:
    columns = {
        "image": make_column(kind, jpeg_files),
        "caption": [f"caption {number}" for number in range(5)],
        "other": [b"bytes that are not read"] * 5,
    }
    samples = pack_table(write_parquet(tmp_path / "table.parquet", columns, row_group_size=3))
    assert [members["jpg"] for members in samples] == jpeg_files
    assert [members["txt"].decode() for members in samples] == columns["caption"]
    sources = {
        "bytes and path": [f"{URL}?{number}" for number in range(5)],
        "path in a struct": [f"pictures/{number}.jpg" for number in range(5)],
    }
    sources["path"] = sources["dictionary of paths"] = sources["path in a struct"]
    rows = [f"table.parquet row {number}" for number in range(1, 6)]
    assert metadata_of(samples) == [{"source": source} for source in sources.get(kind, rows)]


def test_the_first_of_a_list_of_captions_is_taken(jpegs: list[bytes], tmp_path: Path) -> None:
    columns = {"image": jpegs[:3], "caption": [["one", " eins "], ["two"], ["three", ""]]}
    samples = pack_table(write_parquet(tmp_path / "table.parquet", columns))
    assert [members["txt"] for members in samples] == [b"one", b"two"]
    assert [row["caption"] for row in metadata_of(samples)] == [["one", "eins"], ["two"]]
    assert rejected(tmp_path / "table.parquet") == [("table.parquet row 3", "caption", "caption is blank")]


def test_values_of_every_type_go_along(jpegs: list[bytes], tmp_path: Path) -> None:
    columns = {
        "image": jpegs[:2],
        "caption": ["one", "two"],
        "whole": [2**62, None],
        "part": [0.5, float("inf")],
        "nested": [{"a": [1, 2]}, {"a": None}],
        "map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "decimal": [decimal.Decimal("1.50"), None],
        "date": [datetime.date(2024, 2, 29), None],
        "nanoseconds": pyarrow.array([1_600_000_000_123_456_789, None], pyarrow.timestamp("ns")),
        "too late": pyarrow.array([2**62, 5], pyarrow.timestamp("us")),
        "unknown zone": pyarrow.array([1, None], pyarrow.timestamp("us", "Mars/Base")),
        "nested and too late": pyarrow.array([[2**62], [5]], pyarrow.list_(pyarrow.timestamp("us"))),
    }
    samples = pack_table(write_parquet(tmp_path / "table.parquet", columns))
    assert metadata_of(samples) == [
        {
            "source": "table.parquet row 1",
            "whole": 2**62,
            "part": 0.5,
            "nested": {"a": [1, 2]},
            "map": [["k", 1]],
            "decimal": "1.50",
            "date": "2024-02-29",
            "nanoseconds": "2020-09-13 12:26:40.123456789",
            "too late": "<value out of range: 4611686018427387904>",
        },
        {
            "source": "table.parquet row 2",
            "whole": None,
            "part": None,
            "nested": {"a": None},
            "map": [],
            "decimal": None,
            "date": None,
            "nanoseconds": None,
            "too late": "1970-01-01 00:00:00.000005",
            "nested and too late": ["1970-01-01 00:00:00.000005"],
        },
    ]


def test_text_of_parquet_that_is_not_utf_8_costs_only_what_it_is_in(jpegs: list[bytes], tmp_path: Path) -> None:
    def text(*values: bytes) -> Any:
        return pyarrow.array(values).view(pyarrow.string())

    columns = {
        "image": jpegs[:3],
        "caption": text(b"one", b"caf\xe9", b"three"),
        "other": text(b"caf\xe9", b"", b"fine"),
    }
    samples = pack_table(write_parquet(tmp_path / "table.parquet", columns))
    assert metadata_of(samples) == [
        {"source": "table.parquet row 1"},
        {"source": "table.parquet row 3", "other": "fine"},
    ]
    ((source, cause, detail),) = rejected(tmp_path / "table.parquet")
    assert (source, cause) == ("table.parquet row 2", "row") and detail.startswith("caption: 'utf-8' codec can't")


def test_a_damaged_parquet_is_told_with_its_row(jpegs: list[bytes], tmp_path: Path) -> None:
    columns = {"image": jpegs * 200, "caption": ["a"] * 1000}
    table = write_parquet(tmp_path / "table.parquet", columns, row_group_size=500, use_dictionary=False)
    data = bytearray(table.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + 3000] = b"\xff" * 3000
    table.write_bytes(data)
    with pytest.raises(UserError, match=f"input={table}: cannot be read from row 501 on: "):
        pack_table(table, samples_per_shard=1000)
    assert not (tmp_path / "output/sizes.json").exists()


def test_parquet_without_pyarrow_says_what_to_install(
    jpegs: list[bytes], run_here: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_parquet(tmp_path / "table.parquet", {"image": jpegs[:1], "caption": ["a"]})
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does with a package that is not there
    result = run_here("shards", "pack", f"input={table}", f"output={tmp_path / 'output'}", "caption_key=caption")
    message = f"clipmini: input={table}: parquet needs pyarrow: pip install 'clipmini[parquet]'\n"
    assert (result.returncode, result.stderr) == (2, message)
    assert not (tmp_path / "output").exists()
