"""What of a sample is read: as much as the loss of a run compares."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from clipmini.annotations import Limits
from clipmini.data.captions import SAME, Captions
from clipmini.data.decode import VIEWS
from clipmini.data.index import IMAGE_EXTENSIONS, PairFormat
from clipmini.errors import UserError

TERMS = {  # what kinds of pairs need
    "image_text": ("image", "text"),
    "image_image": ("image",),
    "text_text": ("text",),
    "image_teacher": ("image",),
    "text_teacher": ("text",),
    "image_text_teacher": ("image", "text"),
}
TEACHER = "_teacher"  # how the names of those end that compare with what a teacher makes


def needs(terms: Collection[str], tower: str) -> bool:
    """Say whether any kind of pairs needs what a tower, `image` or `text`, makes."""
    return any(tower in TERMS[name] for name in terms)


def needs_teacher(terms: Collection[str], tower: str) -> bool:
    """Say whether any kind of pairs compares with what a teacher's tower makes."""
    return needs([name for name in terms if name.endswith(TEACHER)], tower)


@dataclass(frozen=True)
class Content:
    """What of a sample is read.

    Attributes:
        captions: which of its captions; none if no term of the loss compares captions.
        num_views: of its picture; 0 if none compares pictures.
    """

    captions: Captions
    num_views: int

    @classmethod
    def choose(
        cls,
        terms: Collection[str],
        all_views: bool,
        caption_key: str | Mapping[str, float] | None,
        second_caption_key: str | None,
        hard_negatives: str | None,
        extra_views: int | None,
    ) -> "Content":
        """Choose what a loss compares, of what the config says of `data`.

        Args:
            terms: kinds of pairs that it compares.
            all_views: whether also each view of a picture with each of its captions.

        Raises:
            UserError: it is not there, or there is more than the loss compares.
        """
        all_views = all_views and "image_text" in terms  # which is what compares them
        check_compared(terms, all_views, second_caption_key, hard_negatives)
        captions = Captions.from_key(caption_key if needs(terms, "text") else None, hard_negatives, second_caption_key)
        check_captions(terms, captions)
        return cls(captions, count_views(terms, all_views, extra_views))

    @property
    def pair_format(self) -> PairFormat:
        """The members of a sample that make a pair."""
        return PairFormat(self.captions.extensions, IMAGE_EXTENSIONS if self.num_views else ())


def count_views(terms: Collection[str], all_views: bool, extra_views: int | None) -> int:
    """Return how many views of each picture a loss compares.

    Raises:
        UserError: some would be compared with nothing, or there are not enough.
    """
    Limits(least=0, most=len(VIEWS) - 1).check("data.extra_views", extra_views, int | None)
    compared = "image_image" in terms
    alone = not any(needs([name], "image") for name in terms if name != "image_image")
    extra = (1 if compared else 0) if extra_views is None else extra_views
    if not needs(terms, "image"):
        limit, reason = 0, "no term of loss.terms compares pictures"
    elif not compared:
        limit, reason = len(VIEWS) - 1 if all_views else 0, "only image_image, or loss.all_views, compares them"
    else:
        limit, reason = 1 if alone else 2, "image_image compares two views, and nothing else any"
    if extra > limit:
        raise UserError(f"data.extra_views={extra}: must be at most {limit}, {reason}")
    if compared and not extra:
        raise UserError("data.extra_views=0: loss.terms.image_image compares two views: must be 1 or 2, or null")
    return 1 + extra if needs(terms, "image") else 0


def check_compared(
    terms: Collection[str], all_views: bool, second_caption_key: str | None, hard_negatives: str | None
) -> None:
    """See that a loss compares the further captions that are asked for.

    Raises:
        UserError: it does not.
    """
    if hard_negatives is not None and "image_text" not in terms:
        raise UserError(f"data.hard_negatives={hard_negatives}: only loss.terms.image_text compares them")
    if second_caption_key is not None and "text_text" not in terms and not all_views:
        raise UserError(
            f"data.second_caption_key={second_caption_key}: only loss.terms.text_text, or loss.all_views, compares it"
        )


def check_captions(terms: Collection[str], captions: Captions) -> None:
    """See that there are the captions that a loss compares.

    Raises:
        UserError: there are not.
    """
    with_text = [name for name in terms if needs([name], "text")]
    if with_text and not captions.probabilities:
        raise UserError(
            f"data.caption_key=null: loss.terms.{with_text[0]} compares captions: name where they are, or set "
            f"{', '.join(f'loss.terms.{name}=null' for name in with_text)}"
        )
    if "text_text" in terms and captions.second_key is None:
        raise UserError(
            "data.second_caption_key=null: loss.terms.text_text compares two captions: name where the second is (the "
            f"key of a list takes two of it), or {SAME} for two passes of one caption through a tower with dropout"
        )
