"""Cheaper steps first: a run in stages, the early ones with smaller pictures or fewer patches of them.

As FLIP (https://arxiv.org/abs/2212.00794) with patches, CLIPA (https://arxiv.org/abs/2305.07017) with pixels: reduced
inputs for most of a run, whole ones at its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from clipmini.annotations import Limits
from clipmini.blocks import OwnPatchDropout
from clipmini.errors import UserError
from clipmini.model import Model, image_size


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        end: the first step after it.
        image_size: pixels.
        patch_dropout: share of a vision transformer's patches that are left out.
    """

    end: int
    image_size: int
    patch_dropout: float


def read_curriculum(stages: Sequence[Mapping[str, Any]] | None, model: Model, total_steps: int) -> tuple[Stage, ...]:
    """Turn shares of a run into steps; null is the model's own size and dropout.

    Args:
        stages: each with `until`, the share of the run after which the next one begins, `image_size` and
            `patch_dropout`; None is one stage.

    Raises:
        UserError: stages that do not follow one another to the end, or that the image tower cannot take.
    """
    if stages is None:
        return ()
    if model.visual is None:
        raise UserError("curriculum: no term of loss.terms compares pictures: set null")
    if not stages or stages[-1]["until"] != 1:
        last = stages[-1]["until"] if stages else "[]"
        raise UserError(f"curriculum: the last stage ends at until={last}: must be 1.0, the end of the run")
    found: list[Stage] = []
    before = 0.0
    for number, stage in enumerate(stages):
        key, until = f"curriculum[{number}]", stage["until"]
        if not before < until <= 1:
            raise UserError(f"{key}.until={until:g}: must be above {before:g}, where the stage before ends, up to 1.0")
        end = round(until * total_steps)
        if end == (found[-1].end if found else 0):
            raise UserError(f"{key}.until={until:g}: leaves this stage none of the {total_steps} steps")
        size, share = (stage.get(name) for name in ("image_size", "patch_dropout"))
        check_size(model.visual, size, key)
        check_patch_dropout(model.visual, share, key)
        own = float(model.architecture["vision_cfg"].get("patch_dropout") or 0)
        found.append(Stage(end, image_size(model) if size is None else size, own if share is None else share))
        before = until
    return tuple(found)


def check_size(visual: nn.Module, size: int | None, key: str) -> None:
    """See that an image tower takes pictures of a size.

    Raises:
        UserError: it does not.
    """
    if size is None:
        return
    patch = visual.patch_size[0] if isinstance(visual, VisionTransformer) else 1
    if size < 1 or size % patch:
        raise UserError(f"{key}.image_size={size}: must be a multiple of {patch}, or null")
    weight, was_training = next(visual.parameters()), visual.training
    try:
        with torch.no_grad():
            visual.eval()(torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device))
    except Exception as error:  # of whatever tower it is
        raise UserError(f"{key}.image_size={size}: the image tower takes its own size only: {error}") from error
    finally:
        visual.train(was_training)


def check_patch_dropout(visual: nn.Module, share: float | None, key: str) -> None:
    """See that an image tower can leave out a share of patches, and have it ready to.

    Raises:
        UserError: it cannot.
    """
    if share is None:
        return
    Limits(least=0, below=1).check(f"{key}.patch_dropout", share, float | None)
    if not isinstance(visual, VisionTransformer):
        raise UserError(f"{key}.patch_dropout={share:g}: {type(visual).__name__} has none, must be null")
    if isinstance(visual.patch_dropout, nn.Identity):
        visual.patch_dropout = OwnPatchDropout(0.0)


def stage_at(stages: Sequence[Stage], step: int) -> Stage | None:
    """Return the stage of a step; None where there are none."""
    return next((stage for stage in stages if step < stage.end), None)


def set_patch_dropout(model: Model, share: float) -> None:
    """Have the image tower leave out a share of patches."""
    if isinstance(dropout := getattr(model.visual, "patch_dropout", None), OwnPatchDropout):
        dropout.prob = share


def size_limits(stages: Sequence[Stage], batch_size: int) -> tuple[tuple[int, int], ...]:
    """Return the position of a sample up to which pictures have a size, and that size, stage by stage."""
    return tuple((stage.end * batch_size, stage.image_size) for stage in stages)
