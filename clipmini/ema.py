"""An average of the weights over the steps, beside the weights that are trained."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clipmini import distributed
from clipmini.annotations import Limits
from clipmini.errors import check_choice

Weights = Literal["trained", "average"]
AVERAGE, UPDATES = "average", "average_updates"  # keys of a checkpoint: tensors by name of parameter, and a number


class WeightAverage:
    """The exponential moving average of the trainable parameters, in fp32 at least: a = d a + (1 - d) w after a step.

    Parameters that are not trained, and buffers, are the model's own. Nothing is read back from the device.

    Args:
        decay: d.
        warmup: whether d is at most (1 + t) / (10 + t) after t steps, so that the first weights are soon forgotten, as
            in timm and tf.train.ExponentialMovingAverage.

    Raises:
        UserError: a decay outside 0 to 1.
    """

    def __init__(self, *, decay: float, warmup: bool) -> None:
        Limits(above=0, below=1).check("ema.decay", decay, float | None)
        self.decay = decay
        self.warmup = warmup
        self.averages: dict[str, Tensor] = {}  # by name of parameter
        self.updates = torch.zeros((), dtype=torch.int64)  # good steps

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Begin with a model's weights, or with what was loaded, on the device of the model."""
        loaded, self.averages = self.averages, {}
        for name, weight in trainable(model).items():
            average = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            if loaded:
                distributed.copy_(average, loaded[name])
            self.averages[name] = average
            self.updates = self.updates.to(distributed.local(average).device)

    @torch.no_grad()
    def update(self, model: nn.Module, bad: Tensor) -> None:
        """Take a model's weights in, unless the step was bad, a bool [] on its device."""
        share = torch.where(bad, 0.0, 1 - self.decay)
        if self.warmup:
            share = torch.where(bad, 0.0, (9 / (10 + self.updates)).clamp(min=1 - self.decay))
        averages = [distributed.local(average) for average in self.averages.values()]
        weights = [distributed.local(weight.to(self.averages[name].dtype)) for name, weight in trainable(model).items()]
        torch._foreach_lerp_(averages, weights, [share.to(average.dtype) for average in averages])
        self.updates = self.updates + ~bad

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Have a model hold the average, and give it back its own weights to the last bit."""
        if not self.averages:  # of a complete run that had none
            self.start(model)
        parameters = trainable(model)
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            copy_weights(self.averages, parameters)
            yield
        finally:
            copy_weights(own, parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint takes beside the weights: whole tensors; every rank must call it."""
        return {
            AVERAGE: {name: distributed.full(average) for name, average in self.averages.items()},
            UPDATES: int(self.updates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the average of a checkpoint; where it has none, the average begins with the weights."""
        if AVERAGE in state:
            self.averages = dict(state[AVERAGE])
            self.updates = torch.tensor(state[UPDATES])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are averaged, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


@torch.no_grad()
def copy_weights(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy values into parameters of the same names."""
    for name, parameter in parameters.items():
        distributed.copy_(parameter, values[name])


def check_weights(weights: str, key: str) -> None:
    """See that a choice of weights is one.

    Raises:
        UserError: it is not.
    """
    check_choice(key, weights, get_args(Weights))
