"""The average of the weights: equal to a loop in float64, exact to swap in and out, and chosen by a key."""

import json
import math
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUICK, read_sample, write_tar
from faulty import hash_tree, run
from omegaconf import DictConfig
from test_sources import check_same
from torch import Tensor

from clipmini import train
from clipmini.checkpoints.disk import list_checkpoints, load_checkpoint
from clipmini.cli import main
from clipmini.config import compose
from clipmini.ema import WeightAverage
from clipmini.errors import UserError
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation_callback import Evaluation
from clipmini.sources import load_model


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_equals_a_loop(decay: float, warmup: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), torch.nn.BatchNorm2d(4))
    model[0].bias.requires_grad_(False)
    average = WeightAverage(decay=decay, warmup=warmup)
    average.start(model)
    assert list(average.averages) == ["0.weight", "1.weight", "1.bias"]  # no buffer, and nothing that is locked
    expected = {name: value.detach().double() for name, value in model.named_parameters() if value.requires_grad}
    generator, updates = torch.Generator().manual_seed(0), 0
    for step in range(60):
        bad = step % 7 == 3
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(torch.randn(value.shape, generator=generator))
        before = hash_tree(average.averages)
        average.update(model, torch.tensor(bad))
        assert (hash_tree(average.averages) == before) == bad
        if not bad:
            d = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
            updates += 1
            for name, value in expected.items():
                value.mul_(d).add_(model.get_parameter(name).detach().double(), alpha=1 - d)
    assert int(average.updates) == updates == 51
    for name, value in expected.items():
        torch.testing.assert_close(average.averages[name].double(), value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, math.nan])
def test_decay_out_of_its_range(decay: float) -> None:
    with pytest.raises(UserError, match="ema.decay=.* must be above 0 and below 1, or null"):
        WeightAverage(decay=decay, warmup=False)


def test_half_precision_weights_are_averaged_in_fp32_and_come_back() -> None:
    model = torch.nn.Linear(3, 2).bfloat16()
    average = WeightAverage(decay=0.999, warmup=False)
    average.start(model)
    own = hash_tree(model.state_dict())
    for _ in range(10):
        average.averages["weight"].add_(1e-4)
    average.update(model, torch.tensor(False))
    with average.applied(model):
        assert torch.equal(model.weight, average.averages["weight"].bfloat16())
    assert average.averages["weight"].dtype == torch.float32 and hash_tree(model.state_dict()) == own


class Watch(pl.Callback):
    """Keeps all weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.module: pl.LightningModule | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.module = module
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.weights.append({name: value.detach().clone() for name, value in module.named_parameters()})


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("held_out") / "val.tar", read_sample("train/fluent-00000.tar", 20))


def test_a_run_keeps_evaluates_and_exports_the_average(
    tiny_json: Path,
    shards: Path,
    classification_set: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[str] = []
    evaluate = Evaluator.run

    def spy(self: Evaluator, encoder, *arguments):  # type: ignore[no-untyped-def]
        judged.append(hash_tree(encoder.model.state_dict()))
        return evaluate(self, encoder, *arguments)

    monkeypatch.setattr(Evaluator, "run", spy)
    overrides = [
        *(f"model.name={tiny_json}", f"data.train={shards}", f"data.val={held_out}", "steps=5"),
        *("ema.decay=0.8", "evaluation.weights=average", f"evaluation.datasets=[{classification_set}]"),
        *("evaluation.every_n_steps=2", "evaluation.best_metric=val/loss", "evaluation.bootstrap_resamples=10"),
        "checkpoint.every_n_steps=2",
    ]
    watch, directory = Watch(), tmp_path / "run"
    faults = {3: (0, "nan loss")}
    found = run(directory, faults, *overrides, more=(watch,))
    assert len(judged) == 3
    last = judged[-1]
    plain = run(tmp_path / "plain", faults, *overrides[:2], "steps=5")
    for ours, theirs in zip(found["states"], plain["states"], strict=True):
        assert ours["weights"] == theirs["weights"]  # averaging and judging change nothing of the run

    expected = {name: value.double() for name, value in watch.weights[0].items()}
    averages = []
    for step, weights in enumerate(watch.weights[1:], 1):
        for name, value in expected.items():
            if step not in faults:
                value.mul_(0.8).add_(weights[name].double(), alpha=1 - 0.8)
        averages.append({name: value.clone() for name, value in expected.items()})
    checkpoint = load_checkpoint(list_checkpoints(directory / "checkpoints")[-1])
    assert checkpoint["average_updates"] == 4
    for name, value in checkpoint["average"].items():
        torch.testing.assert_close(value.double(), averages[-1][f"model.{name}"], rtol=0, atol=1e-6)
        assert torch.equal(checkpoint["state_dict"][f"model.{name}"], watch.weights[-1][f"model.{name}"])

    averaged, trained = load_model(str(directory), weights="average"), load_model(str(directory))
    assert (averaged.weights, trained.weights) == ("step 5 average", "step 5")
    assert torch.equal(averaged.model.text_projection, checkpoint["average"]["text_projection"])
    assert torch.equal(trained.model.text_projection, watch.weights[-1]["model.text_projection"])
    assert not torch.equal(averaged.model.text_projection, trained.model.text_projection)
    assert last == hash_tree(averaged.model.state_dict()) and len(set(judged[:3])) == 3
    check_same(load_model(str(directory / "model_average")).model, averaged.model)
    check_same(load_model(str(directory / "model")).model, trained.model)
    rows = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {"run average"}

    best = load_checkpoint(directory / "checkpoints/best.ckpt")  # trained weights where they belong
    weights = watch.weights[best["global_step"]]
    assert torch.equal(best["state_dict"]["model.text_projection"], weights["model.text_projection"])

    # A complete run does nothing again, and its average is there still.
    before = (directory / "model_average/open_clip_model.safetensors").read_bytes()
    train.train(train_config(directory, *overrides))
    assert (directory / "model_average/open_clip_model.safetensors").read_bytes() == before
    assert hash_tree(load_model(str(directory), weights="average").model.state_dict()) == judged[-1] == last
    shutil.rmtree(directory / "checkpoints")
    assert load_model(str(directory), weights="average").weights == "model_average"


def train_config(directory: Path, *overrides: str) -> DictConfig:
    return compose("train", [*QUICK, "schedule=constant", f"paths.run={directory}", *overrides])


def test_an_evaluation_that_raises_leaves_the_trained_weights(
    tiny_json: Path, shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such luck")

    watch = Watch()
    overrides = [f"model.name={tiny_json}", f"data.train={shards}", f"data.val={held_out}", "ema.decay=0.5"]
    more = ("evaluation.every_n_steps=3", "evaluation.weights=average")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no such luck"):
        patch.setattr(Evaluation, "measure", fail)
        run(tmp_path / "run", {}, *overrides, *more, more=(watch,))
    assert len(watch.weights) in (3, 4) and watch.module is not None
    reference = Watch()
    run(tmp_path / "plain", {}, *overrides[:2], "steps=3", more=(reference,))
    for name, value in watch.module.named_parameters():
        assert torch.equal(value, reference.weights[3][name]), name


def test_turned_on_and_off_in_a_run(
    tiny_json: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [f"model.name={tiny_json}", f"data.train={shards}"]
    directory = tmp_path / "run"
    run(directory, {}, *overrides, "steps=1")
    with pytest.raises(UserError, match="ema.decay=null"):
        load_model(str(directory), weights="average")
    train.train(train_config(directory, *overrides, "steps=1", "ema.decay=0.5"))  # it is complete: no step to average
    check_same(load_model(str(directory / "model_average")).model, load_model(str(directory)).model)
    messages = []
    for steps, more in ((2, "ema.decay=0.5"), (3, "ema.decay=null")):
        capsys.readouterr()
        run(directory, {}, *overrides, f"steps={steps}", more)
        messages.append(capsys.readouterr().out)
        assert (directory / "model_average").exists() == (steps == 2)  # none is left of other weights
    assert "the average of weights begins at this checkpoint, which has none" in messages[0]
    assert "the average of weights of this checkpoint is given up" in messages[1]


def test_wrong_choices(
    tiny_json: Path, shards: Path, classification_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = [f"model.name={tiny_json}", f"data.train={shards}"]
    for overrides, message in (
        (["evaluation.weights=average"], "evaluation.weights=average: there is no average with ema.decay=null"),
        (["evaluation.weights=mean"], "evaluation.weights=mean: is one of trained, average"),
        (["ema.decay=2"], "ema.decay=2.0: must be above 0 and below 1"),
        (["bad_steps.max_in_a_row=0"], "bad_steps.max_in_a_row=0: must be 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(train_config(tmp_path / "run", *common, *overrides))
    run(tmp_path / "run", {}, *common, "steps=1")
    datasets = f"datasets=[{classification_set}]"
    for command in (["evaluate", datasets], ["export", f"output={tmp_path}/out"]):
        for model, weights, message in (
            (tmp_path / "run", "average", r"weights=average: there is none in it, the run had ema.decay=null"),
            (tmp_path / "run/model", "average", "weights=average: is for runs and their checkpoints, not"),
            (tmp_path / "run", "mean", "weights=mean: is one of trained, average"),
        ):
            assert main([*command, f"model={model}", f"weights={weights}"]) == 2
            assert message in capsys.readouterr().err


def test_commands_take_the_average(tiny_json: Path, shards: Path, classification_set: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", {}, f"model.name={tiny_json}", f"data.train={shards}", "ema.decay=0.5", "steps=3")
    for weights in ("trained", "average"):
        arguments = [f"model={tmp_path / 'run'}", f"weights={weights}"]
        more = [f"output={tmp_path}/r.jsonl", "bootstrap_resamples=10", "cache=null", "num_workers=0"]
        assert main(["evaluate", f"datasets=[{classification_set}]", *more, *arguments]) == 0
        assert main(["export", f"output={tmp_path}/{weights}", *arguments]) == 0
        source = load_model(str(tmp_path / "run"), weights=weights)
        check_same(load_model(str(tmp_path / weights)).model, source.model)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["run step 3", "run step 3 average"]
    assert rows[0]["weights"] != rows[1]["weights"]
