"""NT-Xent against a loop and lightly; several processes against one; what it refuses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes
from contrast import assert_mean_is, peak_bytes
from lightly.loss import NTXentLoss
from torch import Tensor

from clipmini import distributed
from clipmini.errors import UserError
from clipmini.nt_xent import nt_xent

ITEMS = 12


def make_views(items: int, dtype: torch.dtype = torch.float64, *, width: int = 8) -> tuple[Tensor, Tensor]:
    """Make unit features of two views that are a little alike."""
    generator = torch.Generator().manual_seed(0)
    first, noise = (torch.randn(items, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(F.normalize(view, dim=-1).to(dtype).requires_grad_() for view in (first, first + noise))  # type: ignore[return-value]


def make_scale(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(10.0, dtype=dtype).requires_grad_()


def by_hand(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Compute equation 1 of the SimCLR paper for each view of each item."""
    views, items = [*first, *second], len(first)
    total = first.new_zeros(())
    for i, view in enumerate(views):
        similarities = {j: scale * (view @ other) for j, other in enumerate(views) if j != i}
        total = (
            total + torch.stack(list(similarities.values())).exp().sum().log() - similarities[(i + items) % len(views)]
        )
    return total / len(views)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("block_size", [None, 1, 5, 12, 100])
def test_equals_the_paper(block_size: int | None) -> None:
    inputs = (*make_views(ITEMS), make_scale())
    loss, accuracy = nt_xent(*inputs, block_size=block_size)
    expected = by_hand(*inputs)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for found, gradient in zip(gradients(loss, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)
    similarities = torch.cat(inputs[:2]) @ torch.cat(inputs[:2]).T
    picked = similarities.fill_diagonal_(-2).argmax(1)
    assert accuracy == (picked == torch.arange(2 * ITEMS).roll(ITEMS)).float().mean() and 0 < accuracy < 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_lightly(dtype: torch.dtype, tolerance: float) -> None:
    first, second = make_views(133, dtype, width=32)
    units = (F.normalize(view, dim=-1) for view in (first, second))  # as theirs does
    loss, _ = nt_xent(*units, torch.tensor(10.0, dtype=dtype), block_size=50)
    theirs = NTXentLoss(temperature=0.1)(first, second)
    torch.testing.assert_close(loss, theirs, rtol=tolerance, atol=tolerance)
    for found, gradient in zip(gradients(loss, first, second), gradients(theirs, first, second), strict=True):
        torch.testing.assert_close(found, gradient, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_small_differences() -> None:
    assert torch.autograd.gradcheck(lambda *inputs: nt_xent(*inputs, block_size=3)[0], (*make_views(4), make_scale()))


def test_half_precision_is_summed_in_single() -> None:
    first, second = make_views(133, torch.bfloat16, width=32)
    wide = [view.detach().double().requires_grad_() for view in (first, second)]
    loss, _ = nt_xent(first, second, make_scale(torch.float32))
    expected, _ = nt_xent(*wide, make_scale())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    for found, gradient in zip(gradients(loss, first, second), gradients(expected, *wide), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-2, atol=1e-6, check_dtype=False)


def test_memory_is_linear_in_the_batch() -> None:
    def step(items: int) -> int:
        first, second = make_views(items, torch.float32, width=16)
        return peak_bytes(lambda: nt_xent(first, second, make_scale(torch.float32), block_size=64)[0].backward())

    few, many = step(512), step(2048)
    assert many < 5 * few and many < 2048 * 2048 * 4  # a quarter of one matrix of all similarities


def share_of_a_process() -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute this rank's loss on its slice; return the loss, the gradients of all inputs and the accuracy."""
    inputs = (*make_views(ITEMS), make_scale())
    part = ITEMS // distributed.world_size()
    mine = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
    loss, accuracy = nt_xent(inputs[0][mine], inputs[1][mine], inputs[2], block_size=5)
    return loss.detach(), gradients(loss, *inputs), accuracy


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_equal_one(world_size: int, tmp_path: Path) -> None:
    assert_mean_is(share_of_a_process(), in_processes(world_size, share_of_a_process, tmp_path))


def refusal_of_a_process() -> str:
    first, second = make_views(4 + 2 * distributed.rank())
    with pytest.raises(UserError) as error:
        nt_xent(first, second, make_scale())
    return str(error.value)


def test_unequal_batches_are_refused_on_every_process(tmp_path: Path) -> None:
    expected = "the processes have [4, 6] items: must be as many on each, batch_size divided by the number of processes"
    assert in_processes(2, refusal_of_a_process, tmp_path) == [expected] * 2


def test_views_of_different_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"two views have the shapes \[4, 8\] and \[5, 8\]: must be \[items, width\]"):
        nt_xent(torch.zeros(4, 8), torch.zeros(5, 8), make_scale())
