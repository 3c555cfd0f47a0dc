"""What holds on a GPU, for machines that have one: `OMP_NUM_THREADS=1 python -m pytest -n 4 tests/gpu_checks.py`.

pytest does not collect this file by itself, and it fails where there is no GPU.
"""

import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_clipmini, run_command
from contrast import LOSSES, MODES, call, gradients, make_inputs
from open_clip.loss import ClipLoss
from runs import (
    command,
    final_state,
    last_checkpoint,
    options,
    output,
    read_ledgers,
    read_losses,
    start,
    wait_for_steps,
)
from test_resume import is_same

from clipmini.checkpoints.writer import Staging

KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "random_states")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "torch sees no GPU here, and these tests are of one"


def train(directory: Path, arguments: Sequence[str], processes: int = 1) -> str:
    """Train on the GPU to the end, and return what was printed."""
    directory.mkdir(exist_ok=True)
    result = run_command(command(processes, [*arguments, "trainer.accelerator=gpu"]), directory)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def whole(shards: Path, tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run without workers."""
    directory = tmp_path_factory.mktemp("whole")
    train(directory, options(tiny_json, shards))
    return directory


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 3e-3), (torch.float16, 3e-3)],
)
@pytest.mark.parametrize("block_size", [None, 50])
@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("duplicates", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_float64_on_a_cpu(
    name: str, duplicates: str, negatives: bool, block_size: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = make_inputs(133, dtype, width=32, negatives=negatives)
    exact = {
        key: value.detach().double().requires_grad_() if value.requires_grad else value for key, value in inputs.items()
    }
    on_gpu = {key: value.detach().cuda().requires_grad_(value.requires_grad) for key, value in inputs.items()}
    expected_loss, expected_accuracy = call(name, exact, duplicates=duplicates)
    expected = gradients(expected_loss, exact)
    loss, accuracy = call(name, on_gpu, duplicates=duplicates, block_size=block_size)
    found = gradients(loss, on_gpu)
    assert abs(loss.item() - expected_loss.item()) <= 3e-6 * max(1.0, expected_loss.item())
    assert accuracy.item() == pytest.approx(expected_accuracy.item())
    for key, value in expected.items():
        assert (found[key].cpu().double() - value).norm() <= tolerance * value.norm(), key


@pytest.mark.parametrize("name", LOSSES)
def test_loss_holds_blocks_and_not_all_similarities(name: str) -> None:
    inputs = {key: value.detach().cuda() for key, value in make_inputs(16384, torch.bfloat16, width=64).items()}
    inputs |= {key: inputs[key].requires_grad_() for key in ("image", "text", "scale", "bias")}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(name, inputs, block_size=512)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 200e6 < 16384**2 * 4


def test_loss_equals_open_clip_of_a_large_batch() -> None:
    inputs = {key: value.detach().cuda() for key, value in make_inputs(8192, torch.float32, width=512).items()}
    inputs |= {key: inputs[key].requires_grad_() for key in ("image", "text", "scale")}
    loss, _ = call("infonce", inputs)
    theirs = ClipLoss()(inputs["image"], inputs["text"], inputs["scale"])
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    for key, value in gradients(theirs, inputs).items():
        assert (gradients(call("infonce", inputs)[0], inputs)[key] - value).norm() <= 1e-5 * value.norm(), key


def test_a_run_is_that_of_a_cpu(whole: Path, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    result = run_command(command(1, options(tiny_json, shards, "trainer.accelerator=cpu")), tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_ledgers(whole) == read_ledgers(tmp_path)
    assert read_losses(whole) == pytest.approx(read_losses(tmp_path), abs=2e-3)


@pytest.mark.parametrize("more", [(), ("micro_batch=4", "data.num_workers=2"), ("micro_batch=4", "loss=siglip")])
def test_a_stopped_run_goes_on_to_the_last_bit(more: tuple, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    extra = ("model.patch_dropout=0.5", "bad_steps.skip_spikes=true", "bad_steps.window=3", "ema.decay=0.9")
    given = options(tiny_json, shards, *more, *extra, "trainer.precision=bf16-mixed")
    train(tmp_path / "whole", given)
    train(tmp_path / "parts", [*given, "steps=6"])
    train(tmp_path / "parts", given)
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for name in (*KEPT, "average"):
        assert is_same(parts[name], whole[name]), name
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "more",
    [
        ("micro_batch=4",),
        ("data.num_workers=3",),
        ("profile=true", "callbacks.profile.first_step=2", "callbacks.profile.steps=4"),
    ],
)
def test_how_it_is_computed_changes_nothing(
    more: tuple, whole: Path, shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    train(tmp_path, options(tiny_json, shards, *more))
    assert read_ledgers(tmp_path) == read_ledgers(whole)
    assert read_losses(tmp_path) == pytest.approx(read_losses(whole), abs=1e-4)
    torch.testing.assert_close(final_state(tmp_path)[0], final_state(whole)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_launcher_with_one_process_makes_the_same_run(
    strategy: str, whole: Path, shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    program = command(1, options(tiny_json, shards, f"trainer={strategy}", "trainer.accelerator=gpu"))
    result = run_command([program[0], *launcher, *program[1:]], tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(whole), abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_compiled_blocks_train_the_same(precision: str, shards: Path, tmp_path: Path) -> None:
    given = [argument for argument in options(Path("vit_tiny"), shards, f"trainer.precision={precision}", "steps=6")]
    train(tmp_path / "eager", given)
    train(tmp_path / "compiled", [*given, "compile=true"])
    tolerance = 1e-3 if precision == "32-true" else 5e-2
    assert read_losses(tmp_path / "compiled") == pytest.approx(read_losses(tmp_path / "eager"), abs=tolerance)


def test_sigterm_stops_it_saved_and_it_goes_on(whole: Path, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    given = options(tiny_json, shards, "trainer.accelerator=gpu", "checkpoint.every_n_steps=1000")
    process = start(tmp_path, 1, [*given, "steps=3000"])
    wait_for_steps(tmp_path, process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 85, output(tmp_path)
    stopped = last_checkpoint(tmp_path)["about"]["step"]
    train(tmp_path, [*given, f"steps={stopped + 5}"])
    assert len(read_losses(tmp_path)) == stopped + 5
    shared = min(12, stopped + 5)
    assert read_losses(tmp_path)[:shared] == read_losses(whole)[:shared]


def test_a_checkpoint_is_the_state_of_its_moment() -> None:
    state = {"weights": [torch.randn(1000, 1000, device="cuda") for _ in range(20)], "step": 3}
    expected = [value.cpu() for value in state["weights"]]
    staging = Staging()
    for _ in range(2):  # the second one into the memory of the first
        copied = staging.copy(state)
        for value in state["weights"]:
            value.add_(1)
        assert all(map(torch.equal, copied["weights"], expected))
        expected = [value + 1 for value in expected]
    assert all(value.is_pinned() for value in copied["weights"])


def test_evaluation_is_that_of_a_cpu(whole: Path, classification_set: Path, tmp_path: Path) -> None:
    rows = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.jsonl"
        given = ("evaluate", f"model={whole}/outputs/run", f"datasets=[{classification_set}]", f"output={path}")
        result = run_clipmini(*given, f"device={device}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rows.append(json.loads(path.read_text())["metrics"])
    assert rows[0] == pytest.approx(rows[1], abs=0.051)  # one picture of 21 may be a tie for one of them


def test_embedded_bytes_do_not_depend_on_workers_and_find_themselves(whole: Path, shards: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        given = ("embed", f"model={whole}/outputs/run", f"input={shards}", f"output={tmp_path}/{workers}")
        result = run_clipmini(
            *given, "caption_key=txt", "long_texts=cut", "device=cuda", f"num_workers={workers}", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
    names = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.npy"))
    assert names and all((tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)
    features = np.load(tmp_path / "0" / names[0]).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)


def test_check_tells_the_memory_that_a_run_takes(shards: Path, tmp_path: Path) -> None:
    given = options(Path("ViT-B-32"), shards, "batch_size=64", "micro_batch=16", "trainer.precision=bf16-mixed")
    given += ["trainer.accelerator=gpu", "checkpoint.every_n_steps=1000"]
    checked = run_clipmini("check", *given, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    told = re.search(r"about ([\d.]+) (GiB|MiB) of [\d.]+ GiB of each GPU", checked.stdout)
    assert told is not None, checked.stdout
    program = f"import torch; from clipmini.cli import main; main({['train', *given]!r})"
    program += "; print('reserved', torch.cuda.max_memory_reserved())"
    trained = run_command([sys.executable, "-c", program], tmp_path)
    assert trained.returncode == 0, trained.stderr
    taken = int(trained.stdout.rsplit("reserved ", 1)[1]) / (2**30 if told[2] == "GiB" else 2**20)
    assert float(told[1]) == pytest.approx(taken, rel=0.15)
