"""The step: micro-batches and several processes give the gradient of the whole batch on one."""

from pathlib import Path

import pytest
import torch
from conftest import in_processes
from test_model import make_model, write_json
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clipmini import distributed
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.losses import InfoNCE, SigLIP
from clipmini.module import ClipModule


def make_module(path: str, *, micro_batch: int | None = None, loss: str = "infonce") -> ClipModule:
    """Make a module in float64, so that sums in another order are equal to 1e-12."""
    losses = {
        "infonce": InfoNCE(init_scale=14.0, max_scale=100.0),
        "siglip": SigLIP(init_scale=10.0, init_bias=-10.0, max_scale=100.0),
    }
    module = ClipModule(
        make_model(path, init_bias=losses[loss].init_bias).train(),
        losses[loss],
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda optimizer, total_steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        total_steps=3,
        micro_batch=micro_batch,
    )
    return module.double()


def make_batch(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": image, "text": ClipTokenizer(24)([f"picture number {row}" for row in range(rows)])}


def gradients(module: ClipModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(0)
    module.training_step(batch, 0).backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_micro_batches_equal_the_whole_batch(micro_batch: int, loss: str, tiny_json: Path) -> None:
    batch = make_batch(12)
    expected = gradients(make_module(str(tiny_json), loss=loss), batch)
    assert any(value.abs().max() > 1e-4 for value in expected.values())
    assert_equal(gradients(make_module(str(tiny_json), micro_batch=micro_batch, loss=loss), batch), expected)


def test_micro_batches_replay_random_numbers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"patch_dropout": 0.5})
    batch = make_batch(12)
    module = make_module(path, micro_batch=4)
    found = gradients(module, batch)
    # The same micro-batches, held in memory instead of computed twice.
    module.zero_grad()
    torch.manual_seed(0)
    parts = [module.encode(batch["image"][i : i + 4], batch["text"][i : i + 4]) for i in (0, 4, 8)]
    image, text = (torch.cat(features) for features in zip(*parts, strict=True))
    module.loss(image, text, scale=module.model.logit_scale.exp(), bias=None)["loss"].backward()
    assert_equal(found, {name: value.grad for name, value in module.named_parameters() if value.grad is not None})


def steps_of_a_process(path: str, micro_batch: int | None, loss: str) -> dict[str, Tensor]:
    """Take 3 clipped steps of SGD on this rank's slice of a batch; return the parameters."""
    module = make_module(path, micro_batch=micro_batch, loss=loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rank, world_size = distributed.rank(), distributed.world_size()
    batch = {name: values.chunk(world_size)[rank] for name, values in make_batch(12).items()}

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


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (3, None), (2, 4)])
@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_several_processes_equal_one(
    loss: str, world_size: int, micro_batch: int | None, tiny_json: Path, tmp_path: Path
) -> None:
    expected = steps_of_a_process(str(tiny_json), None, loss)
    for found in in_processes(world_size, steps_of_a_process, tmp_path, str(tiny_json), micro_batch, loss):
        assert_equal(found, expected)


def test_micro_batches_of_a_model_with_batch_norm_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": "test_resnet"})
    assert make_module(path).has_batch_norm
    with pytest.raises(UserError, match="micro_batch=4: this model has BatchNorm"):
        make_module(path, micro_batch=4)


def test_step_measures_without_reading_back(tiny_json: Path) -> None:
    module = make_module(str(tiny_json))
    loss = module.training_step(make_batch(4), 0)
    assert set(module.last) == {"loss", "accuracy", "scale"}
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
