"""Weights into models: of another model, of open_clip's tags, of files."""

import logging
import textwrap
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIP, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import TextTransformer

from clipmini.errors import UserError
from clipmini.one_tower import OTHER, Model, Towers, check_has, rename, text_tower, towers_of

log = logging.getLogger(__name__)


def start_from(model: Model, start: Model, at: str, towers: Towers = "both") -> None:
    """Load the weights of another model; positions are interpolated to a new number of patches or tokens.

    A bias of the logits that only one of the two has is left out, or stays as it was made.

    Args:
        towers: that are taken; with one of them alone, scale and bias stay too, which belong to both together.

    Raises:
        UserError: names or shapes are not those of the model, or one has no such tower; says which.
    """
    weights = rename(start.state_dict(), model)
    if towers != "both":
        for has in (start, model):
            check_has(has, towers, f"model.pretrained_towers={towers}")
        weights = {name: value for name, value in weights.items() if name.startswith("visual.") == (towers == "image")}
    if model.visual is not None:
        resize_pos_embed(weights, model)
    if isinstance(text_tower(model), CLIP | TextTransformer):
        resize_text_pos_embed(weights, model)
    taken = towers_of(start) if towers == "both" else towers
    if taken not in ("both", towers_of(model)):
        log.info("%s gives no %s tower: that begins as it was made", at, OTHER[taken])
        weights = {name: value for name, value in model.state_dict().items() if name not in weights} | weights
    weights.pop("logit_bias", None)
    numbers = start if towers == "both" else model
    if model.logit_bias is not None:
        bias = numbers.logit_bias if numbers.logit_bias is not None else model.logit_bias
        weights["logit_bias"] = bias.detach().reshape(model.logit_bias.shape)
    weights["logit_scale"] = numbers.logit_scale.detach().reshape(model.logit_scale.shape)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{at} does not fit: {tell_differences(error)}") from error


def download_pretrained(tag: dict[str, Any], at: str) -> str:
    """Return the file of weights of one of open_clip's tags, from its cache or the network.

    Raises:
        UserError: it is in neither.
    """
    try:
        return open_clip.download_pretrained(tag)
    except Exception as error:  # of any of the libraries that fetch
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UserError(f"{at}: open_clip has no such weights in its cache and cannot fetch them: {reason}") from error


def load_weights(model: Model, path: str | Path, at: str) -> None:
    """Load a file of weights, in any form that open_clip reads; no code in it is run.

    Raises:
        UserError: it cannot be read, or its names or shapes are not those of the model; says which.
    """
    try:
        open_clip.load_checkpoint(model, str(path))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{at}: {tell_differences(error)}") from error
    except Exception as error:  # of pickle, zipfile, safetensors: damage has no common class
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UserError(f"{at}: {path} cannot be read as weights: {reason}") from error


def tell_differences(error: Exception) -> str:
    """Tell in one line which names and shapes of weights torch found to differ, the first of them."""
    lines = [textwrap.shorten(line, 300, placeholder=" ...") for line in str(error).splitlines() if line]
    return "; ".join(lines[:8])
