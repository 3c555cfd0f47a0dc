"""Sets as a folder of pictures for each class (ImageFolder)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.errors import UserError, did_you_mean
from clipmini.evaluation.prompts import imagenet_synsets, list_synonyms
from clipmini.evaluation.sets import Place


def list_pictures(root: Path) -> dict[str, list[Place]]:
    """List the pictures below each folder of a folder, sorted by path: a folder is a class, its name the class's.

    Raises:
        UserError: no such folder, none in it, or no pictures in them.
    """
    if not root.is_dir():
        raise UserError(f"{root}: is no folder, and one with a folder for each class is expected")
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        paths = (Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names)
        pictures = sorted(path for path in paths if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        found[folder.name] = [Place(str(path.relative_to(root)), str(path)) for path in pictures]
    if not any(found.values()):
        extensions = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        raise UserError(f"{root}: neither classnames.txt nor folders with pictures ({extensions}), one for each class")
    return found


def is_synset(name: str) -> bool:
    """Say whether a folder's name is a WordNet id, as ImageNet has them."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()


def name_folders(folders: Sequence[str], names: Sequence[Any] | Mapping[str, Any] | None, at: str) -> list[Any]:
    """Return the class names of folders, by their names and never by their place in the alphabet.

    Args:
        names: None takes the folders' own names, with underscores as spaces, and ImageNet's for WordNet ids; a mapping
            has each folder's; a list must have one that reads like the folder's.
        at: where the names are, for messages.

    Raises:
        UserError: a folder that no name is for.
    """
    synsets = [name for name in folders if is_synset(name)]
    if isinstance(names, Mapping):
        by_folder = {str(folder): name for folder, name in names.items()}  # yaml has numbers too
        return [list_synonyms([take(by_folder, one, one, at)], f"{at}[{one}]")[0] for one in folders]
    if synsets and (names is None or len(names) == len(imagenet_synsets())):
        if len(synsets) < len(folders):
            other = next(name for name in folders if not is_synset(name))
            raise UserError(f"{at}: folders with WordNet ids such as {synsets[0]} and others such as {other}")
        return [take(imagenet_synsets(), folder, folder, "ImageNet's 1,000 WordNet ids") for folder in folders]
    if names is None:
        return [folder.replace("_", " ") for folder in folders]
    by_name = {plain(name if isinstance(name, str) else name[0]): name for name in names}
    return [take(by_name, plain(folder), folder, at) for folder in folders]


def plain(name: str) -> str:
    """Write a name without what folders' names have otherwise than class names."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def take(names: Mapping[str, Any], key: str, folder: str, at: str) -> Any:
    """Return what is known of a folder.

    Raises:
        UserError: nothing.
    """
    if key not in names:
        raise UserError(f"the folder {folder!r} is none of the classes of {at}{did_you_mean(key, names)}")
    return names[key]
