"""Real runs with steps that go wrong as asked for, and what became of the weights after each."""

import contextlib
import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import QUICK
from forked import torchrun_variables
from torch import Tensor

from clipmini import distributed, launch, train
from clipmini.config import compose
from clipmini.module import ClipModule

Faults = Mapping[int, tuple[int | None, str]]  # by step: the rank (None: all), and what goes wrong there
OPTIMIZERS = {
    "AdamW, fused": [],
    "AdamW": ["optimizer.fused=false"],
    "SGD with momentum, fused": ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps"]
    + ["+optimizer.momentum=0.9"],
    "SGD": ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "optimizer.fused=null"],
}


class Fault(pl.Callback):
    """Breaks the loss, its gradient or the features of some steps on some ranks."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def kind(self, step: int) -> str | None:
        rank, kind = self.faults.get(step, (None, None))
        return kind if rank in (None, distributed.rank()) else None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        kind = self.kind(trainer.global_step + 1)
        whole = type(module.loss).forward
        if kind == "nan features":
            module.embed = lambda *inputs: {
                name: part * torch.nan for name, part in type(module).embed(module, *inputs).items()
            }
        elif kind is not None:
            module.loss.forward = lambda features, **options: spoil(kind, whole, module.loss, dict(features), options)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        if self.kind(trainer.global_step + 1) == "left out":
            optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.loss.__dict__.pop("forward", None)
        module.__dict__.pop("embed", None)


def spoil(kind: str, whole: Callable, loss: Any, features: dict[str, Tensor], options: dict) -> dict[str, Tensor]:
    """Call a loss with something wrong."""
    if kind == "nan gradient":
        features["image"].register_hook(lambda gradient: gradient * torch.nan)
    result = whole(loss, features, **options)
    changed = {
        "nan loss": result["loss"] * torch.nan,
        "inf loss": result["loss"] + torch.inf,
        "spike": result["loss"] * 1e4,
    }
    return {**result, "loss": changed.get(kind, result["loss"])}


class Recorder(pl.Callback):
    """Keeps hashes of weights, optimizer and average before the first step and after each."""

    def __init__(self) -> None:
        self.states: list[dict[str, str]] = []
        self.module: ClipModule | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if self.module is None:
            self.module = module
            self.states.append(hash_state(module, trainer.optimizers[0]))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.states.append(hash_state(module, trainer.optimizers[0]))


def hash_state(module: ClipModule, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    average = {} if module.average is None else module.average.state_dict()
    parts = {"weights": module.state_dict(), "optimizer": optimizer.state_dict()["state"], "average": average}
    return {name: hash_tree(part) for name, part in parts.items()}


def hash_tree(tree: Any) -> str:
    """Hash tensors in nested mappings, to the last bit; no state is the same as a state of zeros."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in value:
                add(f"{name}.{key}", value[key])
        elif isinstance(value, Tensor):
            digest.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name}={value}".encode())

    add("", tree)
    return digest.hexdigest()


@contextlib.contextmanager
def callbacks(*more: pl.Callback) -> Iterator[None]:
    """Have runs call these callbacks too, before those of the config."""
    build_trainer = train.build_trainer
    train.build_trainer = lambda *arguments: build_trainer(*arguments, *more)  # type: ignore[assignment]
    try:
        yield
    finally:
        train.build_trainer = build_trainer


@contextlib.contextmanager
def as_torchrun() -> Iterator[None]:
    """Tell the processes of `in_processes` what torchrun would."""
    before = dict(os.environ)
    os.environ.update(torchrun_variables(distributed.rank(), distributed.world_size(), port="1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(directory: Path, faults: Faults, *overrides: str, more: tuple[pl.Callback, ...] = ()) -> dict[str, Any]:
    """Train in this process, or in those of `in_processes`; return hashes after each step, and what was warned."""
    recorder, messages = Recorder(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("clipmini.guard").addHandler(handler)
    options = [*QUICK, "schedule=constant", "steps=7", "checkpoint.every_n_steps=100", f"paths.run={directory}"]
    with contextlib.ExitStack() as stack:
        stack.callback(logging.getLogger("clipmini.guard").removeHandler, handler)
        if distributed.is_distributed():
            stack.enter_context(as_torchrun())
        stack.enter_context(callbacks(Fault(faults), *more, recorder))
        train.train(compose("train", [*options, *overrides]))
    assert recorder.module is not None and launch.read_launch().world_size == 1
    guard = copy.copy(recorder.module.guard)
    return {"states": recorder.states, "total": guard.total, "in_a_row": guard.in_a_row, "messages": messages}
