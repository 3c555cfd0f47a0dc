"""The bytes of a sample to tensors: a uint8 picture and token ids, every random choice drawn from its position."""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.functional as F
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode

from clipmini.data.augment import Augmentation
from clipmini.data.plan import SAMPLE, generator
from clipmini.data.tokenizer import Tokenize
from clipmini.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow would try all it knows, one after the other
DECODE_ERRORS = (OSError, ValueError, KeyError, TypeError, SyntaxError, Image.DecompressionBombError)


def open_image(data: bytes) -> Image.Image:
    """Decode a picture to RGB: upright by its EXIF tag, transparency over white, 16 bits scaled to 8."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Return a picture as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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


@dataclass(frozen=True)
class Captions:
    """Which caption of a sample is used: `txt`, a key of its json, or several of them with probabilities."""

    probabilities: Mapping[str, float]

    @classmethod
    def from_key(cls, key: str | Mapping[str, float]) -> "Captions":
        """Read `data.caption_key`.

        Raises:
            UserError: probabilities that do not add up to 1.
        """
        probabilities = {key: 1.0} if isinstance(key, str) else dict(key)
        if any(p < 0 for p in probabilities.values()) or not math.isclose(sum(probabilities.values()), 1.0):
            raise UserError(f"data.caption_key={probabilities}: the probabilities must be positive and add up to 1")
        return cls(probabilities)

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that hold the captions."""
        return tuple(sorted({"txt" if key == "txt" else "json" for key in self.probabilities}))

    def draw(self, members: Mapping[str, bytes], rng: np.random.Generator) -> str:
        """Return one caption; of a list of captions, each is as likely."""
        keys = list(self.probabilities)
        key = keys[rng.choice(len(keys), p=list(self.probabilities.values()))] if len(keys) > 1 else keys[0]
        value = members["txt"].decode() if key == "txt" else json.loads(members["json"])[key]
        if isinstance(value, list):
            value = value[rng.integers(len(value))]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"the caption {key!r} is {value!r}")
        return value.strip()


@dataclass(frozen=True)
class Decoder:
    """Turns the members of a sample into what a batch holds.

    Attributes:
        size: pixels of the picture.
        seed: with the position, the whole state of every random choice.
    """

    size: int
    augmentation: Augmentation
    captions: Captions
    tokenize: Tokenize
    seed: int

    def __call__(self, members: Mapping[str, bytes], position: int) -> dict[str, Tensor]:
        """Decode a sample: image uint8 [3, size, size], text int64 [context], id int64 [] (equal captions, equal id).

        Raises:
            DECODE_ERRORS: the picture or the caption cannot be used.
        """
        rng = generator(self.seed, SAMPLE, position)
        caption = self.captions.draw(members, rng)
        picture = next(data for extension, data in members.items() if extension not in ("txt", "json"))
        return {
            "image": to_tensor(self.augmentation(open_image(picture), self.size, rng)),
            "text": self.tokenize([caption])[0],
            "id": torch.tensor(caption_id(caption)),
        }


def caption_id(caption: str) -> int:
    """Hash a caption to a signed 64-bit integer; case and white space do not count."""
    digest = hashlib.blake2b(" ".join(caption.lower().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
