"""Signs that a run trains badly though it goes on: told once when they begin, from what is read for the log anyway."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from clipmini.annotations import Limits
from clipmini.callbacks import Monitor, Reading
from clipmini.module import ClipModule
from clipmini.objective import ContrastiveLoss

log = logging.getLogger(__name__)

KEY = "callbacks.training_health"
# A logarithm of the scale in bfloat16 is its limit to 1 in 256 of 4.6: the scale is it to 2 %.
AT_LIMIT = 0.02


class TrainingHealth(Callback):
    """Warns of what goes wrong in training, each by a short name, once when it begins.

    It looks at what `Monitor` has read, on the first process: nothing is sent, and the device is not waited for. What
    is told is told again only after it was away for a whole window of readings; a run that goes on does not repeat it.

    - `collapse`: in-batch accuracy at chance, or features (almost) the same for all of a batch.
    - `data_wait`: the share of time without data to train on.
    - `scale_at_floor`: the scale is at 1, its least: the model tells nothing apart. At its upper limit it does no harm:
      CLIP's own models end at 100, some recipes hold it lower on purpose. That it gets there is a note, once in a run,
      and none for a run that begins there.
    - `first_loss`: the first step's loss is not that of a model that knows nothing, see `untrained_loss`. Only pictures
      with captions are judged, and no model that begins trained.

    Args:
        window: readings that are looked at together, one every `trainer.log_every_n_steps`.
        grace_steps: up to which no collapse is told, nor as long as the learning rate rises.
        sigmas: standard deviations above chance, up to which an accuracy is at chance.
        min_spread: variance of the unit vectors of a batch: 0 if they are the same, about 1 if they go all ways.
        max_data_wait: share of the time.
        min_seconds: that a window must take for `data_wait` to be judged.
        first_loss_below: nats below what is expected of a first loss.
        first_loss_above: nats above it; more, as features that differ by chance cost something too.
        pretrained: what the model begins with, or None.
    """

    def __init__(
        self,
        *,
        window: Annotated[int, Limits(least=2)],
        grace_steps: Annotated[int, Limits(least=0)],
        sigmas: Annotated[float, Limits(least=0)],
        min_spread: Annotated[float, Limits(least=0)],
        max_data_wait: Annotated[float, Limits(least=0, most=1)],
        min_seconds: Annotated[float, Limits(least=0)],
        first_loss_below: Annotated[float, Limits(least=0)],
        first_loss_above: Annotated[float, Limits(least=0)],
        pretrained: str | None,
    ) -> None:
        self.window = window
        self.grace_steps = grace_steps
        self.sigmas = sigmas
        self.min_spread = min_spread
        self.max_data_wait = max_data_wait
        self.min_seconds = min_seconds
        self.first_loss_below = first_loss_below
        self.first_loss_above = first_loss_above
        self.pretrained = pretrained
        self.active: dict[str, int] = {}  # what has been told, and the readings since that did not show it
        self.scale_was_lower = False  # than its upper limit, in this run
        self.has_noted_limit = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": dict(self.active),
            "scale_was_lower": self.scale_was_lower,
            "has_noted_limit": self.has_noted_limit,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.active = dict(state_dict["active"])
        self.scale_was_lower = state_dict["scale_was_lower"]
        self.has_noted_limit = state_dict["has_noted_limit"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.monitor = next((callback for callback in callbacks if isinstance(callback, Monitor)), None)
        self.last: Reading | None = None
        self.readings: deque[Reading] = deque(maxlen=self.window)
        self.is_warm = False
        self.first_loss: Tensor | None = None
        assert trainer.train_dataloader is not None
        self.batch_size = trainer.train_dataloader.batch_size

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, ClipModule)
        if not trainer.is_global_zero or self.monitor is None:
            return
        if trainer.global_step == 1:
            self.first_loss = pairs_loss(module)  # read later: that would wait for the device
        reading = self.monitor.reading
        if reading is None or reading is self.last:
            return
        before, self.last = self.last, reading
        if before is None:  # the time of the first has the start of the loader's workers in it
            self.judge_first_loss(module)
        elif math.isfinite(reading.metrics["train/loss"]):  # the guard tells of others
            self.is_warm = self.is_warm or reading.metrics["train/lr"] <= before.metrics["train/lr"]
            self.readings.append(reading)
            self.judge(module.loss)

    def judge(self, loss: ContrastiveLoss) -> None:
        """Look at the readings, and tell what has begun."""
        if loss.uses_scale:
            self.note_limit(loss.max_scale)
            self.tell("scale_at_floor", self.find_floor())
        if len(self.readings) == self.window:
            self.tell("collapse", self.find_collapse())
            self.tell("data_wait", self.find_data_wait())

    def tell(self, name: str, message: str | None) -> None:
        """Warn of what has begun, and forget what was away for a window."""
        if message is None:
            if name in self.active:
                self.active[name] += 1
                if self.active[name] >= self.window:
                    del self.active[name]
            return
        if name not in self.active:
            log.warning("%s, step %d: %s", name, self.readings[-1].step, message)
        self.active[name] = 0

    def mean(self, name: str) -> float:
        return sum(reading.metrics[name] for reading in self.readings) / len(self.readings)

    def find_collapse(self) -> str | None:
        """Say what has collapsed, if anything has."""
        if self.readings[-1].step <= self.grace_steps or not self.is_warm:
            return None
        keys = "look at optimizer.lr, schedule.warmup_steps and whether captions and pictures belong together"
        count, names = len(self.readings), self.readings[-1].metrics.keys()
        for tower in ("image", "text"):
            name = f"train/{tower}_spread"
            if name in names and self.mean(name) < self.min_spread:
                return (
                    f"the {tower} features of a batch are almost the same: {name} {self.mean(name):.2g} is less than "
                    f"{KEY}.min_spread={self.min_spread:g}: {keys}"
                )
        limit = chance_limit(self.batch_size, count, self.sigmas)
        if "train/accuracy" in names and self.mean("train/accuracy") <= limit < 1:
            return (
                f"train/accuracy {self.mean('train/accuracy'):.2%} in the last {count} readings is no more than chance "
                f"with batch_size={self.batch_size} (up to {limit:.2%} with {KEY}.sigmas={self.sigmas:g}): {keys} "
                "(data.caption_key; loss.duplicates=share where many captions are equal)"
            )
        return None

    def find_data_wait(self) -> str | None:
        """Say so if too much time passes without data; a single long wait is one reading of many."""
        waited = self.mean("throughput/data_wait")
        seconds = sum(reading.seconds for reading in self.readings)
        if seconds < self.min_seconds or waited <= self.max_data_wait:
            return None
        return (
            f"{waited:.0%} of the last {seconds:.0f} s went by without data to train on, more than "
            f"{KEY}.max_data_wait={self.max_data_wait:.0%}: raise data.num_workers (on more CPU cores), "
            "pip install 'clipmini[fast]' to read JPEG faster, or pack smaller pictures"
        )

    def find_floor(self) -> str | None:
        """Say so if the scale of similarities is at its least."""
        scale = self.readings[-1].metrics["train/scale"]
        if scale > 1 + AT_LIMIT:
            return None
        return f"train/scale {scale:.3g} is at 1, its least: look at optimizer.lr, loss.init_scale and the captions"

    def note_limit(self, max_scale: float) -> None:
        """Note once in a run that the scale has come to its upper limit."""
        scale = self.readings[-1].metrics["train/scale"]
        is_lower = scale < (1 - AT_LIMIT) * max_scale
        if self.scale_was_lower and not is_lower and not self.has_noted_limit:
            self.has_noted_limit = True
            text = "note, step %d: train/scale has come to loss.max_scale=%g and stays there, as is usual late in a run"
            log.info(text, self.readings[-1].step, max_scale)
        self.scale_was_lower = self.scale_was_lower or is_lower

    def judge_first_loss(self, module: ClipModule) -> None:
        """Compare the loss of the first step, of this process's pairs, with what is expected."""
        if self.first_loss is None or self.pretrained is not None or self.batch_size < 2:
            return
        value = float(self.first_loss)
        loss, width = module.loss, module.model.architecture["embed_dim"]
        low, high = untrained_loss(self.batch_size, width, loss.init_scale, loss.init_bias)
        if low - self.first_loss_below <= value <= high + self.first_loss_above or not math.isfinite(value):
            return
        expected = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        limits = f"{KEY}.first_loss_below={self.first_loss_below:g} and first_loss_above={self.first_loss_above:g}"
        why = "pictures and captions give each other away, or are not all compared"
        log.warning(
            "first_loss, step 1: %.2f, where a model that knows nothing has %s with batch_size=%d (allowed: %s): %s",
            *(value, expected, self.batch_size, limits, why if value < low else "look at loss.init_scale"),
        )


def pairs_loss(module: ClipModule) -> Tensor | None:
    """Return the last loss [] of pictures with captions, without its weight, on its device; None if it is not known.

    With `duplicates` other than `ignore` it depends on how many captions are equal.
    """
    loss = module.loss
    if "image_text" not in loss.terms or loss.duplicates != "ignore":
        return None
    if len(loss.terms) > 1:
        return module.last["loss_image_text"]
    return module.last["loss"] / loss.terms["image_text"]


def chance_limit(batch_size: int, count: int, sigmas: float) -> float:
    """Return the largest mean accuracy of `count` batches that chance explains.

    A guess among B is right with probability 1/B. Each batch counts as B guesses, not as the 2 B that the accuracy is
    the mean of: what a picture picks and what its caption picks go together, so that the mean of both varies less than
    a binomial of B, and never more.
    """
    chance = 1 / batch_size
    return chance + sigmas * math.sqrt(chance * (1 - chance) / (count * batch_size))


def untrained_loss(batch_size: int, width: int, scale: float, bias: float | None) -> tuple[float, float]:
    """Return the least and the largest loss that is expected of a model that knows nothing, in nats.

    InfoNCE (no bias): log B. As nothing tells the right caption from others, its similarity is on average that of all,
    and the logsumexp of B numbers is at least their mean plus log B. So it is no less; what features that differ
    without a meaning add, about half the variance of a row of similarities, is left to the tolerance.

    SigLIP: all similarities are about the same S, that of two towers' mean features: the one right pair costs
    softplus(-x) and each of B - 1 others softplus(x) with x = S + bias. The cosine of two directions in D dimensions
    is within 3 / sqrt(D); the cost is convex with its least value at x = -log(B - 1).

    Args:
        batch_size: B, of all processes, 2 or more.
        width: D, of the embedding.
        scale: of similarities.
        bias: of SigLIP; None for InfoNCE.
    """
    if bias is None:
        return math.log(batch_size), math.log(batch_size)

    def cost(x: float) -> float:
        return softplus(-x) + (batch_size - 1) * softplus(x)

    reach = scale * min(1.0, 3 / math.sqrt(width))
    ends = bias - reach, bias + reach
    least = min(max(-math.log(batch_size - 1), ends[0]), ends[1])
    return cost(least), max(map(cost, ends))


def softplus(x: float) -> float:
    """Return log(1 + exp(x)), also of large numbers."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
