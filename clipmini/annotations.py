"""Values from yaml or JSON against the annotations of what will take them."""

import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clipmini.errors import UserError, did_you_mean


def check_values(key: str, values: Mapping[str, Any], known: Collection[str], hints: Mapping[str, Any]) -> None:
    """Compare a mapping with the names and types of what takes it.

    Args:
        key: where the mapping is in the config.
        values: what is there.
        known: the names that are taken.
        hints: annotations by name; a name without one takes any value.

    Raises:
        UserError: an unknown name, or a value of another type than annotated.
    """
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown key {key}.{name}{did_you_mean(str(name), known)}")
        if name in hints and not matches(value, hints[name]):
            raise UserError(f"{key}.{name}={value!r} has the wrong type: expected {describe(hints[name])}")


def matches(value: Any, hint: Any) -> bool:
    """Say whether a value from yaml is of an annotated type; True for annotations that are no yaml type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if hint is None or value is None:
        return value is None and hint in (None, types.NoneType)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if kind is float and not isinstance(value, bool):
        return isinstance(value, int | float)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if kind is tuple and options and options[-1] is not Ellipsis:
            return len(value) == len(options) and all(map(matches, value, options))
        return not options or all(matches(item, options[0]) for item in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def describe(hint: Any) -> str:
    """Write an annotation as a user would say it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
