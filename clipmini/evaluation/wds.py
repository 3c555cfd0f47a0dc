"""Sets in the webdataset layout of CLIP_benchmark and DataComp, read as they are.

ROOT/classnames.txt                          one class a line, in the order of the labels
ROOT/zeroshot_classification_templates.txt   one prompt a line, with {c} or {} for the class
ROOT/dataset_type.txt                        `retrieval` or `multilabel`; absent for classification
ROOT/test/nshards.txt                        a number
ROOT/test/0.tar 1.tar ...                    KEY.webp|png|jpg|jpeg beside KEY.cls, a 0-based label; for multilabel
                                             KEY.npy, 0 or 1 for each class; for retrieval KEY.txt, a caption a line
"""

import io
import json
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmini.data.index import IMAGE_EXTENSIONS, DamagedShard, Member, split_name, walk
from clipmini.data.locate import locate_local
from clipmini.errors import UserError, did_you_mean, tell_choices
from clipmini.evaluation.sets import ClassificationSet, Pictures, Place, RetrievalSet, read_lines

TYPES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}  # and the member that holds what is right
CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
SPLIT = "test"  # that is judged by, if no other is asked for


@dataclass(frozen=True)
class Sample:
    """A picture of a shard and the members beside it that say what is right for it.

    Attributes:
        where: for messages.
    """

    where: str
    place: Place
    members: dict[str, bytes]


def is_wds(root: Path) -> bool:
    """Say whether a directory looks like this layout, complete or not."""
    return any((root / name).exists() for name in (CLASS_NAMES, TEMPLATES, TYPE, f"{SPLIT}/nshards.txt"))


def set_name(root: Path) -> str:
    """Return the name of a set from that of its directory."""
    return root.resolve().name.removeprefix("wds_").removesuffix("_test")


def read_type(root: Path) -> str:
    """Return what kind of set it is.

    Raises:
        UserError: a kind that is not known.
    """
    path = root / TYPE
    kind = read_lines(path, "a set")[0].lower() if path.exists() else "classification"
    if kind not in TYPES:
        raise UserError(f"{path}: {kind!r}{tell_choices(kind, TYPES)}")
    return kind


def read_samples(root: Path, split: str, extension: str) -> list[Sample]:
    """Read all of a split but the pictures.

    Args:
        extension: of the member that every sample must have beside its picture.

    Raises:
        UserError: a shard is missing or damaged, or a sample is not complete: then a set is not to be judged by.
    """
    shards_file = root / split / "nshards.txt"
    splits = [path.parent.name for path in sorted(root.glob("*/nshards.txt"))]
    text = read_lines(shards_file, f"the split {split}{did_you_mean(split, splits)}")[0]
    if not text.isdecimal():
        raise UserError(f"{shards_file}: expected a number, found {text!r}")
    paths = [root / split / f"{number}.tar" for number in range(int(text))]
    samples = [sample for path in paths for sample in read_shard(path, extension)]
    if not samples:
        raise UserError(f"{root / split}: {text} shards without a single picture with .{extension}")
    return samples


def read_labelled(shards: str, label_key: str) -> tuple[list[dict[str, Any]], list[Place]]:
    """Read the labels of plain shards: rows with `label_key`, and the pictures.

    Args:
        shards: as in `data.train`, on this machine.

    Raises:
        UserError: a shard is missing or damaged, or a sample has no such label.
    """
    rows: list[dict[str, Any]] = []
    places: list[Place] = []
    for shard in locate_local(shards, "datasets"):
        for sample in read_shard(Path(shard.path), "json"):
            rows.append({label_key: read_group(sample, label_key, "label_key")})
            places.append(sample.place)
    return rows, places


def read_shard(path: Path, extension: str) -> Iterator[Sample]:
    """Read all samples of a shard but the pictures."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from error
    try:
        samples: dict[str, dict[str, Member]] = {}
        for member in walk(file, str(path)):
            key, kind = split_name(member.name)
            samples.setdefault(key, {})[kind] = member
        for key, members in samples.items():
            pictures = [kind for kind in IMAGE_EXTENSIONS if kind in members]
            if len(pictures) != 1 or extension not in members:
                found = ", ".join(f".{kind}" for kind in members)
                raise UserError(f"{path}, {key}: needs one picture and a .{extension}, found {found}")
            _, offset, size = members[pictures[0]]
            rest = {
                kind: os.pread(file, members[kind].size, members[kind].offset)
                for kind in (*TYPES.values(), "json")
                if kind in members
            }
            yield Sample(f"{path}, {key}", Place(key, str(path), offset, size), rest)
    except DamagedShard as error:
        raise UserError(f"cannot read the shard {path}: it {error}") from error
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from error
    finally:
        os.close(file)


def pictures_of(samples: list[Sample]) -> Pictures:
    return Pictures(tuple(sample.place for sample in samples))


def read_classification(
    root: Path,
    split: str,
    class_names: tuple[str, ...],
    prompts: tuple[tuple[str, ...], ...],
    *,
    name: str,
    group_key: str | None,
    language: str,
) -> ClassificationSet:
    """Read the labels of a split.

    Raises:
        UserError: a label that is none of the classes.
    """
    kind = read_type(root)
    samples = read_samples(root, split, TYPES[kind])
    read = read_vector if kind == "multilabel" else read_label
    labels = np.stack([read(sample, len(class_names)) for sample in samples])
    groups = tuple(read_group(sample, group_key) for sample in samples) if group_key else None
    return ClassificationSet(name, pictures_of(samples), labels, class_names, prompts, groups, language)


def read_label(sample: Sample, num_classes: int) -> np.int64:
    """Read the class of a picture.

    Raises:
        UserError: not a number from 0 to the last class.
    """
    text = sample.members["cls"].decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise UserError(f"{sample.where}.cls: label {text!r}, but there are {num_classes} class names, from 0")
    return np.int64(text)


def read_array(sample: Sample) -> np.ndarray:
    """Read a .npy; no code in it is run.

    Raises:
        UserError: it is none.
    """
    try:
        return np.lib.format.read_array(io.BytesIO(sample.members["npy"]), allow_pickle=False)
    except Exception as error:  # of what a damaged header asks for: damage has no common class
        raise UserError(f"{sample.where}.npy: {error}") from error


def read_vector(sample: Sample, num_classes: int) -> np.ndarray:
    """Read the classes of a picture: uint8 [C].

    Raises:
        UserError: not C numbers of 0 and 1.
    """
    vector = read_array(sample)
    if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
        raise UserError(
            f"{sample.where}.npy: an array of shape {vector.shape} with {reprlib.repr(vector.ravel().tolist())}, but "
            f"there are {num_classes} class names, and 0 or 1 for each is expected"
        )
    return vector.astype(np.uint8)


def read_group(sample: Sample, key: str, at: str = "group_key") -> str:
    """Read the group of a picture, or its label: a key of its .json, or the number of a column of its .npy.

    Raises:
        UserError: it has none.
    """
    found: Any = None
    hint = ""
    if key.isdecimal() and "npy" in sample.members:
        row = read_array(sample).ravel()
        found = row[int(key)].item() if int(key) < len(row) else None
    elif "json" in sample.members:
        try:
            metadata = json.loads(sample.members["json"])
        except ValueError as error:
            raise UserError(f"{sample.where}.json: {error}") from error
        known = metadata if isinstance(metadata, dict) else {}
        found, hint = known.get(key), did_you_mean(key, known)
    if found is None:
        raise UserError(f"{sample.where}: {at}={key} is no key of its .json and no column of its .npy{hint}")
    return str(found)


def read_retrieval(root: Path, split: str, *, name: str, language: str) -> RetrievalSet:
    """Read the captions of a split; two characters backslash and n stand for a line break inside one.

    Raises:
        UserError: a picture without captions.
    """
    samples = read_samples(root, split, "txt")
    captions: list[str] = []
    pairs: list[tuple[int, int]] = []
    for number, sample in enumerate(samples):
        try:
            lines = sample.members["txt"].decode("utf-8-sig").split("\n")  # no other line break ends a caption
        except UnicodeDecodeError as error:
            raise UserError(f"{sample.where}.txt is not UTF-8: {error}") from error
        texts = [line.replace("\\n", "\n").strip() for line in lines if line.strip()]
        if not texts:
            raise UserError(f"{sample.where}.txt: no caption")
        pairs += [(number, len(captions) + offset) for offset in range(len(texts))]
        captions += texts
    return RetrievalSet(name, pictures_of(samples), tuple(captions), np.array(pairs, dtype=np.int64), language)
