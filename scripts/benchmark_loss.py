"""Measures the losses, time and memory forward and backward, and what micro-batches cost a training step.

Every measurement is made in a process of its own with one thread, the candidates in turn for some rounds; figures are
medians. Memory is the peak of the process beyond what it held before, by Linux's own count.
"""

import argparse
import ctypes
import functools
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_tables import print_table, take_turns
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from clipmini.guard import Guard
from clipmini.head import HeadOptions
from clipmini.losses import info_nce, siglip
from clipmini.model import create_model
from clipmini.module import ClipModule
from clipmini.objective import ContrastiveLoss

MEMORY = 10 << 30  # bytes that a process may have; open_clip's losses take all there is for large batches
LARGE = 8192  # pairs; larger batches take minutes, and are measured once
Step = Callable[[], Any]


def linear_cross_entropy(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Compute InfoNCE by torch's fused loss of a linear layer, once for each direction."""
    labels = torch.arange(len(image))
    return (
        F.linear_cross_entropy(scale * image, text, labels) + F.linear_cross_entropy(scale * text, image, labels)
    ) / 2


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "InfoNCE": {
        "clipmini": lambda image, text, scale, bias: info_nce(image, text, scale)[0],
        "open_clip ClipLoss": lambda image, text, scale, bias: ClipLoss()(image, text, scale),
        "torch linear_cross_entropy": lambda image, text, scale, bias: linear_cross_entropy(image, text, scale),
    },
    "SigLIP": {
        "clipmini": lambda image, text, scale, bias: siglip(image, text, scale, bias)[0],
        "open_clip SigLipLoss": lambda image, text, scale, bias: SigLipLoss()(image, text, scale, bias),
    },
}


def make_loss_step(kind: str, name: str, pairs: int, width: int) -> Step:
    """Make features, and return what computes a loss of them and its gradients."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(pairs, width, generator=generator), dim=-1) for _ in "ab")
    inputs = [value.requires_grad_() for value in (image, text, torch.tensor(20.0), torch.tensor(-10.0))]
    loss = LOSSES[kind][name]

    def step() -> None:
        loss(*inputs).backward()
        for value in inputs:
            value.grad = None

    return step


def make_objective() -> ContrastiveLoss:
    """Make CLIP's loss."""
    return ContrastiveLoss(
        kind="infonce",
        init_scale=14.0,
        init_bias=None,
        max_scale=100.0,
        duplicates="ignore",
        block_size=None,
        terms={"image_text": 1.0},
        temperatures={},
        head=HeadOptions(layers=0, hidden_width=1, width=1, norm="layer"),
        all_views=False,
    )


def make_module(pairs: int, micro_batch: int | None) -> ClipModule:
    """Make a model of the size of vit_tiny, to be trained as a run does."""
    torch.manual_seed(0)
    return ClipModule(
        create_model(name="vit_tiny", init_scale=14.0, init_bias=None).train(),
        make_objective(),
        optimizer=torch.optim.SGD,
        schedule=lambda optimizer, total_steps: None,
        total_steps=1,
        micro_batch=micro_batch,
        guard=Guard(batch_size=pairs, max_in_a_row=1, skip_spikes=False, window=128, sigmas=6.0),
        average=None,
    )


def make_batch(pairs: int) -> dict[str, Tensor]:
    """Make a batch for it."""
    image = torch.randint(0, 256, (pairs, 3, 64, 64), dtype=torch.uint8)
    text = torch.randint(1, 49406, (pairs, 32))
    text[:, -1] = 49407  # the end token, by which the text tower pools
    return {"image": image, "text": text, "text_id": torch.arange(pairs)}


def make_training_step(pairs: int, micro_batch: int | None) -> Step:
    """Return what computes the gradients of a batch."""
    module, batch = make_module(pairs, micro_batch), make_batch(pairs)

    def step() -> None:
        module.zero_grad(set_to_none=False)  # gradients stay, so that they do not count
        module.training_step(batch, 0).backward()

    return step


def measure(make_step: Callable[..., Step], arguments: tuple, results: Any) -> None:
    """Send seconds and bytes of a step, or None if memory does not suffice; runs in a process of its own."""
    torch.set_num_threads(1)
    used = read_status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    try:
        step = make_step(*arguments)
        step()  # loads what is loaded at first use
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is used
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is counted from here
        before, start = read_status("VmRSS"), time.perf_counter()
        step()
        results.put((time.perf_counter() - start, read_status("VmHWM") - before))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        results.put(None)


def read_status(name: str) -> int:
    """Return one of the numbers of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def in_a_process(make_step: Callable[..., Step], *arguments: Any) -> tuple[float, int] | None:
    """Measure a step in a process of its own."""
    context = multiprocessing.get_context("forkserver")  # of one that has loaded all this once, which takes seconds
    results = context.Queue()
    process = context.Process(target=measure, args=(make_step, arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the measurement of {arguments} failed with exit code {process.exitcode}")
    return results.get()


def measure_medians(rounds: int, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float] | None]:
    """Measure candidates in turn for some rounds: the medians of seconds and bytes, or None."""
    found = take_turns(rounds, lambda name: candidates[name](), candidates)
    return {
        name: None if None in values else tuple(statistics.median(column) for column in zip(*values, strict=True))
        for name, values in found.items()
    }


def print_results(title: str, results: dict[str, tuple[float, float] | None]) -> None:
    """Print a table with the first candidate as the measure of the others."""
    seconds, size = next(iter(results.values())) or (float("nan"), float("nan"))
    rows = []
    for name, result in results.items():
        if result is None:
            rows.append([name, "-", "-", f"> {MEMORY >> 20}", "-"])
        else:
            times = f"{result[0]:.3f}", f"{result[0] / seconds:.2f}"
            rows.append([name, *times, f"{result[1] / 2**20:.0f}", f"{result[1] / size:.2f}"])
    print()
    print_table([title, "seconds", "x", "MiB", "x"], rows)


def measure_losses(pairs: int, width: int, rounds: int) -> None:
    """Print the tables of batches of one shape."""
    for kind, losses in LOSSES.items():
        names = [name for name in losses if "linear" not in name or hasattr(F, "linear_cross_entropy")]
        candidates = {name: functools.partial(in_a_process, make_loss_step, kind, name, pairs, width) for name in names}
        print_results(f"{kind}, {pairs} pairs of {width}", measure_medians(rounds if pairs <= LARGE else 1, candidates))


def measure_micro_batches(pairs: int, rounds: int) -> None:
    """Print the table of a training step."""
    parts = {"at once": None, "in 8 micro-batches": pairs // 8}
    candidates = {
        name: functools.partial(in_a_process, make_training_step, pairs, part) for name, part in parts.items()
    }
    print_results(f"training step of vit_tiny, {pairs} pairs", measure_medians(rounds, candidates))


def run(options: argparse.Namespace) -> None:
    """Print all there is to measure."""
    multiprocessing.set_forkserver_preload(["benchmark_loss"])
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the forkserver's own path comes too late for a preload
    print(f"fp32, 1 thread, medians of {options.rounds} rounds; beyond {LARGE} pairs of one")
    for shape in options.shapes:
        pairs, width = (int(number) for number in shape.split("x"))
        measure_losses(pairs, width, options.rounds)
    measure_micro_batches(options.pairs, options.rounds)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("loss", help="the losses, and micro-batches", description=__doc__)
    shapes = ["512x256", "2048x256", "8192x512", "32768x512"]
    parser.add_argument("--shapes", nargs="*", default=shapes, metavar="PAIRSxWIDTH")
    parser.add_argument("--pairs", type=int, default=512, help="of the training step, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(run=run)
