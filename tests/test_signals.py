"""Signals stop a run at a step of all its processes, after its checkpoint is on the disk; exit code 85."""

import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
from runs import (
    options,
    output,
    ranks,
    read_ledgers,
    read_losses,
    run,
    same_weights,
    start,
    start_forked,
    wait_for_steps,
)

from clipmini.checkpoints.disk import checkpoint_step, list_checkpoints
from clipmini.cluster import signals
from clipmini.cluster.agreement import Agreement
from clipmini.launch import take_over_signals

LONG = 100_000  # steps, of which a run that is stopped makes a few


def arguments(tiny_json: Path, shards: Path, *more: str) -> list[str]:
    return options(tiny_json, shards, f"steps={LONG}", "checkpoint.every_n_steps=100000", *more)


def saved_step(directory: Path) -> int:
    (path,) = list_checkpoints(directory / "outputs/run/checkpoints")
    return checkpoint_step(path)


def check_stopped(directory: Path, names: str, *, goes_on_with: list[str], processes: int) -> None:
    """See that a run was stopped by signals and saved, and that it goes on as if it had not been."""
    text, step = output(directory), saved_step(directory)
    assert f"clipmini: stopped by {names} at step {step}; " in text and "is saved, the same command goes on" in text
    assert len(read_losses(directory)) == step
    assert [row[0] for row in read_ledgers(directory)] == [number for number in range(1, step + 1) for _ in range(16)]
    last = f"steps={step + 2}"
    run(directory, processes, [*goes_on_with, last])
    run(directory / "whole", processes, [*goes_on_with, last])
    assert same_weights(directory, directory / "whole")
    assert read_ledgers(directory) == read_ledgers(directory / "whole")


def test_signal_skew(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    given = arguments(tiny_json, shards)
    process = start(tmp_path, 2, given)
    wait_for_steps(tmp_path, process, 3)
    first, second = ranks(process)
    os.kill(first, signal.SIGTERM)
    time.sleep(0.005)  # in the middle of a step: between the collectives of one process and of the other
    os.kill(second, signal.SIGTERM)
    for _ in range(20):  # a scheduler that does not let go
        time.sleep(0.01)
        os.kill(first, signal.SIGUSR2)
    assert process.wait(timeout=100) == 1  # torchrun's own; the processes exited with 85
    assert output(tmp_path).count("exitcode  : 85") == 2
    check_stopped(tmp_path, "SIGTERM", goes_on_with=given, processes=2)


def test_signal_one_rank(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    given = arguments(tiny_json, shards)
    with start_forked(tmp_path, 2, given) as process:
        wait_for_steps(tmp_path, process, 3)
        os.kill(process.pids[1], signal.SIGUSR1)
        assert process.wait(timeout=100) == [85, 85]
    check_stopped(tmp_path, "SIGUSR1", goes_on_with=given, processes=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_exit_codes(number: signal.Signals, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    given = arguments(tiny_json, shards, "data.num_workers=1")
    with start_forked(tmp_path, 1, given) as process:
        wait_for_steps(tmp_path, process, 3)
        process.send_to_groups(number)  # also to the loader's worker, as a terminal and a scheduler do
        assert process.wait(timeout=100) == [85]
    check_stopped(tmp_path, number.name, goes_on_with=given, processes=1)


def test_a_run_without_checkpoints_ends_at_once(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    with start_forked(tmp_path, 1, arguments(tiny_json, shards, "callbacks.checkpoint=null")) as process:
        wait_for_steps(tmp_path, process, 3)
        os.kill(process.pids[0], signal.SIGTERM)
        assert process.wait(timeout=100) == [-signal.SIGTERM]


def test_ctrl_c_in_the_terminal_of_torchrun(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    given = arguments(tiny_json, shards, "data.num_workers=1")
    process = start(tmp_path, 2, given)
    wait_for_steps(tmp_path, process, 3)
    os.killpg(process.pid, signal.SIGINT)  # torchrun sends it to its processes once more
    process.wait(timeout=100)
    assert "interrupted twice" not in output(tmp_path)
    assert f"clipmini: stopped by SIGINT at step {saved_step(tmp_path)}; " in output(tmp_path)


def test_second_ctrl_c_ends_at_once(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    # A step that the first one would have to wait for.
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "from pytorch_lightning.callbacks import Callback\n"
        "class Sleep(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        time.sleep(300 if trainer.global_step == 3 else 0)\n"
    )
    own = ("data.num_workers=1", "+callbacks.sleep._target_=mine.Sleep", "allow_targets=[mine.]")
    with start_forked(tmp_path, 1, arguments(tiny_json, shards, *own), PYTHONPATH=str(tmp_path)) as process:
        wait_for_steps(tmp_path, process, 3)
        os.kill(process.pids[0], signal.SIGINT)
        time.sleep(signals.SECONDS_OF_ONE_CTRL_C + 0.5)
        assert process.poll() is None
        os.kill(process.pids[0], signal.SIGINT)
        assert process.wait(timeout=20) == [-signal.SIGINT]
    assert "interrupted twice" in output(tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_before_the_first_step(processes: int, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    given = arguments(tiny_json, shards)
    config, deadline = tmp_path / "outputs/run/config.yaml", time.monotonic() + 200
    with start_forked(tmp_path, processes, given) as process:
        while not config.exists():  # it is written when all is checked, just before the training starts
            assert process.poll() is None and time.monotonic() < deadline, output(tmp_path)
            time.sleep(0.001)
        os.kill(process.pids[-1], signal.SIGTERM)
        assert process.wait(timeout=100) == [85] * processes, output(tmp_path)
    assert "clipmini: stopped by SIGTERM at step " in output(tmp_path) and "Traceback" not in output(tmp_path)


def test_during_a_save_and_an_evaluation(
    shards: Path, tiny_json: Path, classification_set: Path, tmp_path: Path
) -> None:
    # It saves and evaluates all the time, so that any signal comes in the middle of both.
    given = options(tiny_json, shards, f"steps={LONG}", "checkpoint.every_n_steps=1", "evaluation.every_n_steps=1")
    given += [f"evaluation.datasets=[{classification_set}]", "evaluation.bootstrap_resamples=10"]
    process = start(tmp_path, 1, given)
    wait_for_steps(tmp_path, process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 85
    step = checkpoint_step(list_checkpoints(tmp_path / "outputs/run/checkpoints")[-1])
    assert f"stopped by SIGTERM at step {step}; " in output(tmp_path)


SLOW = """
import time
from clipmini.evaluation import encoder
from pytorch_lightning.callbacks import Callback

class Slow(Callback):
    def __init__(self):
        whole = encoder.encode_image
        def encode_image(*arguments, **options):
            time.sleep(2)
            return whole(*arguments, **options)
        encoder.encode_image = encode_image
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_that_takes_longer_than_a_scheduler_waits(
    processes: int, shards: Path, tiny_json: Path, classification_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    given = options(tiny_json, shards, "steps=4", f"evaluation.datasets=[{classification_set}]")
    given += ["evaluation.bootstrap_resamples=10", "evaluation.batch_size=1"]  # 21 pictures, 2 s each
    # In the middle of the run, and at its end with one process.
    given += [f"evaluation.every_n_steps={'null' if processes == 1 else 3}"]
    slow = [*given, "+callbacks.slow._target_=mine.Slow", "allow_targets=[mine.]"]
    with start_forked(tmp_path, processes, slow, PYTHONPATH=str(tmp_path)) as process:
        wait_for_steps(tmp_path, process, 4 if processes == 1 else 2)
        time.sleep(1)
        process.send_to_groups(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=100) == [85] * processes, output(tmp_path)
        assert time.monotonic() - began < 18  # of 42, or of 22 with two processes
    step = 4 if processes == 1 else 3
    assert f"step {step}: the evaluation is given up" in output(tmp_path)
    assert f"clipmini: stopped by SIGTERM at step {step}; " in output(tmp_path) and "is saved" in output(tmp_path)
    results = tmp_path / "outputs/run/results.jsonl"
    assert not results.exists() or not results.read_text()
    run(tmp_path, processes, given)
    found = [(row["step"], row["weights"]) for row in map(json.loads, results.read_text().splitlines())]
    assert [step for step, _ in found] == ([4] if processes == 1 else [3, 4]) and len(set(found)) == len(found)


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_requeue_once_after_the_commit(state: str, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    calls = tmp_path / "calls"
    scontrol.write_text(
        "#!/bin/sh\n"
        "[ $1 = --oneliner ] && { echo JobId=17 JobState=$STATE; exit; }\n"
        f"ls {tmp_path}/outputs/run/checkpoints >> {calls}\n"
        f"echo $RANK $* >> {calls}\n"
    )
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "STATE": state}
    with start_forked(tmp_path, 2, arguments(tiny_json, shards), **environment) as process:
        wait_for_steps(tmp_path, process, 3)
        process.send_to_groups(signal.SIGTERM)
        assert process.wait(timeout=100) == [85, 85]
    step = saved_step(tmp_path)
    if state == "RUNNING":
        assert calls.read_text().splitlines() == [f"step-{step:08d}.ckpt", "0 requeue 17"]
        assert "is saved, SLURM starts the job again" in output(tmp_path)
    else:  # its user cancels it
        assert not calls.exists() and "SLURM job 17 is COMPLETING, and is not put back" in output(tmp_path)


def test_lightning_has_what_is_taken_over() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert hasattr(type(trainer._signal_connector), "register_signal_handlers")
    assert hasattr(type(trainer.fit_loop.epoch_loop), "_broadcast_sigterm_tensor")
    take_over_signals(trainer)
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    del trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(type(trainer.fit_loop.epoch_loop), "_broadcast_sigterm_tensor")
        with pytest.raises(AttributeError, match="_broadcast_sigterm_tensor"):
            take_over_signals(trainer)


def test_agreement_of_one_process_is_at_once() -> None:
    agreement = Agreement(["a", "b"], every_seconds=1)
    agreement.want("b")
    assert agreement.at_start(0) == {"b"} and agreement.at_step(1) == set()
    agreement.want("a")
    assert agreement.at_step(2) == {"a"} and agreement.at_step(3) == set()
    assert agreement.steps_between(100_000) == 10 and agreement.steps_between(5_000_000) == 1
