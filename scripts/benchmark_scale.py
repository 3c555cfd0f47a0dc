"""Says what a step moves and holds on each of W processes, from formulas, and checks the formulas.

Counted are the tensors that collectives of a real step are given, on 1, 2 and 3 processes (gloo): they must be those of
the formulas. The memory of the loss is simulated: one process does its part of a batch of W parts, with all captions
there, as after a gather.

  b pairs of a process, B = W b, D the embedding width, P the trainable parameters, e the bytes of a feature
  gather captions e B D; reduce-scatter their gradients 4 B D; logsumexps and best rivals 12 B; gradients of weights 4 P
"""

import argparse
import collections
import functools
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmark_loss import make_batch, make_module
from benchmark_tables import print_table
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from clipmini import distributed
from clipmini.losses import info_nce
from clipmini.model import count_parameters, create_model
from clipmini.module import ClipModule

KINDS = ("gather captions", "reduce-scatter gradients", "logsumexps", "gradients of weights")
FP32 = 4


def predict(batch_size: int, width: int, parameters: int, element: int) -> dict[str, int]:
    """Return the bytes of the tensors of each collective in a step, of the loss InfoNCE."""
    return {
        "gather captions": element * batch_size * width,
        "reduce-scatter gradients": FP32 * batch_size * width,
        "logsumexps": 3 * FP32 * batch_size,
        "gradients of weights": FP32 * parameters,
    }


def sent(tensors: dict[str, int], world_size: int) -> dict[str, float]:
    """Return the bytes that a process sends by ring algorithms (Patarasuk and Yuan, 2009)."""
    share = (world_size - 1) / world_size
    passes = {"gather captions": 1, "reduce-scatter gradients": 1, "logsumexps": 2, "gradients of weights": 2}
    return {kind: passes[kind] * share * size for kind, size in tensors.items()}


# Counted


class Step(torch.nn.Module):
    """What DDP runs."""

    def __init__(self, module: ClipModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.module.training_step(batch, 0)


def count(rank: int, world_size: int, pairs: int, port: int, results: Any) -> None:
    """Make a step on one of W processes, and send the bytes of the tensors in its collectives."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found: collections.Counter[str] = collections.Counter()
    module = make_module(pairs * world_size, None)

    def counted(kind: str, function: Any, size: Any) -> Any:
        @functools.wraps(function)
        def call(tensor: torch.Tensor) -> torch.Tensor:
            found[kind] += size(tensor)
            return function(tensor)

        return call

    distributed.all_gather = counted("gather captions", distributed.all_gather, lambda rows: world_size * rows.nbytes)
    scatter = distributed.reduce_scatter_sum
    distributed.reduce_scatter_sum = counted("reduce-scatter gradients", scatter, lambda rows: rows.nbytes)
    for name in ("all_reduce_sum", "all_reduce_max"):
        setattr(distributed, name, counted("logsumexps", getattr(distributed, name), lambda values: values.nbytes))

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found["gradients of weights"] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    parallel = DistributedDataParallel(Step(module))
    parallel.register_comm_hook(None, hook)
    parallel(make_batch(pairs)).backward()
    if rank == 0:
        results.put((dict(found), count_parameters(module.model), module.model.architecture["embed_dim"]))
    dist.destroy_process_group()


def check(world_size: int, pairs: int) -> list[str]:
    """Return a row of what was counted.

    Raises:
        SystemExit: it is not what the formulas say.
    """
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (world_size, pairs, port, results)
    processes = [context.Process(target=count, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a step on {world_size} processes failed")
    found, parameters, width = results.get()
    expected = predict(world_size * pairs, width, parameters, FP32)
    for kind in KINDS:
        if found.get(kind, 0) != expected[kind]:
            raise SystemExit(f"{kind}, {world_size} processes: counted {found.get(kind, 0)}, formula {expected[kind]}")
    return [str(world_size), *(f"{found[kind]:,}" for kind in KINDS)]


# Simulated


def simulate(world_size: int, pairs: int, width: int) -> tuple[float, int]:
    """Return seconds and peak bytes of the loss of one of W processes, forward and backward, on this one."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(pairs, width, generator=generator), dim=-1) for _ in "ab")
    inputs = [image.requires_grad_(), text.requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    gather, scatter, size = distributed.all_gather, distributed.reduce_scatter_sum, distributed.world_size
    distributed.all_gather = lambda rows: rows.repeat(world_size, *(1 for _ in rows.shape[1:]))
    distributed.reduce_scatter_sum = lambda rows: rows.chunk(world_size)[0]
    distributed.world_size = lambda: world_size
    try:
        start = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            info_nce(*inputs)[0].backward()
        seconds = time.perf_counter() - start
    finally:
        distributed.all_gather, distributed.reduce_scatter_sum, distributed.world_size = gather, scatter, size
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return seconds, peak


def run(options: argparse.Namespace) -> None:
    """Print what is counted, what the formulas say, and what is simulated."""
    multiprocessing.set_forkserver_preload(["benchmark_scale"])
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    torch.set_num_threads(1)
    print(f"counted in a step of vit_tiny with {options.checked_pairs} pairs a process, fp32: bytes, as the formulas\n")
    print_table(("processes", *KINDS), [check(size, options.checked_pairs) for size in options.checked])

    model = create_model(name=options.model, init_scale=14.0, init_bias=None)
    parameters, width = count_parameters(model), model.architecture["embed_dim"]
    pairs = options.pairs
    print(f"\n{options.model}, {parameters / 1e6:.1f} M parameters, D={width}, {pairs} pairs a process, bf16 features;")
    print("MiB that a process sends in a step, and holds for the loss (fp32, simulated)\n")
    rows, world_size = [], 1
    while world_size <= 1024:
        amounts = sent(predict(world_size * pairs, width, parameters, 2), world_size)
        cells = [f"{world_size * pairs:,}", *(f"{amounts[kind] / 2**20:,.2f}" for kind in KINDS)]
        if world_size * pairs <= options.simulated:
            seconds, peak = simulate(world_size, pairs, width)
            cells += [f"{peak / 2**20:,.0f}", f"{seconds:.2f}"]
        else:
            cells += ["-", "-"]
        rows.append([str(world_size), *cells])
        world_size *= 4 if world_size < 1024 else 2
    print_table(("processes", "batch", *KINDS, "loss, MiB", "seconds"), rows)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("scale", help="cost by processes", description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name")
    parser.add_argument("--pairs", type=int, default=256, help="of a process")
    parser.add_argument("--checked", type=int, nargs="*", default=[1, 2, 3], help="processes whose bytes are counted")
    parser.add_argument("--checked-pairs", type=int, default=4)
    parser.add_argument("--simulated", type=int, default=262_144, help="the largest batch of which the loss is run")
    parser.set_defaults(run=run)
