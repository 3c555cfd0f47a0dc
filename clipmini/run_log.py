"""What a run says of itself: what its model takes, how good its samples were, and which files it has written."""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import clipmini
from clipmini.console import log_rows, log_table
from clipmini.data.health import read_causes
from clipmini.data.loader import ImageTextData
from clipmini.model import image_size
from clipmini.one_tower import Model, Towers, text_tower
from clipmini.redaction import redact

log = logging.getLogger(__name__)

# What decides a run beside our own code.
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "open_clip_torch", "numpy", "Pillow", "simplejpeg")


def describe_data(data: ImageTextData, world_size: int) -> dict[str, str]:
    """Say what there is to train on, and how long."""
    pairs, seen = data.manifest.num_samples, data.num_steps * data.batch_size
    sources = ", ".join(f"{source.name} {source.num_samples:,}" for source in data.manifest.sources)
    return {
        "samples": f"{pairs:,} pairs ({sources})",
        "batch": f"{data.batch_size:,} pairs, {data.batch_size // world_size:,} on each device",
        "steps": f"{data.num_steps:,} = {seen:,} samples seen = {seen / pairs:.1f} epochs",
    }


def log_header(about: Mapping[str, str]) -> None:
    """Say what is about to be trained."""
    log.info("clipmini %s", clipmini.__version__)
    log_rows(about)


def write_environment(path: Path, about: Mapping[str, str], batch_size: int, step: int) -> None:
    """Add a line of what the run goes on with from a step on: itself, the machine and the packages."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    packages = {name: version for name in PACKAGES if (version := find_version(name))}
    line = {
        "started": now,
        "from step": step,
        **about,
        "batch_size": batch_size,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "clipmini": clipmini.__version__,
        **packages,
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(redact(line)) + "\n")


def find_version(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_inputs(model: Model) -> str:
    """Say what a model takes: the size of its pictures, and that it takes no captions, or captions only."""
    size = image_size(model)
    return "captions only" if not size else f"{size} px" + (", pictures only" if text_tower(model) is None else "")


def log_health(quarantine: Path, samples_seen: int) -> None:
    """Say how many samples could not be used, and why."""
    causes = Counter(cause for _, cause in read_causes(quarantine))
    if not causes:
        log.info("data health: all of %s samples were good", f"{samples_seen:,}")
        return
    rows = [(cause, f"{count:,}", f"{count / samples_seen:.3%}") for cause, count in causes.most_common()]
    log_table(f"Bad samples of {samples_seen:,}", ("cause", "samples", "share"), rows)


def log_files(run: Path, towers: Towers) -> None:
    """Name each file of the run."""
    whole, one = 'open_clip.create_model_and_transforms("local-dir:{run}/model")', "for model.pretrained={run}"
    what = {
        "report.html": f"all of this on one page: {(run / 'report.html').absolute().as_uri()}",
        "config.yaml": "the config",
        "train.log": "this output",
        "metrics.csv": "loss, accuracy, scale, learning rate, gradient norm, throughput by step",
        "tensorboard": "the same for `tensorboard --logdir {run}`",
        "quarantine.jsonl": "samples that could not be used",
        "ledger": "step, position and key of every sample",
        "profile": "where the time of a step goes: a table, and a trace for chrome://tracing",
        "results.jsonl": "the table above",
        "evaluation": "pictures with the texts nearest to them, and the most confused classes",
        "environment.jsonl": "when it was started, on what, with which packages",
        "checkpoints": "to go on from",
        "model_average": "the same as below, with the average of the weights",
        "model": whole if towers == "both" else f"the {towers} tower, {one}",
    }
    near = Path(os.path.relpath(run)) if run.is_relative_to(Path.cwd()) else run
    log_rows({str(near / name): text.format(run=near) for name, text in what.items() if (run / name).exists()})
