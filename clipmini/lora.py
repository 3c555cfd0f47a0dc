"""Low-rank changes of a trained model's weights, which stay as they are (LoRA, https://arxiv.org/abs/2106.09685).

A parametrization of torch's, so that whatever reads a weight, as our blocks do of attention, reads the changed one.
peft's layer for nn.MultiheadAttention adds the change to the frozen weights before each forward pass and takes it away
after it; rounding leaves other bits of them, so that a resumed run would not be the same one.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipmini.annotations import Limits
from clipmini.errors import UserError, tell_choices
from clipmini.one_tower import Model, check_has
from clipmini.towers import Kind, list_names

PART = re.compile(r"(.*)parametrizations\.(\w+)\.(original|0\.\w+)$")


class LowRank(nn.Module):
    """Adds scaling * B A to a weight [m, n], with A [r, n] and B [m, r]; B begins as 0.

    A convolution's weight [m, channels, rows, columns] is one of as many rows, as in peft.
    """

    scaling: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft
        self.register_buffer("scaling", weight.new_tensor(alpha / rank))

    def forward(self, weight: Tensor) -> Tensor:
        return change(weight, self.lora_A, self.lora_B, self.scaling)


def change(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Tensor) -> Tensor:
    """Return a changed weight, in the precision that it has."""
    with torch.autocast(weight.device.type, enabled=False):
        return weight + scaling * (lora_b @ lora_a).view_as(weight)


def add_lora(model: Model, *, rank: int, alpha: float, image: Sequence[str] | None, text: Sequence[str] | None) -> None:
    """Freeze towers and train low-rank changes of some of their layers in place of them.

    Args:
        rank: r; 0 leaves the model as it is.
        alpha: changes are multiplied with alpha / rank.
        image, text: ends of the names of layers; None takes all linear ones, attention too, [] leaves the tower as it
            is. Convolutions are taken by their names.

    Raises:
        UserError: a rank or alpha out of range, or a name that is none of a layer.
    """
    Limits(least=0).check("lora.rank", rank)
    Limits(above=0).check("lora.alpha", alpha)
    kinds: tuple[tuple[Kind, Sequence[str] | None], ...] = (("image", image), ("text", text))
    for kind, ends in kinds:
        if rank and (ends is None or len(ends)):
            check_has(model, kind, f"lora.{kind}")
            names = [name for part in list_names(model, kind) for name in part]
            layers = choose_layers(model, kind, names, ends)
            for name in names:
                model.get_parameter(name).requires_grad_(False)
            for layer, weight in layers:
                parametrize.register_parametrization(layer, weight, LowRank(getattr(layer, weight), rank, alpha))


def choose_layers(
    model: Model, kind: Kind, names: Sequence[str], ends: Sequence[str] | None
) -> list[tuple[nn.Module, str]]:
    """Return the layers of a tower that are meant, each with the name of its weight.

    Raises:
        UserError: one of the names is that of no layer.
    """
    layers = {}
    for name in names:
        path, _, weight = name.rpartition(".")
        is_matrix = weight in ("weight", "in_proj_weight") and model.get_parameter(name).ndim > 1
        if is_matrix and not isinstance(layer := model.get_submodule(path), nn.Embedding):
            layers[path] = layer, weight
    for end in ends or ():
        if not any(is_called(path, end) for path in layers):
            known = sorted({".".join(path.split(".")[-2:]) for path in layers})
            raise UserError(f"lora.{kind}: the tower has no layer {end!r}{tell_choices(end, known)}")
    if ends is None:
        return [(layer, weight) for layer, weight in layers.values() if getattr(layer, weight).ndim == 2]
    return [found for path, found in layers.items() if any(is_called(path, end) for end in ends)]


def is_called(path: str, end: str) -> bool:
    """Say whether the path of a layer ends with these names."""
    return f".{path}".endswith(f".{end}")


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model with its low-rank changes added, by the names that they have without them."""
    merged: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := PART.match(name):
            parts.setdefault(found[1] + found[2], {})[found[3]] = value
        else:
            merged[name] = value
    for name, of_weight in parts.items():
        low_rank = (of_weight[f"0.{part}"] for part in ("lora_A", "lora_B", "scaling"))
        merged[name] = change(of_weight["original"], *low_rank)
    return merged
