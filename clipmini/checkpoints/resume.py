"""From which checkpoint a run goes on, and whether it is one of this run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmini import distributed
from clipmini.annotations import flatten
from clipmini.checkpoints import disk
from clipmini.errors import UserError
from clipmini.redaction import redact

log = logging.getLogger(__name__)

# What makes a checkpoint of one config useless to another; the rest may change between a run and its continuation.
IDENTITY = (
    *("seed", "batch_size", "image_size", "curriculum", "teacher", "model", "optimizer", "layer_decay", "lora"),
    *(f"loss.{name}" for name in ("kind", "init_scale", "init_bias", "max_scale", "duplicates", "terms")),
    *(f"loss.{name}" for name in ("temperatures", "head", "all_views")),
    *(
        "data.caption_key",
        "data.second_caption_key",
        "data.hard_negatives",
        "data.augmentation",
        "data.extra_views",
        "data.view_augmentation",
        "data.draft",
        "data.max_pixels",
        "data.max_member_bytes",
    ),
)

# But for this, which costs time for memory and computes the same: a run that goes on with less memory may need it.
MAY_CHANGE = "model.grad_checkpointing"


def find_checkpoint(run: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the newest valid checkpoint of a run, the same in all processes, or None if it has none at all.

    Raises:
        UserError: it has some, but none is valid, or they are of another config.
    """
    directory = run / "checkpoints"
    path = distributed.from_first(lambda: disk.find_newest_valid(directory))
    if path is None:
        return None
    check_same_run(config, redact(disk.load_part(path)["hyper_parameters"]), run)
    return path


def check_same_model(now: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another model, as where a file that `model.name` names has changed.

    Args:
        now: open_clip's config of the model that is to be trained.

    Raises:
        UserError: names each field that differs, with both values.
    """
    then = disk.load_part(path)["open_clip_config"]
    if differences := list_differences(flatten(now), flatten(then)):
        raise UserError(f"{path} is of another model; choose another name=, or give back: {'; '.join(differences)}")


def check_same_teacher(now: Any, path: Path) -> None:
    """Refuse a checkpoint of a run that learned from another teacher, as where that one was trained on since.

    Args:
        now: what tells the teacher from others, or None without one.

    Raises:
        UserError: it is another one.
    """
    if now != disk.load_part(path).get("teacher"):
        raise UserError(
            f"{path} has learned from another teacher: its weights or its model have changed; give them back, as by a "
            "checkpoint of that run in place of the run, or choose another name="
        )


def check_length(total_steps: int, path: Path) -> None:
    """Refuse a checkpoint of after the end: what it holds cannot be evaluated and kept as what was trained until then.

    Raises:
        UserError: it is.
    """
    if (step := disk.checkpoint_step(path)) > total_steps:
        raise UserError(
            f"{path} is of step {step}, and steps or epochs make the run end at {total_steps}: give {step} steps or "
            "more, or choose another name="
        )


def log_resume(path: Path, world_size: int) -> None:
    """Say from where the run goes on, and what is not as it was."""
    manifest = disk.read_manifest(path)
    log.info("resuming from %s, the newest that is complete (%s samples)", path, f"{manifest['samples']:,}")
    if manifest["world_size"] != world_size:
        log.info(
            "%d processes wrote it, now there are %d: samples and loss stay the same, random numbers of dropout do not",
            manifest["world_size"],
            world_size,
        )


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], run: Path) -> None:
    """Refuse to continue a run with another model, loss or data.

    Raises:
        UserError: names each key that differs, with both values.
    """
    now, then = ({key: value for key, value in flatten(tree).items() if key != MAY_CHANGE} for tree in (now, then))
    if differences := list_differences(now, then, IDENTITY):
        raise UserError(
            f"{run} holds a run of another config; choose another name=, or give back: {'; '.join(differences)}"
        )


def list_differences(now: Mapping[str, Any], then: Mapping[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """Tell which values differ, of all names or of these and what is below them."""
    return [
        f"{key}: was {then.get(key)}, now {now.get(key)}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
        and (names is None or any(key == name or key.startswith(f"{name}.") for name in names))
    ]
