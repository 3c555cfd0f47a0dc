"""A process that fails, dies or stands still ends the run in bounded time, and what was wrong comes first."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import callbacks
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from runs import options, output, ranks, start, start_forked, wait_for_steps

from clipmini.cluster.hangs import Watchdog, explain_lost_process
from clipmini.errors import ProcessLost, UserError
from clipmini.train import train

LONG = 100_000
TIMEOUTS = ("timeouts.step=8", "timeouts.stacks=3", "data.timeout=5")


def check_lost(directory: Path, rank: int) -> None:
    """See that a process told in one message that another one is lost."""
    lines = [line for line in output(directory).splitlines() if "another process of this run ended" in line]
    assert lines and all("the same command goes on from the last checkpoint" in line for line in lines)
    assert any(line.startswith(f"rank {rank}: ") if rank else line.startswith("clipmini: ") for line in lines)


def test_rank_exception(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    # A callback of the user's that fails on one process.
    (tmp_path / "mine.py").write_text(
        "from pytorch_lightning.callbacks import Callback\n"
        "class Fail(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 5 and trainer.global_rank == 1:\n"
        "            raise KeyError('mine')\n"
    )
    given = options(
        tiny_json, shards, f"steps={LONG}", "+callbacks.fail._target_=mine.Fail", "allow_targets=[mine.]", *TIMEOUTS
    )
    with start_forked(tmp_path, 2, given, PYTHONPATH=str(tmp_path)) as process:
        assert process.wait(timeout=140) == [1, 1], output(tmp_path)  # by itself: no launcher ends the other one
    text = output(tmp_path)
    assert "KeyError: 'mine'" in text
    lost = text.find("another process of this run ended")
    assert lost == -1 or text.index("KeyError: 'mine'") < lost


def test_killed_rank(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    process = start(tmp_path, 2, options(tiny_json, shards, f"steps={LONG}", *TIMEOUTS))
    wait_for_steps(tmp_path, process, 3)
    os.kill(ranks(process)[1], signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(timeout=60) == 1 and time.monotonic() - began < 30
    assert "exitcode  : -9" in output(tmp_path)  # torchrun's report names the one that began
    check_lost(tmp_path, 0)


def test_stopped_rank(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    # Without checkpoints: in a save they wait for one another as long as at the start.
    given = options(tiny_json, shards, f"steps={LONG}", f"checkpoint.every_n_steps={LONG}", *TIMEOUTS)
    with start_forked(tmp_path, 2, given) as process:
        wait_for_steps(tmp_path, process, 3)
        os.kill(process.pids[1], signal.SIGSTOP)
        began = time.monotonic()
        while "another process of this run" not in output(tmp_path) and time.monotonic() - began < 200:
            time.sleep(0.2)
        assert 3 < time.monotonic() - began < 180
        os.kill(process.pids[1], signal.SIGCONT)
        assert process.wait(timeout=100) == [1, 1]
    check_lost(tmp_path, 0)
    text = output(tmp_path)
    assert "Timeout (0:00:03)!" in text and "most recent call first" in text  # where the other one waited


def test_errors_of_collectives_are_told_by_what_they_mean() -> None:
    with pytest.raises(ProcessLost, match="did not answer within timeouts.step=8 seconds.*Connection closed by peer"):
        explain_lost_process(RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4"), 8)
    explain_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 8)


class Fail(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("CUDA error: the launch timed out and was terminated")


def test_one_process_has_no_other_to_lose(
    compose: Callable[..., DictConfig], shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    given = options(tiny_json, shards, f"paths.run={tmp_path}")
    with callbacks(Fail()), pytest.raises(RuntimeError, match="^CUDA error: the launch timed out and was terminated$"):
        train(compose(*given))


@pytest.mark.parametrize(("step", "stacks"), [(60.0, 5.0), (61.0, 0.0)])
def test_limits(step: float, stacks: float) -> None:
    with pytest.raises(UserError, match="timeouts.step=6. must be above data.timeout=60, and timeouts.stacks="):
        Watchdog(step=step, stacks=stacks, data_timeout=60)
