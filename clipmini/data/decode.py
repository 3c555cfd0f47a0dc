"""The bytes of a sample to tensors: a uint8 picture and token ids, every random choice drawn from its position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torchvision.transforms.functional as F
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import InterpolationMode

from clipmini.data.augment import Augmentation
from clipmini.data.captions import Captions, caption_ids
from clipmini.data.draws import Draws
from clipmini.data.picture import Picture, open_image, to_tensor
from clipmini.data.tokenizer import Tokenize


@dataclass(frozen=True)
class EvaluationTransform:
    """The deterministic transform of evaluation, as open_clip's for the same model: uint8 [3, size, size].

    Attributes:
        size: pixels.
        resize_mode: `shortest` (then a central crop), `longest` (then padding) or `squash`.
        interpolation: `bicubic` or `bilinear`.
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def __call__(self, data: bytes) -> Tensor:
        image, interpolation = open_image(data), InterpolationMode(self.interpolation)
        if self.resize_mode == "squash":
            image = F.resize(image, [self.size, self.size], interpolation)
        elif self.resize_mode == "longest":
            image = ResizeKeepRatio(self.size, longest=1, interpolation=interpolation)(image)
            image = CenterCropOrPad(self.size)(image)
        else:
            image = F.center_crop(F.resize(image, [self.size], interpolation), [self.size, self.size])
        return to_tensor(image)


class Example(NamedTuple):
    """A decoded sample."""

    image: Tensor  # uint8 [3, size, size]
    caption: str
    negative: str  # a caption that is wrong for it, or blank


@dataclass(frozen=True)
class Decoder:
    """Turns the members of samples into what a batch holds.

    Attributes:
        size: pixels of the picture.
        seed: with the position, the whole state of every random choice.
        max_pixels: larger pictures are refused.
        draft: `auto` decodes large JPEGs at a part of their size, `off` never does.
    """

    size: int
    augmentation: Augmentation
    captions: Captions
    tokenize: Tokenize
    seed: int
    max_pixels: int
    draft: Literal["auto", "off"]

    def decode(self, members: Mapping[str, bytes], position: int) -> Example:
        """Decode a sample.

        Raises:
            Fault: the picture or the caption cannot be used.
        """
        draws = Draws(self.seed, position)
        caption = self.captions.draw(members, draws)
        data = next(data for extension, data in members.items() if extension not in ("txt", "json"))
        picture = Picture(data, max_pixels=self.max_pixels)
        box = self.augmentation.draw_box(picture.width, picture.height, draws)
        image = self.augmentation.change(picture.crop(box, self.size, draft=self.draft), draws)
        # The last to be drawn: what is drawn before is the same without it.
        return Example(image, caption, self.captions.draw_negative(members, draws))

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make a batch.

        image uint8 [b, 3, size, size], text int64 [b, context], id int64 [b] (equal captions, equal id); and where the
        config names hard negatives negative_text and negative_id like those, 0 where a sample has none.
        """
        images, captions, negatives = zip(*examples, strict=True)
        batch = {"image": torch.stack(images), "text": self.tokenize(captions), "id": caption_ids(captions)}
        if self.captions.hard_negatives:
            batch |= {"negative_text": self.tokenize(negatives), "negative_id": caption_ids(negatives)}
        return batch
