"""Weights in shards: the gradients, the run, its results and its checkpoints are those of whole weights."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import in_processes, make_head
from faulty import as_torchrun
from forked import run_forked
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from runs import final_state, options, run
from safetensors.torch import load_file
from test_distillation import TERMS, make_taught_batch
from test_model import write_json
from test_module import assert_equal, make_batch, make_module
from test_terms import ALL_TERMS, make_views
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from clipmini import distributed
from clipmini.blocks import find_blocks
from clipmini.checkpoints.writer import DurableCheckpointIO
from clipmini.cluster.fsdp import FullyShardedStrategy
from clipmini.lora import add_lora
from clipmini.model import encode_image
from clipmini.module import ClipModule

Tensors = dict[str, Tensor]
PAIRS = 12


def make_cases(directory: Path) -> dict[str, dict[str, Any]]:
    """Write one model of each kind, and say how it is trained."""
    towers = {"vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}
    bert = transformers.BertConfig(
        vocab_size=49408,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,  # its masks are those of a process
        attention_probs_dropout_prob=0.0,
    )
    bert.save_pretrained(directory / "bert")
    hugging_face = {"hf_model_name": str(directory / "bert"), "hf_pooler_type": "mean_pooler"}
    plain = write_json(directory / "plain.json", **towers)
    custom = write_json(directory / "custom.json", **towers)
    Path(custom).write_text(json.dumps({**json.loads(Path(custom).read_text()), "custom_text": True}))
    timm = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160}
    return {
        "plain": {"path": plain},
        "micro-batches": {"path": plain, "micro_batch": 2},
        "siglip": {"path": plain, "loss": "siglip", "micro_batch": 1},
        "custom text": {"path": custom, "micro_batch": 2, "grad_checkpointing": True},
        "timm": {"path": write_json(directory / "timm.json", vision_cfg=timm), "micro_batch": 3},
        "Hugging Face": {"path": write_json(directory / "hf.json", text_cfg=hugging_face), "micro_batch": 2},
        "locked": {"path": plain, "lock_image": True},
        "views": {"path": plain, "micro_batch": 2, "terms": ALL_TERMS, "head": make_head(layers=2)},
        "taught": {"path": plain, "micro_batch": 2, "terms": TERMS, "teacher_width": 5},
        "locked below": {"path": plain, "micro_batch": 2, "frozen": r"resblocks\.0|embedding|conv1"},
        "low rank": {"path": plain, "micro_batch": 2, "has_lora": True},
    }


def make_case(
    *, grad_checkpointing: bool = False, has_lora: bool = False, frozen: str | None = None, **case: Any
) -> tuple[ClipModule, Tensors]:
    module = make_module(**case)
    if grad_checkpointing:
        module.model.set_grad_checkpointing()
    for name, parameter in module.named_parameters() if frozen else ():
        parameter.requires_grad_(not re.search(str(frozen), name))
    if has_lora:
        add_lora(module.model, rank=2, alpha=4.0, image=None, text=["c_fc"])
    if "teacher_width" in case:
        return module, make_taught_batch(PAIRS)
    return module, make_views(PAIRS) if "terms" in case else make_batch(PAIRS, module.model.visual.image_size[0])


def shard(module: ClipModule) -> FullyShardedStrategy:
    size = distributed.world_size()
    module._device_mesh = init_device_mesh("cpu", (size,))
    strategy = FullyShardedStrategy(world_size=size)
    strategy.connect(module)
    module.configure_model()
    module.configure_model()  # as Lightning may
    return strategy


def backward(module: ClipModule, batch: Tensors, strategy: FullyShardedStrategy | None) -> None:
    """Do what Lightning does before the optimizer's step, with this process's part of a batch."""
    part = PAIRS // distributed.world_size()
    rows = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
    module.zero_grad()
    torch.manual_seed(0)
    loss = module.training_step({name: value[rows] for name, value in batch.items()}, 0)
    loss.backward()
    if strategy is not None:
        strategy.post_backward(loss)


def gradients(module: ClipModule) -> Tensors:
    return {
        name: distributed.full(value.grad).clone()
        for name, value in module.named_parameters()
        if value.grad is not None
    }


def count_together(module: ClipModule) -> list[int]:
    """Note, whenever a block runs, how many blocks have whole weights then."""
    blocks, found = find_blocks(module), []

    def note(*_: Any) -> None:
        found.append(sum(not isinstance(next(block.parameters()), DTensor) for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(note)
    return found


def train_cases(cases: dict[str, dict[str, Any]], are_sharded: bool) -> dict[str, tuple[Tensors, Tensors, Tensor, int]]:
    """Return the gradients of each case, those that are left after clipping, their norm, and the most whole blocks."""
    results = {}
    for name, case in cases.items():
        module, batch = make_case(**case)
        strategy = shard(module) if are_sharded else None
        together = count_together(module)
        for _ in range(2):  # the second time finds what the first one leaves
            backward(module, batch, strategy)
        found = gradients(module)
        module.configure_gradient_clipping(None, 0.01)  # type: ignore[arg-type]
        results[name] = (found, gradients(module), module.last["grad_norm"], max(together, default=0))
    return results


def test_gradients_and_their_norm_are_those_of_one_process(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    parts = in_processes(3, train_cases, tmp_path, cases, True)  # which most weights cannot be divided by
    for name, (found, clipped, norm, _) in train_cases(cases, False).items():
        assert norm > 0.01
        for part in parts:
            assert_equal(part[name][0], found)
            assert_equal(part[name][1], clipped)
            torch.testing.assert_close(part[name][2], norm, rtol=0, atol=1e-12)
            # Also where a forward pass is done again in the backward pass.
            assert part[name][3] == 1, name


def step_and_count(path: str, optimizer: dict[str, Any]) -> tuple[Tensors, int, int]:
    """Make three steps, and return the weights, and the elements that this process keeps of how many in the model."""
    module = make_module(path)
    strategy = shard(module) if distributed.is_distributed() else None
    adamw = torch.optim.AdamW(module.parameters(), lr=0.01, **optimizer)
    for _ in range(3):
        backward(module, make_batch(PAIRS), strategy)
        adamw.step()
    state = [value for of_parameter in adamw.state.values() for value in of_parameter.values()]
    kept = [value.to_local() if isinstance(value, DTensor) else value for value in (*module.parameters(), *state)]
    before = torch.get_rng_state()
    with module.whole_model(torch.device("cpu")) as model:
        with distributed.alone():
            picture = torch.full((distributed.rank() + 1, 3, 32, 32), 100, dtype=torch.uint8)
        for _ in range(distributed.rank() + 1):  # each process as often as it has something to do
            features = encode_image(model, picture)
        assert not any(isinstance(value, DTensor) for value in model.state_dict().values())
        whole = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(features, features[:1])
    weights = {name: distributed.full(value.detach()).clone() for name, value in module.state_dict().items()}
    assert all(torch.equal(whole[name], value) for name, value in weights.items()) and whole.keys() == weights.keys()
    return weights, sum(value.numel() for value in kept), sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}])
def test_each_process_keeps_its_part(optimizer: dict[str, Any], tmp_path: Path) -> None:
    path = write_json(tmp_path / "plain.json", vision_cfg={"layers": 3}, text_cfg={"layers": 2})
    expected, kept_alone, count = step_and_count(path, optimizer)
    assert kept_alone > 3 * count
    for weights, kept, whole in in_processes(3, step_and_count, tmp_path, path, optimizer):
        assert whole == count  # as the header of a run says it
        assert kept == pytest.approx(kept_alone / 3, rel=0.01)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9, msg=name)


def save_below(file: str) -> tuple[str, int]:
    """Save a checkpoint in shards where no directory can be made; return how that ended, and how often it was tried."""
    writer = DurableCheckpointIO(background=True, retries=1, retry_seconds=0, parts_timeout=1)
    with as_torchrun():
        strategy = FullyShardedStrategy(world_size=2)
        strategy.cluster_environment = TorchElasticEnvironment()
        strategy.checkpoint_io = writer
        strategy.save_checkpoint({"about": {"parts": 1}}, f"{file}/step-00000001.ckpt")
    result = writer.take_result()
    assert result is not None
    return type(result[1]).__name__, writer.failures


def test_a_directory_that_cannot_be_made_fails_one_save_of_all_processes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = in_processes(2, save_below, tmp_path, str(tmp_path / "file"))
    assert found == [("NotADirectoryError", 2), ("NotADirectoryError", 0)]


@pytest.fixture(scope="module")
def model_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return Path(write_json(directory / "model.json", vision_cfg={"layers": 2}, text_cfg={"layers": 2}))


@pytest.fixture(scope="module")
def common(model_json: Path, shards: Path, classification_set: Path) -> list[str]:
    """The options of all runs: 21 pictures are three batches, of which the first of two processes has two."""
    evaluation = (
        f"evaluation.datasets=[{classification_set}]",
        "evaluation.every_n_steps=4",
        "evaluation.batch_size=8",
    )
    small = ("batch_size=12", "optimizer.lr=0.0003")  # Adam makes steps of lr also of gradients that are all rounding
    return options(model_json, shards, *small, "evaluation.bootstrap_resamples=10", *evaluation)


@pytest.fixture(scope="module")
def whole(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(directory, 1, common)
    return directory


def read_losses(directory: Path) -> list[float]:
    with open(directory / "outputs/run/metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def read_results(directory: Path) -> list[tuple[int, dict[str, float]]]:
    lines = (directory / "outputs/run/results.jsonl").read_text().splitlines()
    return [(row["step"], row["metrics"]) for row in map(json.loads, lines)]


def assert_same_run(directory: Path, whole: Path) -> None:
    assert read_losses(directory) == pytest.approx(read_losses(whole), abs=1e-5)
    weights, loader = final_state(directory)
    expected_weights, expected_loader = final_state(whole)
    assert loader == expected_loader
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


def test_the_run_and_its_results_are_those_of_one_process_and_of_ddp(
    whole: Path, common: list[str], tmp_path: Path
) -> None:
    for strategy, more in (("ddp", ()), ("fsdp", ("micro_batch=2", "trainer=fsdp", "trainer.accelerator=cpu"))):
        run(tmp_path / strategy, 2, [*common, *more])
        assert_same_run(tmp_path / strategy, whole)
    found, ddp = read_results(tmp_path / "fsdp"), read_results(tmp_path / "ddp")
    assert [step for step, _ in found] == [4, 8, 12]
    for (_, metrics), (_, expected) in zip(found, ddp, strict=True):
        assert metrics == pytest.approx(expected, abs=1e-9)
    exported = load_file(tmp_path / "fsdp/outputs/run/model/open_clip_model.safetensors")
    trained = {name.removeprefix("model."): value for name, value in final_state(tmp_path / "fsdp")[0].items()}
    torch.testing.assert_close(exported, trained, rtol=0, atol=0)


def test_a_run_moves_between_strategies_and_numbers_of_processes(
    whole: Path, common: list[str], tmp_path: Path
) -> None:
    fsdp = ("trainer=fsdp", "trainer.accelerator=cpu")
    for processes, more in (
        (2, (*fsdp, "steps=3")),
        (2, ("steps=5",)),  # DDP
        (3, (*fsdp, "steps=8")),
        (2, (*fsdp, "steps=10")),
        (1, ("steps=12",)),
    ):
        run(tmp_path / "run", processes, [*common, *more, "evaluation.every_n_steps=null"])
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("processes", "overrides", "message"),
    [
        (1, [], "trainer.strategy=fsdp: several devices need a launcher"),
        (2, ["trainer.precision=16-mixed"], "trainer.precision=16-mixed: trainer.strategy=fsdp trains in 32-true or "),
        (2, ["model.vision_cfg={timm_model_name:test_resnet}"], "trainer.strategy=fsdp: this model has BatchNorm"),
    ],
)
def test_what_cannot_be_trained_in_shards_is_refused(
    processes: int, overrides: list[str], message: str, common: list[str], tmp_path: Path
) -> None:
    arguments = [*common, "trainer=fsdp", "trainer.accelerator=cpu", *overrides]
    result = run_forked(["train", *arguments], tmp_path, processes=processes)
    assert result.returncode == 2
    assert result.stderr.count(f"clipmini: {message}") == processes
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "outputs/run/config.yaml").exists()


def test_bf16(common: list[str], tmp_path: Path) -> None:
    more = ("trainer.precision=bf16-mixed", "steps=4", "evaluation.every_n_steps=null")
    run(tmp_path / "ddp", 2, [*common, *more])
    run(tmp_path / "fsdp", 2, [*common, *more, "trainer=fsdp", "trainer.accelerator=cpu"])
    assert read_losses(tmp_path / "fsdp") == pytest.approx(read_losses(tmp_path / "ddp"), rel=0.01)
