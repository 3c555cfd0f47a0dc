"""Measures how long the training stands still for a checkpoint, beside Lightning's ModelCheckpoint in the same run.

A run of a real model on the embedded sample saves in turn with clipmini's callback, which copies the state and writes
it while the training goes on, and with ModelCheckpoint, which writes it at once. The pause is the time in the callback.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from benchmark_tables import print_table
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from clipmini import config, launch
from clipmini.checkpoints.saving import SaveCheckpoints
from clipmini.config import build
from clipmini.data.tokenizer import create_tokenizer
from clipmini.model import image_size, padding
from clipmini.train import build_data, build_module, build_trainer

OURS, LIGHTNINGS = "clipmini", "ModelCheckpoint"


class Compare(Callback):
    """Saves every n steps, with one and the other in turn, and keeps the times of saves and of steps."""

    def __init__(self, ours: SaveCheckpoints, theirs: ModelCheckpoint, every_n_steps: int) -> None:
        self.ours = ours
        self.theirs = theirs
        self.every_n_steps = every_n_steps
        self.pauses: dict[str, list[float]] = {OURS: [], LIGHTNINGS: []}
        self.steps: dict[str, list[float]] = {"nothing is written": [], "clipmini writes": []}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.ours.on_train_start(trainer)
        self.theirs.setup(trainer, module, "fit")

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, content: dict[str, Any]) -> None:
        self.ours.on_save_checkpoint(trainer, module, content)

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *arguments: Any) -> None:
        seconds = time.perf_counter() - self.start
        writes = self.ours.writer.task is not None and not self.ours.writer.task.done.is_set()
        if trainer.global_step > 1:
            self.steps["clipmini writes" if writes else "nothing is written"].append(seconds)
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, OURS if trainer.global_step % (2 * self.every_n_steps) else LIGHTNINGS)

    def save(self, trainer: pl.Trainer, name: str) -> None:
        self.ours.writer.wait()  # so that neither stands in the other's way
        start = time.perf_counter()
        if name == OURS:
            self.ours.save(trainer)
        else:
            strategy = trainer.strategy
            strategy.checkpoint_io, before = TorchCheckpointIO(), strategy.checkpoint_io
            self.theirs._save_checkpoint(trainer, str(Path(str(self.theirs.dirpath)) / f"{trainer.global_step}.ckpt"))
            strategy.checkpoint_io = before
        self.pauses[name].append(time.perf_counter() - start)

    def on_train_end(self, *_: Any) -> None:
        self.ours.writer.wait()
        self.ours.on_train_end()


def measure(options: argparse.Namespace, directory: Path) -> tuple[Compare, int]:
    """Train, and return what was measured and the bytes of a checkpoint."""
    total_steps = 2 * options.saves * options.every_n_steps + 1
    overrides = [
        *(
            "experiment=none",
            "name=benchmark",
            f"paths.run={directory}",
            f"data.train={config.PACKAGE / 'sample/train'}",
        ),
        *(f"model.name={options.model}", f"batch_size={options.batch_size}", f"steps={total_steps}"),
        *("logger.csv=null", "logger.tensorboard=null", f"data.num_workers={options.num_workers}"),
        *("callbacks.checkpoint.every_n_steps=1000000", "checkpoint.background=true"),
    ]
    cfg = config.compose("train", overrides)
    processes = launch.read_launch()
    data = build_data(cfg, processes)
    module = build_module(cfg, {}, processes, total_steps)
    data.prepare(
        tokenize=create_tokenizer(module.model.architecture),
        padding=padding(module.model),
        size=image_size(module.model),
        num_steps=total_steps,
    )
    ours = build(cfg, "callbacks.checkpoint")
    compare = Compare(ours, ModelCheckpoint(dirpath=directory / "lightning", save_top_k=-1), options.every_n_steps)
    OmegaConf.update(cfg, "callbacks", {name: None for name in cfg.callbacks}, merge=False)
    trainer = build_trainer(cfg, processes, total_steps, compare)
    trainer.fit(module, datamodule=data)
    newest = max((directory / "checkpoints").glob("step-*.ckpt"))
    return compare, sum(file.stat().st_size for file in newest.iterdir())


def run(options: argparse.Namespace) -> None:
    """Print how long both stand still, and what writing beside the training costs a step."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        compare, size = measure(options, Path(directory))
    # The first save of each makes the memory that the others use again.
    pauses = {name: statistics.median(times[1:]) for name, times in compare.pauses.items()}
    print(f"\n{options.model}, checkpoints of {size / 2**20:,.0f} MiB; medians of {options.saves - 1} saves each\n")
    rows = [
        (name, f"{1000 * pause:.0f}", f"{1000 * compare.pauses[name][0]:.0f}", f"x {pause / pauses[LIGHTNINGS]:.2f}")
        for name, pause in pauses.items()
    ]
    print_table(("pause of the training", "ms a save", "the first", "of Lightning's"), rows)
    steps = {name: statistics.median(times) for name, times in compare.steps.items() if times}
    print()
    print_table(
        ("a step while", "ms", "steps"),
        [(name, f"{1000 * seconds:.0f}", str(len(compare.steps[name]))) for name, seconds in steps.items()],
    )


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("checkpoint", help="pauses for checkpoints, against Lightning's ModelCheckpoint")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--saves", type=int, default=5, help="of each kind; the first is not counted")
    parser.add_argument("--every-n-steps", type=int, default=5, help="between two saves")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", help="on the disk to measure; the system's temporary one else")
    parser.set_defaults(run=run)
