"""Each map against torchvision's, and the range of what is drawn."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from conftest import make_augmentation
from PIL import Image
from torchvision.transforms import InterpolationMode

from clipmini.data.augment import affine_map, color_map, draw_crop
from clipmini.data.draws import Draws
from clipmini.data.picture import to_tensor
from clipmini.errors import UserError


def noise(width: int, height: int, low: int = 0, high: int = 256) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(low, high, (height, width, 3), np.uint8))


def change(image: Image.Image, draws: Draws | None = None, **changes: object) -> np.ndarray:
    """Change a picture that is cropped already."""
    picture = make_augmentation(**changes).change(to_tensor(image), draws or Draws(0))
    return picture.permute(1, 2, 0).numpy()


def test_nothing_is_changed_unless_asked() -> None:
    assert np.array_equal(change(noise(32, 32)), np.asarray(noise(32, 32)))


def test_crop_covers_its_range_and_stays_inside() -> None:
    draws = Draws(0)
    boxes = np.array([draw_crop(200, 200, (0.3, 0.9), (0.75, 4 / 3), draws) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 200).all()
    area, ratio = width * height / 200**2, width / height
    assert area.min() < 0.31 and area.max() > 0.85 and area.max() <= 0.91
    assert ratio.min() == pytest.approx(0.75, abs=0.02) and ratio.max() == pytest.approx(4 / 3, abs=0.02)
    assert abs(np.log(ratio).mean()) < 0.03


def test_crop_falls_back_to_the_centre() -> None:
    assert draw_crop(1000, 10, (0.9, 1.0), (0.75, 4 / 3), Draws(0)) == (493, 0, 506, 10)


@pytest.mark.parametrize(
    ("rotation", "zoom", "shift"),
    [(0, 1, (0, 0)), (30, 1, (0, 0)), (0, 1.5, (0, 0)), (0, 1, (3, -5)), (-20, 0.7, (2, 1))],
)
def test_affine_map_is_torchvisions(rotation: float, zoom: float, shift: tuple[int, int]) -> None:
    image = noise(40, 40)
    coefficients = affine_map(40, rotation=rotation, zoom=zoom, shear=0, shift=shift)
    bilinear = Image.Resampling.BILINEAR
    found = image.transform((40, 40), Image.Transform.AFFINE, coefficients, bilinear, fillcolor=(9, 9, 9))
    # Torchvision turns clockwise.
    options = {"angle": -rotation, "translate": list(shift), "scale": zoom, "shear": [0.0]}
    expected = F.affine(image, **options, interpolation=InterpolationMode.BILINEAR, fill=[9, 9, 9])
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
    assert np.mean(difference > 2) < 0.02  # a pixel at the border may be in for one and out for the other


def test_shear_moves_rows_by_their_height() -> None:
    image = Image.new("RGB", (41, 41))
    for y in range(41):
        image.putpixel((20, y), (255, 255, 255))
    coefficients = affine_map(41, rotation=0, zoom=1, shear=45, shift=(0, 0))
    sheared = np.asarray(image.transform((41, 41), Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST))
    assert all(sheared[y, y].tolist() == [255] * 3 for y in range(41))  # down is right


def apply(image: Image.Image, **factors: float) -> np.ndarray:
    nothing = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return np.asarray(image.convert("RGB", color_map(**{**nothing, **factors}))).astype(int)


def test_colors_are_left_where_nothing_changes() -> None:
    image = noise(20, 20)
    assert np.abs(apply(image) - np.asarray(image)).max() <= 1


@pytest.mark.parametrize("name", ["brightness", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.3])
def test_brightness_and_saturation_are_torchvisions(name: str, factor: float) -> None:
    image = noise(20, 20, 90, 150)  # no value is clipped on the way
    expected = getattr(F, f"adjust_{name}")(torch.from_numpy(np.asarray(image)).permute(2, 0, 1), factor)
    assert np.abs(apply(image, **{name: factor}) - expected.permute(1, 2, 0).numpy().astype(int)).max() <= 2


def test_contrast_is_about_mid_grey() -> None:
    image = noise(20, 20)
    expected = (np.asarray(image) - 128.0) * 0.5 + 128
    assert np.abs(apply(image, contrast=0.5) - expected).max() <= 1


def test_hue_leaves_grey_and_brightness_and_comes_round() -> None:
    grey = Image.new("RGB", (4, 4), (77, 77, 77))
    assert np.abs(apply(grey, hue=0.3) - 77).max() <= 1
    image = noise(20, 20, 100, 140)
    turned = apply(image, hue=0.25)
    assert np.abs(turned - np.asarray(image)).max() > 5
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(turned @ luma - np.asarray(image) @ luma).max() < 2
    assert np.abs(apply(image, hue=1.0) - np.asarray(image)).max() <= 1


def test_order_of_the_maps() -> None:
    (value,) = {tuple(pixel) for pixel in apply(Image.new("RGB", (2, 2), (100,) * 3), contrast=0.5, brightness=1.5)[0]}
    assert value == (171, 171, 171)  # ((100 - 128) * 0.5 + 128) * 1.5


def test_grayscale_and_flip_come_as_often_as_asked() -> None:
    image, draws = noise(16, 16), Draws(0)
    plain = np.asarray(image)
    flips = sum(np.array_equal(change(image, draws, flip=0.25), plain[:, ::-1]) for _ in range(400))
    greys = sum(np.ptp(change(image, draws, grayscale_probability=0.5), axis=2).max() <= 1 for _ in range(400))
    assert flips / 400 == pytest.approx(0.25, abs=0.07) and greys / 400 == pytest.approx(0.5, abs=0.08)


def test_what_comes_from_outside_is_filled() -> None:
    found = change(Image.new("RGB", (20, 20), (0, 0, 0)), zoom=(0.5, 0.5), fill=200)
    assert found[0, 0].tolist() == [200] * 3 and found[10, 10].tolist() == [0] * 3


@pytest.mark.parametrize(("width", "height"), [(1, 100), (100, 1), (1, 1), (3, 50)])
def test_crops_of_thin_pictures_are_not_empty(width: int, height: int) -> None:
    for ratio in ((2.5, 4.0), (0.1, 0.2), (0.75, 1.33)):
        left, top, right, bottom = draw_crop(width, height, (0.9, 1.0), ratio, Draws(0))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (0.5, 1.5)),
        ("scale", (0.9, 0.5)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (1.0, float("inf"))),
        ("flip", 2.0),
        ("zoom", (0.0, 1.0)),
        ("shear", 90),
        ("color_jitter", (0.1, 0.1, 0.1, 0.6)),
        ("color_jitter", (0.1, 0.1, 0.1)),
        ("color_jitter", (1.5, 0, 0, 0)),
    ],
)
def test_out_of_range(field: str, value: object) -> None:
    augmentation = make_augmentation(**{field: value})
    with pytest.raises(UserError, match=f"^data.view_augmentation.{field}=.*: must be "):
        augmentation.check("data.view_augmentation")
