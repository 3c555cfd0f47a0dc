"""Losses against loops, open_clip and torch: values, gradients, memory, precision and messages."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrast import LOSSES, MODES, by_hand, call, gradients, make_inputs, peak_bytes
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from clipmini import tiles
from clipmini.errors import UserError
from clipmini.losses import info_nce, siglip


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name, check_dtype=False)


@pytest.mark.parametrize("block_size", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("duplicates", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_papers(name: str, duplicates: str, negatives: bool, block_size: int | None) -> None:
    inputs = make_inputs(9, negatives=negatives)
    loss, _ = call(name, inputs, duplicates=duplicates, block_size=block_size)
    expected = by_hand(name, inputs, duplicates)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert_same(gradients(loss, inputs), gradients(expected, inputs), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_open_clip(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(133, dtype, width=32)
    image, text, scale, bias = (inputs[key] for key in ("image", "text", "scale", "bias"))
    loss, _ = call(name, inputs, block_size=50)
    theirs = SigLipLoss()(image, text, scale, bias) if name == "siglip" else ClipLoss()(image, text, scale)
    torch.testing.assert_close(loss, theirs, rtol=tolerance, atol=tolerance)
    assert_same(gradients(loss, inputs), gradients(theirs, inputs), tolerance)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="not in this torch")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_linear_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(133, dtype, width=32)
    image, text, scale = (inputs[key] for key in ("image", "text", "scale"))
    labels = torch.arange(133)
    theirs = (
        F.linear_cross_entropy(scale * image, text, labels) + F.linear_cross_entropy(scale * text, image, labels)
    ) / 2
    loss, _ = info_nce(image, text, scale)
    torch.testing.assert_close(loss, theirs, rtol=tolerance, atol=tolerance)
    assert_same(gradients(loss, inputs), gradients(theirs, inputs), tolerance)


@pytest.mark.parametrize("duplicates", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_small_differences(name: str, duplicates: str) -> None:
    inputs = make_inputs(5, scale=3.0, negatives=True)
    names = [key for key, value in inputs.items() if value.requires_grad and (name, key) != ("infonce", "bias")]

    def loss(*values: Tensor) -> Tensor:
        changed = {**inputs, **dict(zip(names, values, strict=True))}
        return call(name, changed, duplicates=duplicates, block_size=2)[0]

    assert torch.autograd.gradcheck(loss, [inputs[key] for key in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("duplicates", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_exact_but_for_the_rounding_of_gradients(
    name: str, duplicates: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(133, dtype, width=32, scale=100.0)
    wide = {
        key: value.detach().double().requires_grad_() if value.requires_grad else value for key, value in inputs.items()
    }
    exact, _ = call(name, wide, duplicates=duplicates)
    expected = gradients(exact, wide)
    outside, _ = call(name, inputs, duplicates=duplicates, block_size=50)
    found = gradients(outside, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = call(name, inputs, duplicates=duplicates, block_size=50)
        found_inside = gradients(inside, inputs)
    assert outside.dtype == torch.float32 and found["image"].dtype == dtype
    assert abs(outside.item() - exact.item()) <= 1e-6 * max(1.0, exact.item())
    for key, value in expected.items():
        assert (found[key].double() - value).norm() <= 3e-3 * value.norm(), key
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert_same(found_inside, found, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_fp16_survive_when_they_are_scaled_up(name: str) -> None:
    inputs = make_inputs(512, torch.float16, width=16, scale=1e-3)
    exact = {key: value.detach().double().requires_grad_() for key, value in inputs.items() if value.requires_grad}
    exact["ids"] = inputs["ids"]
    found = gradients(call(name, inputs)[0] * 2**14, inputs)["image"].double()
    expected = gradients(call(name, exact)[0] * 2**14, exact)["image"]
    assert expected.abs().median() / 2**14 < 1e-5  # fp16 has steps of 6e-8 there, and 1e-3 as a share further up
    assert (found - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_accuracy_counts_right_picks_both_ways(name: str) -> None:
    inputs = {"image": torch.eye(4), "text": torch.eye(4)[[0, 1, 3, 2]], "scale": torch.tensor(9.0)}
    inputs |= {"bias": torch.tensor(0.0), "ids": torch.tensor([1, 2, 3, 3])}
    assert call(name, inputs)[1].item() == 0.5
    assert call(name, inputs, duplicates="share", block_size=3)[1].item() == 0.5  # own similarities tie with others: 0
    inputs["text"] = torch.eye(4)[[0, 1, 2, 2]]
    # Picture 3 finds no caption; the captions 2 and 3 are equal: a tie if they count as two.
    assert call(name, inputs)[1].item() == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert call(name, inputs, duplicates="mask", block_size=3)[1].item() == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_features_that_are_all_the_same_are_no_success() -> None:
    same = torch.ones(6, 4) / 2
    assert info_nce(same, same, torch.tensor(10.0))[1].item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair_has_a_loss(name: str) -> None:
    loss, accuracy = call(name, make_inputs(1))
    assert loss.isfinite() and accuracy.item() == 1.0


@pytest.mark.parametrize("duplicates", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_saves_features_and_no_similarities(name: str, duplicates: str) -> None:
    inputs = make_inputs(256, torch.float32, width=32)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(name, inputs, duplicates=duplicates)
    assert 2 * 256 * 32 * 4 <= sum(saved.values()) <= 2.2 * 256 * 32 * 4 + 16 * 256


@pytest.mark.parametrize("name", LOSSES)
def test_peak_of_memory(name: str) -> None:
    inputs = make_inputs(2048, torch.float32, width=256)
    peak = peak_bytes(lambda: call(name, inputs, block_size=256)[0].backward())
    naive = peak_bytes(lambda: ClipLoss()(inputs["image"], inputs["text"], inputs["scale"]).backward())
    assert 4e6 < peak <= 12e6 < 60e6 < naive


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradient_nothing_is_kept(name: str) -> None:
    inputs = make_inputs(9)
    with torch.no_grad():
        loss, _ = call(name, inputs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, call(name, inputs)[0].detach())


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_refused(name: str) -> None:
    inputs = make_inputs(5)
    (gradient,) = torch.autograd.grad(call(name, inputs)[0] ** 2, inputs["image"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_function_around_it_gives_the_same(name: str) -> None:
    inputs = make_inputs(9)

    def model(weight: Tensor) -> Tensor:
        image = F.normalize(inputs["image"].detach() @ weight, dim=-1)
        return call(name, {**inputs, "image": image})[0] * 2

    weight = torch.eye(8, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(torch.compile(model, backend="aot_eager")(weight), weight)
    torch.testing.assert_close(found, torch.autograd.grad(model(weight), weight), rtol=0, atol=1e-12)


def test_block_size_fits_the_caches_but_is_never_tiny() -> None:
    def block_size(columns: int) -> int:
        features = torch.zeros(columns, 4)
        labels = tiles.Labels(0, columns, "ignore")
        return tiles.Tiles(features, features, torch.tensor(1.0), labels, None).block_size

    assert block_size(2048) == 256 and block_size(100_000) == tiles.MIN_ROWS
    assert all(limit <= 256 << 20 for limit in tiles.TILE_BYTES.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(4)}, r"image features have the shape \[4\]: must be \[pairs, width\]"),
        ({"text": torch.zeros(4, 3)}, r"text features have the shape \[4, 3\]: must be \[4, 8\]"),
        ({"text": torch.zeros(3, 8)}, r"text features have the shape \[3, 8\]: must be \[4, 8\]"),
        ({"ids": torch.zeros(3)}, r"ids have the shape \[3\]: must be \[4\]"),
        ({"scale": torch.tensor(torch.nan)}, r"scale of similarities is nan: must be finite \(loss.init_scale, opt"),
        ({"duplicates": "mask", "ids": None}, "loss.duplicates=mask: needs the ids of captions"),
        ({"duplicates": "drop"}, "loss.duplicates=drop: must be ignore, mask, share"),
        ({"block_size": 0}, "loss.block_size=0: must be 1 or more, or null"),
        ({"negative": torch.zeros(4, 8)}, "negative and negative_ids: must be given together"),
        (
            {"negative": torch.zeros(4, 7), "negative_ids": torch.zeros(4)},
            r"negative features have the shape \[4, 7\]: must be \[any, 8\]",
        ),
        (
            {"negative": torch.zeros(4, 8), "negative_ids": torch.zeros(3)},
            r"negative_ids have the shape \[3\]: must be \[4\]",
        ),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_wrong_inputs_are_told(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(name, {**make_inputs(4), **changes})


def test_both_take_what_their_docstrings_say() -> None:
    image, text = make_inputs(4)["image"], make_inputs(4, torch.float32)["text"]
    assert info_nce(image, text, torch.tensor(2.0))[0].dtype == torch.float64
    assert siglip(text, text, torch.tensor(2.0), torch.tensor(0.0))[0].dtype == torch.float32
