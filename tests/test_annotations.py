"""Values from yaml are told from those of another type, the same in OmegaConf's containers and Python's own."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from clipmini import annotations


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
        ("anything", Any, True),
        (None, Any, True),
    ],
)
def test_matches(value: Any, hint: Any, expected: bool) -> None:
    assert annotations.matches(value, hint) is expected
    if isinstance(value, dict | list):
        assert annotations.matches(OmegaConf.create(value), hint) is expected
