"""What may happen to a training picture: a crop, a mirror image, an affine map, a linear map of its colours."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from clipmini.data.draws import Draws
from clipmini.data.picture import Box, to_tensor
from clipmini.errors import UserError

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey
# RGB to luma and two chroma axes (YIQ, NTSC 1953): a change of hue is a rotation of the two.
YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(YIQ)
MID_GREY = 128.0


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop, flip, affine map, colour jitter and blur, in that order, each drawn from the numbers given.

    Attributes:
        scale: range of the crop's share of the picture's area.
        ratio: range of the crop's width to height.
        flip: probability of a mirror image.
        rotation: largest angle, degrees.
        translation: largest shift, as a share of the size.
        zoom: range of a second scaling, about the centre.
        shear: largest shear along x, degrees.
        fill: grey level of what the affine map brings in from outside, 0 to 255.
        color_jitter: largest relative change of brightness, of contrast (about mid grey) and of saturation, and largest
            change of hue in turns; or null.
        color_jitter_probability: how often colours are changed at all.
        grayscale_probability: how often they are taken away.
        blur: range of the standard deviation of a Gaussian blur, pixels.
        blur_probability: how often there is one.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    rotation: float
    translation: float
    zoom: tuple[float, float]
    shear: float
    fill: int
    color_jitter: tuple[float, float, float, float] | None
    color_jitter_probability: float
    grayscale_probability: float
    blur: tuple[float, float]
    blur_probability: float

    def check(self, key: str) -> None:
        """See that each number is in its range.

        Args:
            key: of the config.

        Raises:
            UserError: one is not.
        """
        jitter = self.color_jitter or (0, 0, 0, 0)
        shares = ("flip", "translation", "color_jitter_probability", "grayscale_probability", "blur_probability")
        is_jitter = len(jitter) == 4 and 0 <= min(jitter) and max(jitter[:3]) <= 1 and jitter[3] <= 0.5
        are_right = {
            "scale": (0 < self.scale[0] <= self.scale[1] <= 1, "a range above 0, up to 1"),
            "ratio": (0 < self.ratio[0] <= self.ratio[1] < math.inf, "a range above 0"),
            "zoom": (0 < self.zoom[0] <= self.zoom[1] < math.inf, "a range above 0"),
            "blur": (0 <= self.blur[0] <= self.blur[1] < math.inf, "a range from 0 on"),
            "rotation": (0 <= self.rotation <= 180, "from 0 to 180"),
            "shear": (0 <= self.shear < 90, "from 0 to below 90"),
            "fill": (0 <= self.fill <= 255, "from 0 to 255"),
            "color_jitter": (is_jitter, "three numbers from 0 to 1 and one from 0 to 0.5, or null"),
            **{name: (0 <= getattr(self, name) <= 1, "from 0 to 1") for name in shares},
        }
        for name, (is_right, limit) in are_right.items():
            if not is_right:
                raise UserError(f"{key}.{name}={getattr(self, name)}: must be {limit}")

    @property
    def is_random(self) -> bool:
        """Whether a picture is not always changed in the same way."""
        is_still = tuple(self.scale) == (1.0, 1.0) and self.ratio[0] == self.ratio[1] and self.flip in (0.0, 1.0)
        has_map = self.rotation or self.translation or self.shear or tuple(self.zoom) != (1.0, 1.0)
        has_colors = (self.color_jitter and self.color_jitter_probability) or 0 < self.grayscale_probability < 1
        return bool(not is_still or has_map or has_colors or self.blur_probability)

    def draw_box(self, width: int, height: int, draws: Draws) -> Box:
        """Draw the part of a picture that is used."""
        return draw_crop(width, height, self.scale, self.ratio, draws)

    def change(self, picture: Tensor, draws: Draws) -> Tensor:
        """Change a picture that is cropped already: uint8 [3, size, size] to the same."""
        if draws.random() < self.flip:
            picture = picture.flip(2)
        size = picture.shape[1]
        coefficients = self.draw_affine_map(size, draws)
        colors = self.draw_colors(draws)
        # Drawn only where there may be one: numbers that are drawn in vain would change what is drawn after them.
        blur = draws.uniform(*self.blur) if self.blur_probability and draws.random() < self.blur_probability else None
        if coefficients is None and colors is None and blur is None:
            return picture
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        if coefficients:
            fill = (self.fill,) * 3
            method = Image.Transform.AFFINE
            image = image.transform((size, size), method, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)
        image = image.convert("RGB", colors) if colors else image
        return to_tensor(image.filter(ImageFilter.GaussianBlur(blur)) if blur is not None else image)

    def draw_affine_map(self, size: int, draws: Draws) -> tuple[float, ...] | None:
        """Draw an affine map as Pillow wants it, or None if there is never any."""
        if not (self.rotation or self.translation or self.shear or tuple(self.zoom) != (1.0, 1.0)):
            return None
        return affine_map(
            size,
            rotation=draws.uniform(-self.rotation, self.rotation),
            zoom=math.exp(draws.uniform(math.log(self.zoom[0]), math.log(self.zoom[1]))),
            shear=draws.uniform(-self.shear, self.shear),
            shift=(
                draws.uniform(-self.translation, self.translation) * size,
                draws.uniform(-self.translation, self.translation) * size,
            ),
        )

    def draw_colors(self, draws: Draws) -> tuple[float, ...] | None:
        """Draw a map of colours: the 12 numbers of a 3 x 4 matrix, or None to leave them."""
        brightness = contrast = saturation = 1.0
        hue = 0.0
        if self.color_jitter and draws.random() < self.color_jitter_probability:
            brightness, contrast, saturation = (1 + draws.uniform(-limit, limit) for limit in self.color_jitter[:3])
            hue = draws.uniform(-1, 1) * self.color_jitter[3]
        if draws.random() < self.grayscale_probability:
            saturation = 0.0
        if (brightness, contrast, saturation, hue) == (1, 1, 1, 0):
            return None
        return color_map(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


def draw_crop(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws) -> Box:
    """Draw the box of a random resized crop.

    Ten tries of a uniform area and a log-uniform aspect ratio, else the largest central box within the ratios: the
    rule of `torchvision.transforms.RandomResizedCrop`.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draws.below(width - w + 1), draws.below(height - h + 1)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def affine_map(
    size: int, *, rotation: float, zoom: float, shear: float, shift: tuple[float, float]
) -> tuple[float, ...]:
    """Return what Pillow wants of an affine map about the centre: where each pixel of the result comes from.

    Args:
        size: pixels of both pictures.
        rotation: degrees, counter-clockwise as seen.
        zoom: above 1 enlarges.
        shear: degrees along x.
        shift: pixels right and down.
    """
    angle, slope = math.radians(rotation), math.tan(math.radians(shear))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # The inverse of zoom * rotation * shear: first back by the rotation, then by the shear.
    a, b, d, e = cos + slope * -sin, -sin - slope * cos, sin, cos
    x, y = size / 2 + shift[0], size / 2 + shift[1]
    return a, b, size / 2 - a * x - b * y, d, e, size / 2 - d * x - e * y


def color_map(*, brightness: float, contrast: float, saturation: float, hue: float) -> tuple[float, ...]:
    """Return the 3 x 4 matrix, by rows, that changes hue and saturation, then contrast, then brightness.

    Args:
        brightness, contrast, saturation: factors; 1 changes nothing.
        hue: turns; 0 changes nothing.
    """
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    chroma = saturation * np.array([[cos, -sin], [sin, cos]])
    matrix = np.eye(3)
    matrix[1:, 1:] = chroma
    colors = brightness * contrast * FROM_YIQ @ matrix @ YIQ
    offset = brightness * (1 - contrast) * MID_GREY
    return tuple(np.column_stack([colors, np.full(3, offset)]).ravel().tolist())
