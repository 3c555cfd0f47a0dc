"""Pictures: their size before they are decoded, and only as much decoding as a crop needs."""

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clipmini.data.health import Fault

try:
    import simplejpeg
except ImportError:  # Pillow gives the same pixels, later
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow would try all it knows, one after the other
ORIENTATION = 0x0112  # the EXIF tag
# What the EXIF orientation does to the stored picture: whether rows become columns, then mirrored in x, in y (stored).
TURNS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
UPRIGHT = (False, False, False)
START_OF_SCAN = b"\xff\xda"  # of a JPEG
MAX_SCANS = 100  # a progressive JPEG has about 10
MIN_OVERSAMPLING = 1.5  # pixels decoded for one of the result, at least, where fewer than all are decoded
Box = tuple[int, int, int, int]  # left, top, right, bottom; pixels


class Picture:
    """An encoded picture.

    Args:
        data: JPEG, PNG or WebP.
        max_pixels: larger ones are refused.

    Attributes:
        width, height: pixels, upright.

    Raises:
        Fault: no picture, or too large.
    """

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        self.data = data
        self.image = open_encoded(data)
        self.turn = TURNS.get(orientation(self.image), UPRIGHT)
        self.width, self.height = self.image.size[::-1] if self.turn[0] else self.image.size
        if self.width * self.height > max_pixels:
            raise Fault("too_many_pixels", f"{self.width} x {self.height}, max_pixels={max_pixels}")

    def crop(self, box: Box, size: int, *, draft: Literal["auto", "off"]) -> Tensor:
        """Cut out a box and scale it, bicubic with antialiasing: uint8 [3, size, size].

        JPEGs are decoded at a half, a quarter or an eighth of their size (`draft=auto`) where that leaves 1.5 pixels
        for each of the result.

        Raises:
            Fault: the picture cannot be decoded.
        """
        left, top, right, bottom = self.stored_box(box)
        divisor = self.choose_divisor(right - left, bottom - top, size) if draft == "auto" else 1
        if divisor > 1:
            # Whole pixels of the smaller picture; the box moves by less than half of one.
            left, top = round(left / divisor), round(top / divisor)
            right, bottom = max(left + 1, round(right / divisor)), max(top + 1, round(bottom / divisor))
        try:
            pixels = torch.from_numpy(self.decode((left, top, right, bottom), divisor))
            # The same bits on any CPU, and much faster than Pillow, from which it differs by 1, seldom 2 levels of 256.
            resized = torch.nn.functional.interpolate(
                pixels.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True
            )[0]
        except Exception as error:
            raise Fault("picture", error) from error
        swap, mirror_x, mirror_y = self.turn
        mirrored = [axis for axis, is_mirrored in ((2, mirror_x), (1, mirror_y)) if is_mirrored]
        resized = resized.flip(mirrored) if mirrored else resized
        return resized.transpose(1, 2).contiguous() if swap else resized

    def stored_box(self, box: Box) -> Box:
        """Turn a box of the upright picture into one of the stored picture."""
        swap, mirror_x, mirror_y = self.turn
        left, top, right, bottom = (box[1], box[0], box[3], box[2]) if swap else box
        width, height = self.image.size
        if mirror_x:
            left, right = width - right, width - left
        if mirror_y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom

    def choose_divisor(self, width: int, height: int, size: int) -> int:
        """Return the largest divisor that leaves enough pixels of a crop, 1 for what is no JPEG."""
        if self.image.format != "JPEG":
            return 1
        enough = min(width, height) / (MIN_OVERSAMPLING * size)
        return next((divisor for divisor in (8, 4, 2) if divisor <= enough), 1)

    def decode(self, box: Box, divisor: int) -> np.ndarray:
        """Decode at a part of the size, and cut out a box: uint8 [height, width, 3]."""
        left, top, right, bottom = box
        width, height = (-(-side // divisor) for side in self.image.size)
        if simplejpeg is not None and self.image.format == "JPEG" and self.image.mode in ("RGB", "L"):
            try:
                pixels = simplejpeg.decode_jpeg(self.data, "RGB", min_width=width, min_height=height)
                if pixels.shape[:2] == (height, width):
                    return pixels[top:bottom, left:right]
            except ValueError:
                pass  # it is strict; what Pillow says of the picture counts
        if divisor > 1:
            self.image.draft(self.image.mode, (self.image.width // divisor, self.image.height // divisor))
        return np.array(to_rgb(self.image.crop(box)))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or it cannot be read."""
    if "exif" not in image.info:  # asking Pillow would decode a PNG to look behind the pixels
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata, the picture may be fine
        return 1


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF tag says."""
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB, or to RGBA where it has transparency; 16 bits are scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB, with white behind what is transparent."""
    image = to_eight_bits(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_encoded(data: bytes) -> Image.Image:
    """Read the header of a picture.

    Raises:
        Fault: it is none, or is so large that Pillow refuses it.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Fault("too_many_pixels", error) from error
    except UnidentifiedImageError as error:  # its own words hold an address
        raise Fault("picture", "not a JPEG, PNG or WebP") from error
    except Exception as error:  # no list of what a decoder raises over hostile bytes is complete
        raise Fault("picture", error) from error
    if image.format == "JPEG" and (scans := data.count(START_OF_SCAN)) > MAX_SCANS:
        raise Fault("picture", f"{scans} scans")  # each costs a pass over all pixels
    return image


def open_image(data: bytes) -> Image.Image:
    """Decode a whole picture to RGB, upright by its EXIF tag.

    Raises:
        Fault: it cannot be decoded.
    """
    image = open_encoded(data)
    try:
        return to_rgb(turn_upright(image))
    except Exception as error:
        raise Fault("picture", error) from error


def make_thumbnail(data: bytes, pixels: int) -> bytes:
    """Return a picture as a WebP with so many pixels at most along its longer side.

    Raises:
        Fault: it cannot be decoded.
    """
    image = open_image(data)
    image.thumbnail((pixels, pixels))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=80)
    return content.getvalue()


def to_tensor(image: Image.Image) -> Tensor:
    """Return a picture as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
