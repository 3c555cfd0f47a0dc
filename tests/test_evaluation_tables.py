"""Tables of pictures with labels or captions; what is wrong with one is said with its row."""

from pathlib import Path
from typing import Any

import pytest
from judging import (
    labels_by_name,
    open_one,
    read_captions,
    read_classes,
    write_table,
)

from clipmini.errors import UserError
from clipmini.evaluation.sets import Place

EXTENSIONS = ["csv", "tsv", "TSV", "jsonl", "parquet"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_table_of_labels_by_name(extension: str, tmp_path: Path) -> None:
    (tmp_path / "3.png").write_bytes(b"three")
    rows = [
        {"path": "1.png", "class": "dog", "region": 'north, "far"'},
        {"path": "deep/2.png", "class": "cat", "region": "south"},
        {"path": str(tmp_path / "3.png"), "class": "dog", "region": "south"},
    ]
    dataset = read_classes(write_table(tmp_path / f"pets.{extension}", *rows), group_key="region")
    assert dataset.name == "pets" and dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [1, 0, 1]
    assert dataset.prompts == (("a photo of a cat.",), ("a photo of a dog.",))
    assert dataset.groups == ('north, "far"', "south", "south")
    assert dataset.pictures.places[1] == Place("deep/2.png", str(tmp_path / "deep/2.png"))
    assert dataset.pictures.read(2) == b"three"


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_table_of_labels_by_number(extension: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"t.{extension}", {"i": "1.png", "n": 2}, {"i": "2.png", "n": 0})
    options = {"image_key": "i", "label_key": "n", "class_names": ["owl", ["dog", "hound"], "cat"], "images": "/data"}
    dataset = read_classes(table, templates=["{}"], **options)
    assert dataset.class_names == ("owl", "dog", "cat") and dataset.labels.tolist() == [2, 0]
    assert dataset.prompts[1] == ("dog", "hound") and dataset.pictures.places[0].path == "/data/1.png"


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["2", "1", "0"], [0, 1, 2], [2, 1, 0]),  # all are names
        (["1", "2", "3"], [0, 1, 2], [0, 1, 2]),  # one is none: all are numbers
        (["cat", "dog"], ["dog", " cat "], [1, 0]),
    ],
)
def test_labels_are_all_names_or_all_numbers(names: list, labels: list, expected: list, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", *({"image": f"{label}.png", "label": label} for label in labels))
    assert read_classes(table, class_names=names).labels.tolist() == expected


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_table_of_captions_is_n_to_m(extension: str, tmp_path: Path) -> None:
    texts = [("a.jpg", "one"), ("b.jpg", "two\nlines"), ("a.jpg", "both"), ("b.jpg", " both "), ("b.jpg", "both")]
    rows = [{"filepath": path, "title": text} for path, text in texts]
    dataset = read_captions(write_table(tmp_path / f"t.{extension}", *rows))
    assert [place.key for place in dataset.pictures.places] == ["a.jpg", "b.jpg"]
    assert dataset.captions == ("one", "two\nlines", "both")
    assert dataset.pairs.tolist() == [[0, 0], [1, 1], [0, 2], [1, 2]]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_a_list_of_captions_in_a_row(extension: str, tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["two"]}]
    dataset = read_captions(write_table(tmp_path / f"t.{extension}", *rows))
    assert dataset.captions == ("one", "two") and dataset.pairs.tolist() == [[0, 0], [0, 1], [1, 1]]


def test_the_key_that_is_said_decides_what_a_table_is(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "label": "cat", "class": "x", "caption": "a cat", "title": "y"}
    table = write_table(tmp_path / "t.csv", row)
    assert read_classes(table, label_key="label").class_names == ("cat",)
    assert read_captions(table, caption_key="title").captions == ("y",)


def test_the_training_part_of_a_table(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", *({"image": f"{name}.png", "c": name, "g": 1} for name in ("owl", "cat")))
    (tmp_path / "part").mkdir()
    train = write_table(tmp_path / "part/train.jsonl", *({"path": f"{number}.png", "c": "owl"} for number in (1, 2)))
    opened = open_one(table, with_train=True, train=str(train), label_key="c", group_key="g", templates=["{}"])
    assert opened.train is not None and labels_by_name(opened.train) == {"1.png": "owl", "2.png": "owl"}
    assert opened.train.class_names == ("cat", "owl") and opened.train.labels.tolist() == [1, 1]
    assert opened.train.pictures.places[0].path == str(tmp_path / "part/1.png")


LABELLED = {"image": "a.jpg", "label": "cat"}


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("t.csv", "image,label\na.jpg,cat\nb.jpg\n", {}, "/t.csv: .*row 2: not as many columns as the first line"),
        ("t.csv", "image,label\na.jpg,cat,x\n", {}, "/t.csv: .*row 1: not as many columns as the first line"),
        ("t.csv", 'image,label\na.jpg,"cat" dog\n', {}, "/t.csv: .*line 2: ',' expected after '\"'"),
        ("t.csv", "image,label\n", {}, "/t.csv: has no rows"),
        ("t.csv", "", {}, "/t.csv: has no rows"),
        ("t.csv", b"image,label\na.jpg,ch\xe2teau\n", {}, "/t.csv: cannot be read: 'utf-8'"),
        ("t.csv", "image,label\na.jpg,cat\n,cat\n", {}, "/t.csv, row 2: image is '', no path of a picture"),
        ("t.csv", "image,label\nhttp://x/a.jpg,cat\n", {}, "/t.csv, row 1: image is 'http://x/a.jpg', no path"),
        ("t.csv", "image,label\na.jpg,cat\nb.jpg,\n", {}, "/t.csv, row 2: no label"),
        ("t.csv", "image,label\na.jpg,0\nb.jpg,1\n", {}, "/t.csv: the labels are numbers: class_names must say"),
        ("t.csv", "image,label\na.jpg,-1\nb.jpg,1\n", {}, "/t.csv: the labels are numbers: class_names must say"),
        (
            "t.csv",
            "image,label\na.jpg,0\nb.jpg,2\n",
            {"class_names": ["cat", "dog"]},
            "/t.csv, row 2: label '2' is none of the 2 classes, from 0 to 1$",
        ),
        ("t.csv", "image,label\na.jpg,-1\n", {"class_names": ["cat", "dog"]}, "row 1: label '-1' is none of the 2"),
        (
            "t.csv",
            "image,label\na.jpg,cat\nb.jpg,dgo\n",
            {"class_names": ["cat", "dog"]},
            r"/t.csv, row 2: label 'dgo' is none of the 2 classes \(did you mean 'dog'\?\)$",
        ),
        ("t.csv", "image,x\na.jpg,1\n", {}, "/t.csv has the columns image, x: image_key must say .* label_key"),
        ("t.csv", "file,label\na.jpg,1\n", {}, "/t.csv has the columns file, label: image_key must say"),
        ("t.csv", "image,label,text\na.jpg,1,x\n", {}, "/t.csv has the columns image, label, text: .* caption_key"),
        ("t.csv", "image,path,label\na,b,c\n", {}, "/t.csv has the columns image and path: choose one by image_key"),
        ("t.csv", "image,class,label\na,b,c\n", {}, "/t.csv has the columns label and class: choose .* label_key"),
        ("t.csv", "image,label\na,b\n", {"image_key": "imag"}, "^image_key=imag: .*/t.csv has no such .* 'image'"),
        ("t.csv", "image,label\na,b\n", {"label_key": "lable"}, "^label_key=lable: .*/t.csv has no such .* 'label'"),
        (
            "t.csv",
            "image,label\na,b\n",
            {"group_key": "g"},
            "^group_key=g: .*/t.csv has no .*; there are: image, l",
        ),
        ("t.csv", "image,label,g\na,b,\n", {"group_key": "g"}, "/t.csv, row 1: no g, which is the group_key"),
        ("t.csv", "image,text\na,x\nb, \n", {}, "/t.csv, row 2: ' ' is no caption"),
        ("t.jsonl", '{"image": "a", "label": "b"}\n\n{"image": \n', {}, "/t.jsonl: .*line 3: Expecting value"),
        ("t.jsonl", '["a", "b"]\n', {}, "/t.jsonl: .*line 1: no JSON object"),
        ("t.jsonl", '{"image": "a", "label": "b"}\n{"image": "c"}\n', {}, "/t.jsonl, row 2: no label"),
        ("t.jsonl", '{"image": "a", "text": "b"}\n{"image": "c"}\n', {}, "/t.jsonl, row 2: None is no caption"),
        ("t.jsonl", '{"image": "a", "text": []}\n', {}, r"/t.jsonl, row 1: \[\] is no caption"),
        ("t.jsonl", '{"image": "a", "text": ["b", ""]}\n', {}, "/t.jsonl, row 1: '' is no caption"),
        ("t.jsonl", '{"image": "a", "text": "b"}\n{"text": "c"}\n', {}, "/t.jsonl, row 2: image is None, no path"),
        ("t.parquet", "no parquet", {}, "/t.parquet: cannot be read: "),
        ("t.txt", "image,label\na,b\n", {}, "^datasets=.*/t.txt: cannot tell its layout; layout is one of wds, folder"),
        ("t.json", "[]", {}, "^datasets=.*/t.json: cannot tell its layout"),
        ("t.csv", "image,label\na,b\n", {"layout": "folder"}, "/t.csv: is no folder"),
    ],
)
def test_broken_tables_are_refused(file: str, content: Any, options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_one(tmp_path / file, **options)


def test_bytes_of_a_picture_are_no_path_and_not_printed(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", {"image": b"\xff" * 9999, "label": "cat"})
    with pytest.raises(UserError, match="/t.parquet, row 1: image is b'.*, no path of a picture") as caught:
        open_one(table)
    assert len(str(caught.value)) < 300


def test_a_table_of_another_suffix_is_read_where_the_layout_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("image,label\na.jpg,cat\n")
    assert read_classes(tmp_path / "t.txt", layout="table").class_names == ("cat",)


@pytest.mark.parametrize(
    ("train", "content", "message"),
    [
        (None, "", "^s: probes learn from a training part: the key train must say where it is$"),
        ("nowhere.csv", "", "^datasets=.*/nowhere.csv: there is no such file or directory"),
        ("train.csv", "image,label\nb.jpg,cta\n", r"/train.csv, row 1: label 'cta' is none of .* \(did you .* 'cat'"),
        ("train.csv", "image,class\nb.jpg,cat\n", "^label_key=label: .*/train.csv has no .* there are: image, class$"),
    ],
)
def test_broken_training_tables_are_refused(train: str | None, content: str, message: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "s.csv", LABELLED)
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        open_one(table, with_train=True, train=train and str(tmp_path / train))
