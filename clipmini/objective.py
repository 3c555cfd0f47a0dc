"""What a run minimises, as the config says it: a weighted sum of losses over kinds of pairs."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from clipmini.annotations import Limits
from clipmini.data.content import TEACHER, TERMS, needs
from clipmini.data.decode import VIEWS
from clipmini.distillation import feature_distance, similarity_distillation
from clipmini.errors import UserError, tell_choices
from clipmini.head import HeadOptions, Projection
from clipmini.losses import info_nce, siglip
from clipmini.nt_xent import nt_xent
from clipmini.one_tower import Towers
from clipmini.tiles import Duplicates

TEXTS = ("text", "text_2")  # captions of a picture
TEMPERATURES = ("image_image", "text_text", "image_text_teacher")  # terms that may have one of their own


class ContrastiveLoss(nn.Module):
    """A weighted sum over kinds of pairs: pictures and captions, two views of pictures, two captions, a teacher's.

    Compared with a teacher's are features, by their mean squared difference (`image_teacher` and `text_teacher`), and
    similarities of pictures with captions, by their divergence (`image_text_teacher`).

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
        temperatures: of views, of two captions, and of the teacher's similarities; None takes the scale of the model,
            or of the teacher.
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
        Limits(least=1).check("loss.block_size", block_size, int | None)
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
        self.teacher_scale: float | None = None
        self.projections = nn.ModuleDict()  # of features to the width of a teacher's, by tower

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
        own = [name for name in ("image_image", "text_text") if self.temperatures.get(name) is None]
        return any(name in self.terms for name in ("image_text", "image_text_teacher", *own))

    @property
    def uses_bias(self) -> bool:
        """Whether any term has the model's bias."""
        return self.kind == "siglip" and ("image_text" in self.terms or "text_text" in self.terms)

    @property
    def compares_embeddings(self) -> bool:
        """Whether any term compares the embeddings of pictures, and not views of them alone."""
        return any(needs([name], "image") for name in self.terms if name != "image_image")

    @property
    def judged(self) -> Literal["image_text", "text_text"] | None:
        """Which held-out pairs are compared: those that a term makes alike, be it by a teacher that has done so."""
        by_teacher = {"image_teacher", "text_teacher"} <= self.terms.keys() and not self.projections
        if "image_text" in self.terms or "image_text_teacher" in self.terms:
            return "image_text"
        return "text_text" if "text_text" in self.terms else "image_text" if by_teacher else None

    def check_judged(self) -> None:
        """See that there is something to compare of held-out pairs.

        Raises:
            UserError: there is not.
        """
        if self.judged is None:
            raise UserError(
                "data.val: no term of loss.terms makes captions like pictures or like other captions: set null, and "
                "evaluation.datasets with probes"
            )

    def add_head(self, width: int) -> None:
        """Make the head for features of a width."""
        self.head = self.head_options.make(width)

    def add_teacher(self, width: int, teacher_width: int, teacher_scale: float) -> None:
        """Take what is to be known of a teacher: how wide its features are, and its scale."""
        self.teacher_scale = teacher_scale
        for tower in ("image", "text"):
            if f"{tower}{TEACHER}" in self.terms and width != teacher_width:
                self.projections[tower] = Projection(width, teacher_width)

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give features of pictures and captions the width of a teacher's, where they have another."""
        return {f"{tower}_projected": layer(features[tower]) for tower, layer in self.projections.items()}

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
                what views are compared by `view`, `view_2` [b, H]; `negative` are hard negatives [h, D]; what a teacher
                makes `teacher_image`, `teacher_text` [b, T], and `image_projected`, `text_projected`, see `project`.
            scale, bias: see `clipmini.losses`; a bias for `siglip` only.
            ids: of the captions by the same names, see there.

        Returns:
            `loss` [] with gradient, `accuracy` [], that of the first term that has one, and, if there are several, the
            loss of each as `loss_image_text` and so on.
        """
        assert (bias is None) == (self.kind == "infonce")
        results: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name in self.terms:
            of_term = self.scale_of(name, scale)
            if name == "image_image":
                results[name] = nt_xent(features["view"], features["view_2"], of_term, block_size=self.block_size)
            elif name == "text_text":
                results[name] = self.compare(features["text"], features["text_2"], of_term, bias, ids.get("text"))
            elif name == "image_text":
                results[name] = self.compare_views(features, of_term, bias, ids)
            elif name == "image_text_teacher":
                results[name] = self.compare_with_teacher(features, scale)
            else:
                tower = name.removesuffix(TEACHER)
                own = features.get(f"{tower}_projected", features[tower])
                results[name] = feature_distance(own, features[f"teacher_{tower}"]), None
        losses = {f"loss_{name}": loss for name, (loss, _) in results.items()}
        weighted = [weight * loss for weight, loss in zip(self.terms.values(), losses.values(), strict=True)]
        parts = {name: loss.detach() for name, loss in losses.items()} if len(losses) > 1 else {}
        accuracies = [accuracy for _, accuracy in results.values() if accuracy is not None]
        return {"loss": torch.stack(weighted).sum(), **({"accuracy": accuracies[0]} if accuracies else {}), **parts}

    def scale_of(self, term: str, scale: Tensor) -> Tensor:
        """Return what similarities of a term are multiplied with: its own, or the model's."""
        temperature = self.temperatures.get(term)
        return scale if temperature is None else scale.new_full((), 1 / temperature)

    def compare_with_teacher(self, features: Mapping[str, Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Compare similarities of pictures and captions with a teacher's, each with the scale of its own model."""
        temperature = self.temperatures.get("image_text_teacher")
        assert self.teacher_scale is not None
        teacher_scale = self.teacher_scale if temperature is None else 1 / temperature
        theirs = features["teacher_image"], features["teacher_text"], scale.new_full((), teacher_scale)
        return similarity_distillation(features["image"], features["text"], scale, *theirs, block_size=self.block_size)

    def compare_captions(
        self, features: Mapping[str, Tensor], scale: Tensor, bias: Tensor | None, ids: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the one term that judges held-out pairs: pictures with captions or, without that, two captions."""
        if self.judged == "image_text":
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
    for name, weight in terms.items():
        if name not in TERMS:
            raise UserError(f"loss.terms.{name}: no such kind of pairs{tell_choices(name, TERMS)}")
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise UserError(f"loss.terms.{name}={weight}: must be a number above 0, or null")
    found = {name: weight for name, weight in terms.items() if weight is not None}
    if not found:
        raise UserError(f"loss.terms: must give a weight to at least one of {', '.join(TERMS)}")
    return found


def check_temperatures(temperatures: Mapping[str, float | None], kind: str) -> None:
    """See that temperatures are above 0, and of terms that may have one.

    Raises:
        UserError: one is not.
    """
    for name, value in temperatures.items():
        if name not in TEMPERATURES:
            raise UserError(f"loss.temperatures.{name}: no such temperature{tell_choices(name, TEMPERATURES)}")
        if value is not None and not 0 < value < math.inf:
            whose = "teacher's" if name.endswith(TEACHER) else "model's"
            raise UserError(f"loss.temperatures.{name}={value:g}: must be above 0, or null for the {whose} own scale")
        if value is not None and name == "text_text" and kind == "siglip":
            raise UserError(f"loss.temperatures.text_text={value:g}: must be null with loss=siglip, as its bias")
