"""Losses against open_clip and a float64 loop, and several processes against one, gradients included."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from clipmini import distributed
from clipmini.errors import UserError
from clipmini.losses import ContrastiveLoss, InfoNCE, SigLIP

LOSSES: dict[str, Callable[[], ContrastiveLoss]] = {
    "infonce": lambda: InfoNCE(init_scale=14.0, max_scale=100.0),
    "siglip": lambda: SigLIP(init_scale=10.0, init_bias=-10.0, max_scale=100.0),
}


def make_inputs(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Make unit features of pictures and captions, a scale and a bias, all with gradient."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, 8, generator=generator, dtype=dtype), dim=-1) for _ in "ab")
    inputs = [image, text, torch.tensor(20.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype)]
    return [value.requires_grad_() for value in inputs]


def call(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return LOSSES[name]()(image, text, scale=scale, bias=bias if name == "siglip" else None)


def by_hand(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute the loss as the papers write it, one pair after the other."""
    rows = range(len(image))
    logit = [[scale * (image[i] @ text[j]) for j in rows] for i in rows]
    if name == "siglip":
        terms = [F.logsigmoid((1 if i == j else -1) * (logit[i][j] + bias)) for i in rows for j in rows]
        return -sum(terms) / len(image)  # type: ignore[return-value]
    of_images = [logit[i][i] - torch.stack(logit[i]).exp().sum().log() for i in rows]
    of_texts = [logit[i][i] - torch.stack([logit[j][i] for j in rows]).exp().sum().log() for i in rows]
    return -sum(of_images + of_texts) / (2 * len(image))  # type: ignore[return-value, arg-type]


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(value) if g is None else g for g, value in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_papers(name: str) -> None:
    inputs = make_inputs(9)
    ours, theirs = call(name, *inputs)["loss"], by_hand(name, *inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_open_clip(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(33, dtype)
    image, text, scale, bias = inputs
    ours = call(name, *inputs)["loss"]
    theirs = SigLipLoss()(image, text, scale, bias) if name == "siglip" else ClipLoss()(image, text, scale)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_around_changes_nothing(name: str) -> None:
    inputs = [value.detach().bfloat16() if value.ndim else value for value in make_inputs(33, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(name, *inputs)["loss"]
    exact = call(name, *(value.double() for value in inputs))["loss"]
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.double(), exact, rtol=0, atol=2e-6)


def share_of_a_process(name: str, rows: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute this rank's loss on its slice; return the loss, the gradients of all inputs and the accuracy."""
    rank, world_size = distributed.rank(), distributed.world_size()
    inputs = make_inputs(rows)
    image, text, scale, bias = inputs
    mine = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
    result = call(name, image[mine], text[mine], scale, bias)
    return result["loss"].detach(), gradients(result["loss"], inputs), result["accuracy"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_several_processes_equal_one(name: str, world_size: int, tmp_path: Path) -> None:
    loss, expected, accuracy = share_of_a_process(name, 12)
    parts = in_processes(world_size, share_of_a_process, tmp_path, name, 12)
    # What DDP does: the mean over the processes, of losses and of gradients.
    mean = torch.stack([part[0] for part in parts]).mean()
    torch.testing.assert_close(mean, loss, rtol=0, atol=1e-12)
    for number, gradient in enumerate(expected):
        found = torch.stack([part[1][number] for part in parts]).mean(dim=0)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack([part[2] for part in parts]).mean(), accuracy)


def test_accuracy_counts_right_picks() -> None:
    image = torch.eye(4)
    text = image[[0, 1, 3, 2]]
    scale = torch.tensor(10.0)
    assert InfoNCE(init_scale=1, max_scale=100)(image, image, scale=scale)["accuracy"] == 1
    assert InfoNCE(init_scale=1, max_scale=100)(image, text, scale=scale)["accuracy"] == 0.5


def test_clamp_keeps_the_scale_in_its_limits() -> None:
    loss = InfoNCE(init_scale=14, max_scale=50)
    for start, expected in ((10.0, math.log(50)), (-1.0, 0.0), (2.0, 2.0)):
        scale = torch.nn.Parameter(torch.tensor(start))
        loss.clamp_(scale)
        assert float(scale) == pytest.approx(expected)


@pytest.mark.parametrize("init_scale", [0.5, 101.0])
def test_scale_out_of_range(init_scale: float) -> None:
    with pytest.raises(UserError, match=r"loss.init_scale=.*: must be from 1 to loss.max_scale=100"):
        InfoNCE(init_scale=init_scale, max_scale=100)
