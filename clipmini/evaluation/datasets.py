"""Classification sets on disk, in the webdataset layout of CLIP_benchmark and DataComp.

ROOT/classnames.txt                          one class a line, in the order of the labels
ROOT/zeroshot_classification_templates.txt   one prompt a line, with {c} or {} for the class
ROOT/test/nshards.txt                        a number
ROOT/test/0.tar 1.tar ...                    KEY.webp|png|jpg|jpeg and KEY.cls, a 0-based label
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from clipmini.data.decode import EvaluationTransform
from clipmini.data.health import Fault
from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import local_shard
from clipmini.data.store import ShardStore
from clipmini.errors import UserError

FORMAT = PairFormat(caption_extensions=("cls",))
MAX_MEMBER_BYTES = 1 << 31  # of a picture: what is judged is not scraped from anywhere


@dataclass(frozen=True)
class ClassificationSet:
    """Pictures with one of C classes each, and the words for the classes.

    Attributes:
        name: of the set.
        class_names: C names.
        templates: prompts with one placeholder each.
        samples: (shard, index in the shard, label) of each picture.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    samples: tuple[tuple[Shard, int, int], ...]

    def prompts(self, label: int) -> list[str]:
        """Return the sentences for a class."""
        name = self.class_names[label]
        return [template.replace("{c}", name).replace("{}", name) for template in self.templates]


def read_classification_set(directory: str) -> ClassificationSet:
    """Read a set with its labels, but none of its pictures.

    Raises:
        UserError: no such directory, a file that is missing or empty, a template without a place for the class, or a
            label that is no line of the class names.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"evaluation.datasets: {directory} is not a directory")
    class_names = read_lines(root / "classnames.txt")
    templates = read_lines(root / "zeroshot_classification_templates.txt")
    for number, template in enumerate(templates, 1):
        if "{c}" not in template and "{}" not in template:
            file = root / "zeroshot_classification_templates.txt"
            raise UserError(f"{file}, line {number}: {template!r} has neither {{c}} nor {{}}")
    shards_file = root / "test/nshards.txt"
    (num_shards,) = read_lines(shards_file)[:1]
    if not num_shards.isdecimal():
        raise UserError(f"{shards_file}: expected a number, found {num_shards!r}")
    store = ShardStore(FORMAT, max_member_bytes=MAX_MEMBER_BYTES)
    samples = tuple(
        (shard, index, read_label(store, shard, index, len(class_names)))
        for shard in open_shards(store, root / "test", int(num_shards))
        for index in range(len(store.index(shard)))
    )
    if not samples:
        raise UserError(f"{root / 'test'}: {num_shards} shards without a single pair of picture and .cls")
    name = root.name.removeprefix("wds_").removesuffix("_test")
    return ClassificationSet(name, tuple(class_names), tuple(templates), samples)


def open_shards(store: ShardStore, directory: Path, num_shards: int) -> list[Shard]:
    """Index the shards of a set.

    Raises:
        UserError: one is missing or damaged: a set to judge by must be complete.
    """
    shards = []
    for number in range(num_shards):
        path = directory / f"{number}.tar"
        try:
            shard = local_shard(str(path))
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error.strerror}") from error
        if damage := store.index(shard).damage:
            raise UserError(f"cannot read the shard {path}: it {damage}")
        shards.append(shard)
    return shards


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file.

    Raises:
        UserError: the file is missing or has no lines.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; a classification set needs it")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def read_label(store: ShardStore, shard: Shard, index: int, num_classes: int) -> int:
    """Read the label of a picture.

    Raises:
        UserError: not a number from 0 to the last class.
    """
    text = store.read(shard, index, only=("cls",))["cls"].decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise UserError(
            f"{shard.path}, {store.key(shard, index)}.cls: label {text!r}, "
            f"but classnames.txt has {num_classes} lines, from 0"
        )
    return int(text)


class LabelledPictures(Dataset):
    """Some of the pictures of a set with their labels."""

    def __init__(self, dataset: ClassificationSet, chosen: range, transform: EvaluationTransform) -> None:
        self.dataset = dataset
        self.chosen = chosen
        self.transform = transform
        self.store = ShardStore(FORMAT, max_member_bytes=MAX_MEMBER_BYTES)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: int) -> tuple[Tensor, int] | UserError:
        shard, index, label = self.dataset.samples[self.chosen[item]]
        try:
            (data,) = self.store.read(shard, index, only=FORMAT.image_extensions).values()
            return self.transform(data), label
        except Fault as fault:
            return UserError(f"{shard.path}, {self.store.key(shard, index)}: {fault.cause}: {fault.detail}")
