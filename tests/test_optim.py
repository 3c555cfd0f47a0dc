"""Which parameters decay, and the learning rate at each step."""

from pathlib import Path

import open_clip
import pytest
import torch
from test_model import make_model

from clipmini import optim
from clipmini.errors import UserError


def spared_by_open_clip(name: str, parameter: torch.Tensor) -> bool:
    """Say what `open_clip_train.main` (3.3.0) says of its AdamW."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


@pytest.mark.parametrize(
    "name",
    ["ViT-B-32-quickgelu", "RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base", "swin_base_patch4_window7_224"],
)
def test_what_decays_is_what_decays_in_open_clip(name: str) -> None:
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    decayed, rest = optim.parameter_groups([model])
    assert rest["weight_decay"] == 0 and "weight_decay" not in decayed
    expected = {True: [], False: []}
    for key, parameter in model.named_parameters():
        expected[spared_by_open_clip(key, parameter)].append(parameter)
    assert list(map(id, decayed["params"])) == list(map(id, expected[False]))
    assert list(map(id, rest["params"])) == list(map(id, expected[True]))


def test_frozen_parameters_are_left_out(tiny_json: Path) -> None:
    model = make_model(str(tiny_json), lock_image=True)
    trained = [parameter for group in optim.parameter_groups([model]) for parameter in group["params"]]
    frozen = {id(parameter) for parameter in model.visual.parameters()}
    assert trained and not any(id(parameter) in frozen for parameter in trained)


def rates(schedule: str, steps: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = getattr(optim, schedule)(optimizer, total_steps=steps, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_cosine() -> None:
    values = rates("cosine", 100, warmup_steps=10, warmup_fraction=0.5, final_fraction=0.1)
    assert values[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert values[10] == pytest.approx(2.0)
    assert values[55] == pytest.approx((2.0 + 0.2) / 2)  # half way down
    assert values[99] == pytest.approx(0.2, abs=0.01)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_warmup_is_the_shorter_of_two() -> None:
    assert optim.warmup_length(1000, 2000, 0.05) == 50
    assert optim.warmup_length(100_000, 2000, 0.05) == 2000
    assert rates("constant", 20, warmup_steps=2000, warmup_fraction=0.2)[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates("cosine", 5, warmup_steps=0, warmup_fraction=0.0, final_fraction=0.0)[0] == 2.0


@pytest.mark.parametrize(("steps", "fraction"), [(-1, 0.5), (10, 1.0), (10, -0.1)])
def test_warmup_out_of_range(steps: int, fraction: float) -> None:
    with pytest.raises(UserError, match="schedule.warmup_steps"):
        optim.warmup_length(100, steps, fraction)
