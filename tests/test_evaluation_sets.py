"""Sets to judge by that are folders, choices or lines of a config; what is wrong with one is said with its name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
from judging import (
    PETS,
    labels_by_name,
    open_one,
    read_classes,
    write_folders,
    write_table,
    write_wds,
)

from clipmini.data.health import Fault
from clipmini.errors import UserError
from clipmini.evaluation.datasets import open_sets
from clipmini.evaluation.entries import SetEntry, read_entries
from clipmini.evaluation.sets import ChoiceSet, Pictures, Place

# A folder for each class

FOLDERS = ("b_big-dog/2.jpg", "b_big-dog/deep/1.PNG", "a_cat/x.webp", "a_cat/notes.txt", ".hidden/3.jpg")
KEYS = {"a_cat/x.webp": "a cat", "b_big-dog/2.jpg": "b big-dog", "b_big-dog/deep/1.PNG": "b big-dog"}


def test_folders_are_named_by_themselves(tmp_path: Path) -> None:
    dataset = read_classes(write_folders(tmp_path / "my.pets", *FOLDERS))
    assert dataset.name == "my.pets" and labels_by_name(dataset) == KEYS
    assert dataset.prompts == (("a photo of a a cat.",), ("a photo of a b big-dog.",))
    assert dataset.pictures.read(2) == b"b_big-dog/deep/1.PNG"


LIST, MAPPING = ["B big_dog", "owl", "A Cat"], {"b_big-dog": "B big_dog", "a_cat": "A Cat"}


@pytest.mark.parametrize(
    ("file", "names"), [(None, LIST), (None, MAPPING), ("json", LIST), ("json", MAPPING), ("txt", LIST)]
)
def test_labels_follow_the_names_of_folders(file: str | None, names: Any, tmp_path: Path) -> None:
    given = str(tmp_path / f"names.{file}") if file else names
    if file:
        Path(given).write_text(json.dumps(names) if file == "json" else "\n".join(names))
    dataset = read_classes(write_folders(tmp_path / "pets", *FOLDERS), class_names=given, templates=["{}"])
    assert list(labels_by_name(dataset).values()) == ["A Cat", "B big_dog", "B big_dog"]
    assert dataset.prompts == (("A Cat",), ("B big_dog",))


def test_synonyms_of_a_folder(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", *FOLDERS)
    dataset = read_classes(root, class_names={"a_cat": ["cat", "kitty"], "b_big-dog": "dog"}, templates=["{}"])
    assert dataset.prompts == (("cat", "kitty"), ("dog",)) and dataset.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("names", [None, "imagenet"])
def test_some_of_imagenets_folders_have_imagenets_names(names: str | None, tmp_path: Path) -> None:
    # `tench`, `tabby cat`, `toilet paper`: numbers 0, 281 and 999 of timm's list.
    synsets = ("n15075141", "n01440764", "n02123045")
    root = write_folders(tmp_path / "val", *(f"{synset}/1.JPEG" for synset in synsets))
    dataset = read_classes(root, class_names=names)
    assert [open_clip.IMAGENET_CLASSNAMES[number] for number in (0, 281, 999)] == list(dataset.class_names)
    expected = {"n01440764/1.JPEG": "tench", "n02123045/1.JPEG": "tabby cat", "n15075141/1.JPEG": "toilet paper"}
    assert labels_by_name(dataset) == expected
    assert len(dataset.prompts[2]) == 80 and dataset.prompts[2][0] == "a bad photo of a toilet paper."


def test_1000_other_names_are_in_imagenets_order(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "val", "n02123045/1.JPEG")
    dataset = read_classes(root, class_names=[f"name {number}" for number in range(1000)], templates=["{}"])
    assert dataset.class_names == ("name 281",)


def test_a_training_folder_may_lack_a_class(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets/val", *FOLDERS)
    train = write_folders(tmp_path / "pets/train", "b_big-dog/7.jpg")
    opened = open_one(root, with_train=True, train=str(train))
    assert opened.train is not None and labels_by_name(opened.train) == {"b_big-dog/7.jpg": "b big-dog"}


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ((), {}, "/s: neither classnames.txt nor folders with pictures .* one for each class"),
        (("a/notes.txt",), {}, "/s: neither classnames.txt nor folders"),
        (("n01440764/1.jpg", "cats/1.jpg"), {}, "s.class_names: folders with WordNet ids such as n01440764 .* cats$"),
        (
            ("n01440764/1.jpg", "cats/1.jpg"),
            {"class_names": "imagenet"},
            "open_clip's names of ImageNet: folders with WordNet ids such as n01440764 and others such as cats$",
        ),
        (("n00000001/1.jpg",), {}, "the folder 'n00000001' is none of the classes of ImageNet's 1,000 WordNet ids"),
        (
            ("cats/1.jpg",),
            {"class_names": ["cat", "dog"]},
            r"^the folder 'cats' is none of the classes of s.class_names \(did you mean 'cat'\?\)$",
        ),
        (("cats/1.jpg",), {"class_names": {"cat": "x"}}, r"^the folder 'cats' is none .* \(did you mean 'cat'\?\)$"),
        (("3/1.jpg",), {"class_names": {4: "x"}}, r"^the folder '3' is none of the classes of s.class_names$"),
        (("cat/1.jpg",), {"class_names": {"cat": 0}}, r"^s.class_names\[cat\], line 1: 0 is no name of a class"),
        (("cat/1.jpg",), {"class_names": [5]}, "^s.class_names, line 1: 5 is no name of a class"),
        (("cat/1.jpg",), {"class_names": "nowhere.txt"}, "s.class_names=nowhere.txt: neither a file nor one of"),
        (("cat/1.jpg",), {"templates": []}, r"s.templates: expected a list .* found \[\]"),
        (("cat/1.jpg",), {"layout": "winoground"}, "/s/examples.jsonl: cannot be read: .*No such file"),
        (("cat/1.jpg",), {"layout": "table"}, "/s: cannot be read: .*directory"),
        (("cat/1.jpg",), {"layout": "sugarcrepe", "images": "."}, "/s: no .json of SugarCrepe's in it"),
        (("cat/1.jpg",), {"layout": "wds"}, "/s/classnames.txt is missing"),
    ],
)
def test_broken_folders_are_refused(files: tuple[str, ...], options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write_folders(tmp_path / "s", *files)
    with pytest.raises(UserError, match=message):
        open_one(tmp_path / "s", **options)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "^s: probes learn from a training part: the key train must say where it is$"),
        ("nowhere", "/nowhere: is no folder"),
        ("train", "^the folder 'cta' is none of the classes of .*/s .did you mean 'cat'"),
    ],
)
def test_broken_training_folders_are_refused(train: str | None, message: str, tmp_path: Path) -> None:
    write_folders(tmp_path, "s/cat/1.jpg", "train/cta/1.jpg")
    with pytest.raises(UserError, match=message):
        open_one(tmp_path / "s", with_train=True, train=train and str(tmp_path / train))


# Choices


def write_sugarcrepe(path: Path, *captions: tuple[str, str]) -> None:
    rows = {
        str(number): {"filename": f"{number % 2}.jpg", "caption": right, "negative_caption": wrong}
        for number, (right, wrong) in enumerate(captions)
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))


def test_sugarcrepe(tmp_path: Path) -> None:
    write_sugarcrepe(tmp_path / "data/swap_obj.json", ("a on b", "b on a"), ("c", "d"), ("a on b", "x"))
    write_sugarcrepe(tmp_path / "data/add_att.json", ("a", "b"))
    images = tmp_path / "images"
    write_folders(images, "0.jpg", "1.jpg")
    opened = open_sets([SetEntry(str(tmp_path / "data"), images=str(images), name="crepe")], "datasets")
    assert [one.dataset.name for one in opened] == ["crepe/add_att", "crepe/swap_obj"]
    dataset = open_one(tmp_path / "data/swap_obj.json", images=str(images)).dataset
    assert isinstance(dataset, ChoiceSet) and dataset.name == "swap_obj"
    assert dataset.captions == ("a on b", "b on a", "c", "d", "x")
    assert dataset.examples.tolist() == [[0, 0, 1, -1], [1, 2, 3, -1], [0, 0, 4, -1]]
    assert [dataset.pictures.read(number) for number in range(2)] == [b"0.jpg", b"1.jpg"]


def test_winoground(tmp_path: Path) -> None:
    rows = [
        {"image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "caption_0": f"a {n}", "caption_1": f"b\u2028{n}"}
        for n in range(2)
    ]
    names = [f"images/ex_{n}_img_{side}.png" for n in range(2) for side in range(2)]
    write_folders(tmp_path / "winoground", *names)
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "winoground/examples.jsonl").write_text(text + "\n", encoding="utf-8")
    dataset = open_one(tmp_path / "winoground").dataset
    assert isinstance(dataset, ChoiceSet) and dataset.name == "winoground"
    assert dataset.captions == ("a 0", "b\u20280", "a 1", "b\u20281")
    assert dataset.examples.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert [dataset.pictures.read(number).decode() for number in range(4)] == names


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("add.json", '{"0": {"negative_caption": "b", "caption": "a"}}', "/add.json, example 1: has no 'filename'"),
        ("add.json", '{"negative_caption": 5}', "/add.json, example 1: has no 'filename'"),
        ("add.json", '"negative_caption"', "/add.json: has no examples"),
        ("add.json", '{"negative_caption', "/add.json: is not JSON"),
        ("add.json", b'{"negative_caption": "\xe9"}', "/add.json: cannot be read: 'utf-8'"),
        ("examples.jsonl", '\n{"image_0": "a"}', "/examples.jsonl, line 2: has no 'caption_0'"),
        ("examples.jsonl", "{", "/examples.jsonl, line 1: is not JSON"),
        ("examples.jsonl", "\n", "/examples.jsonl: has no examples"),
        ("examples.jsonl", b"\xe9", "/examples.jsonl: cannot be read: 'utf-8'"),
    ],
)
def test_broken_choices_are_refused(file: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_one(tmp_path, images=str(tmp_path) if file == "add.json" else None)


@pytest.mark.parametrize("images", [None, "/nowhere"])
def test_sugarcrepe_needs_its_pictures(images: str | None, tmp_path: Path) -> None:
    write_sugarcrepe(tmp_path / "add.json", ("a", "b"))
    with pytest.raises(UserError, match=f"/add.json: the key images must name the directory .*, not {images}$"):
        open_one(tmp_path / "add.json", images=images)


# What the config says


def test_yaml_files_name_paths_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    folder = tmp_path / "sets"
    folder.mkdir()
    write_table(folder / "pets.csv", {"image": "a.jpg", "label": "cat"})
    write_table(folder / "train.csv", {"image": "a.jpg", "label": "cat"})
    (folder / "names.txt").write_text("cat\n")
    (folder / "one.yaml").write_text(
        "path: pets.csv\nclass_names: names.txt\ntemplates: imagenet_simple\nimages: ../pictures\ntrain: train.csv\n"
    )
    (folder / "two.yml").write_text(f"- pets.csv\n- {{path: {folder}/pets.csv, name: b, split: val}}\n")
    entries = read_entries([f"{folder}/one.yaml", "x.csv", f"{folder}/two.yml", {"path": "y", "name": "c"}], "datasets")
    assert entries == [
        SetEntry(
            f"{folder}/pets.csv",
            class_names=f"{folder}/names.txt",
            templates="imagenet_simple",
            images=f"{folder}/../pictures",
            train=f"{folder}/train.csv",
        ),
        SetEntry("x.csv"),
        SetEntry(f"{folder}/pets.csv"),
        SetEntry(f"{folder}/pets.csv", name="b", split="val"),
        SetEntry("y", name="c"),
    ]
    (opened,) = open_sets(entries[:1], "datasets", with_train=True)
    assert opened.train is not None and opened.train.pictures.places[0].path == f"{folder}/../pictures/a.jpg"


def test_yaml_files_tell_paths_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    write_folders(tmp_path, "imagenet/val/n01440764/1.jpg", "train/1.jpg")  # which are no lists and no split
    write_wds(tmp_path / "wds", [{"cls": b"0"}], **PETS)
    (tmp_path / "s.yaml").write_text(
        "- {path: imagenet/val, class_names: imagenet, templates: imagenet}\n"
        "- {path: noto-*.tar, train: fluent-*.tar, label_key: name}\n"
        "- {path: wds, train: train}\n"
    )
    folder, shards, wds = read_entries([f"{tmp_path}/s.yaml"], "datasets")
    assert (folder.path, folder.class_names, folder.templates) == (f"{tmp_path}/imagenet/val", "imagenet", "imagenet")
    assert (shards.path, shards.train) == (f"{tmp_path}/noto-*.tar", f"{tmp_path}/fluent-*.tar")
    assert (wds.path, wds.train) == (f"{tmp_path}/wds", "train")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"path": "x", "templtes": []}, r"^unknown key datasets\[1\].templtes \(did you mean 'templates'\?\)$"),
        ({"path": "x", "layout": "csv"}, r"^datasets\[1\].layout=csv: is one of wds, folder, table"),
        ({"path": 5}, r"^datasets\[1\].path=5 has the wrong type: expected str$"),
        ({"name": "x"}, r"^datasets\[1\]: expected a path, or a mapping with the key path, found {'name': 'x'}$"),
        (None, r"^datasets\[1\]: expected a path, or a mapping with the key path, found None$"),
        ("nowhere.yaml", r"^datasets\[1\]=nowhere.yaml: cannot be read: .*No such file"),
    ],
)
def test_wrong_entries_are_refused(item: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_entries(["x.csv", item], "datasets")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path: [", r"^datasets\[0\]=.*/s.yaml: cannot be read: .*line 1"),
        (b"path: \xe9", r"^datasets\[0\]=.*/s.yaml: cannot be read: 'utf-8'"),
        (b"", "/s.yaml: expected a path, or a mapping with the key path, found None$"),
        (b"- a.csv\n- {path: b, nam: c}", r"^unknown key .*/s.yaml\[1\].nam \(did you mean 'name'"),
    ],
)
def test_broken_yaml_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_entries([str(tmp_path / "s.yaml")], "datasets")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"split": "val"}, "split is not for the layout folder, which takes class_names, templates$"),
        ({"group_key": "g"}, "group_key is not for the layout folder, which takes class_names, templates$"),
        ({"label_key": "l"}, "label_key is not for the layout folder, which takes class_names, templates$"),
        ({"layout": "shards", "group_key": "g"}, "group_key is not for the layout shards, which takes .*, label_key$"),
        ({"layout": "winoground", "images": "i"}, "images is not for the layout winoground, which takes no such key$"),
    ],
)
def test_keys_that_a_layout_has_no_use_for_are_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folders(tmp_path, "imagenet/train/cat/1.jpg", "imagenet/val/cat/1.jpg")
    with pytest.raises(UserError, match=f"^datasets={tmp_path}/imagenet: {message}"):
        open_one(tmp_path / "imagenet", **entry)


@pytest.mark.parametrize("layout", [None, "wds", "folder", "table", "sugarcrepe", "winoground"])
def test_nothing_at_a_path_is_refused(layout: Any) -> None:
    with pytest.raises(UserError, match="^datasets=/nowhere/s: there is no such file or directory$"):
        open_one(Path("/nowhere/s"), layout=layout)


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [str(write_folders(tmp_path / top / "val", "cat/1.jpg")) for top in "ab"]
    with pytest.raises(UserError, match="^datasets: 2 sets are called 'val': give one another name$"):
        open_sets([SetEntry(path) for path in paths], "datasets")
    assert len(open_sets([SetEntry(paths[0]), SetEntry(paths[1], name="other")], "datasets")) == 2


# Pictures


def test_pictures_that_are_gone_or_cut_are_faults(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    path = str(tmp_path / "a")
    pictures = Pictures((Place("k", path, 2, 3), Place("l", path, 8, 3), Place("m", f"{path}/x"), Place("n", path)))
    assert pictures.read(0) == b"234" and pictures.read(3) == b"0123456789"
    with pytest.raises(Fault, match="damaged_shard.*/a ends inside l"):
        pictures.read(1)
    with pytest.raises(Fault, match="picture.*/a/x: Not a directory"):
        pictures.read(2)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda path: path.write_bytes(b"other content"),
    "time": lambda path: os.utime(path, (1, 1)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_of_pictures_changes_with_their_files(change: Callable, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    pictures = Pictures((Place("k", str(path), 0, 3), Place("l", str(path), 3, 3)))
    before = pictures.fingerprint()
    assert before == pictures.fingerprint() != Pictures(pictures.places[::-1]).fingerprint()
    change(path)
    assert pictures.fingerprint() != before
