"""What a run says of itself: what its model takes, how good its samples were, and which files it has written."""

import logging
import os
from collections import Counter
from pathlib import Path

from clipmini.console import log_rows, log_table
from clipmini.data.health import read_causes
from clipmini.model import image_size
from clipmini.one_tower import Model, Towers, text_tower

log = logging.getLogger(__name__)


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
        "config.yaml": "the config",
        "train.log": "this output",
        "metrics.csv": "loss, accuracy, scale, learning rate, gradient norm, throughput by step",
        "tensorboard": "the same for `tensorboard --logdir {run}`",
        "quarantine.jsonl": "samples that could not be used",
        "ledger": "step, position and key of every sample",
        "profile": "where the time of a step goes: a table, and a trace for chrome://tracing",
        "results.jsonl": "the table above",
        "checkpoints": "to go on from",
        "model_average": "the same as below, with the average of the weights",
        "model": whole if towers == "both" else f"the {towers} tower, {one}",
    }
    near = Path(os.path.relpath(run)) if run.is_relative_to(Path.cwd()) else run
    log_rows({str(near / name): text.format(run=near) for name, text in what.items() if (run / name).exists()})
