"""Whole runs of a tiny model: on one process, or several as under torchrun.

`start` starts them as users do; `start_forked` is for what depends neither on an interpreter nor on torchrun.
"""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import QUICK
from forked import Forked, run_forked

from clipmini.checkpoints.disk import list_checkpoints, load_checkpoint

STEPS = 12
ROW = tuple[int, int, str]  # step, position, key


def options(tiny_json: Path, shards: object, *more: str) -> list[str]:
    return [
        *QUICK,
        "name=run",
        f"steps={STEPS}",
        f"model.name={tiny_json}",
        f"data.train={shards}",
        "data.ledger=true",
        "data.shuffle_streams=3",
        "data.shuffle_block=8",
        "data.augmentation.flip=0.5",
        "schedule=constant",
        "optimizer.lr=0.0003",
        "schedule.warmup_steps=0",  # the same for any number of steps
        *more,
    ]


def command(processes: int, arguments: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "clipmini", "train", *arguments]


def run(directory: Path, processes: int, arguments: list[str]) -> None:
    """Train to the end."""
    directory.mkdir(exist_ok=True)
    result = run_forked(["train", *arguments], directory, processes=processes)
    assert result.returncode == 0, result.stderr


def read_ledgers(directory: Path) -> list[ROW]:
    rows = []
    for path in (directory / "outputs/run/ledger").iterdir():
        with open(path, newline="") as file:
            rows += [(int(row["step"]), int(row["position"]), row["key"]) for row in csv.DictReader(file)]
    return sorted(rows)


def read_losses(directory: Path) -> list[float]:
    with open(directory / "outputs/run/metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


def last_checkpoint(directory: Path) -> dict:
    """Return what the last checkpoint of a run holds."""
    return load_checkpoint(list_checkpoints(directory / "outputs/run/checkpoints")[-1])


def final_state(directory: Path) -> tuple[dict, dict]:
    """Return the weights and the state of the loader."""
    checkpoint = last_checkpoint(directory)
    (loader,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return checkpoint["state_dict"], loader


def start(directory: Path, processes: int, arguments: list[str], **environment: str) -> subprocess.Popen:
    """Start a run in a session of its own, as a job of a shell's; both outputs go to a file."""
    directory.mkdir(exist_ok=True)
    with open(directory / "output", "w") as output:
        return subprocess.Popen(
            command(processes, arguments),
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_forked(directory: Path, processes: int, arguments: list[str], **environment: str) -> Forked:
    """Start a run; both outputs of all of its processes go to a file."""
    directory.mkdir(exist_ok=True)
    files = (directory / "output", directory / "output")
    return Forked(["train", *arguments], directory, [files] * processes, **environment)


def output(directory: Path) -> str:
    """Return what a started run has printed."""
    return (directory / "output").read_text()


def wait_for_steps(directory: Path, process: subprocess.Popen | Forked, steps: int, timeout: float = 200) -> None:
    """Wait until a run has trained so many steps."""
    metrics = directory / "outputs/run/metrics.csv"
    deadline = time.monotonic() + timeout
    while not metrics.exists() or len(metrics.read_text().splitlines()) <= steps:
        assert process.poll() is None and time.monotonic() < deadline, output(directory)
        time.sleep(0.02)


def ranks(torchrun: subprocess.Popen) -> list[int]:
    """Return the processes that train, by rank."""
    found = {}
    for pid in children(torchrun.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((value[5:] for value in variables if value.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = pid
    return [found[rank] for rank in sorted(found)]


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def same_weights(first: Path, second: Path) -> bool:
    """Tell whether the last checkpoints of two runs are the same to the last bit."""
    a, b = last_checkpoint(first), last_checkpoint(second)
    same = all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    return same and a["global_step"] == b["global_step"]
