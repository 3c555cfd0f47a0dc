"""Sets of choices between captions that differ in little: SugarCrepe and Winoground, as they are published.

SugarCrepe (https://arxiv.org/abs/2306.14610): add_att.json and six more, {id: {filename, caption, negative_caption}},
with the pictures of COCO's val2017. Winoground (https://arxiv.org/abs/2204.03162): examples.jsonl with image_0,
caption_0, image_1, caption_1 and images/.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.errors import UserError
from clipmini.evaluation.sets import ChoiceSet, Pictures, Place

EXAMPLES = "examples.jsonl"


def is_sugarcrepe(path: Path) -> bool:
    """Say whether a file, or the first .json of a directory, has SugarCrepe's fields."""
    files = [path] if path.suffix == ".json" else sorted(path.glob("*.json")) if path.is_dir() else []
    if not files or not files[0].is_file():
        return False
    with open(files[0], encoding="utf-8", errors="replace") as file:
        return "negative_caption" in file.read(10_000)


def read_sugarcrepe(path: Path, images: Path | None, *, name: str, language: str) -> list[ChoiceSet]:
    """Read one file, or each of a directory.

    Args:
        images: the directory of the pictures.

    Raises:
        UserError: `images` or the files are missing, or an example has not all fields.
    """
    if images is None or not images.is_dir():
        raise UserError(
            f"{path}: the key images must name the directory of its pictures (COCO's val2017), not {images}"
        )
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise UserError(f"{path}: no .json of SugarCrepe's in it")
    sets = []
    for file in files:
        content = read_json(read_text(file), str(file))
        rows = list(content.values()) if isinstance(content, Mapping) else content
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{file}: has no examples")
        examples = []
        for number, row in enumerate(rows, 1):
            values = take(row, ("filename", "caption", "negative_caption"), f"{file}, example {number}")
            examples.append((values[0], values[1], values[2], None))
        full_name = name if path.is_file() else f"{name}/{file.stem}"
        sets.append(make_set(full_name, {row[0]: str(images / row[0]) for row in examples}, examples, language))
    return sets


def read_winoground(root: Path, *, name: str, language: str) -> ChoiceSet:
    """Read examples.jsonl: each of its rows makes an example seen from its first picture.

    Raises:
        UserError: there are no examples, or one has not all fields.
    """
    examples: list[tuple[str, str, str, str | None]] = []
    keys = ("image_0", "caption_0", "caption_1", "image_1")
    names: list[str] = []
    for number, line in enumerate(read_text(root / EXAMPLES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{root / EXAMPLES}, line {number}"
        first, right, wrong, second = take(read_json(line, where), keys, where)
        examples.append((first, right, wrong, second))
        names += [first, second]
    if not examples:
        raise UserError(f"{root / EXAMPLES}: has no examples")
    return make_set(
        name, {picture: str(find_picture(root / "images", picture)) for picture in names}, examples, language
    )


def find_picture(folder: Path, name: str) -> Path:
    """Return the file of a picture that may be named without its extension."""
    paths = [folder / name, *(folder / f"{name}.{extension}" for extension in IMAGE_EXTENSIONS)]
    return next((path for path in paths if path.is_file()), paths[0])


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: it is missing, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_json(text: str, where: str) -> Any:
    """Read JSON.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error


def take(row: Any, keys: Sequence[str], where: str) -> list[str]:
    """Return the values of some keys.

    Raises:
        UserError: one is missing or no text.
    """
    for key in keys:
        if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
            raise UserError(f"{where}: has no {key!r}")
    return [row[key] for key in keys]


def make_set(
    name: str, paths: Mapping[str, str], examples: Sequence[tuple[str, str, str, str | None]], language: str
) -> ChoiceSet:
    """Number the pictures and captions of examples, each of them once.

    Args:
        paths: of the pictures by name.
        examples: a picture, its caption, another caption, and the picture of that if there is one.
    """
    pictures = {picture: number for number, picture in enumerate(paths)}
    captions: dict[str, int] = {}
    rows = []
    for picture, right, wrong, other in examples:
        numbers = [captions.setdefault(caption, len(captions)) for caption in (right, wrong)]
        rows.append((pictures[picture], *numbers, -1 if other is None else pictures[other]))
    places = tuple(Place(picture, path) for picture, path in paths.items())
    return ChoiceSet(name, Pictures(places), tuple(captions), np.array(rows, dtype=np.int64), language)
