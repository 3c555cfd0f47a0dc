"""Whole training runs of clipmini and of open_clip's trainer, watched from outside: time by step, memory, weights."""

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PEER = ("open_clip_torch==3.3.0", "webdataset==0.2.86", "pandas", "python-dateutil", "pytz", "six", "tzdata")
POLL_SECONDS, MEMORY_SECONDS = 0.01, 0.5


@dataclass(frozen=True)
class Case:
    """What both train.

    Attributes:
        model: JSON file in open_clip's form.
        shards: pattern in braces, which both take.
        steps: optimizer steps, with a line of the log every `log_every` of them.
        skipped: the first steps, which are not counted in samples a second.
        resampled: open_clip draws shards with replacement, and has one epoch; else `samples` in each, in whole batches.
    """

    name: str
    model: Path
    shards: str
    samples: int
    batch_size: int
    steps: int
    skipped: int
    log_every: int
    resampled: bool
    num_workers: int
    threads: int
    precision: str
    lr: float = 1e-3
    warmup: int = 10


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        speed: samples a second after the skipped steps.
        start: seconds from the command to the end of the first step that is told.
        memory: MiB, the most of all its processes together (PSS).
        weights: what it trained.
    """

    speed: float
    start: float
    memory: float
    weights: Path


def make_overlay(directory: Path) -> Path:
    """Install open_clip's trainer and what it pins beside this environment, whose torch it uses."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(directory), *PEER], check=True)
    return directory


def clipmini_command(case: Case, directory: Path, seed: int, *more: str) -> list[str]:
    """Say how clipmini trains a case."""
    precision = {"amp_bf16": "bf16-mixed", "fp32": "32-true"}[case.precision]
    return [
        *(sys.executable, "-m", "clipmini", "train", "experiment=none", "evaluation=default"),
        *(f"paths.run={directory}", "name=benchmark", f"model.name={case.model}", f'data.train="{case.shards}"'),
        *(f"batch_size={case.batch_size}", f"steps={case.steps}", f"seed={seed}", f"trainer.precision={precision}"),
        *(f"data.num_workers={case.num_workers}", f"trainer.log_every_n_steps={case.log_every}"),
        *("data.augmentation.scale=[0.9,1.0]", f"schedule.warmup_steps={case.warmup}", "schedule.warmup_fraction=0.99"),
        *(f"optimizer.lr={case.lr}", "optimizer.betas=[0.9,0.98]", "optimizer.eps=1e-6", "optimizer.weight_decay=0.2"),
        *more,
    ]


def open_clip_command(case: Case, directory: Path, seed: int) -> list[str]:
    """Say how open_clip's trainer does, with the same numbers."""
    model = directory / "model_config"
    model.mkdir(parents=True)
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": json.loads(case.model.read_text())}))
    epochs = 1 if case.resampled else case.steps // math.ceil(case.samples / case.batch_size)  # which it rounds up
    return [
        *(sys.executable, "-m", "open_clip_train.main", "--model", f"local-dir:{model}", "--name", "benchmark"),
        *("--logs", str(directory), "--train-data", case.shards, "--dataset-type", "webdataset"),
        *("--train-num-samples", str(case.steps * case.batch_size // epochs), "--epochs", str(epochs)),
        *("--seed", str(seed)),
        *(["--dataset-resampled"] if case.resampled else []),
        *("--batch-size", str(case.batch_size), "--precision", case.precision, "--workers", str(case.num_workers)),
        *("--log-every-n-steps", str(case.log_every), "--warmup", str(case.warmup), "--lr", str(case.lr)),
        *("--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-6", "--wd", "0.2", "--grad-clip-norm", "1.0"),
        *("--aug-cfg", "scale=(0.9, 1.0)", "--report-to", "tensorboard"),
    ]


def run_clipmini(
    case: Case, directory: Path, overlay: Path | None = None, seed: int = 0, more: Sequence[str] = ()
) -> Measured:
    """Train with clipmini, with more overrides."""
    metrics = directory / "metrics.csv"

    def count_steps() -> int:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(lines[-1].split(",")[lines[0].split(",").index("step")]) if len(lines) > 1 else 0

    command = clipmini_command(case, directory, seed, *more)
    return watch(case, command, {}, count_steps, directory, directory / "model")


def run_open_clip(case: Case, directory: Path, overlay: Path, seed: int = 0) -> Measured:
    """Train with open_clip's trainer."""
    epoch = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/(\d+)")
    command = open_clip_command(case, directory, seed)
    epochs = int(command[command.index("--epochs") + 1])

    def count_steps() -> int:
        found = epoch.findall((directory / "output").read_text())
        if not found:
            return 0
        number, seen, whole = map(int, found[-1])
        return (number * whole + seen) // case.batch_size

    weights = directory / f"benchmark/checkpoints/epoch_{epochs}.pt"
    return watch(case, command, {"PYTHONPATH": str(overlay)}, count_steps, directory, weights)


def watch(
    case: Case,
    command: list[str],
    environment: dict[str, str],
    count_steps: Callable[[], int],
    directory: Path,
    weights: Path,
) -> Measured:
    """Run a command, and note when its log tells of which step, and how much memory it takes."""
    directory.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(case.threads), "MKL_NUM_THREADS": str(case.threads)}
    times: list[tuple[int, float]] = []
    start = time.perf_counter()
    with open(directory / "output", "w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **threads, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
    with measure_memory(process.pid) as memory:
        while process.poll() is None:
            step = count_steps()
            if step and (not times or step > times[-1][0]):
                times.append((step, time.perf_counter() - start))
            time.sleep(POLL_SECONDS)
    text = (directory / "output").read_text()
    assert process.returncode == 0, f"{' '.join(command)}\n{text[-3000:]}"
    counted = [(step, seconds) for step, seconds in times if step >= case.skipped]
    (first, begin), (last, end) = counted[0], counted[-1]
    return Measured(case.batch_size * (last - first) / (end - begin), times[0][1], max(memory), weights)


@contextlib.contextmanager
def measure_memory(pid: int) -> Iterator[list[float]]:
    """Collect the MiB of a process and its children, what they share counted once (PSS), while they run."""
    found = [0.0]
    done = threading.Event()

    def collect() -> None:
        while not done.wait(MEMORY_SECONDS):
            found.append(sum(map(read_memory, list_processes(pid))))

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def list_processes(pid: int) -> list[int]:
    """Return a process and all that came from it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += list_processes(int(child))
    return found


def read_memory(pid: int) -> float:
    """Return the MiB of a process, what it shares with others in parts."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
    return 0.0


def evaluate(weights: Path, case: Case, dataset: Path, directory: Path) -> float:
    """Return the zero-shot top-1 of what either trained, by clipmini's evaluation."""
    model = [f"model={weights}"] + ([f"architecture={case.model}"] if weights.suffix == ".pt" else [])
    results = directory / "results.jsonl"
    command = [sys.executable, "-m", "clipmini", "evaluate", *model, f"datasets=[{dataset}]", f"output={results}"]
    done = subprocess.run([*command, "bootstrap_resamples=10"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text().splitlines()[-1])["metrics"]["acc1"]


def median(runs: list[Measured], name: str) -> float:
    """Return the median of what was measured of some runs."""
    return statistics.median(getattr(run, name) for run in runs)
