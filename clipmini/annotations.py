"""Values from yaml or JSON against the annotations of what will take them."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clipmini.errors import UserError, check_choice, did_you_mean

LONGEST = 1_000_000  # seconds; what waits counts milliseconds in 32 bits
FOREIGN = ("logger.",)  # groups whose classes are of others, and mean something by ""


def check_values(key: str, values: Mapping[str, Any], known: Collection[str], hints: Mapping[str, Any]) -> None:
    """Compare a mapping with the names and types of what takes it.

    Args:
        key: where the mapping is in the config.
        values: what is there.
        known: the names that are taken.
        hints: annotations by name; a name without one takes any value.

    Raises:
        UserError: an unknown name, a value of another type than annotated, or a number out of its `Limits`.
    """
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown key {key}.{name}{did_you_mean(str(name), known)}")
        hint, *limits = read_limits(hints.get(name, Any))
        if not matches(value, hint):
            if isinstance(value, Mapping) and typing.get_origin(hint) is dict:  # which of its values, is told
                check_values(f"{key}.{name}", value, value.keys(), dict.fromkeys(value, typing.get_args(hint)[1]))
            if choices := read_choices(hint):
                check_choice(f"{key}.{name}", value, (*choices, *([None] if matches(None, hint) else [])))
            raise UserError(f"{key}.{name}={value!r} has the wrong type: expected {describe(hint)}")
        for one in limits:
            one.check(f"{key}.{name}", value, hint)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a number may be.

    Attributes:
        least, most: the number itself may be one of them.
        above, below: and none of these.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def check(self, key: str, value: object, hint: Any = None) -> None:
        """See that a value, if it is a number, is where it may be.

        Args:
            hint: its annotation, which says whether it may be null.

        Raises:
            UserError: it is not.
        """
        if not isinstance(value, int | float):
            return
        if not (self.least <= value <= self.most and self.above < value < self.below):
            or_null = ", or null" if types.NoneType in typing.get_args(hint) else ""
            raise UserError(f"{key}={value}: must be {self}{or_null}")

    def __str__(self) -> str:
        is_open = self.above > -math.inf
        low = f"above {self.above}" if is_open else f"from {self.least}"
        if self.below < math.inf:
            return f"{low} {'and' if is_open else 'to'} below {self.below}"
        if self.most < math.inf:
            return f"{low}{', up' if is_open else ''} to {self.most}"
        return low if is_open else f"{self.least} or more"


def check_schema(values: Mapping[str, Any], schema: type, key: str = "") -> None:
    """Compare the keys of a config, also those that `++` forces into it, and its numbers with its schema.

    Args:
        values: plain data.
        schema: a dataclass; a field may have its `Limits` in its metadata.
        key: where the values are in the config, with a dot at its end; empty for the whole.

    Raises:
        UserError: an unknown key, or a number out of its limits.
    """
    hints = typing.get_type_hints(schema)
    for name in values.keys() - hints.keys():
        raise UserError(f"unknown key {key}{name}{did_you_mean(name, hints)}")
    for entry in dataclasses.fields(schema):
        value, hint = values.get(entry.name), hints[entry.name]
        if "limits" in entry.metadata:
            entry.metadata["limits"].check(key + entry.name, value, hint)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            check_schema(value, typing.cast(type, hint), f"{key}{entry.name}.")


def check_meant(tree: Any, key: str) -> None:
    """Refuse what is no value of any key of ours: a number that is not finite, or an empty text.

    Raises:
        UserError: there is one.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            check_meant(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            check_meant(value, f"{key}[{number}]")
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise UserError(f"{key}={tree}: must be a finite number")
    elif tree == "" and not key.startswith(FOREIGN):
        raise UserError(f"{key} is empty: give it a value")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
        return isinstance(value, Mapping) and all(matches(item, options[1]) for item in value.values() if options)
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if kind is tuple and options and options[-1] is not Ellipsis:
            return len(value) == len(options) and all(map(matches, value, options))
        return not options or all(matches(item, options[0]) for item in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def read_limits(hint: Any) -> tuple[Any, ...]:
    """Return an annotation without what `Annotated` adds to it, and the `Limits` among that."""
    if typing.get_origin(hint) is not typing.Annotated:
        return (hint,)
    inner, *added = typing.get_args(hint)
    return (inner, *(one for one in added if isinstance(one, Limits)))


def read_choices(hint: Any) -> tuple[str, ...]:
    """Return the texts that an annotation allows, as `Literal["a", "b"] | None` does; none where others are too."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return options
    others = [option for option in options if option is not types.NoneType]
    return read_choices(others[0]) if len(others) == 1 and len(options) == 2 else ()


def describe(hint: Any) -> str:
    """Write an annotation as a user would say it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
