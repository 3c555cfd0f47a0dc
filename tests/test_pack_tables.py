"""Tables of text that are packed: each way to hold a picture, and each thing that can be wrong with a table."""

import base64
import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from packing import (
    KEYS,
    URL,
    metadata_of,
    pack_table,
    read_packed_samples,
    rejected,
    run_pack,
    write_jsonl,
    write_parquet,
)

from clipmini.errors import UserError
from clipmini.shards.packed import Packed
from clipmini.shards.tables import HEAD


@pytest.mark.parametrize("extension", ["csv", "tsv", "CSV"])
def test_a_table_of_text_names_pictures(extension: str, jpeg_files: list[bytes], tmp_path: Path) -> None:
    table = tmp_path / f"table.{extension}"
    texts = ['plain, with a comma and a\ttab "quoted"', "two\nlines", " spaces ", "\u00e9t\u00e9", "last"]
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if extension == "tsv" else ",")
        writer.writerow(["number", "caption", "image"])
        for number, text in enumerate(texts):
            writer.writerow([number, text, f"pictures/{number}.jpg"])
            file.write("\r\n")  # blank lines are no rows
    samples = pack_table(table)
    assert [members["jpg"] for members in samples] == jpeg_files
    assert [members["txt"].decode() for members in samples] == [text.strip() for text in texts]
    assert metadata_of(samples)[4] == {"number": "4", "source": "pictures/4.jpg"}
    assert json.loads((tmp_path / "output/sizes.json").read_text()) == {
        "00000.tar": 2,
        "00001.tar": 2,
        "00002.tar": 1,
    }


def test_json_lines_name_pictures_and_keep_the_rest(jpeg_files: list[bytes], tmp_path: Path) -> None:
    absolute = str(tmp_path / "pictures/1.jpg")
    rows = [
        {"image": "pictures/0.jpg", "caption": "zero", "tags": ["a", 1, None], "source": "where it is from"},
        {"caption": "one", "image": absolute, "score": float("nan")},
        {"caption": ["two", "zwei"], "image": {"path": "pictures/2.jpg"}},
    ]
    samples = pack_table(write_jsonl(tmp_path / "table.jsonl", rows))
    assert [members["jpg"] for members in samples] == jpeg_files[:3]
    assert [members["txt"] for members in samples] == [b"zero", b"one", b"two"]
    assert metadata_of(samples) == [
        {"tags": ["a", 1, None], "source": "where it is from"},
        {"score": None, "source": absolute},
        {"caption": ["two", "zwei"], "source": "pictures/2.jpg"},
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_text_holds_pictures_in_base64(kind: str, jpegs: list[bytes], tmp_path: Path) -> None:
    large = jpegs[0] + bytes(200_000)  # longer than a field that Python's csv takes by itself
    encoded = [base64.b64encode(data).decode() for data in (large, jpegs[1])]
    rows = [(encoded[0], "zero"), (f"data:image/jpeg;base64,{encoded[1]}", "one")]
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    else:
        write_jsonl(table, [{"image": image, "caption": caption} for image, caption in rows])
    samples = pack_table(table)
    assert [members["jpg"] for members in samples] == [large, jpegs[1]]
    assert metadata_of(samples) == [{"source": f"table.{kind} row 1"}, {"source": f"table.{kind} row 2"}]


def test_what_is_wrong_with_a_row_is_told_by_cause(jpeg_files: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "pictures/bad.jpg").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "pictures/pipe.jpg")
    good = {"image": "pictures/0.jpg", "caption": "good"}
    rows: list[Any] = [
        good,
        {**good, "image": "pictures/9.jpg"},
        {**good, "image": "pictures/bad.jpg"},
        {**good, "image": "pictures"},
        {**good, "image": "pictures/pipe.jpg"},
        {**good, "image": URL},
        {**good, "image": None},
        {**good, "image": 5},
        {**good, "image": "a\0.jpg"},
        {**good, "image": "R0lGODlh" + "A" * 10_000},
        {**good, "image": "data:image/png;base64,\u00e9"},
        {"image": "pictures/0.jpg"},
        {**good, "caption": " "},
        {**good, "caption": ["fine", 5]},
        {**good, "caption": []},
        {**good, "caption": "\ud800"},
        ["no object"],
        {**good, "deep": json.loads("[" * 600 + "]" * 600)},
    ]
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    with open(table, "ab") as file:
        file.write(b'{"image": "pictures/0.jpg", "caption": "caf\xe9"}\n{"image": \n' + b"[" * 100_000 + b"\n")
        file.write(json.dumps(good).encode())  # no newline at the end
    assert [members["jpg"] for members in pack_table(table)] == [jpeg_files[0], jpeg_files[0]]
    found = rejected(table)
    assert [(source, cause) for source, cause, _ in found] == [
        ("pictures/9.jpg", "picture"),
        ("pictures/bad.jpg", "picture"),
        ("pictures", "picture"),
        ("pictures/pipe.jpg", "picture"),
        (URL, "picture"),
        ("table.jsonl row 7", "picture"),
        ("table.jsonl row 8", "picture"),
        ("a\0.jpg", "picture"),
        ("table.jsonl row 10", "picture"),
        ("table.jsonl row 11", "picture"),
        ("pictures/0.jpg", "caption"),
        ("pictures/0.jpg", "caption"),
        ("pictures/0.jpg", "caption"),
        ("pictures/0.jpg", "caption"),
        ("pictures/0.jpg", "caption"),
        ("table.jsonl row 17", "row"),
        ("pictures/0.jpg", "json"),
        ("pictures/0.jpg", "caption"),
        ("table.jsonl row 20", "row"),
        ("table.jsonl row 21", "row"),
    ]
    details = [detail for _, _, detail in found]
    assert details[0] == "9.jpg: No such file or directory"
    assert details[2:7] == [
        "pictures is not a file",
        "pipe.jpg is not a file",
        "a URL, and nothing is downloaded",
        "it is missing",
        "int in place of a picture",
    ]
    assert details[10:14] == [
        "caption is missing",
        "caption is blank",
        "caption is int, not text",
        "caption is list, not text",
    ]
    assert details[14].startswith("caption is not UTF-8") and details[17].startswith("caption is not UTF-8")
    assert details[15] == "list in place of an object"
    assert all(len(detail) < 200 for detail in details)


def test_rows_of_csv_that_do_not_fit_are_told(jpeg_files: list[bytes], tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(
        b"image,caption\npictures/0.jpg,zero\npictures/1.jpg\npictures/2.jpg,two,more\npictures/3.jpg,caf\xe9\n"
        b"pictures/4.jpg,\npictures/4.jpg,four\n"
    )
    assert [members["txt"] for members in pack_table(table)] == [b"zero", b"four"]
    assert rejected(table)[:2] == [
        ("table.csv row 2", "row", "1 columns, and the first line has 2"),
        ("table.csv row 3", "row", "3 columns, and the first line has 2"),
    ]
    assert [(source, cause) for source, cause, _ in rejected(table)[2:]] == [
        ("pictures/3.jpg", "caption"),
        ("pictures/4.jpg", "caption"),
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_give_the_same_bytes_for_any_number_of_processes(
    kind: str, jpeg_files: list[bytes], tmp_path: Path
) -> None:
    rows = [(f"pictures/{number % 5}.jpg", f"caption {number}\n" * (number % 4 + 1)) for number in range(40)]
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    else:
        images, captions = zip(*rows, strict=True)
        write_parquet(table, {"image": images, "caption": captions}, row_group_size=9)
    for num_workers in (1, 3):
        run_pack(table, tmp_path / str(num_workers), **KEYS, samples_per_shard=7, num_workers=num_workers)
    found = [read_packed_samples(tmp_path / str(num_workers)) for num_workers in (1, 3)]
    assert found[0] == found[1]
    assert [members["txt"].decode() for members in found[0].values()] == [caption.strip() for _, caption in rows]


# What is refused


def content_of(kind: str) -> bytes:
    """Return a table with the columns image and caption and one row."""
    if kind == "jsonl":
        return b'{"image": "a.jpg", "caption": "a"}\n'
    if kind == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"image": ["a.jpg"], "caption": ["a"]}), buffer)
        return buffer.getvalue()
    return b"image,caption\na.jpg,a\n" if kind == "csv" else b"image\tcaption\na.jpg\ta\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("key", ["image_key", "caption_key"])
def test_a_column_that_is_not_there_is_told(kind: str, key: str, tmp_path: Path) -> None:
    table = tmp_path / f"table.{kind}"
    table.write_bytes(content_of(kind))
    wrong, right = {"image_key": ("imag", "image"), "caption_key": ("captions", "caption")}[key]
    message = rf"{key}={wrong}: {table} has no such column \(did you mean '{right}'\?\); there are: image, caption"
    with pytest.raises(UserError, match=message):
        pack_table(table, **{key: wrong})
    assert not (tmp_path / "output").exists()


WRONG_TABLES = [
    ("a.csv", b"", "has no rows"),
    ("a.csv", b"image,caption\n\n", "has no rows"),
    ("a.tsv", b"image\tcaption\n", "has no rows"),
    ("a.jsonl", b"\n \n", "has no rows"),
    ("a.csv", "image,caption\na.jpg,a\n".encode("utf-16"), "is not UTF-8"),
    ("a.csv", b"image;caption\na.jpg;a\n", "image_key=image: .* has no such column.* there are: image;caption"),
    ("a.csv", b'image,caption\na.jpg,"a\nb.jpg,b\n', "cannot be read up to byte [0-9]+: unexpected end of data"),
    ("a.csv", b'image,caption\na.jpg,"a" b\n', "cannot be read up to byte 26: ',' expected after '\"'"),
    ("a.csv", b"image,caption,caption\na.jpg,a,b\n", "caption_key=caption: .* has 2 columns of this name"),
    (
        "a.csv",
        b"a.jpg," + b"no header " * 1000 + b"\nb.jpg,b\n",
        "image_key=image: .* has no such column; there are: a.jpg, no .{,300}$",
    ),
    ("a.csv", b"image,caption\na.jpg\n", "none of its first 1 rows can be read: 1 columns, and the first line has 2"),
    ("a.jsonl", b"[1]\n{\n", "none of its first 2 rows can be read: list in place of an object"),
    ("a.jsonl", '{"image": "a"}\n'.encode("utf-16"), "none of its first 2 rows can be read: "),
    ("a.csv", f"image,caption\n{URL},a\n".encode(), f"image_key=image: holds URLs such as {URL}, and nothing"),
    ("a.jsonl", b'{"image": "s3://b/a.jpg", "caption": "a"}\n', "image_key=image: holds URLs such as s3://b/a.jpg"),
    ("a.parquet", b"", "input=.*a.parquet: "),
    ("a.parquet", b"PAR1" * 100, "input=.*a.parquet: "),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_TABLES)
def test_a_table_that_cannot_be_packed_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        pack_table(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pyarrow.array([], pyarrow.string()), "caption": pyarrow.array([], pyarrow.string())}, "no rows"),
        ({"image": [URL, None], "caption": ["a", "b"]}, f"image_key=image: holds URLs such as {URL}"),
        ({"image": [{"bytes": None, "path": URL}], "caption": ["a"]}, f"image_key=image: holds URLs such as {URL}"),
    ],
)
def test_a_parquet_that_cannot_be_packed_is_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "table.parquet", columns)
    with pytest.raises(UserError, match=message):
        pack_table(table)
    assert not (tmp_path / "output").exists()


def test_one_column_for_both_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content_of("csv"))
    with pytest.raises(UserError, match="caption_key=image: is the column of the pictures too"):
        pack_table(tmp_path / "table.csv", caption_key="image")


def test_a_few_urls_are_left_out(jpeg_files: list[bytes], tmp_path: Path) -> None:
    rows = [{"image": URL, "caption": "far"}] * HEAD + [{"image": "pictures/0.jpg", "caption": "near"}]
    with pytest.raises(UserError, match="holds URLs"):
        pack_table(write_jsonl(tmp_path / "table.jsonl", rows))
    samples = pack_table(write_jsonl(tmp_path / "table.jsonl", rows[1:]))
    assert [members["txt"] for members in samples] == [b"near"] and len(rejected(tmp_path / "table.jsonl")) == HEAD - 1


def test_a_table_of_which_no_row_can_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content_of("csv"))
    with pytest.raises(UserError, match=r"not one sample can be used: 1 x picture \(a.jpg: a.jpg: No such file"):
        pack_table(tmp_path / "table.csv")


def test_a_changed_table_is_refused(jpeg_files: list[bytes], tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "table.jsonl", [{"image": "pictures/0.jpg", "caption": "a"}])
    pack_table(table)
    write_jsonl(table, [{"image": "pictures/1.jpg", "caption": "a"}] * 2)
    with pytest.raises(UserError, match="was begun with other files of the input"):
        pack_table(table)


def test_rows_of_a_part_begin_where_the_last_part_ends(jpeg_files: list[bytes], tmp_path: Path) -> None:
    table = write_jsonl(
        tmp_path / "table.jsonl",
        [{"image": f"pictures/{number}.jpg", "caption": "\u00e9" * number} for number in range(5)],
    )
    for samples_per_shard in (1, 2, 3, 4, 5, 6):
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        samples = pack_table(table, samples_per_shard=samples_per_shard)
        assert [members["jpg"] for members in samples] == jpeg_files[1:]
        assert rejected(table) == [("pictures/0.jpg", "caption", "caption is blank")]
    assert run_pack(table, tmp_path / "output", **KEYS, samples_per_shard=6) == Packed({"00000.tar": 4}, 1)
