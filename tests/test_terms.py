"""Kinds of pairs as terms of one loss: their sum, the head of views, what needs no gradient, wrong values."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, make_head, make_objective
from contrast import LOSSES, call, make_inputs
from test_model import make_model, write_json
from test_module import (
    assert_equal,
    gradients,
    gradients_under_ddp,
    make_batch,
    make_module,
    make_pictures,
    slice_of_a_process,
)
from torch import Tensor

from clipmini.data.captions import caption_ids
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.head import ProjectionHead
from clipmini.model import encode_image, project_image, width_before_projection
from clipmini.nt_xent import nt_xent

ALL_TERMS = {"image_text": 1.0, "image_image": 0.5, "text_text": 0.25}


def make_features() -> dict[str, Tensor]:
    """Make the features of 9 pictures with two views and two captions each."""
    one, other = make_inputs(9), make_inputs(9, width=16)
    names = {
        "image": one["image"],
        "text": one["text"],
        "image_2": other["image"][:, :8],
        "text_2": other["text"][:, 8:],
    }
    features = {name: F.normalize(value.detach(), dim=-1).requires_grad_() for name, value in names.items()}
    return features | {"view": features["image"], "view_2": features["image_2"]}


def slip(image: Tensor, text: Tensor, first: Tensor, second: Tensor, scale: Tensor, weight: float) -> Tensor:
    """Compute SLIP's loss in its dense form (https://arxiv.org/abs/2112.12750, algorithm 1), its temperature 0.1."""
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    no_self = torch.eye(len(image), dtype=image.dtype) * 1e9
    halves = [
        F.cross_entropy(torch.cat([a @ b.T, a @ a.T - no_self], dim=1) / 0.1, labels)
        for a, b in ((first, second), (second, first))
    ]
    return clip + weight * sum(halves) / 2


def test_is_slips_sum() -> None:
    features, scale = make_features(), torch.tensor(20.0, dtype=torch.float64)
    objective = make_objective(terms={"image_text": 1.0, "image_image": 0.7, "text_text": None})
    found = objective(features, scale=scale, ids={})
    expected = slip(features["image"], features["text"], features["view"], features["view_2"], scale, 0.7)
    torch.testing.assert_close(found["loss"], expected, rtol=0, atol=1e-12)
    inputs = [features[name] for name in ("image", "image_2", "text")]
    pairs = zip(torch.autograd.grad(found["loss"], inputs), torch.autograd.grad(expected, inputs), strict=True)
    for gradient, theirs in pairs:
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_is_the_weighted_sum_of_its_terms(kind: str) -> None:
    features, inputs = make_features(), make_inputs(9)
    numbers = {"scale": inputs["scale"], "bias": inputs["bias"] if kind == "siglip" else None}
    for duplicates in ("ignore", "share"):
        objective = make_objective(kind, terms=ALL_TERMS, duplicates=duplicates)
        found = objective(features, ids={"text": inputs["ids"]}, **numbers)
        pairs = (
            {**inputs, "image": features[first], "text": features[second]}
            for first, second in (("image", "text"), ("text", "text_2"))
        )
        (image_text, accuracy), (text_text, _) = (call(kind, pair, duplicates=duplicates) for pair in pairs)
        image_image, _ = nt_xent(features["view"], features["view_2"], torch.tensor(10.0, dtype=torch.float64))
        expected = image_text + image_image / 2 + text_text / 4
        torch.testing.assert_close(found["loss"], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found["accuracy"], accuracy)
        torch.testing.assert_close(found["loss_text_text"], text_text)
        assert not found["loss_image_image"].requires_grad


def test_temperatures_take_the_place_of_the_scale() -> None:
    features, scale = make_features(), torch.tensor(20.0, dtype=torch.float64)
    for temperature, expected in ((0.05, 20.0), (None, 20.0), (0.5, 2.0)):
        temperatures = {"image_image": temperature, "text_text": temperature}
        found = make_objective(terms=ALL_TERMS, temperatures=temperatures)(features, scale=scale, ids={})
        views, _ = nt_xent(features["view"], features["view_2"], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(found["loss_image_image"], views)
        pair = {"image": features["text"], "text": features["text_2"], "scale": torch.tensor(expected)}
        torch.testing.assert_close(found["loss_text_text"], call("infonce", pair)[0])


def test_all_views_are_compared_with_all_captions() -> None:
    features, inputs = make_features(), make_inputs(9)
    ids = {"text": inputs["ids"], "text_2": inputs["ids"].flip(0)}
    options = {"duplicates": "mask", "terms": {"image_text": 1.0}}
    found = make_objective(all_views=True, **options)(features, scale=inputs["scale"], ids=ids)
    losses = [
        call(
            "infonce", {**inputs, "image": features[image], "text": features[text], "ids": ids[text]}, duplicates="mask"
        )
        for image, text in itertools.product(("image", "image_2"), ("text", "text_2"))
    ]
    torch.testing.assert_close(found["loss"], sum(loss for loss, _ in losses) / 4, rtol=0, atol=1e-12)
    first = make_objective(all_views=False, **options)(features, scale=inputs["scale"], ids=ids)
    torch.testing.assert_close(first["loss"], losses[0][0], rtol=0, atol=1e-12)


def make_views(rows: int) -> dict[str, Tensor]:
    """Make a batch with two views and two captions of each picture."""
    captions = [f"image {row if row % 3 else 0}" for row in range(rows)]
    text = {"text_2": ClipTokenizer(24)(captions), "text_2_id": caption_ids(captions)}
    batch = {name: value for name, value in make_batch(rows).items() if not name.startswith("negative")}
    return {**batch, "image_2": make_pictures(rows, 32, 2), **text}


HEAD = make_head(layers=3)


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_equal_the_whole_batch(micro_batch: int, loss: str, tiny_json: Path) -> None:
    options: dict[str, Any] = {"loss": loss, "terms": ALL_TERMS, "head": HEAD, "all_views": True}
    expected = gradients(make_module(str(tiny_json), **options), make_views(12))
    assert expected["loss.head.layers.0.weight"].abs().max() > 1e-4
    assert_equal(gradients(make_module(str(tiny_json), micro_batch=micro_batch, **options), make_views(12)), expected)


def gradients_of_a_process(path: str, micro_batch: int | None, terms: dict[str, float]) -> dict[str, Tensor]:
    module = make_module(path, micro_batch=micro_batch, terms=terms, head=HEAD)
    return gradients_under_ddp(module, slice_of_a_process(make_views(12)))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (2, 4), (3, 3)])
def test_several_processes_equal_one(world_size: int, micro_batch: int | None, tiny_json: Path, tmp_path: Path) -> None:
    expected = gradients_of_a_process(str(tiny_json), None, ALL_TERMS)
    assert {"loss.head.layers.0.weight", "model.visual.proj", "model.logit_scale"} <= expected.keys()
    arguments = (str(tiny_json), micro_batch, ALL_TERMS)
    for found in in_processes(world_size, gradients_of_a_process, tmp_path, *arguments):
        assert_equal(found, expected)


def test_what_no_term_uses_is_not_trained(tiny_json: Path, tmp_path: Path) -> None:
    terms = {"image_text": None, "image_image": 1.0, "text_text": 1.0}
    module = make_module(str(tiny_json), terms=terms, head=HEAD, temperatures={"image_image": 0.1, "text_text": 0.1})
    still = {name for name, value in module.named_parameters() if not value.requires_grad}
    assert still == {"model.logit_scale", "model.visual.proj"}
    found = gradients(module, make_views(6))
    assert found.keys() | still == dict(module.named_parameters()).keys()
    assert make_module(str(tiny_json), terms=terms).model.logit_scale.requires_grad  # the scale of two captions


@pytest.mark.parametrize("vision", [{}, {"timm_model_name": "test_vit", "image_size": 160}])
def test_head_takes_what_the_projection_takes(vision: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(write_json(tmp_path / "m.json", vision_cfg=vision)).eval()
    image = make_pictures(2, model.visual.image_size[0], 1)
    before = encode_image(model, image, before_projection=True)
    assert before.shape == (2, width_before_projection(model))
    torch.testing.assert_close(project_image(model, before), encode_image(model, image))


def test_head_is_that_of_slip() -> None:
    layers = [type(layer).__name__ for layer in ProjectionHead(32, make_head(layers=3, norm="batch")).layers]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    head = ProjectionHead(32, make_head(layers=2))
    features = head(torch.randn(5, 32))
    assert [type(layer).__name__ for layer in head.layers] == ["Linear", "LayerNorm", "ReLU", "Linear"]
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    assert features.shape == (5, 8) and make_head().make(32) is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("infonce", {"terms": {"image_text": None}}, "loss.terms: must give a weight to at least one of image_text"),
        (
            "infonce",
            {"temperatures": {"image_image": 0.0}},
            "loss.temperatures.image_image=0: must be above 0, or null",
        ),
        ("infonce", {"temperatures": {"text_text": -1.0}}, "loss.temperatures.text_text=-1: must be above 0, or null"),
        ("infonce", {"temperatures": {"image_text": 1.0}}, "image_text: no such temperature .*; there are: image_"),
        (
            "siglip",
            {"temperatures": {"text_text": 0.1}},
            "loss.temperatures.text_text=0.1: must be null with loss=siglip",
        ),
    ],
)
def test_wrong_values_are_told(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_objective(kind, **changes)


@pytest.mark.parametrize(("name", "value", "least"), [("layers", -1, 0), ("hidden_width", 0, 1), ("width", 0, 1)])
def test_wrong_heads_are_told(name: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=f"loss.head.{name}={value}: must be {least} or more"):
        make_head(**{name: value})
