"""Steps that must change nothing: their loss or gradient is not finite, or, if asked for, a spike."""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clipmini import distributed
from clipmini.annotations import Limits
from clipmini.errors import UserError

log = logging.getLogger(__name__)

GOOD, NOT_FINITE, SPIKE = 0.0, 1.0, 2.0  # what a step was, as tensors on the device say it


class Guard:
    """Has a bad step change nothing on any process: no weight, no state of the optimizer, no statistics.

    The gradient of a loss that is not finite is made NaN, so that the reduction of gradients tells all processes of it,
    and each decides by the norm of the reduced gradient, which is the same on all. Nothing else is sent, and nothing is
    read from the device between two logged steps: a fused optimizer skips by its `found_inf`, as it does for
    `torch.amp.GradScaler`. Any other optimizer gets no gradients, for which the host waits for the device in each step;
    so does every optimizer under GradScaler (16-mixed), whose own skipped steps count as well.

    Args:
        batch_size: of all processes, to name the samples of a bad step.
        max_in_a_row: so many bad steps in a row stop the run.
        skip_spikes: whether a gradient norm far above those before it is bad too, see `Spikes`.
        window, sigmas: of `Spikes`.

    Raises:
        UserError: a limit out of its range.
    """

    def __init__(self, *, batch_size: int, max_in_a_row: int, skip_spikes: bool, window: int, sigmas: float) -> None:
        Limits(least=1).check("bad_steps.max_in_a_row", max_in_a_row)
        self.batch_size = batch_size
        self.max_in_a_row = max_in_a_row
        self.spikes = Spikes(window=window, sigmas=sigmas) if skip_spikes else None
        self.total = 0  # bad steps of the run, as far as they have been read
        self.in_a_row = 0  # of them, at the end
        self.longest = 0  # in a row, since the last `check`
        self.protected: list[tuple[Tensor, Tensor]] = []  # what to put back, and how it was
        self.pending: list[tuple[Tensor, Tensor]] = []  # of steps that have not been read: what they were, and where
        self.has_stepped = False
        self.has_told_cost = False

    @torch.no_grad()
    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Remember what a step changes beside what the optimizer does: the scale, the statistics of BatchNorm."""
        self.protected = [(tensor, tensor.clone()) for tensor in map(distributed.local, tensors)]

    def mark(self, loss: Tensor, features: Iterable[Tensor]) -> Tensor:
        """Return the loss [] of this process with a gradient of NaN if it is not finite, and the same loss else."""
        is_finite = loss.detach().isfinite()
        have_finite = torch.stack([part.detach().sum().isfinite() for part in features]).all()
        self.here = torch.stack([is_finite, have_finite]).logical_not()
        return loss * torch.where(is_finite, 1.0, torch.nan)

    def judge(self, norm: Tensor) -> None:
        """Decide by the norm [] of the gradient of all processes whether this step is good."""
        self.kind = torch.where(norm.isfinite(), GOOD, NOT_FINITE)
        if self.spikes is not None:
            self.kind = torch.where(self.spikes.find(norm), SPIKE, self.kind)
        self.bad = self.kind != GOOD

    def hold(self, optimizer: Optimizer, *, has_scaler: bool) -> None:
        """Have the coming step of the optimizer change nothing if it is bad."""
        # The first step makes the state; fused SGD would leave its momentum uninitialised where found_inf is set.
        if can_skip(optimizer) and not has_scaler and self.has_stepped:
            optimizer.found_inf = self.bad.float()  # type: ignore[attr-defined]
            return
        if self.bad.is_cuda and self.has_stepped and not self.has_told_cost:
            self.has_told_cost = True
            why = "precision 16-mixed" if has_scaler else f"{type(optimizer).__name__} without fused=true"
            log.info("%s: the host waits for the GPU in each step, to skip those that are not finite", why)
        if bool(self.bad):
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are passed over, with all their state
        else:
            self.has_stepped = True

    @torch.no_grad()
    def finish(self, optimizer: Optimizer) -> None:
        """Put back what is protected if the step is bad; after the step and all that belongs to it."""
        if hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
        for tensor, before in self.protected:
            tensor.copy_(torch.where(self.bad, before, tensor))
        self.protected = []
        self.pending.append((self.kind, self.here))

    def unread(self) -> list[Tensor]:
        """Return what the steps since the last `take` were, a tensor [] for each."""
        return [kind for kind, _ in self.pending]

    def take(self, step: int, kinds: Sequence[float]) -> None:
        """Count what was read of `unread()`, up to this step, and tell of bad ones; every rank must call it."""
        assert len(kinds) == len(self.pending) and set(kinds) <= {GOOD, NOT_FINITE, SPIKE}, "the ranks do not agree"
        steps = range(step - len(kinds) + 1, step + 1)
        for kind in kinds:
            self.in_a_row = 0 if kind == GOOD else self.in_a_row + 1
            self.longest = max(self.longest, self.in_a_row)
        bad = [(step, kind) for step, kind in zip(steps, kinds, strict=True) if kind != GOOD]
        if bad:
            where = torch.stack([here for (_, here), kind in zip(self.pending, kinds, strict=True) if kind != GOOD])
            everyone = distributed.all_gather_objects(where.tolist())
            self.total += len(bad)
            reasons = [describe(kind, of_ranks) for (_, kind), *of_ranks in zip(bad, *everyone, strict=True)]
            if distributed.rank() == 0:
                self.warn([step for step, _ in bad], reasons)
        self.pending = []

    def read(self, step: int) -> None:
        """Read what has not been read yet, up to this step; every rank must call it."""
        if self.pending:
            self.take(step, torch.stack(self.unread()).tolist())

    def warn(self, steps: Sequence[int], reasons: Sequence[str]) -> None:
        """Tell of bad steps, in one line those that follow each other for the same reason."""
        for (_, reason), group in itertools.groupby(
            enumerate(zip(steps, reasons, strict=True)), key=lambda item: (item[1][0] - item[0], item[1][1])
        ):
            numbers = [step for _, (step, _) in group]
            first, last = numbers[0], numbers[-1]
            name = f"step {first} was" if first == last else f"steps {first} to {last} were"
            positions = f"{(first - 1) * self.batch_size} to {last * self.batch_size - 1}"
            log.warning(
                "%s skipped and changed nothing: %s; samples at positions %s of data.train (data.ledger=true writes "
                "down their keys, `clipmini shards plan` prints them for range=%d:%d); %d bad steps so far",
                *(name, reason, positions, first, last, self.total),
            )

    def check(self, step: int) -> None:
        """See that not too many bad steps came one after another; after `read` or `take`.

        Raises:
            UserError: too many did.
        """
        longest, self.longest = self.longest, 0
        if longest >= self.max_in_a_row:
            spikes = "" if self.spikes is None else "bad_steps.skip_spikes=false, "
            raise UserError(
                f"{longest} steps in a row until step {step} had a loss or gradient that cannot be used, and "
                f"bad_steps.max_in_a_row={self.max_in_a_row}: they changed nothing, and the checkpoints are kept; the "
                f"warnings above name the samples; what helps may be {spikes}a lower optimizer.lr, a longer warm-up "
                "(schedule.warmup_steps), trainer.precision=32-true, or other weights to start from"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on the same; after `read`."""
        spikes = {} if self.spikes is None else self.spikes.state_dict()
        return {"total": self.total, "in_a_row": self.in_a_row, "spikes": spikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        if self.spikes is not None:
            self.spikes.load_state_dict(state["spikes"])


class Spikes:
    """Finds gradient norms that are more than some standard deviations above the mean of those before.

    As OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core, optim/skip_step_optimizer.py), but that only
    good steps are looked back at, and only when there are enough of them.

    Args:
        window: good steps that are looked back at.
        sigmas: standard deviations.
    """

    def __init__(self, *, window: int, sigmas: float) -> None:
        self.sigmas = sigmas
        self.norms = torch.zeros(window, dtype=torch.float64)  # in float64 equal norms have a deviation of 0
        self.count = torch.zeros((), dtype=torch.int64)  # of good steps

    def find(self, norm: Tensor) -> Tensor:
        """Say whether a norm [] is a spike, a bool [], and keep it if it is not."""
        self.norms, self.count, norm = self.norms.to(norm.device), self.count.to(norm.device), norm.double()
        window = len(self.norms)
        deviation, mean = torch.std_mean(self.norms)
        is_spike = (self.count >= window) & norm.isfinite() & (norm > mean + self.sigmas * deviation)
        is_good = norm.isfinite() & ~is_spike
        place = torch.arange(window, device=norm.device) == self.count % window
        self.norms = torch.where(place & is_good, norm, self.norms)
        self.count = self.count + is_good
        return is_spike

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the norms of a run with the same window; with another one, or none, begin anew."""
        if state and len(state["norms"]) == len(self.norms):
            self.norms, self.count = state["norms"].clone(), state["count"].clone()


def can_skip(optimizer: Optimizer) -> bool:
    """Say whether an optimizer looks at `found_inf` on the device: torch's own with fused=True."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def describe(kind: float, of_ranks: Sequence[Sequence[bool]]) -> str:
    """Say why a step was bad, and on which ranks it began: [whether the loss, whether features are not finite]."""
    if kind == SPIKE:
        return "the norm of its gradient is a spike"
    for number, what in ((1, "features"), (0, "the loss")):  # one process's features are in the losses of all
        ranks = [str(rank) for rank, here in enumerate(of_ranks) if here[number]]
        if ranks:
            return f"{what} of {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks)} not finite"
    return "its gradient is not finite"
