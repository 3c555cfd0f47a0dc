"""What a run leaves behind: checkpoints that are complete or absent, and a model that plain open_clip loads."""

import json
import os
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors.torch import save_file

from clipmini import distributed
from clipmini.errors import Interrupted, UserError
from clipmini.files import write_atomically
from clipmini.model import Model, open_clip_config

# What makes a checkpoint of one config useless to another; the rest may change between a run and its continuation.
IDENTITY = (
    *("seed", "batch_size", "image_size", "model"),
    *(f"loss.{name}" for name in ("kind", "init_scale", "init_bias", "max_scale", "duplicates", "terms")),
    *(
        "data.caption_key",
        "data.hard_negatives",
        "data.augmentation",
        "data.draft",
        "data.max_pixels",
        "data.max_member_bytes",
    ),
)
WEIGHTS = "open_clip_model.safetensors"
BEST = "best.ckpt"  # beside the numbered checkpoints


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own goes through $TMPDIR: a copy, not a rename, when that is another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


class SaveCheckpoints(Callback):
    """Saves every n steps, at the end and at the first Ctrl-C, and keeps the last few.

    The first Ctrl-C lets the step come to its end, the second one stops at once. Of several processes each would stop
    at a step of its own, so they keep Python's behaviour.

    Args:
        directory: where `step-00001000.ckpt` and its like go.
        every_n_steps: how often.
        keep_last: how many stay; at least 2, since the newest may turn out to be damaged.

    Raises:
        UserError: a limit that is too low.
    """

    def __init__(self, *, directory: str, every_n_steps: int, keep_last: int) -> None:
        if every_n_steps < 1 or keep_last < 2:
            raise UserError(
                f"checkpoint.every_n_steps={every_n_steps} must be 1 or more, and "
                f"checkpoint.keep_last={keep_last} 2 or more"
            )
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.is_interrupted = False

    def on_train_start(self, *_: Any) -> None:
        self.handler_before = signal.getsignal(signal.SIGINT)
        if distributed.world_size() == 1:
            signal.signal(signal.SIGINT, self.note_interrupt)

    def note_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.is_interrupted = True
        signal.signal(signal.SIGINT, self.handler_before)

    def on_train_end(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.handler_before)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps or self.is_interrupted:
            path = self.save(trainer)
            if self.is_interrupted:
                raise Interrupted(f"interrupted at step {step}; {path} is saved, the same command goes on from it")

    def save(self, trainer: pl.Trainer) -> Path:
        """Write the checkpoint of this step, then delete the oldest; every rank must call it."""
        path = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in list_checkpoints(self.directory)[: -self.keep_last]:
                old.unlink()
        return path


def list_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    return sorted(path for path in directory.glob("step-*.ckpt") if re.fullmatch(r"step-\d+\.ckpt", path.name))


def keep_best(path: Path) -> None:
    """Keep a checkpoint as best.ckpt beside it: another name of the same file where the file system can do that."""
    best, new = path.with_name(BEST), path.with_name(f".{BEST}.new")
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)
    new.replace(best)


def checkpoint_step(path: Path) -> int:
    """Return the number of optimizer steps that a checkpoint's name tells."""
    return int(path.stem.removeprefix("step-"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], run: Path) -> None:
    """Refuse to continue a run with another model, loss or data.

    Raises:
        UserError: names each key that differs, with both values.
    """
    a, b = flatten(now), flatten(then)
    differences = [
        f"{key}: was {b.get(key)}, now {a.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and any(key == name or key.startswith(f"{name}.") for name in IDENTITY)
    ]
    if differences:
        raise UserError(
            f"{run} holds a run of another config; choose another name=, or give back: {'; '.join(differences)}"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def export_open_clip(model: Model, directory: Path) -> None:
    """Write a directory for `open_clip.create_model_and_transforms("local-dir:<directory>")`.

    Replaces an older export as a whole.
    """
    new = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "open_clip_config.json").write_text(json.dumps(open_clip_config(model), indent=2))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, new / WEIGHTS)
    (new / WEIGHTS).chmod((new / "open_clip_config.json").stat().st_mode)  # safetensors lets only the owner read
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)
