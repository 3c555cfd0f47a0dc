"""Measures what recipes for the embedded sample are worth: whole runs of `clipmini train`, with some seeds each.

  finetune    a model of one drawing style (Noto) goes on on another (Fluent), in five ways; the third is held out
  curriculum  a run of a vision transformer, and the same with small pictures for most of it
  distill     a short run alone, and one that learns from the model of the default run
  views       the default run, and one that also compares two more views of each picture

Zero-shot top-1 in percent, mean and every seed; samples a second are of the whole training, without evaluation.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_tables import print_table
from omegaconf import OmegaConf

from clipmini.config import compose
from clipmini.report.read import read_run

NOTO = "data.train=${paths.sample}/train/noto-*.tar"
STYLES = ("noto", "fluent", "twemoji")
DECAY = 0.7


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        scores: zero-shot top-1 of each set.
        speed: samples a second; None of what was not trained.
    """

    scores: dict[str, float]
    speed: float | None


class Runs:
    """Trains and remembers.

    Args:
        directory: of all runs.
        more: overrides of all.
    """

    def __init__(self, directory: Path, more: Sequence[str]) -> None:
        self.directory = directory
        self.more = more
        self.found: dict[str, list[Measured]] = {}

    def train(self, name: str, seed: int, *overrides: str) -> Path:
        """Train once, and return the run's directory."""
        run = self.directory / f"{name}-{seed}"
        given = [*overrides, *self.more, f"seed={seed}", f"name={run.name}", f"paths.output={self.directory}"]
        call("train", *given)
        trained = read_run(run)
        speed = trained.samples / trained.seconds
        self.found.setdefault(name, []).append(Measured(read_scores(run / "results.jsonl"), speed))
        self.tell(name)
        return run

    def tell(self, name: str) -> None:
        last = self.found[name][-1]
        scores = "  ".join(f"{of} {score:.1f}" for of, score in last.scores.items())
        print(f"{name}: {scores}{'' if last.speed is None else f'  {last.speed:.0f} samples/s'}", flush=True)

    def speeds(self, name: str) -> list[float]:
        """Return the samples a second of all seeds of a run that is trained."""
        return [run.speed for run in self.found[name] if run.speed is not None]

    def row(self, name: str, sets: Sequence[str]) -> list[str]:
        """Return the scores of all seeds of a run for a table."""
        return [name, *(tell_all([run.scores[of] for run in self.found[name]]) for of in sets)]


def call(*arguments: str) -> None:
    """Run a command of clipmini."""
    command = [sys.executable, "-m", "clipmini", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}"


def read_scores(path: Path) -> dict[str, float]:
    """Read the top-1 of each set that was last measured, in percent."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["dataset"]: 100 * row["metrics"]["acc1"] for row in rows}


def tell_all(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def finetune(runs: Runs, seeds: Sequence[int]) -> None:
    """Compare ways to go on from a model of one style."""
    for seed in seeds:
        base = runs.train("before", seed, "evaluation=sample_styles", NOTO)
        start = f"model.pretrained={base}"
        full = runs.train("full", seed, "experiment=sample_finetune", start)
        decay = (f"layer_decay.image={DECAY}", f"layer_decay.text={DECAY}")
        runs.train("layer decay", seed, "experiment=sample_finetune", start, *decay)
        runs.train("LoRA", seed, "experiment=sample_lora", start)
        runs.train("LiT", seed, "experiment=sample_lit", start)
        wise, results = full / "wise", full / "wise.jsonl"
        call("export", f"model={full}", "wise=0.5", f"output={wise}")
        sets = full / "styles.yaml"
        sets.write_text(json.dumps(describe_styles()))  # JSON is yaml too
        call("evaluate", f"model={wise}", f"datasets=[{sets}]", f"output={results}", "probes=[]")
        runs.found.setdefault("WiSE-FT 0.5", []).append(Measured(read_scores(results), None))
        runs.tell("WiSE-FT 0.5")
    print()
    ways = ("before", "full", "layer decay", "LoRA", "LiT", "WiSE-FT 0.5")
    print_table(("", *STYLES), [runs.row(way, STYLES) for way in ways])


def describe_styles() -> list[Any]:
    """Return the sets of `evaluation=sample_styles`."""
    sets = OmegaConf.to_container(compose("train", ["evaluation=sample_styles"]).evaluation.datasets, resolve=True)
    assert isinstance(sets, list)
    return sets


def compare(runs: Runs, seeds: Sequence[int], ways: dict[str, tuple[str, ...]]) -> None:
    """Train in some ways in turn, and tell what each is worth and how fast it is."""
    for seed in seeds:
        for way, overrides in ways.items():
            runs.train(way, seed, *overrides)
    rows = []
    first = runs.speeds(next(iter(ways)))
    for way in ways:
        speeds = runs.speeds(way)
        ratio = statistics.median(one / other for one, other in zip(speeds, first, strict=True))
        rows.append([*runs.row(way, ["twemoji"]), f"{statistics.median(speeds):.0f}", f"x {ratio:.2f}"])
    print()
    print_table(("", "twemoji", "samples/s", ""), rows)


def curriculum(runs: Runs, seeds: Sequence[int]) -> None:
    """Compare with the same run on whole pictures alone."""
    recipe = "experiment=sample_curriculum"
    compare(runs, seeds, {"whole pictures": (recipe, "curriculum=null"), "curriculum": (recipe,)})


def views(runs: Runs, seeds: Sequence[int]) -> None:
    """Compare with the default run."""
    compare(runs, seeds, {"default": (), "views": ("experiment=sample_views",)})


def distill(runs: Runs, seeds: Sequence[int]) -> None:
    """Compare a short run with one that has a teacher, the model of a default run of another seed."""
    teacher = runs.train("teacher", 100)
    alone = [f"loss.terms.{name}=null" for name in ("image_teacher", "text_teacher", "image_text_teacher")]
    of = ("experiment=sample_distill", f"teacher={teacher}")
    compare(runs, seeds, {"alone": ("experiment=sample_distill", "teacher=null", *alone), "with a teacher": of})


PARTS = {"finetune": finetune, "curriculum": curriculum, "distill": distill, "views": views}


def run(options: argparse.Namespace) -> None:
    """Print the tables."""
    more = [] if options.steps is None else [f"steps={options.steps}"]
    for part in options.parts:
        print(f"\n{part}\n", flush=True)
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            PARTS[part](Runs(Path(directory), [*more, *options.overrides]), options.seeds)


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = "fine-tuning, a curriculum, a teacher, views: what they are worth"
    parser = commands.add_parser("recipes", help=text, description=__doc__, formatter_class=formatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of each run; none: its own")
    parser.add_argument("--overrides", nargs="*", default=[], help="of every run")
    parser.add_argument("--directory", help="for runs that are deleted; none: the system's")
    parser.set_defaults(run=run)
