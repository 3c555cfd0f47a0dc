"""What the config names, to sets: looks at what lies at a path and reads it by its layout."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipmini.errors import UserError
from clipmini.evaluation import choices, folders, tables, wds
from clipmini.evaluation.entries import Layout, SetEntry
from clipmini.evaluation.prompts import PLAIN, Names, Prompts, make_prompts, read_file, read_names, read_templates
from clipmini.evaluation.sets import ClassificationSet, EvaluationSet, Pictures, Place
from clipmini.files import tell_neighbours


@dataclass(frozen=True)
class Opened:
    """A set, and the training part of it where probes need one."""

    dataset: EvaluationSet
    train: ClassificationSet | None = None

    @property
    def parts(self) -> list[EvaluationSet]:
        return [self.dataset, *([self.train] if self.train else [])]


def open_sets(entries: Sequence[SetEntry], key: str, *, with_train: bool = False) -> list[Opened]:
    """Read everything of the sets but the pictures.

    Args:
        key: where they are in the config, for messages.
        with_train: read the training parts too.

    Raises:
        UserError: something in them is wrong, or two have one name.
    """
    opened = [one for entry in entries for one in open_set(entry, key, with_train=with_train)]
    names = [one.dataset.name for one in opened]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: {names.count(name)} sets are called {name!r}: give one another name")
    return opened


def open_set(entry: SetEntry, key: str, *, with_train: bool = False) -> list[Opened]:
    """Read what an entry names: one set, or of a directory of SugarCrepe one for each file; see `open_sets`.

    Raises:
        UserError: nothing is there, or something in it is wrong.
    """
    path = Path(entry.path)
    if is_shards(entry):
        entry.check_layout("shards", key)
        return [open_shards(entry, key, with_train=with_train)]
    if not path.exists():
        raise UserError(f"{key}={entry.path}: there is no such file or directory{tell_neighbours(path)}")
    layout = entry.layout or find_layout(path, key)
    entry.check_layout(layout, key)
    whole_name = path.resolve().stem if path.is_file() else path.resolve().name
    name = entry.name or (wds.set_name(path) if layout == "wds" else whole_name)
    common = {"name": name, "language": entry.language}
    if layout == "sugarcrepe":
        sets = choices.read_sugarcrepe(path, Path(entry.images) if entry.images else None, **common)
        return [Opened(dataset) for dataset in sets]
    if layout == "winoground":
        return [Opened(choices.read_winoground(path, **common))]
    if layout == "wds":
        if wds.read_type(path) == "retrieval":
            return [Opened(wds.read_retrieval(path, entry.split or wds.SPLIT, **common))]
        return [open_wds(path, entry, name, with_train=with_train)]
    if layout == "folder":
        return [open_folder(path, entry, name, with_train=with_train)]
    return [open_table(path, entry, name, key, with_train=with_train)]


def find_layout(path: Path, key: str) -> Layout:
    """Tell the layout of what is at a path.

    Raises:
        UserError: nothing that is known.
    """
    if path.is_file() and path.suffix.lower() in tables.TABLES:
        return "table"
    if (path / choices.EXAMPLES).is_file():
        return "winoground"
    if path.is_dir() and wds.is_wds(path):
        return "wds"
    if choices.is_sugarcrepe(path):
        return "sugarcrepe"
    if path.is_dir():
        return "folder"
    known = ", ".join(typing.get_args(Layout))
    raise UserError(f"{key}={path}: cannot tell its layout; layout is one of {known}")


def open_wds(path: Path, entry: SetEntry, name: str, *, with_train: bool) -> Opened:
    """Read a classification set in CLIP_benchmark's layout; the entry's names and templates win over its own."""
    given: list[Any] = []
    for file, own in ((path / wds.CLASS_NAMES, entry.class_names), (path / wds.TEMPLATES, entry.templates)):
        if own is None and not file.is_file():
            raise UserError(f"{file} is missing; a classification set needs it")
        given.append(str(file) if own is None else own)
    names, names_at = read_names(given[0], f"{name}.class_names")
    class_names, prompts = name_classes(names, names_at, given[1], name)
    with_train = with_train and wds.read_type(path) != "multilabel"  # which no probe learns from
    splits = [(entry.split or wds.SPLIT, entry.group_key), (entry.train or "train", None)]
    parts = [
        wds.read_classification(
            path, split, class_names, prompts, name=name, group_key=group_key, language=entry.language
        )
        for split, group_key in (splits if with_train else splits[:1])
    ]
    return Opened(*parts)


def name_classes(names: Names, names_at: str, templates: Any, name: str) -> tuple[tuple[str, ...], Prompts]:
    """Read templates and put names into them."""
    known, templates_at = read_templates(templates, f"{name}.templates")
    return make_prompts(names, known, names_at, templates_at)


def open_folder(path: Path, entry: SetEntry, name: str, *, with_train: bool) -> Opened:
    """Read a folder for each class; a training part must have the same classes."""
    found = folders.list_pictures(path)
    given: Any = entry.class_names
    at = f"{name}.class_names"
    if isinstance(given, str) and given.endswith(".json"):  # a list or a mapping
        given, at = read_file(Path(given), at), given
    if given is not None and not isinstance(given, Mapping):
        given, at = read_names(given, at)
    chosen = folders.name_folders(list(found), given, at)
    has_synsets = all(isinstance(one, int) for one in chosen)
    if has_synsets:  # numbers in ImageNet's list
        all_names = read_names("imagenet", at)[0] if given is None else given
        chosen = [all_names[number] for number in chosen]
    templates = ("imagenet" if has_synsets else list(PLAIN)) if entry.templates is None else entry.templates
    class_names, prompts = name_classes(chosen, at, templates, name)
    numbers = {folder: number for number, folder in enumerate(found)}

    def make(pictures: Mapping[str, list]) -> ClassificationSet:
        for folder in pictures:
            folders.take(numbers, folder, folder, str(path))
        labels = np.array([numbers[folder] for folder, places in pictures.items() for _ in places], dtype=np.int64)
        places = tuple(place for places in pictures.values() for place in places)
        return ClassificationSet(name, Pictures(places), labels, class_names, prompts, None, entry.language)

    train = make(folders.list_pictures(Path(need_train(entry, name)))) if with_train else None
    return Opened(make(found), train)


def need_train(entry: SetEntry, name: str) -> str:
    """Return the path of the training part.

    Raises:
        UserError: the entry has none.
    """
    if entry.train is None:
        raise UserError(f"{name}: probes learn from a training part: the key train must say where it is")
    return entry.train


def is_shards(entry: SetEntry) -> bool:
    """Say whether an entry names shards: a pattern of them need be no path that is there."""
    return entry.layout == "shards" or (entry.layout is None and entry.path.endswith(".tar"))


def open_shards(entry: SetEntry, key: str, *, with_train: bool) -> Opened:
    """Read the labels of shards; the training part must have the same classes.

    Raises:
        UserError: no `label_key`, or a sample without it.
    """
    if entry.label_key is None:
        raise UserError(f"{key}={entry.path}: label_key must say which key of the .json has the class of a picture")
    rows, places = wds.read_labelled(entry.path, entry.label_key)
    name = entry.name or Path(entry.path).stem
    return open_labels(Path(entry.path), entry, name, rows, places, entry.label_key, key, with_train=with_train)


def open_table(path: Path, entry: SetEntry, name: str, key: str, *, with_train: bool) -> Opened:
    """Read a table: one with labels is for classification, one with captions for retrieval."""
    rows = tables.read_table(path)
    image = tables.choose_column(rows, entry.image_key, tables.IMAGE_KEYS, "image_key", path)
    is_said = bool(entry.label_key or entry.caption_key)  # then no other column counts
    label_keys, caption_keys = ((), ()) if is_said else (tables.LABEL_KEYS, tables.CAPTION_KEYS)
    label = tables.choose_column(rows, entry.label_key, label_keys, "label_key", path)
    caption = tables.choose_column(rows, entry.caption_key, caption_keys, "caption_key", path)
    if image is None or (label is None) == (caption is None):
        raise UserError(
            f"{path} has the columns {', '.join(rows[0])}: image_key must say which has the pictures' paths, and "
            "label_key their classes or caption_key their captions"
        )
    folder = Path(entry.images) if entry.images else path.parent
    places = tables.table_places(rows, image, folder, path)
    if caption is not None:
        return Opened(tables.pair_rows(name, places, [row.get(caption) for row in rows], entry.language, path))
    assert label is not None
    return open_labels(path, entry, name, rows, places, label, key, with_train=with_train)


def open_labels(
    path: Path,
    entry: SetEntry,
    name: str,
    rows: Sequence[tables.Row],
    places: Sequence[Place],
    label: str,
    key: str,
    *,
    with_train: bool,
) -> Opened:
    """Read the labels of a table; its training part must have the same classes."""
    given, names_at = None, str(path)
    if entry.class_names is not None:
        given, names_at = read_names(entry.class_names, f"{name}.class_names")
    plain_names = None if given is None else [one if isinstance(one, str) else one[0] for one in given]
    names, labels = tables.number_labels([row.get(label) for row in rows], plain_names, path)
    templates = list(PLAIN) if entry.templates is None else entry.templates
    class_names, prompts = name_classes(given or names, names_at, templates, name)
    groups = tables.read_groups(rows, entry.group_key, path) if entry.group_key else None
    dataset = ClassificationSet(name, Pictures(tuple(places)), labels, class_names, prompts, groups, entry.language)
    if not with_train:
        return Opened(dataset)
    layout = "shards" if is_shards(entry) else "table"
    changes: dict[str, Any] = {"layout": layout, "class_names": names, "label_key": label, "group_key": None}
    (opened,) = open_set(replace(entry, path=need_train(entry, name), **changes), key)
    assert isinstance(opened.dataset, ClassificationSet)
    return Opened(dataset, opened.dataset)
