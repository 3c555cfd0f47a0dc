"""Measures the loader: samples a second of a core, time by stage, workers, and a set of 40,000 shards.

Three loaders take turns for some rounds; every figure is the median. Samples a second are of CPU time in one process
with one thread, so that other loads on the machine count less.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import webdataset
from benchmark_loaders import (
    BATCH,
    LOADERS,
    PER_SHARD,
    PIXELS,
    STAGES,
    Clock,
    NoClock,
    Pairs,
    make_cache,
    start,
    write_pairs,
)
from benchmark_tables import print_table, take_turns

from clipmini.data import counts, picture
from clipmini.data.index import PairFormat, Shard, index_shard
from clipmini.data.manifest import Manifest, Source, read_manifest
from clipmini.data.plan import Plan


def measure_speed(name: str, pairs: Pairs, num_batches: int) -> float:
    """Return samples a second of CPU time, in this process."""
    with start(name, pairs, NoClock(), 0) as batches:
        before = time.process_time()
        for _ in range(num_batches):
            next(batches)
        return BATCH * num_batches / (time.process_time() - before)


def measure_stages(name: str, pairs: Pairs, num_batches: int) -> dict[str, float]:
    """Return microseconds a sample by stage; the rest is what leads from one to the next."""
    clock = Clock()
    with start(name, pairs, clock, 0) as batches:
        clock.seconds = dict.fromkeys(STAGES, 0.0)
        before = time.process_time()
        for _ in range(num_batches):
            next(batches)
        clock.seconds["rest"] = time.process_time() - before - sum(clock.seconds.values())
    return {stage: 1e6 * seconds / (BATCH * num_batches) for stage, seconds in clock.seconds.items()}


def measure_workers(name: str, pairs: Pairs, num_batches: int, num_workers: int) -> float:
    """Return samples a second of wall time with worker processes, and nothing else to do."""
    with start(name, pairs, NoClock(), num_workers) as batches:
        before = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        return BATCH * num_batches / (time.perf_counter() - before)


def measure_wait(name: str, pairs: Pairs, num_batches: int, step_seconds: float) -> float:
    """Return microseconds a sample that steps of some length wait for one worker."""
    waited = 0.0
    with start(name, pairs, NoClock(), 1) as batches:
        for _ in range(num_batches):
            time.sleep(step_seconds)
            before = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - before
    return 1e6 * waited / (BATCH * num_batches)


def measure_index(pairs: Pairs) -> float:
    """Return microseconds a sample that the walk over the headers takes, once for each shard."""
    before = time.process_time()
    for path in pairs.shards:
        index_shard(path, PairFormat())
    return 1e6 * (time.process_time() - before) / len(pairs.files)


def measure_size(size: int, root: Path, options: argparse.Namespace) -> None:
    """Print the tables of pictures of one size."""
    pairs = write_pairs(root / str(size), options.pictures, size, options.samples)
    num_batches = options.samples // BATCH
    names = [name for name in LOADERS if picture.simplejpeg or name != "clipmini with Pillow alone"]
    what = "photographs" if options.pictures else "noise like photographs"
    print(f"\n{size * 4 // 3} x {size} JPEGs of {what}, {pairs.bytes / 1024:.0f} KiB on average, to {PIXELS} pixels")

    speeds = take_turns(options.rounds, lambda name: measure_speed(name, pairs, num_batches), names)
    waits = take_turns(
        max(1, options.rounds // 2),
        lambda name: measure_wait(name, pairs, num_batches, 1.25 * BATCH / statistics.median(speeds[name])),
        names,
    )
    rows = []
    for name, found in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds["clipmini"], found, strict=True)]
        spread = f"{min(found):.0f} to {max(found):.0f}"
        wait = f"{statistics.median(waits[name]):.0f}"
        rows.append([name, f"{statistics.median(found):.0f}", spread, f"{statistics.median(ratios):.2f}", wait])
    print_table(["loader", "samples/s a core", "spread", "clipmini is x", "wait, us a sample"], rows)

    stages = take_turns(options.rounds, lambda name: measure_stages(name, pairs, num_batches), names)
    rows = []
    for name, times in stages.items():
        medians = [statistics.median(found[stage] for found in times) for stage in STAGES]
        rows.append([name, *(f"{value:.0f}" for value in medians), f"{sum(medians):.0f}"])
    print_table(["us a sample", *STAGES, "sum"], rows)
    index = statistics.median(measure_index(pairs) for _ in range(options.rounds))
    print(f"clipmini's index of a shard, made when it is opened first: {index:.0f} us a sample")

    counts_of_workers = ("1", "2")
    scaling = take_turns(
        options.rounds,
        lambda workers: measure_workers("clipmini", pairs, 2 * num_batches, int(workers)),
        counts_of_workers,
    )
    one, two = (statistics.median(scaling[workers]) for workers in counts_of_workers)
    ratio = statistics.median(b / a for a, b in zip(*scaling.values(), strict=True))
    print(f"clipmini with 1 and 2 workers: {one:.0f} and {two:.0f} samples/s, {ratio:.2f} times")


def measure_large_set(root: Path, rounds: int) -> None:
    """Print what 40,000 shards cost: to find and count them, and to look up batches of their 400 million samples."""
    directory = root / "large"
    directory.mkdir()
    with open(directory / "00000.tar", "wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        writer.write({"__key__": "a", "jpg": b"x", "txt": b"x"})
    for number in range(1, 40_000):
        os.link(directory / "00000.tar", directory / f"{number:05d}.tar")
    cache = make_cache(root)
    kept = PairFormat()
    read_manifest(str(directory), kept, cache)  # counts them, and keeps the counts beside them
    assert (directory / counts.INDEX_NAME).exists()
    loads, firsts, lookups = [], [], []
    for _ in range(rounds):
        before = time.perf_counter()
        read_manifest(str(directory), kept, cache)
        loads.append(time.perf_counter() - before)
        shards = tuple(Shard(f"{number:05d}.tar", 10_000) for number in range(40_000))
        before = time.perf_counter()
        plan = Plan(Manifest((Source("train", 1.0, shards),)), seed=0, shuffle_streams=64, shuffle_block=10_000)
        plan.lookup(plan.batch(0, 4096))
        firsts.append(time.perf_counter() - before)
        before = time.perf_counter()
        for step in range(1, 101):
            plan.lookup(plan.batch(step, 4096))
        lookups.append(1e6 * (time.perf_counter() - before) / 100 / 4096)
    load, first, lookup = map(statistics.median, (loads, firsts, lookups))
    print(f"\n40,000 shards: found, and their counts read, in {load:.2f} s")
    print(f"400 million samples: first batch of 4,096 looked up in {first:.2f} s, then {lookup:.2f} us a sample")


def run(options: argparse.Namespace) -> None:
    """Print all there is to measure."""
    torch.set_num_threads(1)
    decoder = "simplejpeg and Pillow" if picture.simplejpeg else "Pillow"
    print(f"clipmini decodes with {decoder}; {options.rounds} rounds of {options.samples} samples, medians")
    with tempfile.TemporaryDirectory() as root:
        for size in options.sizes:
            measure_size(size, Path(root), options)
        measure_large_set(Path(root), options.rounds)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("data", help="the loader", description=__doc__)
    parser.add_argument("--pictures", metavar="FOLDER", help="photographs to cut out of; without it, noise like them")
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 1024], help="pixels of the short side")
    parser.add_argument("--samples", type=int, default=256, help=f"pairs, a multiple of {PER_SHARD}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(run=run)
