"""Each warning of a run's health comes once where its fault is planted, and never in a run that is well."""

import contextlib
import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import in_processes
from faulty import run
from test_module import make_batch, make_module
from torch import Tensor
from torch.nn.functional import normalize

from clipmini.callbacks import Reading
from clipmini.data.decode import Decoder
from clipmini.module import spreads
from clipmini.training_health import KEY as HEALTH
from clipmini.training_health import TrainingHealth, chance_limit, untrained_loss

QUICKER = (f"{HEALTH}.window=4", f"{HEALTH}.grace_steps=20", "optimizer.lr=1e-3")


def make_health(**changes: Any) -> TrainingHealth:
    limits = {"min_spread": 0.01, "max_data_wait": 0.3, "first_loss_below": 0.5, "first_loss_above": 2.0}
    options = {"window": 10, "grace_steps": 500, "sigmas": 3.0, "min_seconds": 30.0, "pretrained": None}
    return TrainingHealth(**{**options, **limits, **changes})


class Planted(pl.Callback):
    """Spoils the features of all steps from one on."""

    def __init__(self, kind: str, first: int = 1) -> None:
        self.kind, self.first = kind, first

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step + 1 >= self.first:
            module.embed = lambda batch: spoil(self.kind, type(module).embed(module, batch))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.__dict__.pop("embed", None)


def spoil(kind: str, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make features that are almost the same, pairs that do not belong together, or pairs that are known."""
    image, text = features["image"], features["text"]
    if kind == "same":
        noise = 1e-3 * torch.arange(len(image))[:, None]  # a tie would be a miss
        image, text = (normalize(part.mean(0) + noise * part, dim=-1) for part in (image, text))
    elif kind == "shuffled":
        text = text.roll(1 + int(torch.randint(len(text) - 1, ())), 0)
    elif kind == "leak":
        image, text = (normalize(torch.eye(*part.shape) + 1e-3 * part, dim=-1) for part in (image, text))
    return {"image": image, "text": text}


def watch(directory: Path, tiny_json: Path, shards: Path, planted: tuple, *overrides: str) -> list[str]:
    """Train with something wrong, or nothing, and return what is told of the run's health."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")  # type: ignore
    logger = logging.getLogger("clipmini.training_health")
    arguments = [f"model.name={tiny_json}", f"data.train={shards}", *QUICKER, *overrides]
    with contextlib.ExitStack() as stack:
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        run(directory, {}, *arguments, more=(Planted(*planted),) if planted else ())
    return messages


Told = Callable[..., list[str]]


@pytest.fixture
def told(tiny_json: Path, shards: Path, tmp_path: Path) -> Told:
    """Train in this process; the same name goes on."""

    def train(*overrides: str, planted: tuple = (), name: str = "run") -> list[str]:
        return watch(tmp_path / name, tiny_json, shards, planted, *overrides)

    return train


def test_a_run_that_is_well(told: Told) -> None:
    assert told("steps=60", f"{HEALTH}.grace_steps=50") == []


# Collapse


def test_features_that_are_the_same(told: Told) -> None:
    (message,) = told("steps=26", planted=("same",))
    assert message.startswith("WARNING collapse, step 21: the image features of a batch are almost the same")
    assert "train/image_spread" in message and f"less than {HEALTH}.min_spread=0.01: look at optimizer.lr" in message
    assert told("steps=32", planted=("same",)) == []  # it goes on, and knows what it has told


def test_accuracy_at_chance_on_two_processes(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    arguments = (tmp_path / "run", tiny_json, shards, ("shuffled",), "steps=26", f"{HEALTH}.min_spread=0")
    (message,), others = in_processes(2, watch, tmp_path, *arguments)
    assert others == []
    assert re.match(r"WARNING collapse, step 21: train/accuracy \d\.\d\d% in the last 4 readings is no more", message)
    assert f"than chance with batch_size=16 (up to 15.33% with {HEALTH}.sigmas=3)" in message


@torch.no_grad()
def test_chance_is_within_its_limit() -> None:
    torch.manual_seed(0)
    found = []
    for _ in range(3000):
        own, pairs = torch.arange(16), torch.randn(16, 16)
        found.append(((pairs.argmax(0) == own).float().mean() + (pairs.argmax(1) == own).float().mean()) / 2)
    deviation, mean = torch.std_mean(torch.stack(found))
    one_sigma = chance_limit(16, 1, 1.0) - 1 / 16
    assert mean == pytest.approx(1 / 16, rel=0.05) and 0.8 * one_sigma < deviation < one_sigma
    assert chance_limit(16, 100, 1.0) == pytest.approx(1 / 16 + one_sigma / 10)


def test_spread_of_features(tiny_json: Path) -> None:
    batch = make_batch(12)
    found = []
    for micro_batch in (None, 5):
        module = make_module(str(tiny_json), micro_batch=micro_batch)
        module.training_step(batch, 0)
        found.append(module.last)
        for tower in ("image", "text"):
            rows = module.embed(batch)[tower]
            distances = torch.cdist(rows, rows).square().sum() / (12 * 11)  # of different ones: twice the variance
            torch.testing.assert_close(module.last[f"{tower}_spread"].double(), distances / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[0]["image_spread"], found[1]["image_spread"])
    one = torch.eye(3)
    assert spreads({"view": one, "view_2": one}) == {"image_spread": pytest.approx(1.0)}
    assert spreads({"text": one[:1]}) == {} and spreads({"text": one[[0, 0]]}) == {"text_spread": 0.0}


# The scale


def test_scale_at_its_floor(told: Told) -> None:
    (message,) = told("steps=6", "loss.init_scale=1.05", "loss.max_scale=14", "optimizer.lr=0.1")
    assert message.startswith("WARNING scale_at_floor, step 2: train/scale 1 is at 1, its least: look at optimizer.lr")


def test_scale_at_its_limit_is_a_note(told: Told) -> None:
    options, leak = ("loss.max_scale=1.2", "optimizer.lr=3e-2"), ("leak", 2)
    (message,) = told("steps=8", "loss.init_scale=1.1", *options, planted=leak)
    assert message.startswith("INFO note, step ") and "has come to loss.max_scale=1.2 and stays there" in message
    assert told("steps=10", "loss.init_scale=1.1", *options, planted=leak) == []
    begins_there = ("loss.init_scale=1.2", f"{HEALTH}.pretrained=a")
    assert told("steps=4", *begins_there, *options, planted=("leak",), name="from there") == []


# Data


def test_waiting_for_data(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decoder.decode

    def slow_decode(self: Decoder, members: dict[str, bytes], position: int) -> object:
        time.sleep(0.01)
        return decode(self, members, position)

    monkeypatch.setattr(Decoder, "decode", slow_decode)
    assert told("steps=5") == []  # four readings after the first are a window, but of less than 30 s
    (message,) = told("steps=5", f"{HEALTH}.min_seconds=0.3", name="counted")
    assert re.match(r"WARNING data_wait, step 5: \d+% of the last \d+ s went by without data to train on", message)
    assert f"more than {HEALTH}.max_data_wait=30%: raise data.num_workers" in message


# The first loss


@pytest.mark.parametrize(
    ("overrides", "planted", "expected"),
    [
        ([], (), None),
        (["loss=siglip"], (), None),
        ([], ("leak",), "0.00, where a model that knows nothing has 2.77 with batch_size=16"),
        (["loss=siglip"], ("leak",), "0.69, where a model that knows nothing has 4.84 to 15.30 with batch_size=16"),
        (["loss.init_scale=100"], (), "look at loss.init_scale"),
        ([f"{HEALTH}.pretrained=a"], ("leak",), None),
        (["loss.duplicates=share"], ("leak",), None),
        (["callbacks.monitor=null"], ("leak",), None),
    ],
)
def test_first_loss(overrides: list[str], planted: tuple, expected: str | None, told: Told) -> None:
    messages = told("steps=1", *overrides, planted=planted)
    if expected is None:
        assert messages == []
    else:
        assert len(messages) == 1 and messages[0].startswith("WARNING first_loss, step 1: ") and expected in messages[0]


def test_first_loss_of_a_run_that_goes_on(told: Told) -> None:
    told("steps=2")
    assert told("steps=3", planted=("leak",)) == []


@pytest.mark.parametrize("batch_size", [2, 16, 1024, 32768])
def test_expected_loss_of_siglip(batch_size: int) -> None:
    low, high = untrained_loss(batch_size, 512, 10.0, -10.0)
    similarities = torch.linspace(-1, 1, 2001, dtype=torch.float64) * 10 * 3 / math.sqrt(512)
    x = similarities - 10
    costs = torch.nn.functional.softplus(-x) + (batch_size - 1) * torch.nn.functional.softplus(x)
    assert low == pytest.approx(float(costs.min()), rel=1e-4) and high == pytest.approx(float(costs.max()))


# Once, and again when it comes back


def test_told_again_after_it_was_away(caplog: pytest.LogCaptureFixture) -> None:
    health = make_health(window=2)
    health.readings = deque([Reading(7, 1.0, {})])
    for message in ("a", "a", None, "a", None, None, "b", None):
        health.tell("name", message)
    assert [record.getMessage() for record in caplog.records] == ["name, step 7: a", "name, step 7: b"]
    again = make_health(window=2)
    again.load_state_dict(health.state_dict())
    again.tell("name", "b")
    assert len(caplog.records) == 2
