"""Values from yaml are told from those of another type, the same in OmegaConf's containers and Python's own."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf

from clipmini import annotations
from clipmini.annotations import Limits
from clipmini.errors import UserError


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        (None, int | None, True),
        (None, str, False),
        ("x", int | str, True),
        ([1, 2], tuple[float, float], True),
        ([1], tuple[float, float], False),
        ([1, 2, 3], tuple[float, float], False),
        ([1, 2, 3], tuple[float, ...], True),
        ([1, "a"], tuple[float, str], True),
        (["a"], list[float], False),
        ({"a": 1}, dict[str, float], True),
        ({"a": 1}, list[str], False),
        ({"a": None}, dict[str, float | None], True),
        ({"a": "b"}, dict[str, float | None], False),
        ("anything", Any, True),
        (None, Any, True),
    ],
)
def test_matches(value: Any, hint: Any, expected: bool) -> None:
    assert annotations.matches(value, hint) is expected
    if isinstance(value, dict | list):
        assert annotations.matches(OmegaConf.create(value), hint) is expected


@pytest.mark.parametrize(
    ("limits", "right", "wrong", "words"),
    [
        (Limits(least=1), (1, 1.5, 1e30), (0, -1), "1 or more"),
        (Limits(above=0), (0.1,), (0, -1), "above 0"),
        (Limits(least=0, most=5), (0, 5), (-1, 6), "from 0 to 5"),
        (Limits(least=0, below=1), (0, 0.99), (1, -0.1), "from 0 to below 1"),
        (Limits(above=0, most=5), (1, 5), (0, 6), "above 0, up to 5"),
        (Limits(above=0, below=1), (0.01, 0.99), (0, 1), "above 0 and below 1"),
    ],
)
def test_limits(limits: Limits, right: tuple, wrong: tuple, words: str) -> None:
    for value in (*right, None, "not a number"):
        limits.check("a.b", value)
    for value in wrong:
        with pytest.raises(UserError, match=f"^a.b={value}: must be {words}$"):
            limits.check("a.b", value)
        with pytest.raises(UserError, match=f"must be {words}, or null$"):
            limits.check("a.b", value, int | None)


HINTS = {
    "size": Annotated[int | None, Limits(least=1)],
    "kind": Literal["one", "two"] | None,
    "shares": dict[str, float],
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "^a.size=0: must be 1 or more, or null$"),
        ({"size": "x"}, r"^a.size='x' has the wrong type: expected int \| None$"),
        ({"kind": "ONE"}, r"^a.kind=ONE: is one of one, two, null \(did you mean 'one'\?\)$"),
        ({"shares": {"b": 1, "c": "x"}}, "^a.shares.c='x' has the wrong type: expected float$"),
        ({"sise": 1}, r"^unknown key a.sise \(did you mean 'size'\?\)$"),
    ],
)
def test_wrong_values_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        annotations.check_values("a", values, HINTS, HINTS)


def test_right_values_are_taken() -> None:
    annotations.check_values("a", {"size": None, "kind": None, "shares": {"b": 1}}, HINTS, HINTS)


@dataclass
class Inner:
    count: int | None = field(default=None, metadata={"limits": Limits(least=1)})


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    text: str = "a"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"count": 0}}, "^inner.count=0: must be 1 or more, or null$"),
        ({"inner": {"cuont": 1}}, r"^unknown key inner.cuont \(did you mean 'count'\?\)$"),
        ({"txt": 1}, r"^unknown key txt \(did you mean 'text'\?\)$"),
    ],
)
def test_a_schema_has_limits_and_all_keys(values: dict[str, Any], message: str) -> None:
    annotations.check_schema({"inner": {"count": 1}, "text": "b"}, Outer)
    with pytest.raises(UserError, match=message):
        annotations.check_schema(values, Outer)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"^a.b\[1\]=nan: must be a finite number$"),
        ({"a": float("-inf")}, "^a=-inf: must be a finite number$"),
        ({"a": [{"b": ""}]}, r"^a\[0\].b is empty: give it a value$"),
    ],
)
def test_what_nobody_means_is_refused(tree: dict[str, Any], message: str) -> None:
    annotations.check_meant({"a": [1e30, -1, None, "x", True], "logger": {"name": ""}}, "")
    with pytest.raises(UserError, match=message):
        annotations.check_meant(tree, "")
