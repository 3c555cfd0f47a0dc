"""The step: micro-batches and several processes give the gradient of the whole batch on one."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_processes, make_guard, make_objective
from contrast import LOSSES, MODES, peak_bytes
from test_model import make_model, write_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipmini import distributed
from clipmini.data.captions import caption_ids
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.model import width_before_projection
from clipmini.module import ClipModule
from clipmini.tiles import Duplicates


def make_module(
    path: str,
    *,
    micro_batch: int | None = None,
    loss: str = "infonce",
    duplicates: Duplicates = "ignore",
    lock_image: bool = False,
    teacher_width: int | None = None,
    **changes: Any,
) -> ClipModule:
    """Make a module in float64, so that sums in another order are equal to 1e-12; changes are of the loss."""
    objective = make_objective(loss, duplicates=duplicates, **changes)
    model = make_model(path, init_bias=objective.init_bias, lock_image=lock_image).train()
    if objective.needs_head:
        objective.add_head(width_before_projection(model))
    if teacher_width is not None:
        objective.add_teacher(model.architecture["embed_dim"], teacher_width, 30.0)
    module = ClipModule(
        model,
        objective,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda optimizer, total_steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        total_steps=3,
        micro_batch=micro_batch,
        guard=make_guard(),
        average=None,
    )
    return module.double()


def make_pictures(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator)


def make_batch(rows: int, size: int = 32) -> dict[str, Tensor]:
    """Make a batch in which every third caption is the first one, and half of the pairs have a hard negative."""
    image = make_pictures(rows, size, 1)
    captions = [f"picture number {row if row % 3 else 0}" for row in range(rows)]
    negatives = [f"no picture number {row}" if row % 2 else "" for row in range(rows)]
    tokenize = ClipTokenizer(24)
    batch = {"image": image, "text": tokenize(captions), "text_id": caption_ids(captions)}
    return {**batch, "negative_text": tokenize(negatives), "negative_text_id": caption_ids(negatives)}


def gradients(module: ClipModule, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(seed)
    module.training_step(batch, 0).backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
@pytest.mark.parametrize("duplicates", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_equal_the_whole_batch(
    micro_batch: int, duplicates: Duplicates, loss: str, tiny_json: Path
) -> None:
    batch = make_batch(12)
    expected = gradients(make_module(str(tiny_json), loss=loss, duplicates=duplicates), batch)
    assert any(value.abs().max() > 1e-4 for value in expected.values())
    module = make_module(str(tiny_json), micro_batch=micro_batch, loss=loss, duplicates=duplicates)
    assert_equal(gradients(module, batch), expected)


RANDOM_TOWERS = {
    "patch dropout": {"patch_dropout": 0.5},
    "dropout and stochastic depth": {
        "timm_model_name": "test_vit",
        "image_size": 160,
        "timm_drop": 0.3,
        "timm_drop_path": 0.5,
        "patch_dropout": 0.5,
    },
}


def gradients_of_a_random_tower(path: str) -> list[dict[str, Tensor]]:
    """Return the gradients of this rank's pairs: micro-batches computed twice, held in memory, with other numbers."""
    module = make_module(path, micro_batch=5)
    size = module.model.visual.image_size[0]
    batch = slice_of_a_process(make_batch(24, size))
    found = [gradients(module, batch)]
    module.embed = functools.partial(embed_in_memory, module)  # type: ignore[method-assign]
    return [*found, gradients(module, batch), gradients(module, batch, seed=1)]


def embed_in_memory(module: ClipModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    starts = range(0, len(batch["image"]), 5)
    parts = [module.encode({name: rows[start : start + 5] for name, rows in batch.items()}) for start in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tower", RANDOM_TOWERS)
def test_micro_batches_replay_random_numbers(tower: str, world_size: int, tmp_path: Path) -> None:
    path = write_json(tmp_path / "model.json", vision_cfg=RANDOM_TOWERS[tower])
    for found, expected, other in in_processes(world_size, gradients_of_a_random_tower, tmp_path, path):
        assert_equal(found, expected)
        assert any((other[name] - value).abs().max() > 1e-6 for name, value in expected.items())


def test_micro_batches_hold_the_activations_of_one_at_a_time(tmp_path: Path) -> None:
    vision = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 4}
    path, batch, peaks = write_json(tmp_path / "m.json", vision_cfg=vision), make_batch(256, 64), []
    for micro_batch in (None, 32):
        module = make_module(path, micro_batch=micro_batch).float()
        module.training_step(batch, 0).backward()  # gradients are there from now on, and do not count

        def step(module: ClipModule = module) -> None:
            module.zero_grad(set_to_none=False)
            module.training_step(batch, 0).backward()

        peaks.append(peak_bytes(step))
    assert 0 < peaks[1] <= 0.2 * peaks[0]


def slice_of_a_process(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.chunk(distributed.world_size())[distributed.rank()] for name, values in batch.items()}


def gradients_under_ddp(module: ClipModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that DDP leaves on this rank; it raises where a parameter has none."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor:
            return self.module.training_step(batch, 0)

    step: nn.Module = DistributedDataParallel(Step()) if distributed.is_distributed() else Step()
    for _ in range(2):
        module.zero_grad()
        step().backward()
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def steps_of_a_process(path: str, micro_batch: int | None, loss: str, duplicates: Duplicates) -> dict[str, Tensor]:
    """Take 3 clipped steps of SGD on this rank's slice of a batch; return the parameters."""
    module = make_module(path, micro_batch=micro_batch, loss=loss, duplicates=duplicates)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = slice_of_a_process(make_batch(12))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor:
            return self.module.training_step(batch, 0)

    step: torch.nn.Module = Step()
    if distributed.is_distributed():
        step = DistributedDataParallel(step)
    for _ in range(3):
        optimizer.zero_grad()
        step().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    return {name: value.detach() for name, value in module.named_parameters()}


def all_steps(path: str, micro_batches: list[int | None]) -> dict[tuple, dict[str, Tensor]]:
    """Take the steps with each loss and each way with equal captions."""
    kinds = itertools.product(micro_batches, LOSSES, MODES)
    return {kind: steps_of_a_process(path, *kind) for kind in kinds}


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 4), (3, 3)])  # the last one of a process is smaller
def test_several_processes_equal_one(world_size: int, micro_batch: int, tiny_json: Path, tmp_path: Path) -> None:
    path, micro_batches = str(tiny_json), [None, micro_batch]
    expected = all_steps(path, [None])
    for found in in_processes(world_size, all_steps, tmp_path, path, micro_batches):
        assert len(found) == len(expected) * len(micro_batches)
        for (_, *kind), parameters in found.items():
            assert_equal(parameters, expected[(None, *kind)])


def test_micro_batches_of_a_model_with_batch_norm_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": "test_resnet", "image_size": 160})
    assert make_module(path).has_local_batch_norm
    with pytest.raises(UserError, match="micro_batch=4: this model has BatchNorm"):
        make_module(path, micro_batch=4)


def test_micro_batches_of_a_locked_tower_with_batch_norm_are_exact(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": "test_resnet", "image_size": 160})
    batch, found = make_batch(6, 160), []
    for micro_batch in (None, 4):
        module = make_module(path, micro_batch=micro_batch, lock_image=True)
        assert not module.has_local_batch_norm
        found.append(gradients(module, batch))
    assert not any(name.startswith("model.visual.trunk") for name in found[0])
    assert_equal(*found)


def test_step_measures_without_reading_back(tiny_json: Path) -> None:
    module = make_module(str(tiny_json))
    loss = module.training_step(make_batch(4), 0)
    assert set(module.last) == {"loss", "accuracy", "scale", "image_spread", "text_spread"}
    assert not any(value.requires_grad for value in module.last.values())
    torch.testing.assert_close(module.last["loss"], loss.detach())


def test_clipping_keeps_the_norm(tiny_json: Path) -> None:
    module = make_module(str(tiny_json))
    gradients(module, make_batch(4))
    module.zero_grad()
    module.training_step(make_batch(4), 0).backward()
    before = torch.cat([value.grad.flatten() for value in module.parameters() if value.grad is not None]).norm()
    module.configure_gradient_clipping(None, 1e-3)  # type: ignore[arg-type]
    after = torch.cat([value.grad.flatten() for value in module.parameters() if value.grad is not None]).norm()
    torch.testing.assert_close(module.last["grad_norm"], before)
    torch.testing.assert_close(after, torch.tensor(1e-3, dtype=torch.float64), rtol=1e-2, atol=0)
