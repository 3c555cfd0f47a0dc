"""Messages say which choices there are, and which is meant."""

from pathlib import Path

import pytest

from clipmini.errors import UserError, check_choice, did_you_mean, tell_choices
from clipmini.files import tell_neighbours


def test_what_is_close_is_found_in_any_case_of_letters() -> None:
    assert did_you_mean("imagnet", ["imagenet", "cars"]) == " (did you mean 'imagenet'?)"
    assert did_you_mean("vit-b32", ["ViT-B-32", "RN50"]) == " (did you mean 'ViT-B-32'?)"
    assert did_you_mean("zzz", ["imagenet", "cars"]) == did_you_mean("a", []) == ""


def test_few_choices_are_told_and_many_counted() -> None:
    assert tell_choices("b", ["a", "c"]) == "; there are: a, c"
    assert tell_choices(5, []) == "; there are: none"
    assert tell_choices("choice 7x", [f"choice {number}" for number in range(100)]).endswith("?); 100 are known")


def test_one_of_a_list() -> None:
    check_choice("format", "onnx", ("hf", "onnx"))
    with pytest.raises(UserError, match=r"^format=onx: is one of hf, onnx \(did you mean 'onnx'\?\)$"):
        check_choice("format", "onx", ("hf", "onnx"))


def test_what_lies_beside_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "wds_imagenet1k").mkdir()
    assert tell_neighbours(tmp_path / "wds_imagnet1k") == " (did you mean 'wds_imagenet1k'?)"
    assert tell_neighbours(tmp_path / "nowhere/wds_imagnet1k") == tell_neighbours(tmp_path / "z") == ""
