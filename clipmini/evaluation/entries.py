"""What the config says of the sets to judge by: paths, small yaml files, or mappings that say more."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from clipmini.annotations import check_values
from clipmini.errors import UserError
from clipmini.evaluation.wds import is_wds

RELATIVE = ("path", "images", "class_names", "templates", "train")  # keys whose values may be paths
Layout = Literal["wds", "folder", "table", "shards", "sugarcrepe", "winoground"]

# What the layouts take beside path, name, layout, language and train: other keys would be passed over.
KEYS: dict[Layout, tuple[str, ...]] = {
    "wds": ("split", "class_names", "templates", "group_key"),
    "folder": ("class_names", "templates"),
    "table": ("class_names", "templates", "images", "image_key", "label_key", "caption_key", "group_key"),
    "shards": ("class_names", "templates", "label_key"),
    "sugarcrepe": ("images",),
    "winoground": (),
}


@dataclass(frozen=True)
class SetEntry:
    """What the config may say of a set.

    Attributes:
        path: a directory in CLIP_benchmark's layout; a directory with a folder for each class; a .csv, .tsv, .jsonl or
            .parquet; shards as for training whose .json has `label_key`, a .tar or a pattern of them, or with
            `layout: shards` a directory; SugarCrepe's .json files; a directory with Winoground's examples.jsonl.
        name: of the set; None takes that of the path.
        layout: None looks at what is there.
        class_names: `imagenet`, a list, a mapping of folders' names, or a file of them.
        templates: `imagenet`, `imagenet_simple`, a list, a mapping of classes to sentences, or a file of them.
        split: of CLIP_benchmark's layout; None takes test.
        train: the training part, for probes: a split of CLIP_benchmark's layout, else a path like that of the set.
        images: the directory that pictures' paths are relative to; None takes that of the table.
        image_key, label_key, caption_key: columns of a table; None looks at the first line. label_key also of a .json.
        group_key: compares groups of pictures: a column, a key of the .json or the number of a column of the .npy.
        language: of the names and templates.
    """

    path: str
    name: str | None = None
    layout: Layout | None = None
    class_names: str | list[Any] | dict[str, Any] | None = None
    templates: str | list[Any] | dict[str, Any] | None = None
    split: str | None = None
    train: str | None = None
    images: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    caption_key: str | None = None
    group_key: str | None = None
    language: str = "en"

    def check_layout(self, layout: Layout, key: str) -> None:
        """See that only what a layout has is asked of it.

        Args:
            key: where the entry is in the config.

        Raises:
            UserError: there is a key that it has no use for.
        """
        for name in sorted({one for names in KEYS.values() for one in names} - set(KEYS[layout])):
            if getattr(self, name) is not None:
                known = ", ".join(KEYS[layout]) or "no such key"
                raise UserError(f"{key}={self.path}: {name} is not for the layout {layout}, which takes {known}")


def read_entries(value: Sequence[Any], key: str) -> list[SetEntry]:
    """Read a list of paths, yaml files and mappings.

    Args:
        key: where it is in the config.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    entries: list[SetEntry] = []
    for number, item in enumerate(value):
        at = f"{key}[{number}]"
        if isinstance(item, str) and item.endswith((".yaml", ".yml")):
            entries += read_yaml(Path(item), at)
        else:
            entries.append(read_entry({"path": item} if isinstance(item, str) else item, at))
    return entries


def read_yaml(path: Path, at: str) -> list[SetEntry]:
    """Read a yaml file with one set, or a list of them; its paths are relative to it.

    Raises:
        UserError: it is missing, or is not what it should be.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{at}={path}: cannot be read: {' '.join(str(error).split())}") from error
    items = content if isinstance(content, list) else [content]
    items = [{"path": item} if isinstance(item, str) else item for item in items]
    return [
        read_entry(relative_to(item, path.parent), f"{path}[{number}]" if len(items) > 1 else str(path))
        for number, item in enumerate(items)
    ]


def relative_to(item: Any, folder: Path) -> Any:
    """Return an entry whose paths start at a folder."""
    if not isinstance(item, Mapping):
        return item
    given = {name: item[name] for name in RELATIVE if isinstance(item.get(name), str)}
    for name in ("class_names", "templates"):  # may be names of open_clip's lists
        if name in given and not (folder / given[name]).is_file():
            del given[name]
    if item.get("layout") == "wds" or ("path" in given and is_wds(folder / given["path"])):
        given.pop("train", None)  # is a split
    return {**item, **{name: str(folder / path) for name, path in given.items()}}


def read_entry(item: Any, at: str) -> SetEntry:
    """Check the keys and types of an entry.

    Raises:
        UserError: they are wrong.
    """
    if isinstance(item, Mapping):
        check_values(at, item, [field.name for field in fields(SetEntry)], typing.get_type_hints(SetEntry))
    if not isinstance(item, Mapping) or "path" not in item:
        raise UserError(f"{at}: expected a path, or a mapping with the key path, found {item!r}")
    return SetEntry(**item)
