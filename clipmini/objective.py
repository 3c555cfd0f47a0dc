"""What a run minimises, as the config says it: a weighted sum of one loss over kinds of pairs."""

import functools
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from clipmini.errors import UserError, did_you_mean
from clipmini.losses import info_nce, siglip
from clipmini.tiles import Duplicates, check_block_size

TERMS = {"image_text": ("image", "text")}  # kinds of pairs, by the features that are compared


class ContrastiveLoss(nn.Module):
    """A weighted sum of InfoNCE or of the sigmoid loss over kinds of pairs.

    The scale and the bias themselves are open_clip's `logit_scale` (a logarithm) and `logit_bias`, in the model, where
    open_clip looks for them; how they start, and how far the scale may go, is said here.

    Args:
        kind: `infonce` or `siglip`.
        init_scale: what similarities are multiplied with at the start.
        init_bias: what is added to them at the start; only for `siglip`.
        max_scale: limit of the scale; CLIP's is 100 (https://arxiv.org/abs/2103.00020, section 2.5).
        duplicates: what the equal captions of other pictures are: wrong (`ignore`), left out (`mask`), right (`share`).
        block_size: rows of similarities that exist at a time; None chooses.
        terms: the weight of each kind of pairs.

    Raises:
        UserError: a value out of its range, or a kind of pairs that there is not.
    """

    def __init__(
        self,
        *,
        kind: Literal["infonce", "siglip"],
        init_scale: float,
        init_bias: float | None,
        max_scale: float,
        duplicates: Duplicates,
        block_size: int | None,
        terms: dict[str, float],
    ) -> None:
        super().__init__()
        if not 1 <= init_scale <= max_scale:
            raise UserError(f"loss.init_scale={init_scale:g}: must be from 1 to loss.max_scale={max_scale:g}")
        if (init_bias is None) != (kind == "infonce"):
            raise UserError(f"loss.init_bias={init_bias}: must be a number with siglip, and null with infonce")
        check_block_size(block_size)
        check_terms(terms)
        self.kind = kind
        self.init_scale = init_scale
        self.init_bias = init_bias
        self.max_scale = max_scale
        self.duplicates = duplicates
        self.block_size = block_size
        self.terms = terms

    def forward(
        self,
        features: Mapping[str, Tensor],
        *,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of this process's pairs; the mean over processes is that of the global batch.

        Args:
            features: unit vectors [b, D] by name, `image`, `text` and so on; `negative` are hard negatives [h, D].
            scale, bias, ids, negative_ids: see `clipmini.losses`; a bias for `siglip` only.

        Returns:
            `loss` [] with gradient, and `accuracy` [], that of the first term.
        """
        assert (bias is None) == (self.kind == "infonce")
        compare = functools.partial(
            info_nce if bias is None else functools.partial(siglip, bias=bias),
            scale=scale,
            duplicates=self.duplicates,
            ids=ids,
            negative=features.get("negative"),
            negative_ids=negative_ids,
            block_size=self.block_size,
        )
        results = [compare(*(features[side] for side in TERMS[name])) for name in self.terms]
        loss = sum(weight * loss for weight, (loss, _) in zip(self.terms.values(), results, strict=True))
        return {"loss": loss, "accuracy": results[0][1]}

    @torch.no_grad()
    def clamp_(self, logit_scale: Tensor) -> None:
        """Keep a logarithmic scale within its limits, after an optimizer step."""
        logit_scale.clamp_(0, math.log(self.max_scale))


def check_terms(terms: Mapping[str, float]) -> None:
    """See that each kind of pairs exists and has a weight.

    Raises:
        UserError: one does not, or there is none.
    """
    known = ", ".join(TERMS)
    if not terms:
        raise UserError(f"loss.terms={{}}: must give a weight to at least one of {known}")
    for name, weight in terms.items():
        if name not in TERMS:
            raise UserError(f"loss.terms.{name}: no such kind of pairs{did_you_mean(name, TERMS)}; there are: {known}")
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"loss.terms.{name}={weight}: must be a number above 0")
