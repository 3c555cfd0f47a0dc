"""The bytes of a sample to tensors: a uint8 picture and token ids, every random choice drawn from its position."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torchvision.transforms.functional as F
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import InterpolationMode

from clipmini.data.augment import Augmentation
from clipmini.data.captions import Captions, caption_ids
from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.data.picture import Picture, open_image, to_tensor
from clipmini.data.tokenizer import Tokenize

MAX_RESIZED = 89_478_485  # pixels: what Pillow warns of when it opens a picture
VIEWS = ("image", "image_2", "image_3")  # of a picture, by their names in a batch
FEATURES = "image_features"  # in place of them, for a tower that is locked
TEACHER_FEATURES = ("teacher_image", "teacher_text")  # beside them, what a teacher makes of pictures and captions


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
        self.check_sides(image.width, image.height)
        if self.resize_mode == "squash":
            image = F.resize(image, [self.size, self.size], interpolation)
        elif self.resize_mode == "longest":
            image = ResizeKeepRatio(self.size, longest=1, interpolation=interpolation)(image)
            image = CenterCropOrPad(self.size)(image)
        else:
            image = F.center_crop(F.resize(image, [self.size], interpolation), [self.size, self.size])
        return to_tensor(image)

    def check_sides(self, width: int, height: int) -> None:
        """Refuse a picture that is so long that resizing its shorter side would take gigabytes.

        Raises:
            Fault: it is.
        """
        resized = self.size**2 * max(width, height) // min(width, height)
        if self.resize_mode == "shortest" and resized > MAX_RESIZED:
            raise Fault("too_many_pixels", f"{width} x {height} would be resized to {resized}, more than {MAX_RESIZED}")


class Example(NamedTuple):
    """A decoded sample."""

    views: list[Tensor]  # of its picture, uint8 [3, size, size]; or, in place of it, its features, fp32 [D]
    captions: dict[str, str]  # by their names in a batch
    teacher: Mapping[str, Tensor] = MappingProxyType({})  # a teacher's features, fp32 [D], by their names in a batch


@dataclass(frozen=True)
class Decoder:
    """Turns the members of samples into what a batch holds.

    Attributes:
        size: pixels of the picture.
        size_limits: the position of a sample up to which pictures have another size, and that, in ascending order.
        seed: with the position, the whole state of every random choice.
        max_pixels: larger pictures are refused.
        draft: `auto` decodes large JPEGs at a part of their size, `off` never does.
        view_augmentation: of the views after the first one.
        num_views: of each picture; 0 leaves pictures out.
    """

    size: int
    augmentation: Augmentation
    captions: Captions
    tokenize: Tokenize
    seed: int
    max_pixels: int
    draft: Literal["auto", "off"]
    view_augmentation: Augmentation
    num_views: int
    size_limits: tuple[tuple[int, int], ...] = ()

    def size_at(self, position: int) -> int:
        """Return the pixels of the picture at a position."""
        return next((size for end, size in self.size_limits if position < end), self.size)

    def decode(self, members: Mapping[str, bytes], position: int, features: Tensor | None = None) -> Example:
        """Decode a sample.

        Args:
            features: in place of its picture.

        Raises:
            Fault: the picture or the caption cannot be used.
        """
        draws = Draws(self.seed, position)
        captions = self.captions.draw_all(members, draws, Draws(self.seed, position, len(VIEWS)))
        views = [features] if features is not None else list(self.draw_views(members, position, draws))
        return Example(views, captions)

    def draw_views(self, members: Mapping[str, bytes], position: int, draws: Draws) -> Iterator[Tensor]:
        """Yield the views of a picture, each after the first drawn from numbers of its own."""
        if self.num_views:
            data = next(data for extension, data in members.items() if extension in IMAGE_EXTENSIONS)
            picture = Picture(data, max_pixels=self.max_pixels)
            for number in range(self.num_views):
                if number and picture.image.format == "JPEG":  # each view may be decoded at another size
                    picture = Picture(data, max_pixels=self.max_pixels)
                draws = draws if number == 0 else Draws(self.seed, position, number)
                augmentation = self.view_augmentation if number else self.augmentation
                yield self.make_view(picture, augmentation, draws, self.size_at(position))

    def make_view(self, picture: Picture, augmentation: Augmentation, draws: Draws, size: int) -> Tensor:
        """Crop, resize and change a picture: uint8 [3, size, size]."""
        box = augmentation.draw_box(picture.width, picture.height, draws)
        return augmentation.change(picture.crop(box, size, draft=self.draft), draws)

    def fixed_view(self, data: bytes) -> Tensor:
        """Return the view of a picture where nothing is random: uint8 [3, size, size].

        Raises:
            Fault: the picture cannot be decoded.
        """
        picture = Picture(data, max_pixels=self.max_pixels)
        return self.make_view(picture, self.augmentation, Draws(self.seed, 0), self.size)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make a batch.

        image, image_2, image_3 uint8 [b, 3, size, size], as many as there are views, or image_features fp32 [b, D];
        text, text_2, negative_text int64 [b, context], those that there are, and text_id and so on int64 [b]: equal
        captions have equal ones, 0 where a sample has no hard negative; teacher_image, teacher_text fp32 [b, D].
        """
        views = zip(*(example.views for example in examples), strict=True)
        batch = {name: torch.stack(of_all) for name, of_all in zip(VIEWS, views, strict=False)}
        if "image" in batch and batch["image"].is_floating_point():
            batch[FEATURES] = batch.pop("image")
        for name in examples[0].captions:
            captions = [example.captions[name] for example in examples]
            batch |= {name: self.tokenize(captions), f"{name}_id": caption_ids(captions)}
        for name in examples[0].teacher:
            batch[name] = torch.stack([example.teacher[name] for example in examples])
        return batch
