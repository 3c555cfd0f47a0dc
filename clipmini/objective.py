"""What a run minimises, as the config says it: a weighted sum of losses over kinds of pairs."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from clipmini.data.content import TERMS, needs
from clipmini.data.decode import VIEWS
from clipmini.errors import UserError, did_you_mean
from clipmini.head import HeadOptions
from clipmini.losses import info_nce, siglip
from clipmini.nt_xent import nt_xent
from clipmini.one_tower import Towers
from clipmini.tiles import Duplicates, check_block_size

TEXTS = ("text", "text_2")  # captions of a picture


class ContrastiveLoss(nn.Module):
    """A weighted sum over kinds of pairs: pictures and captions, two views of pictures, two captions.

    The scale and the bias themselves are open_clip's `logit_scale` (a logarithm) and `logit_bias`, in the model, where
    open_clip looks for them; how they start, and how far the scale may go, is said here.

    Args:
        kind: `infonce` or `siglip`, of pictures and captions and of two captions.
        init_scale: what similarities are multiplied with at the start.
        init_bias: what is added to them at the start; only for `siglip`.
        max_scale: limit of the scale; CLIP's is 100 (https://arxiv.org/abs/2103.00020, section 2.5).
        duplicates: what the equal captions of other pictures are: wrong (`ignore`), left out (`mask`), right (`share`).
        block_size: rows of similarities that exist at a time; None chooses.
        terms: the weight of each kind of pairs; None leaves it out. Views are compared by NT-Xent.
        temperatures: of views, and of two captions; None takes the scale of the model.
        head: what views go through before they are compared.
        all_views: whether each view of a picture is compared with each of its captions, or only the first ones.

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
        terms: dict[str, float | None],
        temperatures: dict[str, float | None],
        head: HeadOptions,
        all_views: bool,
    ) -> None:
        super().__init__()
        if not 1 <= init_scale <= max_scale:
            raise UserError(f"loss.init_scale={init_scale:g}: must be from 1 to loss.max_scale={max_scale:g}")
        if (init_bias is None) != (kind == "infonce"):
            raise UserError(f"loss.init_bias={init_bias}: must be a number with siglip, and null with infonce")
        check_block_size(block_size)
        self.terms = check_terms(terms)
        check_temperatures(temperatures, kind)
        self.kind = kind
        self.init_scale = init_scale
        self.init_bias = init_bias
        self.max_scale = max_scale
        self.duplicates = duplicates
        self.block_size = block_size
        self.temperatures = temperatures
        self.head_options = head
        self.all_views = all_views
        self.head: nn.Module | None = None

    def needs(self, tower: str) -> bool:
        """Say whether any term compares what a tower, `image` or `text`, makes."""
        return needs(self.terms, tower)

    @property
    def towers(self) -> Towers:
        """The towers whose features any term compares."""
        return "both" if self.needs("image") and self.needs("text") else "image" if self.needs("image") else "text"

    @property
    def needs_head(self) -> bool:
        """Whether views are compared by more than the embeddings."""
        return "image_image" in self.terms and self.head_options.layers > 0

    @property
    def uses_scale(self) -> bool:
        """Whether any term has the model's scale, and not a temperature of its own."""
        return any(self.temperatures.get(name) is None for name in self.terms)

    def add_head(self, width: int) -> None:
        """Make the head for features of a width."""
        self.head = self.head_options.make(width)

    def forward(
        self,
        features: Mapping[str, Tensor],
        *,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Compute the loss of this process's pairs; the mean over processes is that of the global batch.

        Args:
            features: unit vectors [b, D] by name: views of pictures `image`, `image_2`, captions `text`, `text_2`,
                what views are compared by `view`, `view_2` [b, H]; `negative` are hard negatives [h, D].
            scale, bias: see `clipmini.losses`; a bias for `siglip` only.
            ids: of the captions by the same names, see there.

        Returns:
            `loss` [] with gradient, `accuracy` [], that of the first term, and, if there are several, the loss of each
            as `loss_image_text` and so on.
        """
        assert (bias is None) == (self.kind == "infonce")
        results = {}
        for name in self.terms:
            of_term = self.scale_of(name, scale)
            if name == "image_image":
                results[name] = nt_xent(features["view"], features["view_2"], of_term, block_size=self.block_size)
            elif name == "text_text":
                results[name] = self.compare(features["text"], features["text_2"], of_term, bias, ids.get("text"))
            else:
                results[name] = self.compare_views(features, of_term, bias, ids)
        losses = {f"loss_{name}": loss for name, (loss, _) in results.items()}
        total = sum(weight * loss for weight, loss in zip(self.terms.values(), losses.values(), strict=True))
        parts = {name: loss.detach() for name, loss in losses.items()} if len(losses) > 1 else {}
        return {"loss": total, "accuracy": next(iter(results.values()))[1], **parts}

    def scale_of(self, term: str, scale: Tensor) -> Tensor:
        """Return what similarities of a term are multiplied with: its own, or the model's."""
        temperature = self.temperatures.get(term)
        return scale if temperature is None else scale.new_full((), 1 / temperature)

    def compare_captions(
        self, features: Mapping[str, Tensor], scale: Tensor, bias: Tensor | None, ids: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the one term that judges held-out pairs: pictures with captions or, without that, two captions."""
        if "image_text" in self.terms:
            return self.compare_views(features, scale, bias, ids)
        scale = self.scale_of("text_text", scale)
        return self.compare(features["text"], features["text_2"], scale, bias, ids["text"])

    def compare_views(
        self, features: Mapping[str, Tensor], scale: Tensor, bias: Tensor | None, ids: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compare pictures with captions: the first view with the first caption, or each with each, and the mean."""
        images, texts = ([name for name in names if name in features] for names in (VIEWS, TEXTS))
        if not self.all_views:
            images, texts = images[:1], texts[:1]
        negatives = features.get("negative"), ids.get("negative")
        found = [
            self.compare(features[image], features[text], scale, bias, ids.get(text), *negatives)
            for image in images
            for text in texts
        ]
        losses, accuracies = zip(*found, strict=True)
        return sum(losses) / len(found), sum(accuracies) / len(found)

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        negative: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of one kind of pairs, see `clipmini.losses`."""
        options = {"negative": negative, "negative_ids": negative_ids, "block_size": self.block_size}
        if bias is None:
            return info_nce(first, second, scale, duplicates=self.duplicates, ids=ids, **options)
        return siglip(first, second, scale, bias, duplicates=self.duplicates, ids=ids, **options)

    @torch.no_grad()
    def clamp_(self, logit_scale: Tensor) -> None:
        """Keep a logarithmic scale within its limits, after an optimizer step."""
        logit_scale.clamp_(0, math.log(self.max_scale))


def check_terms(terms: Mapping[str, float | None]) -> dict[str, float]:
    """See that each kind of pairs exists and has a weight, and return those that are not left out.

    Raises:
        UserError: one does not, or there is none.
    """
    known = ", ".join(TERMS)
    for name, weight in terms.items():
        if name not in TERMS:
            raise UserError(f"loss.terms.{name}: no such kind of pairs{did_you_mean(name, TERMS)}; there are: {known}")
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise UserError(f"loss.terms.{name}={weight}: must be a number above 0, or null")
    found = {name: weight for name, weight in terms.items() if weight is not None}
    if not found:
        raise UserError(f"loss.terms: must give a weight to at least one of {known}")
    return found


def check_temperatures(temperatures: Mapping[str, float | None], kind: str) -> None:
    """See that temperatures are above 0, and of terms that may have one.

    Raises:
        UserError: one is not.
    """
    known = ("image_image", "text_text")
    for name, value in temperatures.items():
        if name not in known:
            raise UserError(f"loss.temperatures.{name}: there are {', '.join(known)}{did_you_mean(name, known)}")
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"loss.temperatures.{name}={value:g}: must be above 0, or null for the model's own scale")
        if value is not None and name == "text_text" and kind == "siglip":
            raise UserError(f"loss.temperatures.text_text={value:g}: must be null with loss=siglip, as its bias")
