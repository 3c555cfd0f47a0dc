"""Lightning's Trainer: how it is built, and how it trains, from the start or from a checkpoint."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from clipmini import launch
from clipmini.annotations import Limits
from clipmini.checkpoints import disk, resume
from clipmini.checkpoints.saving import SaveCheckpoints
from clipmini.checkpoints.writer import DurableCheckpointIO
from clipmini.cluster import signals
from clipmini.cluster.hangs import explain_lost_process
from clipmini.config import build, build_all
from clipmini.console import format_seconds
from clipmini.data.loader import ImageTextData
from clipmini.errors import UserError, check_choice
from clipmini.evaluation_callback import find_callbacks
from clipmini.module import ClipModule

log = logging.getLogger(__name__)

# Arguments of Lightning's Trainer that are set here, or that would break what a run promises; and what to do instead.
INSTEAD = {
    "max_steps": "is taken from steps or epochs: set one of them",
    "max_epochs": "is taken from steps or epochs: set one of them",
    "fast_dev_run": "makes one step and calls that the whole run: set steps=1",
    "max_time": "ends a run without its last checkpoint: set steps, or have a signal stop it (preemption.*)",
    "callbacks": "they are those of callbacks.*: add one there",
    "logger": "they are those of logger.*: add one there",
    "plugins": "they follow from checkpoint.* and from the launcher: leave it out",
    "default_root_dir": "is paths.run: set that",
    "use_distributed_sampler": "the order of samples is a function of the config: leave it out",
    "enable_checkpointing": "checkpoints are those of callbacks.checkpoint: set checkpoint.*",
    "enable_progress_bar": "lines of the log tell how far a run is: set trainer.log_every_n_steps",
    "enable_model_summary": "the log tells what the model is: leave it out",
    "num_sanity_val_steps": "nothing is validated by Lightning: set evaluation.at_start",
}


def build_trainer(cfg: DictConfig, processes: launch.Launch, total_steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Build Lightning's Trainer with what the launcher, the hardware and the exact order of samples decide.

    Raises:
        UserError: settings that Lightning refuses, or that would not be exact.
    """
    options = cfg.trainer
    check_options(options)
    accelerator = launch.choose_accelerator(options.accelerator)
    launch.check_processes(processes, devices=options.devices, num_nodes=options.num_nodes, strategy=options.strategy)
    durable = {name: cfg.checkpoint[name] for name in ("background", "retries", "retry_seconds", "parts_timeout")}
    try:
        trainer = build(
            cfg,
            "trainer",
            accelerator=accelerator,
            devices=processes.local_world_size,
            num_nodes=processes.num_nodes,
            strategy=launch.choose_strategy(options.strategy, processes),
            precision=launch.choose_precision(options.precision, accelerator),
            max_steps=total_steps,
            max_epochs=-1,
            callbacks=[*callbacks, *build_all(cfg, "callbacks")],
            logger=build_all(cfg, "logger"),
            plugins=[DurableCheckpointIO(**durable), launch.choose_environment(processes)],
            default_root_dir=cfg.paths.run,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"trainer: {error}") from error
    launch.take_over_signals(trainer)
    return trainer


def check_options(options: Mapping[str, Any]) -> None:
    """Check what is asked of Lightning's Trainer beyond its own checks.

    Raises:
        UserError: what is set here, or would break what a run promises.
    """
    for name, instead in INSTEAD.items():
        if options.get(name) is not None:
            raise UserError(f"trainer.{name}={options[name]}: {instead}")
    if options.get("accumulate_grad_batches", 1) != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches={options['accumulate_grad_batches']} would shrink the negatives of the "
            "contrastive loss to one part of the batch: set micro_batch instead, which does not"
        )
    check_choice("trainer.gradient_clip_algorithm", options.get("gradient_clip_algorithm"), (None, "norm"))
    Limits(least=1).check("trainer.log_every_n_steps", options.get("log_every_n_steps"))
    Limits(least=0).check("trainer.gradient_clip_val", options.get("gradient_clip_val"), float | None)


def fit(trainer: pl.Trainer, module: ClipModule, data: ImageTextData, newest: Path | None, step_timeout: float) -> None:
    """Train from the start or from a checkpoint; a run that is complete only gets its weights and what it knew back."""
    if not find_callbacks(trainer, SaveCheckpoints):
        signals.stop_listening()  # nothing would look at them
    if newest and disk.checkpoint_step(newest) == trainer.max_steps:
        content = disk.load_checkpoint(newest, verify=False)
        module.load_state_dict(content["state_dict"])
        module.on_load_checkpoint(content)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if state := content["callbacks"].get(callback.state_key):
                callback.load_state_dict(state)
        log.info("already trained: %s is at the last of %d steps", newest, trainer.max_steps)
        return
    if newest:
        resume.log_resume(newest, trainer.world_size)
    start = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=newest, weights_only=True)
    except RuntimeError as error:
        if trainer.world_size > 1:
            explain_lost_process(error, step_timeout)
        raise
    log.info("trained in %s", format_seconds(time.perf_counter() - start))
