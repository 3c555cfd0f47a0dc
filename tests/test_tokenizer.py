"""Token ids equal to open_clip's own tokenizer."""

import pickle
import pydoc_data.topics
import random
import unicodedata

import open_clip
import pytest
import torch
from conftest import SAMPLE, TINY

from clipmini.data.tokenizer import ClipTokenizer, create_tokenizer, trim

HAND_PICKED = [
    "",
    " ",
    "a photo of a dog",
    "It's THEY'RE  12345 $%^ don’t naïve café \n\t x",
    "&amp; &lt;b&gt; &amp;amp;",
    "日本語テスト 한국어 ελληνικά",
    "😀😀 emoji 👩‍👩‍👧‍👦",
    "ſ'ſ 'S 'ſ İstanbul K Å",
    "word " * 200,
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (0xA0, 0x3000), (0x4E00, 0x9000), (0x1F300, 0x1F700)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def random_ascii(count: int) -> list[str]:
    """Make texts of control characters, punctuation and entities, where cleaning could matter."""
    rng = random.Random(1)
    parts = ["&amp;", "&#39;", "\r\n", "\x1b[1m", "``", "''", "--", "...", *map(chr, range(128))]
    return ["".join(rng.choices(parts, k=rng.randrange(1, 30))) for _ in range(count)]


def prose(count: int) -> list[str]:
    """Cut texts of caption length out of Python's own manual."""
    rng = random.Random(2)
    words = " ".join(pydoc_data.topics.topics.values()).split(" ")
    starts = (rng.randrange(len(words) - 40) for _ in range(count))
    return [" ".join(words[start : start + rng.randrange(1, 40)]) for start in starts]


def characters(count: int) -> list[str]:
    """Put characters of every script beside their names."""
    rng = random.Random(3)
    named = [chr(code) for code in range(0x110000) if unicodedata.name(chr(code), "")]
    return [f"{unicodedata.name(character)}: {character}" for character in rng.sample(named, count)]


def test_same_ids_as_open_clip_on_twenty_thousand_captions() -> None:
    names = (SAMPLE / "wds_twemoji/classnames.txt").read_text().splitlines()
    texts = [*HAND_PICKED, *names, *prose(6_000), *characters(7_000), *random_texts(3_000), *random_ascii(3_000)]
    assert len(texts) > 20_000
    ours, theirs = ClipTokenizer(77)(texts), open_clip.SimpleTokenizer(context_length=77)(texts)
    different = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert not different
    assert ours.dtype == torch.int64 and ours.shape == (len(texts), 77)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_same_ids_for_every_way_of_cleaning(clean: str) -> None:
    texts = ["A Dog, a_cat; &amp; more!", *random_texts(50)]
    theirs = open_clip.SimpleTokenizer(context_length=20, clean=clean)(texts)
    torch.testing.assert_close(ClipTokenizer(20, clean)(texts), theirs, rtol=0, atol=0)


def test_special_tokens_in_captions_are_plain_text() -> None:
    rng = random.Random(4)
    parts = [
        "<end_of_text>",
        "<start_of_text>",
        "<|endoftext|>",
        "&lt;end_of_text&gt;",
        "<END_OF_TEXT>",
        " a ",
        "b",
        "<",
    ]
    texts = ["".join(rng.choices(parts, k=rng.randrange(1, 7))) for _ in range(500)]
    for text, ids in zip(texts, ClipTokenizer(77)(texts).tolist(), strict=True):
        assert ids[0] == 49406 and ids.count(49406) == 1 and ids.count(49407) == 1, text


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_an_entity_of_too_many_digits_is_not_the_end(clean: str) -> None:
    text = f"a &amp; b &#{'9' * 5000}; c"
    with pytest.raises(ValueError, match="Exceeds the limit"):
        open_clip.SimpleTokenizer(context_length=20, clean=clean)([text])
    tokenizer = ClipTokenizer(20, clean)
    assert torch.equal(tokenizer([text]), tokenizer(["a & b c"]))


def test_long_captions_are_cut_and_keep_their_end() -> None:
    ids = ClipTokenizer(8)(["one two three four five six seven eight nine"])[0]
    assert ids[0] == 49406 and ids[-1] == 49407 and (ids != 0).all()


def test_travels_to_a_worker() -> None:
    tokenizer = ClipTokenizer(12)
    expected = tokenizer(["a dog"])
    torch.testing.assert_close(pickle.loads(pickle.dumps(tokenizer))(["a dog"]), expected)


def test_create_tokenizer_follows_the_model() -> None:
    assert create_tokenizer(TINY)(["a"]).shape == (1, 24)
    siglip = {"text_cfg": {"context_length": 16, "tokenizer_kwargs": {"clean": "canonicalize"}}}
    assert create_tokenizer(siglip).clean == "canonicalize"  # type: ignore[attr-defined]


def test_trim_cuts_what_only_padding_fills() -> None:
    text = torch.tensor([[5, 0, 7, 0, 0], [5, 7, 0, 0, 0]])
    assert trim(text, 0).tolist() == [[5, 0, 7], [5, 7, 0]]
    assert trim(text, None) is text
