"""CLIP's tokenizer as files of transformers, made from open_clip's list of merges."""

import json
from pathlib import Path

from clipmini.data.tokenizer import ClipTokenizer, make_vocabulary, read_merges

START, END = "<|startoftext|>", "<|endoftext|>"  # as transformers and the published models write them


def write_tokenizer(directory: Path, context_length: int) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and tokenizer.json.

    transformers does not repair text first: captions with HTML entities, ligatures or typographic quotes get other
    tokens there than in open_clip, which passes them through ftfy and html.unescape.

    Args:
        context_length: tokens of a caption with its start and end, at which `truncation=True` cuts.
    """
    merges = read_merges()
    vocabulary = {**make_vocabulary(merges), START: ClipTokenizer.start_token, END: ClipTokenizer.end_token}
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(options, indent=2) + "\n")
    # Not by a constructor: those of transformers 4 and 5 take other arguments.
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory).backend_tokenizer.save(str(directory / "tokenizer.json"))
