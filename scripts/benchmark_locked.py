"""Measures what it saves to keep the features of a locked image tower: whole runs of clipmini, in turn.

ViT-B-32 at 224 px on 256 px JPEGs with captions of 14 tokens, case b of `benchmark.py train`, with its image tower
locked and nothing random about its pictures. One encodes each picture whenever it is seen, the other reads what a first
run has kept; how long that took is told too. Samples a second are without the first steps.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_tables import print_table
from benchmark_train import add_run_options, make_case, tell
from benchmark_trainers import Case, Measured, run_clipmini

STILL = ("model.lock_image=true", "data.augmentation.scale=[1.0,1.0]", "data.augmentation.ratio=[1.0,1.0]")


def train(case: Case, root: Path, cached: bool) -> Measured:
    """Train once, with features that are kept or without."""
    more = (*STILL, f"paths.cache={root / 'cache'}", f"data.cached_features={str(cached).lower()}")
    with tempfile.TemporaryDirectory(dir=root) as directory:
        return run_clipmini(case, Path(directory) / "run", more=more)


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = Path(directory)
        case = make_case("b", root, options)
        start = time.perf_counter()
        train(dataclasses.replace(case, steps=2, skipped=1), root, cached=True)
        print(f"features of {case.samples} pictures, and 2 steps: {time.perf_counter() - start:.0f} s", flush=True)
        found: dict[bool, list[Measured]] = {False: [], True: []}
        for _ in range(options.rounds):
            for cached, runs in found.items():
                runs.append(train(case, root, cached))
                print(f"{'kept' if cached else 'encoded'}: {tell(runs[-1])}", flush=True)
    rows = []
    for cached, runs in found.items():
        ratios = [run.speed / other.speed for run, other in zip(runs, found[False], strict=True)]
        speeds = [run.speed for run in runs]
        told = f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"
        rows.append(("kept" if cached else "encoded each time", told, f"x {statistics.median(ratios):.2f}"))
    print(f"\nmedians of {options.rounds} rounds, {options.precision}\n")
    print_table(("features of pictures", "samples/s", ""), rows)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("locked", help="a locked image tower", description=__doc__, formatter_class=formatter)
    add_run_options(parser, steps=20)
    parser.set_defaults(run=run)
