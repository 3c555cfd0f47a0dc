"""A bad step changes nothing on any process, and is told; too many stop the run."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import QUICK, in_processes, make_guard
from faulty import OPTIMIZERS, hash_tree, run
from forked import run_forked
from test_model import make_model, write_json
from test_module import make_batch, make_module
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from clipmini import distributed
from clipmini.checkpoints.disk import list_checkpoints, load_checkpoint
from clipmini.ema import WeightAverage
from clipmini.errors import UserError
from clipmini.guard import Spikes
from clipmini.module import ClipModule

FAULTS = {1: (1, "nan loss"), 3: (0, "inf loss"), 4: (1, "nan gradient"), 6: (1, "nan features")}


def options(tiny_json: Path, shards: Path) -> list[str]:
    return [f"model.name={tiny_json}", f"data.train={shards}", "data.shuffle_streams=3", "data.shuffle_block=8"]


# What a bad step changes


def run_each_optimizer(directory: Path, arguments: list[str]) -> dict[str, tuple[dict, dict]]:
    """Train with bad steps, and with the same steps left out by hand."""
    left_out = dict.fromkeys(FAULTS, (None, "left out"))
    found = {}
    for name, overrides in OPTIMIZERS.items():
        both = [*arguments, *overrides, "ema.decay=0.9"]
        place = directory / name.replace(",", "")
        found[name] = run(place / "bad", FAULTS, *both), run(place / "out", left_out, *both)
    return found


@pytest.mark.parametrize("world_size", [2])
def test_nan_one_rank_skips_all(world_size: int, tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    ranks = in_processes(world_size, run_each_optimizer, tmp_path, tmp_path, options(tiny_json, shards))
    for found in ranks:
        for name, (bad, out) in found.items():
            states = bad["states"]
            assert len(states) == 8 and bad["total"] == 4 and bad["in_a_row"] == 0, name
            for step in range(1, 8):
                is_same = {part: states[step][part] == states[step - 1][part] for part in states[step]}
                has_state = name != "SGD"  # which has none
                expected = {"weights": step in FAULTS, "optimizer": step in FAULTS or not has_state}
                assert is_same == {**expected, "average": step in FAULTS}, (name, step)
            for part in ("weights", "optimizer"):
                assert states[-1][part] == out["states"][-1][part], (name, part)
            assert states == ranks[0][name][0]["states"], name  # the same on all processes

    messages = ranks[0]["SGD"][0]["messages"]
    assert messages == ranks[0]["AdamW, fused"][0]["messages"] and not ranks[1]["SGD"][0]["messages"]
    expected_reasons = [
        (1, "the loss of rank 1 not finite", "0 to 15", 1),
        (3, "the loss of rank 0 not finite", "32 to 47", 2),
        (4, "its gradient is not finite", "48 to 63", 3),
        (6, "features of rank 1 not finite", "80 to 95", 4),
    ]
    for message, (step, reason, positions, total) in zip(messages, expected_reasons, strict=True):
        assert message.startswith(f"step {step} was skipped and changed nothing: {reason}; "), message
        assert f"positions {positions} of data.train (data.ledger=true" in message
        assert message.endswith(f"; {total} bad steps so far")


def take_step(module: ClipModule, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Do what Lightning does in a step."""
    optimizer.zero_grad()
    module.training_step(batch, 0).backward()
    module.configure_gradient_clipping(optimizer, 1.0)
    optimizer.step()
    finish(module, optimizer)


def finish(module: ClipModule, optimizer: torch.optim.Optimizer) -> None:
    module.loss.clamp_(module.model.logit_scale)
    module.guard.finish(optimizer)


OF_TORCH = "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD Muon NAdam RAdam RMSprop Rprop SGD".split()
OF_TORCH = [name for name in OF_TORCH if hasattr(torch.optim, name)]  # Muon came with 2.9
FUSED = ["Adagrad", "Adam", "AdamW", "SGD"]


@pytest.mark.parametrize(("name", "fused"), [(name, False) for name in OF_TORCH] + [(name, True) for name in FUSED])
def test_every_optimizer_of_torch_passes_a_bad_step_over(name: str, fused: bool) -> None:
    more = {"fused": True} if fused else {}
    if name == "SGD":
        more |= {"momentum": 0.9, "dampening": 0.1}

    def steps(gradients: list[float]) -> tuple[Tensor, str]:
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) / 7)
        optimizer = getattr(torch.optim, name)([weight], lr=0.1, **more)
        guard = make_guard()
        for gradient in gradients:
            weight.grad = torch.full_like(weight, gradient)
            guard.mark(torch.ones(()), [weight])
            guard.judge(weight.grad.norm())
            before = weight.detach().clone()
            guard.hold(optimizer, has_scaler=False)
            optimizer.step()
            guard.finish(optimizer)
            assert math.isfinite(gradient) or torch.equal(before, weight)
            assert not hasattr(optimizer, "found_inf")
        return weight.detach(), hash_tree(optimizer.state_dict()["state"])

    bad = [math.nan, 0.3, math.inf, -0.2, math.nan, math.nan, 0.4]
    found, expected = steps(bad), steps([gradient for gradient in bad if math.isfinite(gradient)])
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


def test_the_clamp_and_statistics_of_batch_norm_are_put_back(tmp_path: Path) -> None:
    path = write_json(tmp_path / "m.json", vision_cfg={"timm_model_name": "test_resnet", "image_size": 160})
    module = make_module(path)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = make_batch(4, 160)
    with torch.no_grad():
        module.model.logit_scale.fill_(7.0)  # beyond the limit: a good step clamps it
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hook = module.model.visual.trunk.conv1.register_forward_hook(lambda *arguments: arguments[2] * torch.nan)
    take_step(module, optimizer, batch)
    after = {name: value.clone() for name, value in module.state_dict().items()}
    assert len(module.batch_norms) > 3 and hash_tree(after) == hash_tree(before)
    hook.remove()
    take_step(module, optimizer, batch)
    good = module.state_dict()
    assert good["model.logit_scale"] == pytest.approx(math.log(100))
    changed = [name for name in good if "running" in name and not torch.equal(good[name], before[name])]
    assert len(changed) == 2 * len(module.batch_norms) and all(good[name].isfinite().all() for name in good)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused: bool, tiny_json: Path) -> None:
    def train(scale: float | None, bad: set[int]) -> tuple[ClipModule, torch.optim.Optimizer, list[float]]:
        module = make_module(str(tiny_json)).float()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        module.scaler = None if scale is None else scaler
        scales = []
        for step in range(4):
            optimizer.zero_grad()
            loss = module.training_step(make_batch(4), 0)
            scaler.scale(loss * (torch.nan if step in bad else 1)).backward()
            if scale is not None and not fused:
                scaler.unscale_(optimizer)  # as Lightning does
            before = hash_tree(module.state_dict())
            module.configure_gradient_clipping(optimizer, 1e-2)
            scaler.step(optimizer)
            scaler.update()
            finish(module, optimizer)
            assert (hash_tree(module.state_dict()) == before) == (step in bad)
            scales.append(scaler.get_scale())
        module.guard.read(4)
        return module, optimizer, scales

    scaled, optimizer, scales = train(2.0**14, {0, 2})
    plain, expected, _ = train(None, {0, 2})
    assert scaled.guard.total == plain.guard.total == 2
    assert scales == [2.0**13, 2.0**13, 2.0**12, 2.0**12]  # its own skipping, and that of the guard
    # A clip of scaled gradients would be another step.
    torch.testing.assert_close(scaled.last["grad_norm"], plain.last["grad_norm"], rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert {float(state["step"]) for state in expected.state.values()} == {2.0}


def shard_and_step(kinds: list[str]) -> list[dict[str, Tensor]]:
    """Train a sharded (FSDP2) and a whole model on the same gradients, with bad steps on rank 1."""
    found = []
    for is_sharded in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4))
        if is_sharded:
            fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (distributed.world_size(),)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        guard, average = make_guard(), WeightAverage(decay=0.5, warmup=True)
        average.start(model)
        for step, kind in enumerate(kinds):
            optimizer.zero_grad()
            loss = model(torch.arange(4.0) + step).square().mean()
            if kind == "bad":
                loss = loss * (torch.nan if distributed.rank() == 1 or not is_sharded else 1)
            guard.mark(loss, [loss]).backward()
            norm = torch.nn.utils.get_total_norm(value.grad for value in model.parameters())
            guard.judge(distributed.full(norm))
            guard.hold(optimizer, has_scaler=False)
            optimizer.step()
            guard.finish(optimizer)
            average.update(model, guard.bad)
        with average.applied(model):
            held = {
                f"held {name}": distributed.full(value.detach()).clone() for name, value in model.named_parameters()
            }
        values = {name: distributed.full(value.detach()) for name, value in model.named_parameters()}
        again = WeightAverage(decay=0.5, warmup=True)
        again.load_state_dict(average.state_dict())  # whole, for a checkpoint
        again.start(model)
        for name, value in average.averages.items():
            assert torch.equal(distributed.local(again.averages[name]), distributed.local(value))
        averages = {f"average {name}": value for name, value in average.state_dict()["average"].items()}
        found.append({**values, **averages, **held})
    return found


def test_weights_in_shards(tmp_path: Path) -> None:
    kinds = ["bad", "good", "bad", "good", "good", "bad"]
    for sharded, whole in in_processes(2, shard_and_step, tmp_path, kinds):
        torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-6)
        for name, value in sharded.items():
            assert value.isfinite().all(), name
            if name.startswith("held "):
                assert torch.equal(value, sharded[name.replace("held", "average")])
                assert not torch.equal(value, sharded[name.removeprefix("held ")])


# Counting, stopping, resuming


def test_too_many_in_a_row_stop_the_run(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    model = make_model(str(tiny_json))
    with torch.no_grad():
        model.visual.proj[3, 5] = math.nan
    torch.save(model.state_dict(), tmp_path / "broken.pt")
    overrides = [*QUICK, *options(tiny_json, shards), "name=run", "steps=50", "bad_steps.max_in_a_row=5"]
    result = run_forked(["train", *overrides, f"model.pretrained={tmp_path / 'broken.pt'}"], tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr, result.stderr
    shown = re.sub(r"\s+", " ", result.stdout + result.stderr)
    assert "5 steps in a row until step 5 had a loss or gradient that cannot be used" in shown
    assert "bad_steps.max_in_a_row=5: they changed nothing" in shown and "a lower optimizer.lr" in shown
    kept = list_checkpoints(tmp_path / "outputs/run/checkpoints")
    assert [path.stem for path in kept] == ["step-00000002", "step-00000004"]
    assert load_checkpoint(kept[-1])["bad_steps"]["in_a_row"] == 4


def test_too_many_in_a_row_stop_all_processes(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    overrides = [*QUICK, *options(tiny_json, shards), "steps=50", "bad_steps.max_in_a_row=3", *OPTIMIZERS["SGD"]]
    result = run_forked(["train", *overrides, "name=run", "optimizer.lr=1e30"], tmp_path, processes=2)
    assert result.returncode == 2 and result.stderr.count("3 steps in a row until step") == 2, result.stderr
    kept = list_checkpoints(tmp_path / "outputs/run/checkpoints")
    assert kept and all(value.isfinite().all() for value in load_checkpoint(kept[-1])["state_dict"].values())


def read_bad_steps(directory: Path) -> list[tuple[int, float]]:
    with open(directory / "metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row["train/bad_steps"])) for row in csv.DictReader(file)]


def test_a_resumed_run_is_the_uninterrupted_one(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    faults = {2: (0, "nan loss"), 6: (0, "spike"), 7: (0, "nan loss"), 8: (0, "inf loss"), 10: (0, "spike")}
    overrides = [
        *options(tiny_json, shards),
        *("trainer.log_every_n_steps=3", "ema.decay=0.9", "ema.warmup=true", "model.patch_dropout=0.5"),
        *("bad_steps.skip_spikes=true", "bad_steps.window=3", "bad_steps.sigmas=50", "model.patch_dropout=null"),
    ]
    whole = run(tmp_path / "whole", faults, *overrides, "steps=12")
    parts = [run(tmp_path / "parts", faults, *overrides, f"steps={steps}") for steps in (4, 7, 12)]
    assert whole["total"] == parts[-1]["total"] == 5
    assert [part["in_a_row"] for part in parts] == [0, 2, 0]
    assert whole["states"][1:] == [state for part in parts for state in part["states"][1:]]
    (spikes,) = [message for message in whole["messages"] if message.startswith("step 6 ")]
    assert "the norm of its gradient is a spike" in spikes
    assert any(
        message.startswith("steps 7 to 8 were skipped") and "96 to 127" in message for message in whole["messages"]
    )
    a, b = (load_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states", "average", "average_updates", "bad_steps"):
        assert hash_tree(dict(enumerate([a[key]]))) == hash_tree(dict(enumerate([b[key]]))), key
    assert read_bad_steps(tmp_path / "whole") == [(3, 1), (6, 2), (9, 4), (12, 5)]
    assert set(read_bad_steps(tmp_path / "whole")) <= set(read_bad_steps(tmp_path / "parts"))


def test_without_a_monitor_bad_steps_still_stop_the_run(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    faults = dict.fromkeys(range(2, 9), (0, "nan loss"))
    overrides = [*options(tiny_json, shards), "callbacks.monitor=null", "steps=9", "trainer.log_every_n_steps=4"]
    with pytest.raises(UserError, match="3 steps in a row until step 4 .*bad_steps.max_in_a_row=3"):
        run(tmp_path / "run", faults, *overrides, "bad_steps.max_in_a_row=3")


# Spikes


def test_spikes_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.empty(600).log_normal_(0, 0.1, generator=generator)
    norms[torch.randperm(600, generator=generator)[:60]] *= 3
    norms[[5, 70, 300]] = torch.tensor([math.nan, math.inf, math.nan])
    spikes, kept, found, expected = Spikes(window=32, sigmas=4.0), [], [], []
    for norm in norms:
        found.append(bool(spikes.find(norm)))
        last, value = kept[-32:], float(norm)
        is_spike = False
        if len(last) == 32 and math.isfinite(value):
            mean = sum(last) / 32
            is_spike = value > mean + 4.0 * math.sqrt(sum((x - mean) ** 2 for x in last) / 31)
        if math.isfinite(value) and not is_spike:
            kept.append(value)
        expected.append(is_spike)
    assert found == expected and 20 < sum(found) < 100 and not any(found[:32])


def test_equal_norms_are_no_spikes() -> None:
    spikes = Spikes(window=128, sigmas=6.0)
    assert not any(bool(spikes.find(torch.tensor(0.1))) for _ in range(400))


def test_limit_out_of_its_range() -> None:
    with pytest.raises(UserError, match="bad_steps.max_in_a_row=0: must be 1 or more"):
        make_guard(max_in_a_row=0)
