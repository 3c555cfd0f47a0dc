"""A sample to tensors: random choices follow the position alone; the transform of evaluation is open_clip's."""

import io
import json
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import make_augmentation, read_sample
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipmini.data.augment import Augmentation
from clipmini.data.captions import Captions, caption_id
from clipmini.data.decode import Decoder, EvaluationTransform
from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.data.picture import Picture
from clipmini.data.tokenizer import ClipTokenizer

STRONG = make_augmentation(
    flip=0.5,
    rotation=10,
    translation=0.1,
    zoom=(0.8, 1.1),
    shear=5,
    color_jitter=(0.3, 0.3, 0.3, 0.1),
    color_jitter_probability=0.8,
    grayscale_probability=0.2,
)


def make_decoder(
    augmentation: Augmentation = STRONG,
    seed: int = 0,
    hard_negatives: str | None = None,
    view_augmentation: Augmentation = STRONG,
    num_views: int = 1,
) -> Decoder:
    captions, tokenize = Captions.from_key("txt", hard_negatives), ClipTokenizer(16)
    options: dict[str, Any] = {"max_pixels": 10**7, "draft": "auto"}
    options |= {"view_augmentation": view_augmentation, "num_views": num_views}
    return Decoder(32, augmentation, captions, tokenize, seed, **options)


def members() -> dict[str, bytes]:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    return {name: data for name, data in sample.items() if name != "__key__"}


def test_position_and_seed_are_all_that_counts() -> None:
    first, again = (make_decoder().decode(members(), 5) for _ in range(2))
    assert torch.equal(first.views[0], again.views[0]) and first.captions == again.captions
    assert not torch.equal(first.views[0], make_decoder().decode(members(), 6).views[0])
    assert not torch.equal(first.views[0], make_decoder(seed=1).decode(members(), 5).views[0])


def test_batch_fields() -> None:
    decoder = make_decoder()
    examples = [decoder.decode(members(), position) for position in range(3)]
    batch = decoder.collate(examples)
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (3, 3, 32, 32)
    assert batch["text"].dtype == torch.int64 and batch["text"].shape == (3, 16)
    assert batch["text_id"].tolist() == [caption_id(members()["txt"].decode())] * 3
    for row, example in enumerate(examples):
        assert torch.equal(batch["image"][row], example.views[0])
        assert torch.equal(batch["text"][row], ClipTokenizer(16)([example.captions["text"]])[0])


def test_hard_negatives_are_more_fields_and_change_nothing_else() -> None:
    wrong = [{"wrong": ["a cat", "a bird"]}, {}]
    samples = [{**members(), "json": json.dumps(value).encode()} for value in wrong]
    with_them, without = (make_decoder(hard_negatives=key) for key in ("wrong", None))
    examples = [[decoder.decode(sample, 7) for sample in samples] for decoder in (with_them, without)]
    batch, plain = with_them.collate(examples[0]), without.collate(examples[1])
    assert set(plain) == {"image", "text", "text_id"} and set(batch) - set(plain) == {
        "negative_text",
        "negative_text_id",
    }
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    negative = examples[0][0].captions["negative_text"]
    assert negative in wrong[0]["wrong"] and batch["negative_text_id"].tolist() == [caption_id(negative), 0]
    assert torch.equal(batch["negative_text"], ClipTokenizer(16)([negative, ""]))


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_further_views_are_drawn_from_numbers_of_their_own(format: str) -> None:
    weak = make_augmentation(flip=0.0)
    file = io.BytesIO()
    Image.effect_noise((150, 120), 90).convert("RGB").save(file, format)
    sample = {format: file.getvalue(), "txt": b"a cat"}
    one = make_decoder(weak).decode(sample, 7)
    three = make_decoder(weak, view_augmentation=STRONG, num_views=3).decode(sample, 7)
    assert torch.equal(three.views[0], one.views[0])  # as without them
    # The second is what the first would be at the place (position, 1), with the augmentation of views.
    for number in (1, 2):
        picture = Picture(sample[format], max_pixels=10**7)
        draws = Draws(0, 7, number)
        box = STRONG.draw_box(picture.width, picture.height, draws)
        assert torch.equal(three.views[number], STRONG.change(picture.crop(box, 32, draft="auto"), draws))
    assert not torch.equal(three.views[1], three.views[2])
    batch = make_decoder(weak, num_views=3).collate([three, three])
    assert set(batch) == {"image", "image_2", "image_3", "text", "text_id"}
    assert batch["image_3"].shape == (2, 3, 32, 32) and batch["image_3"].dtype == torch.uint8


def test_crop_of_the_whole_picture_is_a_resize() -> None:
    nothing = make_augmentation(scale=(1, 1), ratio=(1, 1))
    found = make_decoder(nothing).decode(members(), 0).views[0]
    image = Image.open(io.BytesIO(members()["webp"]))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    expected = np.asarray(white.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found.permute(1, 2, 0).int().numpy() - expected).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        {"webp": b"", "txt": b"a"},
        {"webp": members()["webp"], "txt": b" "},
    ],
    ids=["picture", "caption"],
)
def test_what_cannot_be_used_is_a_fault(data: dict[str, bytes]) -> None:
    with pytest.raises(Fault):
        make_decoder().decode(data, 0)


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (32, 32), (20, 20)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_evaluation_transform_is_open_clips(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    ours = EvaluationTransform(32, mode)(buffer.getvalue())
    config = PreprocessCfg(size=32, resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = image_transform_v2(config, is_train=False)(image)
    torch.testing.assert_close(ours.float() / 255, theirs, rtol=0, atol=1e-6)
    assert open_clip.__version__.startswith("3.")
