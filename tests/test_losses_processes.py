"""Losses on several processes against one: values, gradients and accuracies, and what they refuse together."""

from pathlib import Path

import pytest
import torch
from conftest import in_processes
from contrast import LOSSES, MODES, call, gradients, make_inputs
from torch import Tensor

from clipmini import distributed
from clipmini.errors import UserError

PER_PAIR = ("image", "text", "ids", "negative", "negative_ids")
ROWS = 12


def share_of_a_process(name: str, duplicates: str, negatives: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute this rank's loss on its slice; return the loss, the gradients of all inputs and the accuracy."""
    inputs = make_inputs(ROWS, negatives=negatives)
    part = ROWS // distributed.world_size()
    mine = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
    here = {key: value[mine] if key in PER_PAIR else value for key, value in inputs.items()}
    loss, accuracy = call(name, here, duplicates=duplicates, block_size=5)
    return loss.detach(), gradients(loss, inputs), accuracy


def all_shares() -> dict[tuple[str, str, bool], tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Compute each kind of loss once."""
    kinds = [(name, duplicates, negatives) for name in LOSSES for duplicates in MODES for negatives in (False, True)]
    return {kind: share_of_a_process(*kind) for kind in kinds}


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_equal_one(world_size: int, tmp_path: Path) -> None:
    parts = in_processes(world_size, all_shares, tmp_path)
    for kind, (loss, expected, accuracy) in all_shares().items():
        found = [part[kind] for part in parts]
        # What DDP does: the mean over the processes, of losses and of gradients.
        mean = torch.stack([part[0] for part in found]).mean()
        torch.testing.assert_close(mean, loss, rtol=0, atol=1e-12)
        for name, gradient in expected.items():
            mean = torch.stack([part[1][name] for part in found]).mean(dim=0)
            torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-12)
            if name == "scale":
                assert abs(mean / gradient - 1) <= 1e-9
        torch.testing.assert_close(torch.stack([part[2] for part in found]).mean(), accuracy)


def refusals_of_a_process(name: str) -> list[str]:
    few, many = make_inputs(4, negatives=True), make_inputs(6, negatives=True)
    mine = few if distributed.rank() == 0 else many
    messages = []
    for inputs in (mine, {**few, **{key: mine[key] for key in ("negative", "negative_ids")}}):
        with pytest.raises(UserError) as error:
            call(name, inputs)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_are_refused_on_every_process(name: str, tmp_path: Path) -> None:
    limit = "must be as many on each, batch_size divided by the number of processes"
    expected = [f"the processes have [4, 6] pairs: {limit}", f"the processes have [4, 6] hard negatives: {limit}"]
    assert in_processes(2, refusals_of_a_process, tmp_path, name) == [expected] * 2
