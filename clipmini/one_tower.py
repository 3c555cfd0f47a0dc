"""open_clip's kinds of model, and one with a single tower, for runs that compare nothing of the other."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP, _build_text_tower, _build_vision_tower
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clipmini.errors import UserError

Model: TypeAlias = CLIP | CustomTextCLIP  # the only two kinds of object that are trained
Towers: TypeAlias = Literal["both", "image", "text"]  # that a model has
OTHER = {"image": "text", "text": "image"}


class OneTower(CustomTextCLIP):
    """What open_clip makes of a model's JSON, with one tower only; the other is None.

    Weights have the names of a CustomTextCLIP, so that those of the tower can be taken by a model with both.

    Args:
        towers: `image` or `text`.
        embed_dim, vision_cfg, text_cfg, quick_gelu, init_logit_scale, init_logit_bias: see `CustomTextCLIP`.
    """

    def __init__(
        self,
        towers: Towers,
        embed_dim: int,
        vision_cfg: Mapping[str, Any],
        text_cfg: Mapping[str, Any],
        quick_gelu: bool = False,
        *,
        init_logit_scale: float,
        init_logit_bias: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.output_dict = False
        self.visual = _build_vision_tower(embed_dim, vision_cfg, quick_gelu) if towers == "image" else None
        self.text = _build_text_tower(embed_dim, text_cfg, quick_gelu) if towers == "text" else None
        self.logit_scale = nn.Parameter(torch.ones([]) * init_logit_scale)
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.ones([]) * init_logit_bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for tower in filter(None, (self.visual, self.text)):
            tower.set_grad_checkpointing(enable)


def text_tower(model: Model) -> CLIP | TextTransformer | HFTextEncoder:
    """Return what holds the layers of the text tower: open_clip's CLIP does so itself; None without one."""
    return model if isinstance(model, CLIP) else model.text


def towers_of(model: Model) -> Towers:
    """Say which towers a model has."""
    if not isinstance(model, OneTower):
        return "both"
    return "image" if model.visual is not None else "text"


def named_towers(names: Iterable[str]) -> Towers:
    """Say which towers there are weights of, by their names."""
    own = [name for name in names if not name.startswith("logit_")]
    has_image, has_text = (any(name.startswith("visual.") is wanted for name in own) for wanted in (True, False))
    return "both" if has_image == has_text else "image" if has_image else "text"


def check_has(model: Model, tower: Literal["image", "text"], needed_by: str) -> None:
    """See that a model has a tower.

    Raises:
        UserError: it has not.
    """
    if towers_of(model) == OTHER[tower]:
        raise UserError(f"{needed_by} needs the {tower} tower, and the model has only that of {OTHER[tower]}s")


def rename(weights: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Give weights of either kind of model the names that they have in another, without those of towers it has not."""
    without = {name.removeprefix("text."): value for name, value in weights.items()}
    prefix = "" if isinstance(model, CLIP) else "text."
    towers = towers_of(model)
    renamed = {}
    for name, value in without.items():
        kind = "image" if name.startswith("visual.") else None if name.startswith("logit_") else "text"
        if kind is None or towers in ("both", kind):
            renamed[f"{prefix}{name}" if kind == "text" else name] = value
    return renamed
