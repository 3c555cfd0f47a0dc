"""Weights between those that a run started from and those that it trained."""

from collections.abc import Mapping
from typing import Any

import torch

from clipmini.annotations import Limits
from clipmini.errors import UserError
from clipmini.model import Model, create_from_architecture
from clipmini.sources import load_start
from clipmini.weights import start_from


@torch.no_grad()
def interpolate_(model: Model, share: float, config: Mapping[str, Any] | None, source: str) -> None:
    """Move the weights of a fine-tuned model towards those that its run started from, in place.

    (1 - share) * start + share * trained, as WiSE-FT does (https://arxiv.org/abs/2109.01903, section 3): what was
    learned stays in part, and what fine-tuning had lost on other data comes back. Counts stay the trained ones.

    Args:
        model: that was trained.
        share: of the trained weights; 1 leaves the model as it is.
        config: of the run that trained it, as plain data.
        source: what the user calls the model, for messages.

    Raises:
        UserError: a share outside 0 to 1, or a run that started from nothing, or from what is there no more.
    """
    Limits(least=0, most=1).check("wise", share)
    options = (config or {}).get("model") or {}
    if not options.get("pretrained"):
        raise UserError(
            f"wise={share}: no weights are known that {source} started from; it must be a run, or its checkpoint, with "
            "model.pretrained"
        )
    if options.get("pretrained_towers", "both") != "both":
        raise UserError(f"wise={share}: {source} started from one tower, model.pretrained_towers, and not from a model")
    start = create_from_architecture(model.architecture)
    before = load_start(options["pretrained"], options.get("name")).model
    start_from(start, before, f"wise={share}: model.pretrained={options['pretrained']}")
    old = start.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(old[name].lerp(value, share))
