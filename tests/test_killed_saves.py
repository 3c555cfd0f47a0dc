"""Whole runs that are killed in the middle of a save, or lose a process there, lose nothing."""

import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from runs import options, output, read_ledgers, run, same_weights, start_forked
from test_checkpoint import Recorder

from clipmini import cli
from clipmini.checkpoints.disk import checkpoint_step, find_newest_valid, list_checkpoints


class Points(Recorder):
    """Ends the process at a point, of which a write is none: there are too many."""

    def at(self, what: str, path: Any) -> None:
        if what != "write":
            super().at(what, path)


def train_until(directory: Path, overrides: list[str], last: int | None) -> None:
    """Train, in a process of its own, until so many things are done to the disk; None trains to the end."""
    torch.set_num_threads(1)
    os.chdir(directory)
    Points(last).install()
    sys.exit(cli.main(["train", *overrides]))


def train_in_a_process(directory: Path, overrides: list[str], last: int | None) -> int | None:
    directory.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_until, args=(directory, overrides, last))
    process.start()
    process.join(timeout=100)
    return process.exitcode


def test_a_run_that_is_killed_at_every_point_of_its_saves(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    overrides = options(tiny_json, shards, "steps=24", "checkpoint.every_n_steps=2")
    assert train_in_a_process(tmp_path / "whole", overrides, None) == 0
    steps = [0]  # of the newest valid checkpoint after each life
    for point in itertools.count():  # each life gets a little further than the one before
        code = train_in_a_process(tmp_path / "killed", overrides, point)
        newest = find_newest_valid(tmp_path / "killed/outputs/run/checkpoints")
        steps.append(checkpoint_step(newest) if newest else 0)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert steps == sorted(steps) and steps[-1] == 24
    assert steps.count(0) > 5 and len(steps) > 12  # all points of the first save, and more of later ones
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert read_ledgers(tmp_path / "killed") == read_ledgers(tmp_path / "whole")


DIE_IN_A_PART = """
import os, signal
from clipmini.checkpoints import disk
from pytorch_lightning.callbacks import Callback

class Die(Callback):
    def on_train_start(self, trainer, *_):
        whole = disk.write_part
        def write_part(path, rank, content):
            if rank == 1 and disk.checkpoint_step(path) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(path, rank, content)
        disk.write_part = write_part
"""


def test_a_process_that_is_lost_while_it_writes_its_part(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DIE_IN_A_PART)
    given = options(tiny_json, shards, "trainer=fsdp", "trainer.accelerator=cpu", "steps=6", "timeouts.step=950")
    dying = [*given, "steps=100000", "+callbacks.die._target_=mine.Die", "allow_targets=[mine.]"]
    directory = tmp_path / "run"
    with start_forked(directory, 2, dying, PYTHONPATH=str(tmp_path)) as process:
        assert process.wait(timeout=150) == [1, -signal.SIGKILL]  # checkpoint.parts_timeout is 600
    assert "another process of this run ended" in output(directory)
    (kept,) = list_checkpoints(directory / "outputs/run/checkpoints")
    assert checkpoint_step(kept) == 2
    run(directory, 2, given)
    run(tmp_path / "whole", 2, given)
    assert same_weights(directory, tmp_path / "whole")
    assert read_ledgers(directory) == read_ledgers(tmp_path / "whole")
