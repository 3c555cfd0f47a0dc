"""Class names and templates to sentences, in every way that they are written down today.

A template holds the class as `{}` (open_clip, CLIP), `{c}` (CLIP_benchmark, DataComp) or `{name}`, or is a function; or
a mapping gives each class sentences of its own (CuPL, https://arxiv.org/abs/2209.03320). With names such as `age:child`
a template counts for the group before its colon only, as in DataComp's FairFace.
"""

import json
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import open_clip

from clipmini.errors import UserError, did_you_mean
from clipmini.evaluation.sets import read_lines

log = logging.getLogger(__name__)

Template: TypeAlias = str | Callable[[str], str]
Names: TypeAlias = Sequence[str | Sequence[str]]  # of a class one name, or several that mean the same
Prompts: TypeAlias = tuple[tuple[str, ...], ...]

PLACEHOLDER = re.compile(r"\{[^{}]*\}")
PLACEHOLDERS = ("{}", "{c}", "{name}")
GROUP = re.compile(r"(\w+):\s*(\S.*)")
PLAIN = ("a photo of a {}.",)  # where nothing else is said
NAMED_TEMPLATES = ("imagenet", "imagenet_simple")


def read_names(value: Any, key: str) -> tuple[Names, str]:
    """Read what a config says of class names: `imagenet`, a list, or a file (.txt with a line each, or .json).

    Args:
        key: where that is in the config.

    Returns:
        The names, and where they are, for messages.

    Raises:
        UserError: no such file, or no names in it, or something else.
    """
    if value == "imagenet":
        return open_clip.IMAGENET_CLASSNAMES, "open_clip's names of ImageNet"
    if isinstance(value, str):
        value, key = read_file(Path(value), key), value
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{key}: expected a list of class names, found {reprlib.repr(value)}")
    return list_synonyms(value, key), key


def list_synonyms(names: Sequence[Any], names_at: str) -> list[tuple[str, ...]]:
    """Return all names of each class.

    Raises:
        UserError: a class without a name, or with one that is no text.
    """
    synonyms = []
    for number, name in enumerate(names, 1):
        group = (name,) if isinstance(name, str) else tuple(name) if isinstance(name, list | tuple) else ()
        if not group or not all(isinstance(one, str) and one.strip() for one in group):
            raise UserError(f"{names_at}, line {number}: {name!r} is no name of a class (a text, or a list of them)")
        synonyms.append(group)
    return synonyms


def read_templates(value: Any, key: str) -> tuple[Sequence[Template] | Mapping[str, Sequence[str]], str]:
    """Read what a config says of templates: `imagenet` (80), `imagenet_simple` (7), a list, a mapping, or a file.

    Returns:
        The templates, and where they are, for messages.

    Raises:
        UserError: no such file, or no templates in it.
    """
    if value == "imagenet":
        return open_clip.OPENAI_IMAGENET_TEMPLATES, key
    if value == "imagenet_simple":
        return open_clip.SIMPLE_IMAGENET_TEMPLATES, key
    if isinstance(value, str):
        value, key = read_file(Path(value), key, NAMED_TEMPLATES), value
    if not isinstance(value, list | tuple | Mapping) or not value:
        raise UserError(
            f"{key}: expected a list of templates or a mapping of classes to sentences, found {reprlib.repr(value)}"
        )
    return value, key


def read_file(path: Path, key: str, known: Sequence[str] = ("imagenet",)) -> Any:
    """Read a .json, or the lines of any other file.

    Raises:
        UserError: it is not there, or is not what its name says.
    """
    if not path.is_file():
        raise UserError(f"{key}={path}: neither a file nor one of {', '.join(known)}{did_you_mean(str(path), known)}")
    if path.suffix != ".json":
        return read_lines(path, key)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def make_prompts(
    names: Names, templates: Sequence[Template] | Mapping[str, Sequence[str]], names_at: str, templates_at: str
) -> tuple[tuple[str, ...], Prompts]:
    """Put the names of each class into its templates.

    Args:
        names_at, templates_at: where they are, for messages.

    Returns:
        The first name of each class, and its sentences.

    Raises:
        UserError: a blank name, a template without one place for the class, or a class without sentences.
    """
    synonyms = list_synonyms(names, names_at)
    class_names = tuple(group[0] for group in synonyms)
    warn_of_equal_names(class_names, names_at)
    if isinstance(templates, Mapping):
        return class_names, take_sentences(class_names, templates, names_at, templates_at)
    for number, template in enumerate(templates, 1):
        check_template(template, f"{templates_at}, line {number}")
    if are_grouped(class_names, templates):
        return class_names, fill_by_group(synonyms, templates, names_at, templates_at)
    return class_names, tuple(
        tuple(fill(template, name) for template in templates for name in group) for group in synonyms
    )


def warn_of_equal_names(class_names: Sequence[str], names_at: str) -> None:
    """Say which names cannot be told apart: ImageNet's own list has two of them."""
    equal = [name for name, count in Counter(class_names).items() if count > 1]
    if equal:
        lines = {name: [i for i, other in enumerate(class_names, 1) if other == name] for name in equal}
        told = "; ".join(f"{name!r} in lines {', '.join(map(str, lines[name]))}" for name in equal[:5])
        log.warning("%s: equal names, of which the first wins: %s", names_at, told)


def check_template(template: object, at: str) -> None:
    """See that a template has a place for the class, and only one kind of it.

    Raises:
        UserError: it has not.
    """
    if callable(template):
        return
    if not isinstance(template, str):
        raise UserError(f"{at}: {template!r} is no text")
    found = set(PLACEHOLDER.findall(template))
    if len(found) != 1 or not found <= set(PLACEHOLDERS):
        problem = f"has {' and '.join(sorted(found))}" if found else "has no place for the class"
        raise UserError(f"{at}: {template!r} {problem}: it needs one of {', '.join(PLACEHOLDERS)}")


def fill(template: Template, name: str) -> str:
    """Put a name into a template."""
    return template(name) if callable(template) else PLACEHOLDER.sub(lambda _: name, template)


def take_sentences(
    class_names: Sequence[str], sentences: Mapping[str, Sequence[str]], names_at: str, templates_at: str
) -> Prompts:
    """Return the sentences that a mapping has for each class.

    Raises:
        UserError: it has none for a class, or has some for a class that is not there.
    """
    sentences = {str(name): value for name, value in sentences.items()}  # yaml has numbers too
    for name in class_names:
        found = sentences.get(name)
        are_sentences = isinstance(found, list | tuple) and all(isinstance(one, str) and one.strip() for one in found)
        if not found or not are_sentences:
            hint = did_you_mean(name, sentences) if name not in sentences else ""
            raise UserError(f"{templates_at}: no list of sentences for the class {name!r} of {names_at}{hint}")
    if unknown := sentences.keys() - set(class_names):
        name = min(unknown)
        raise UserError(f"{templates_at}: {name!r} is no class of {names_at}{did_you_mean(name, class_names)}")
    return tuple(tuple(sentences[name]) for name in class_names)


def are_grouped(class_names: Sequence[str], templates: Sequence[Template]) -> bool:
    """Say whether all names have groups, or one has a group that a template is for."""
    groups = {split_group(name)[0] for name in class_names}
    of_templates = {split_group(template)[0] for template in templates if isinstance(template, str)}
    return bool(groups & of_templates - {""}) or "" not in groups and len(class_names) > 1


def fill_by_group(
    synonyms: Sequence[Sequence[str]], templates: Sequence[Template], names_at: str, templates_at: str
) -> Prompts:
    """Fill templates such as `age:a person {c} years old` with the names of that group, such as `age:20-29`.

    Raises:
        UserError: a template or a class of a group that the other side does not have.
    """
    by_group: dict[str, list[Template]] = {}
    groups = {split_group(name)[0] for names in synonyms for name in names}
    for number, template in enumerate(templates, 1):
        group, text = split_group(template) if isinstance(template, str) else ("", template)
        if group not in groups:
            known = ", ".join(sorted(groups - {""}))
            raise UserError(f"{templates_at}, line {number}: {template!r} is for none of the groups {known}")
        by_group.setdefault(group, []).append(text)
    for number, names in enumerate(synonyms, 1):
        for name in names:
            if split_group(name)[0] not in by_group:
                raise UserError(
                    f"{names_at}, line {number}: no template in {templates_at} is for the group of {name!r}"
                )
    return tuple(
        tuple(fill(text, name) for group, name in map(split_group, names) for text in by_group[group])
        for names in synonyms
    )


def split_group(text: str) -> tuple[str, str]:
    """Split `group:rest`; a text without a group has a blank one."""
    match = GROUP.fullmatch(text)
    return (match[1], match[2]) if match else ("", text)


@cache
def imagenet_synsets() -> dict[str, int]:
    """Return the class number of each of ImageNet's WordNet ids, from timm's list."""
    text = (files("timm") / "data/_info/imagenet_synsets.txt").read_text(encoding="utf-8")
    return {synset: number for number, synset in enumerate(text.split())}
