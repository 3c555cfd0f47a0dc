"""What of a sample is read, by what a loss compares; shards of pictures alone and of captions alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_cache, make_data, read_sample, write_tar

from clipmini.data.content import Content
from clipmini.data.index import index_shard
from clipmini.errors import UserError


def choose(*names: str, all_views: bool = False, **changes: Any) -> Content:
    options = {"caption_key": "txt", "second_caption_key": None, "hard_negatives": None, "extra_views": None}
    return Content.choose(names, all_views, **{**options, **changes})


@pytest.mark.parametrize(
    ("names", "changes", "views", "captions", "members"),
    [
        (["image_text"], {}, 1, ("txt",), "a picture (.jpg, .jpeg, .png, .webp) and .txt"),
        (["image_text"], {"all_views": True, "extra_views": 2}, 3, ("txt",), "a picture"),
        (["image_text", "image_image"], {}, 2, ("txt",), "a picture"),
        (["image_text", "image_image"], {"extra_views": 2}, 3, ("txt",), "a picture"),
        (["image_image"], {}, 2, (), "a picture (.jpg, .jpeg, .png, .webp)"),
        (["image_image"], {"caption_key": None}, 2, (), "a picture"),
        (["text_text"], {"second_caption_key": "same"}, 0, ("txt",), ".txt"),
        (["text_text"], {"second_caption_key": "names"}, 0, ("json", "txt"), ".json and .txt"),
    ],
)
def test_as_much_is_read_as_is_compared(
    names: list[str], changes: dict[str, Any], views: int, captions: tuple[str, ...], members: str
) -> None:
    content = choose(*names, **changes)
    assert content.num_views == views and content.captions.extensions == captions
    assert str(content.pair_format).startswith(members)
    assert "picture" in str(content.pair_format) or not views


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["image_text"], {"caption_key": None}, "data.caption_key=null: loss.terms.image_text compares captions: name"),
        (["text_text"], {}, "data.second_caption_key=null: loss.terms.text_text compares two captions"),
        (
            ["image_text"],
            {"second_caption_key": "x"},
            "second_caption_key=x: only loss.terms.text_text, or loss.all_vi",
        ),
        (["image_image"], {"second_caption_key": "x"}, "data.second_caption_key=x: only loss.terms.text_text, or"),
        (["image_image"], {"hard_negatives": "x"}, "data.hard_negatives=x: only loss.terms.image_text compares them"),
        (
            ["image_text"],
            {"caption_key": None, "hard_negatives": "x"},
            "hard_negatives=x: needs captions, and data.caption_key=null takes none",
        ),
        (
            ["image_text"],
            {"extra_views": 1},
            "data.extra_views=1: must be at most 0, only image_image, or loss.all_views",
        ),
        (["image_image"], {"extra_views": 2}, "extra_views=2: must be at most 1, image_image compares two views, and"),
        (["image_image"], {"extra_views": 0}, "data.extra_views=0: loss.terms.image_image compares two views"),
        (["image_image", "image_text"], {"extra_views": 3}, "data.extra_views=3: must be from 0 to 2"),
        (
            ["text_text"],
            {"second_caption_key": "x", "extra_views": 1},
            "must be at most 0, no term of loss.terms compare",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_told(names: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(*names, **changes)


def test_pictures_without_captions_are_trained_on(tmp_path: Path) -> None:
    samples = [
        {"__key__": sample["__key__"], "webp": sample["webp"]} for sample in read_sample("train/noto-00000.tar", 16)
    ]
    path = write_tar(tmp_path / "shards/a.tar", samples)
    index = index_shard(path, choose("image_image").pair_format)
    assert len(index) == 16 and list(index.members(3)) == ["webp"]
    data = make_data(str(path.parent), make_cache(tmp_path / "cache"), terms=("image_image",))
    batch = next(iter(data.loader(0, 1)))
    assert {"image", "image_2"} == {name for name in batch if isinstance(batch[name], torch.Tensor)}
    assert batch["image"].shape == batch["image_2"].shape == (12, 3, 16, 16)
    with pytest.raises(UserError, match=r"no picture-caption pairs in 1 shards.*a pair is a picture .* and .txt"):
        make_data(str(path.parent), make_cache(tmp_path / "cache"))


def test_captions_without_pictures_are_trained_on(tmp_path: Path) -> None:
    samples = [{"__key__": f"{number:02}", "txt": b"a cat", "more.txt": b"a tomcat"} for number in range(16)]
    path = write_tar(tmp_path / "shards/a.tar", samples)
    changes = {"terms": ("text_text",), "second_caption_key": "more.txt"}
    data = make_data(str(path.parent), make_cache(tmp_path / "cache"), **changes)
    batch = next(iter(data.loader(0, 1)))
    names = {name for name in batch if isinstance(batch[name], torch.Tensor)}
    assert names == {"text", "text_2", "text_id", "text_2_id"}
    assert batch["text"].shape == batch["text_2"].shape[:1] + batch["text"].shape[1:]
    assert len(batch["text_2_length"]) == 12 and (batch["text_2_id"] == batch["text_2_id"][0]).all()
    assert batch["text_id"][0] != batch["text_2_id"][0]
