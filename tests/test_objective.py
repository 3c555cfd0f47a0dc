"""What the config says of a loss: limits, terms, equal captions."""

import math
from typing import Any

import pytest
import torch
from conftest import make_objective
from contrast import LOSSES, call, make_inputs

from clipmini.errors import UserError


@pytest.mark.parametrize("kind", LOSSES)
def test_is_the_weighted_sum_of_its_terms(kind: str) -> None:
    inputs = make_inputs(9, negatives=True)
    bias = inputs["bias"] if kind == "siglip" else None
    numbers = {
        "scale": inputs["scale"],
        "bias": bias,
        "ids": {"text": inputs["ids"], "negative": inputs["negative_ids"]},
    }
    for duplicates in ("ignore", "share"):
        result = make_objective(kind, duplicates=duplicates, terms={"image_text": 0.25})(inputs, **numbers)
        loss, accuracy = call(kind, inputs, duplicates=duplicates)
        torch.testing.assert_close(result["loss"], loss / 4)
        torch.testing.assert_close(result["accuracy"], accuracy)


def test_scale_stays_within_its_limits() -> None:
    objective = make_objective(max_scale=50.0)
    for value, expected in ((10.0, math.log(50)), (-1.0, 0.0), (2.0, 2.0)):
        scale = torch.nn.Parameter(torch.tensor(value))
        objective.clamp_(scale)
        assert scale.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("infonce", {"init_scale": 0.5}, "loss.init_scale=0.5: must be from 1 to loss.max_scale=100"),
        ("infonce", {"init_scale": 101.0}, "loss.init_scale=101: must be from 1 to loss.max_scale=100"),
        ("infonce", {"init_bias": 1.0}, "loss.init_bias=1.0: must be a number with siglip, and null with infonce"),
        ("siglip", {"init_bias": None}, "loss.init_bias=None: must be a number with siglip"),
        ("infonce", {"block_size": 0}, "loss.block_size=0: must be 1 or more, or null"),
        ("infonce", {"terms": {}}, "must give a weight to at least one of image_text"),
        ("infonce", {"terms": {"image_txt": 1.0}}, r"image_txt: no such kind of pairs \(did you mean 'image_text'"),
        ("infonce", {"terms": {"image_text": 0.0}}, "loss.terms.image_text=0.0: must be a number above 0"),
        ("infonce", {"terms": {"image_text": "much"}}, "loss.terms.image_text=much: must be a number above 0"),
    ],
)
def test_wrong_values_are_told(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_objective(kind, **changes)
