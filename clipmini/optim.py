"""Which parameters decay, and how the learning rate moves."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clipmini.annotations import Limits
from clipmini.errors import UserError


def parameter_groups(modules: Iterable[nn.Module], shares: Mapping[str, float] | None = None) -> list[dict]:
    """Split the trainable parameters into one group that decays and one that does not, for each learning rate.

    As in CLIP (arXiv:2103.00020, section 2.5) and open_clip's trainer, all decays that is no gain and no bias: gains,
    biases and the scale (fewer than two dimensions) and tables of relative position biases are spared.

    Args:
        modules: the model, and what is trained beside it.
        shares: of the learning rate, for parameters that learn slower, by name.

    Returns:
        Groups with the key `share`; first those of the full rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, False): [], (1.0, True): []}
    for name, parameter in itertools.chain.from_iterable(module.named_parameters() for module in modules):
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or "bias" in name
            groups.setdefault(((shares or {}).get(name, 1.0), spared), []).append(parameter)
    return [
        {"params": parameters, "share": share, **({"weight_decay": 0.0} if spared else {})}
        for (share, spared), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]


def apply_shares(optimizer: Optimizer) -> None:
    """Set the learning rate of each of the groups of `parameter_groups`; schedules multiply it."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("share")  # not in place: as a tensor it may be that of all groups


def match_memory_format(optimizer: Optimizer) -> None:
    """Lay the state of each parameter out in memory as the parameter is; to be called when a state has been loaded.

    Shards know no channels_last, which convolutions have elsewhere, and fused optimizers pair elements by their place
    in memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_steps: int,
    warmup_fraction: float,
    final_fraction: Annotated[float, Limits(least=0, most=1)],
) -> LambdaLR:
    """Warm up linearly, then fall along half a cosine.

    Args:
        optimizer: its learning rates are the peak.
        total_steps: of the run.
        warmup_steps: steps of the warm-up, but never more than
        warmup_fraction: this share of the run.
        final_fraction: where the cosine ends, as a share of the peak.
    """
    warmup = warmup_length(total_steps, warmup_steps, warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, total_steps: int, warmup_steps: int, warmup_fraction: float) -> LambdaLR:
    """Warm up linearly, then stay; the arguments are those of `cosine`."""
    warmup = warmup_length(total_steps, warmup_steps, warmup_fraction)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))


def warmup_length(total_steps: int, warmup_steps: int, warmup_fraction: float) -> int:
    """Return the steps of the warm-up.

    Raises:
        UserError: a negative number of steps, or a share outside 0 to 1.
    """
    if warmup_steps < 0 or not 0 <= warmup_fraction < 1:
        raise UserError(
            f"schedule.warmup_steps={warmup_steps} must be 0 or more, and "
            f"schedule.warmup_fraction={warmup_fraction} from 0 to below 1"
        )
    return min(warmup_steps, int(total_steps * warmup_fraction))
