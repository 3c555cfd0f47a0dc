"""Sets in CLIP_benchmark's layout are read as they are; what is wrong with one is said with shard and key."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tar
from judging import (
    PETS,
    open_one,
    read_captions,
    read_classes,
    write_npy,
    write_wds,
)

from clipmini.errors import UserError
from clipmini.evaluation.sets import ClassificationSet


def test_classification_of_two_shards(tmp_path: Path) -> None:
    first = [{"cls": b"2"}, {"cls": b"0\n"}]
    root = write_wds(tmp_path / "wds_pets_test", first, [{"cls": b" 1 "}], **PETS)
    dataset = read_classes(root)
    assert dataset.name == "pets" and dataset.class_names == ("cat", "dog", "owl")
    assert dataset.prompts == (("a cat.", "cat"), ("a dog.", "dog"), ("a owl.", "owl"))
    assert dataset.labels.tolist() == [2, 0, 1] and dataset.labels.dtype == np.int64
    assert [dataset.pictures.key(number) for number in range(3)] == ["s00", "s01", "s10"]
    assert [dataset.pictures.read(number) for number in range(3)] == [b"0-0", b"0-1", b"1-0"]
    assert dataset.groups is None and not dataset.is_multilabel


def test_extensions_in_upper_case(tmp_path: Path) -> None:
    samples = [{"__key__": "a", "JPEG": b"picture", "CLS": b"1"}]
    dataset = read_classes(write_wds(tmp_path / "s", samples, **PETS))
    assert dataset.pictures.read(0) == b"picture" and dataset.labels.tolist() == [1]


def test_multilabel(tmp_path: Path) -> None:
    vectors = [[1, 0, 1], [0, 0, 0]]
    samples = [
        {"npy": write_npy(vector, dtype=kind)} for vector, kind in zip(vectors, ("int64", "float32"), strict=True)
    ]
    root = write_wds(tmp_path / "s", samples, dataset_type="multilabel\n", **PETS)
    dataset = open_one(root, with_train=True).dataset  # no probe learns from it: it needs no training part
    assert isinstance(dataset, ClassificationSet) and dataset.is_multilabel
    assert dataset.labels.tolist() == vectors and dataset.labels.dtype == np.uint8


def test_retrieval_with_several_captions(tmp_path: Path) -> None:
    samples = [{"txt": b"a dog\r\n\n a cat on\\na mat \n"}, {"txt": "caf\u00e9\u2028bar".encode()}]
    dataset = read_captions(write_wds(tmp_path / "wds_two", samples, dataset_type="retrieval\n"))
    assert dataset.captions == ("a dog", "a cat on\na mat", "caf\u00e9\u2028bar")
    assert dataset.pairs.tolist() == [[0, 0], [0, 1], [1, 2]] and len(dataset.pictures) == 2
    assert dataset.name == "two"


def test_the_same_caption_of_two_pictures_stays_two(tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"txt": b"same"}, {"txt": b"same"}], dataset_type="retrieval")
    assert read_captions(root).pairs.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("key", "members", "groups"),
    [
        ("region", [{"json": b'{"region": "north"}'}, {"json": b'{"region": 0}'}], ("north", "0")),
        ("1", [{"npy": write_npy([5, 7])}, {"npy": write_npy([[5, 8]])}], ("7", "8")),
        ("1", [{"json": b'{"1": "a"}'}, {"json": b'{"1": "b"}'}], ("a", "b")),
    ],
)
def test_groups(key: str, members: list[dict], groups: tuple[str, ...], tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"0", **sample} for sample in members], **PETS)
    assert read_classes(root, group_key=key).groups == groups


def test_names_templates_and_language_of_the_entry_win(tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"1"}], **PETS)
    options = {"class_names": ["Katze", ["Hund", "Dackel"]], "templates": ["ein {c}"], "language": "de", "name": "t"}
    dataset = read_classes(root, **options)
    assert dataset.class_names == ("Katze", "Hund") and dataset.language == "de" and dataset.name == "t"
    assert dataset.prompts == (("ein Katze",), ("ein Hund", "ein Dackel"))


@pytest.mark.parametrize("train", [None, "part"])
def test_the_training_part_is_another_split(train: str | None, tmp_path: Path) -> None:
    group = {"json": b'{"g": "x"}'}
    root = write_wds(tmp_path / "s", [{"cls": b"0", **group}], split="val", **PETS)
    write_wds(root, [{"cls": b"2"}, {"cls": b"1"}], split=train or "train")
    opened = open_one(root, with_train=True, split="val", train=train, group_key="g")  # which only val has
    assert opened.train is not None and isinstance(opened.dataset, ClassificationSet)
    assert opened.dataset.labels.tolist() == [0] and opened.train.labels.tolist() == [2, 1]
    assert opened.train.class_names == opened.dataset.class_names


def test_a_split_and_a_group_are_found_by_their_likes(tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"0", "json": b'{"region": "x"}'}], **PETS)
    with pytest.raises(UserError, match=r"/tset/nshards.txt is missing; the split tset \(did you mean 'test'\?\) n"):
        open_one(root, split="tset")
    with pytest.raises(UserError, match=r"group_key=regoin is no key of its .json .* \(did you mean 'region'\?\)"):
        open_one(root, group_key="regoin")
    with pytest.raises(UserError, match=r"there is no such file or directory \(did you mean 's'\?\)"):
        open_one(tmp_path / "S")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, "/classnames.txt is missing; a classification set needs it$"),
        ("classnames.txt", "", "/classnames.txt is empty"),
        ("classnames.txt", "cat\n\nowl\n", "/classnames.txt, line 2: is blank"),
        ("classnames.txt", "cat\ndog\n", r"/test/0.tar, s01.cls: label '2', but there are 2 class names, from 0$"),
        ("zeroshot_classification_templates.txt", None, "/zeroshot_classification_templates.txt is missing"),
        ("zeroshot_classification_templates.txt", "a {c}\na\n", "_templates.txt, line 2: 'a' has no place"),
        ("dataset_type.txt", "regression\n", "/dataset_type.txt: 'regression'; there are: classification, multilabel"),
        ("dataset_type.txt", "retrieval\n", "/test/0.tar, s00: needs one picture and a .txt, found .cls, .png$"),
        ("test/nshards.txt", None, "/test/nshards.txt is missing; the split test needs it"),
        ("test/nshards.txt", "two\n", "/test/nshards.txt: expected a number, found 'two'"),
        ("test/nshards.txt", "-1", "/test/nshards.txt: expected a number, found '-1'"),
        ("test/nshards.txt", "2\n", r"cannot read the shard .*/test/1.tar: No such file"),
        ("test/nshards.txt", "0\n", "/test: 0 shards without a single picture with .cls"),
        ("test/0.tar", "", "cannot read the shard .*/test/0.tar: it ends without the two empty blocks"),
        ("test/0.tar", "no tar" * 999, "cannot read the shard .*/test/0.tar: it has no tar header at byte 0"),
    ],
)
def test_broken_wds_sets_are_refused(file: str, content: str | None, message: str, tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"0"}, {"cls": b"2"}], **PETS)
    (root / file).unlink() if content is None else (root / file).write_text(content)
    with pytest.raises(UserError, match=message):
        open_one(root)


def test_a_shard_that_is_cut_is_refused(tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"0"}, {"cls": b"2"}], **PETS)
    os.truncate(root / "test/0.tar", 1600)
    with pytest.raises(UserError, match=r"cannot read the shard .*/test/0.tar: it ends without .* at byte 1600"):
        open_one(root)


@pytest.mark.parametrize(
    ("kind", "sample", "message"),
    [
        ("classification", {"cls": b"cat"}, r"/test/0.tar, k.cls: label 'cat', but there are 3 class names, from 0"),
        ("classification", {"cls": b"-1"}, "k.cls: label '-1'"),
        ("classification", {"cls": b"3"}, "k.cls: label '3'"),
        ("classification", {"cls": b""}, "k.cls: label ''"),
        ("classification", {"cls": b"0", "png": None}, "/test/0.tar, k: needs one picture and a .cls, found .cls"),
        ("classification", {"cls": b"0", "jpg": b""}, "k: needs one picture and a .cls, found .cls, .jpg, .png"),
        ("classification", {"txt": b"0"}, "k: needs one picture and a .cls, found .png, .txt"),
        ("multilabel", {"cls": b"0"}, "k: needs one picture and a .npy, found .cls, .png"),
        ("multilabel", {"npy": b""}, r"/test/0.tar, k.npy: "),
        ("multilabel", {"npy": b"nothing"}, r"/test/0.tar, k.npy: "),
        ("multilabel", {"npy": write_npy([0, 1, 1])[:-9]}, r"/test/0.tar, k.npy: "),
        ("multilabel", {"npy": b"PK\3\4 a zip?"}, r"/test/0.tar, k.npy: "),
        ("multilabel", {"npy": write_npy([0, 1])}, r"k.npy: an array of shape \(2,\) with \[0, 1\], but there are 3"),
        ("multilabel", {"npy": write_npy([])}, r"k.npy: an array of shape \(0,\) with \[\]"),
        ("multilabel", {"npy": write_npy([[0, 1, 1]])}, r"k.npy: an array of shape \(1, 3\)"),
        ("multilabel", {"npy": write_npy([0, 2, 1])}, r"k.npy: .*\[0, 2, 1\], .* and 0 or 1 for each is expected"),
        ("multilabel", {"npy": write_npy(["0", "1", "1"])}, r"k.npy: .*\['0', '1', '1'\]"),
        ("retrieval", {"txt": b"\n \n"}, "/test/0.tar, k.txt: no caption"),
        ("retrieval", {"txt": b"caf\xe9"}, "/test/0.tar, k.txt is not UTF-8"),
    ],
)
def test_broken_samples_are_refused(kind: str, sample: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [], dataset_type=kind, **PETS)
    members = {"__key__": "k", "png": b"picture", **sample}
    write_tar(root / "test/0.tar", [{name: value for name, value in members.items() if value is not None}])
    with pytest.raises(UserError, match=message):
        open_one(root)


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("region", {}, "/0.tar, s00: group_key=region is no key of its .json and no column of its .npy"),
        ("region", {"json": b'{"Region": 1}'}, "s00: group_key=region is no key"),
        ("region", {"json": b"[1]"}, "s00: group_key=region is no key"),
        ("region", {"json": b"{"}, "s00.json: "),
        ("2", {"npy": write_npy([5, 7])}, "s00: group_key=2 is no key of its .json and no column of its .npy"),
        ("0", {"npy": b"broken"}, "s00.npy: "),
    ],
)
def test_pictures_without_a_group_are_refused(key: str, members: dict, message: str, tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"0", **members}], **PETS)
    with pytest.raises(UserError, match=message):
        open_one(root, group_key=key)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_no_code_in_a_npy_is_run(kind: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "evil"),)

    npy = write_npy([Evil(), 0, 1], dtype=object)
    root = write_wds(tmp_path / "s", [{"cls": b"0", "npy": npy}], dataset_type=kind, **PETS)
    with pytest.raises(UserError, match=r"/test/0.tar, s00.npy: Object arrays cannot be loaded"):
        open_one(root, group_key="1")
    assert not (tmp_path / "evil").exists()


def test_a_training_split_that_is_missing_is_refused(tmp_path: Path) -> None:
    root = write_wds(tmp_path / "s", [{"cls": b"0"}], **PETS)
    with pytest.raises(UserError, match="/train/nshards.txt is missing; the split train needs it"):
        open_one(root, with_train=True)
