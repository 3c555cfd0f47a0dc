"""Measures whole runs of clipmini and of open_clip's trainer on the same shards, model, batch, precision and threads.

Both train in turn for some rounds. Samples a second are of the time between the lines of their logs, without the first
steps; the start is the time from the command to the first step; memory is that of all processes of a run together.

  a   vit_tiny on the embedded sample        b   ViT-B-32 at 224 px, captions of 14 tokens
  c   the same, captions of 66 tokens        d   vit_tiny on JPEGs of 1024 px: bound by the loader

Then both train the model of the default run on the sample, each with some seeds and the same number of samples, and
what they export is judged on the drawing style that is held out.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from benchmark_loaders import write_pairs
from benchmark_tables import print_table
from benchmark_trainers import Case, Measured, evaluate, make_overlay, median, run_clipmini, run_open_clip

from clipmini.config import PACKAGE
from clipmini.data.index import PairFormat, index_shard

TRAINERS: dict[str, Callable[..., Measured]] = {"clipmini": run_clipmini, "open_clip_train": run_open_clip}
WORDS = "that runs after a red ball in the tall grass of a wide field while two children look on and laugh"
SHORT = "a photo of a dog that runs after ball {}"
LONG = f"a photo of a dog {WORDS}, and another dog {WORDS}, behind it a barn, number {{}}"
TINY = PACKAGE / "model_configs/vit_tiny.json"
RESNET = PACKAGE / "model_configs/sample_resnet.json"
SAMPLE = PACKAGE / "sample"
SAMPLE_SHARDS = f"{SAMPLE}/train/{{fluent,noto}}-0000{{0..3}}.tar"


def make_case(name: str, root: Path, options: argparse.Namespace) -> Case:
    """Say what is trained, and write its shards."""
    common: dict[str, Any] = {
        "skipped": options.skip,
        "log_every": 1,
        "resampled": True,
        "num_workers": options.num_workers,
        "threads": options.threads,
        "precision": options.precision,
    }
    if name == "a":
        samples = count_samples()
        return Case(name, TINY, SAMPLE_SHARDS, samples, options.batch_size or 256, options.steps, **common)
    size, model, caption = {
        "b": (256, root / "ViT-B-32.json", SHORT),
        "c": (256, root / "ViT-B-32.json", LONG),
        "d": (1024, TINY, SHORT),
    }[name]
    if model != TINY:
        model.write_text(json.dumps(open_clip.get_model_config("ViT-B-32")))
    if not (root / name).exists():
        write_pairs(root / name, options.pictures, size, options.samples, caption)
    stems = sorted(path.stem for path in (root / name).glob("*.tar"))
    alternatives = ",".join(stems)
    shards = f"{root}/{name}/{f'{{{alternatives}}}' if len(stems) > 1 else alternatives}.tar"  # braces hold several
    return Case(name, model, shards, options.samples, options.batch_size or 64, options.steps, **common)


def count_samples() -> int:
    """Return how many pairs the sample has."""
    return sum(len(index_shard(path, PairFormat())) for path in (SAMPLE / "train").glob("*.tar"))


def compare(case: Case, root: Path, overlay: Path, rounds: int) -> list[str]:
    """Train with both in turn, and return a row of the table."""
    found: dict[str, list[Measured]] = {name: [] for name in TRAINERS}
    for number in range(rounds):
        for name, train in TRAINERS.items():
            with tempfile.TemporaryDirectory(dir=root) as directory:
                found[name].append(train(case, Path(directory) / "run", overlay))
                print(f"case {case.name}, round {number + 1}: {name}: {tell(found[name][-1])}", flush=True)
    ours, theirs = found.values()
    ratios = [a.speed / b.speed for a, b in zip(ours, theirs, strict=True)]
    memory = median(ours, "memory") / median(theirs, "memory")
    cells = [case.name]
    for runs in (ours, theirs):
        speeds = [run.speed for run in runs]
        cells.append(f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})")
    cells += [f"x {statistics.median(ratios):.2f}"]
    cells += [f"{median(runs, 'memory'):,.0f}" for runs in (ours, theirs)] + [f"x {memory:.2f}"]
    return cells + [f"{median(runs, 'start'):.1f}" for runs in (ours, theirs)]


def tell(measured: Measured) -> str:
    """Say what one run was."""
    return f"{measured.speed:.1f} samples/s, {measured.memory:,.0f} MiB, first step after {measured.start:.1f} s"


def compare_quality(options: argparse.Namespace, root: Path, overlay: Path) -> None:
    """Train on the sample with some seeds and as many samples, and print zero-shot top-1 of what comes out."""
    case = make_case("a", root, options)
    steps = options.quality_epochs * math.ceil(case.samples / case.batch_size)  # as open_clip counts
    case = dataclasses.replace(
        case, model=RESNET, lr=2e-3, steps=steps, resampled=False, log_every=10, warmup=steps // 10
    )
    rows = []
    for name, train in TRAINERS.items():
        scores = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory(dir=root) as directory:
                measured = train(case, Path(directory) / "run", overlay, seed)
                scores.append(100 * evaluate(measured.weights, case, SAMPLE / "wds_twemoji", Path(directory)))
                print(f"quality, seed {seed}: {name}: {scores[-1]:.1f} %, {tell(measured)}", flush=True)
        rows.append((name, ", ".join(f"{score:.1f}" for score in scores), f"{statistics.mean(scores):.1f}"))
    print(f"\nsample_resnet, {steps} steps of {case.batch_size}: zero-shot top-1 (%) on the held-out drawing style\n")
    print_table(("trainer", "by seed", "mean"), rows)


def run(options: argparse.Namespace) -> None:
    """Print the table of the cases, and of quality if it is asked for."""
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, torch {torch.__version__}, {options.threads} threads, {options.num_workers} workers")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = Path(directory)
        overlay = make_overlay(root / "overlay")
        for name in options.cases:
            rows.append(compare(make_case(name, root, options), root, overlay, options.rounds))
        if rows:
            print(f"\nmedians of {options.rounds} rounds, {options.precision}\n")
            header = ("case", "clipmini, samples/s", "open_clip_train", "", "MiB", "MiB", "", "start, s", "start, s")
            print_table(header, rows)
        if options.seeds:
            compare_quality(options, root, overlay)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("train", help="whole runs", description=__doc__, formatter_class=formatter)
    parser.add_argument("--cases", nargs="*", choices="abcd", default=list("abcd"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each whose quality is compared")
    parser.add_argument("--quality-epochs", type=int, default=30)
    add_run_options(parser, steps=12)
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """Add what says how long and how runs are made."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--skip", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--batch-size", type=int, help="256 for case a, 64 for the others")
    parser.add_argument("--samples", type=int, default=512, help="pictures of the cases b, c, d")
    parser.add_argument("--pictures", metavar="FOLDER", help="photographs to cut out of; without it, noise like them")
    parser.add_argument("--precision", choices=("amp_bf16", "fp32"), default="amp_bf16")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", help="for shards and runs; the system's temporary one else")
