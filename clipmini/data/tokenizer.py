"""Captions to token ids: open_clip's byte-pair encoding run by Rust `tokenizers`, or the model's own tokenizer."""

import gzip
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import regex
import torch
from open_clip.tokenizer import (
    DEFAULT_CONTEXT_LENGTH,
    HFTokenizer,
    SimpleTokenizer,
    bytes_to_unicode,
    default_bpe,
    get_clean_fn,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from clipmini.annotations import Limits

Tokenize = Callable[[Sequence[str]], Tensor]

# The pattern of CLIP's tokenizer without its special tokens, so that a caption cannot contain one. Words are split by
# the same `regex` module as there: the one inside `tokenizers` knows another version of Unicode.
# https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
NUM_MERGES = 49152 - 256 - 2
HUGE_ENTITY = regex.compile(r"&#\d{1000,};?")
# What ftfy and html.unescape, the slow part of cleaning, leave as it is: printable ASCII without an ampersand.
PLAIN = regex.compile(r"[ -%'-~]*")


def create_tokenizer(architecture: dict[str, Any]) -> Tokenize:
    """Return the tokenizer that goes with a model.

    Args:
        architecture: open_clip's model JSON; `text_cfg.hf_tokenizer_name` asks for a Hugging Face tokenizer.
    """
    text = architecture["text_cfg"]
    name = text.get("hf_tokenizer_name")
    options = text.get("tokenizer_kwargs") or {}
    context_length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    Limits(least=2).check("model.text_cfg.context_length", context_length)  # a start and an end
    if name:
        return HFTokenizer(name, context_length=context_length, tokenizer_mode=text.get("tokenizer_mode"), **options)
    if set(options) - {"clean"}:
        return SimpleTokenizer(context_length=context_length, **options)
    return ClipTokenizer(context_length, **options)


def trim(text: Tensor, padding: int | None) -> Tensor:
    """Cut off the columns of int64 [b, L] that hold nothing but padding; all stay if there is no padding."""
    if padding is None:
        return text
    used = (text != padding).any(dim=0).nonzero()
    return text[:, : int(used[-1]) + 1] if len(used) else text


def clean_text(text: str, clean: str) -> str:
    """Clean text as open_clip does, also where that fails: Python does not convert numbers of thousands of digits."""
    function = get_clean_fn(clean)
    try:
        return function(text)
    except ValueError:
        return function(HUGE_ENTITY.sub(" ", text))


def read_merges() -> list[tuple[str, str]]:
    """Read the pairs of symbols that CLIP's tokenizer joins, in their order, from open_clip's file."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : NUM_MERGES + 1]
    return [(first, second) for first, second in (line.split() for line in lines)]


def make_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the ids of CLIP's words: all but those of start and end, which come after them."""
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(first + second for first, second in merges)]
    return {word: index for index, word in enumerate(words)}


class ClipTokenizer:
    """CLIP's tokenizer: the ids of `open_clip.SimpleTokenizer`, but special tokens in a caption stay plain text.

    Args:
        context_length: tokens of a caption, with its start and end; longer captions are cut.
        clean: how text is cleaned first, one of open_clip's names (`lower`, `whitespace`, `canonicalize`).
    """

    start_token, end_token = 49406, 49407

    def __init__(self, context_length: int, clean: str = "lower") -> None:
        self.context_length = context_length
        self.clean = clean

    def __getstate__(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "clean": self.clean}

    @cached_property
    def encoder(self) -> Tokenizer:
        """The Rust tokenizer, built at first use in each process (0.1 s)."""
        merges = read_merges()
        tokenizer = Tokenizer(models.BPE(make_vocabulary(merges), merges, end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return tokenizer

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """Tokenize captions: int64 [len(texts), context_length], padded with 0."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        result = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in enumerate(texts):
            ids = self.encode(text)[: self.context_length - 2]
            result[row, : len(ids) + 2] = torch.tensor([self.start_token, *ids, self.end_token])
        return result

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, as many as it has, without those of start and end."""
        is_plain = self.clean == "lower" and PLAIN.fullmatch(text)
        cleaned = " ".join(text.split()).lower() if is_plain else clean_text(text, self.clean)
        return self.encoder.encode(WORD.findall(cleaned), is_pretokenized=True).ids


def count_tokens(tokenize: Tokenize, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has, with start and end, before it is cut to the context."""
    if isinstance(tokenize, HFTokenizer):
        return [len(tokenize.tokenizer(tokenize.clean_fn(text))["input_ids"]) for text in texts]
    assert isinstance(tokenize, ClipTokenizer | SimpleTokenizer)
    return [len(tokenize.encode(text)) + 2 for text in texts]
