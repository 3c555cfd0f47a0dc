"""The two towers as ONNX files, which need no Python to run.

image.onnx            image float32 [batch, 3, S, S], normalised -> image_features float32 [batch, D], unit vectors
text.onnx             text int64 [batch, L] -> text_features float32 [batch, D], unit vectors
clipmini_onnx.json    how pictures and captions become that, and how features become similarities
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn

from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.model import Model, image_size

FACTS = "clipmini_onnx.json"


class ImageTower(nn.Module):
    """What image.onnx holds."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image, normalize=True)


class TextTower(nn.Module):
    """What text.onnx holds."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text, normalize=True)


def write_towers(model: Model, directory: Path) -> None:
    """Write both towers and their facts.

    Args:
        model: float32, on the CPU, in evaluation mode.

    Raises:
        UserError: torch cannot translate a tower.
    """
    directory.mkdir()
    size, length = image_size(model), context_length(model)
    # Two of each: torch.export takes an example of one for a batch that is always one.
    write_tower(ImageTower(model), "image", torch.zeros(2, 3, size, size), directory)
    write_tower(TextTower(model), "text", torch.zeros(2, length, dtype=torch.int64), directory)
    (directory / FACTS).write_text(json.dumps(make_facts(model), indent=2) + "\n")


def write_tower(tower: nn.Module, name: str, example: Tensor, directory: Path) -> None:
    """Write NAME.onnx, for any batch; weights of more than 1.5 GiB go into NAME.onnx.data.

    Raises:
        UserError: torch cannot translate it.
    """
    try:
        with torch.no_grad(), only_errors("onnxscript"), only_errors("onnx_ir"):
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                input_names=[name],
                output_names=[f"{name}_features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"format=onnx: torch.onnx cannot translate the {name} tower: {reason}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names files of whoever exports
    program.save(directory / f"{name}.onnx")


@contextlib.contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Keep a library from warning of what it did not optimise."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def context_length(model: Model) -> int:
    """Return the tokens of a caption; of a Hugging Face tower not those that it could take, but those it was given."""
    return model.architecture["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)


def make_facts(model: Model) -> dict[str, Any]:
    """Return what a program needs besides the towers; similarity = logit_scale * image @ text + logit_bias."""
    preprocess, text = model.visual.preprocess_cfg, model.architecture["text_cfg"]
    name = text.get("hf_tokenizer_name")
    tokens = {"start_token": ClipTokenizer.start_token, "end_token": ClipTokenizer.end_token, "padding": 0}
    return {
        "image": {"size": image_size(model), **{key: preprocess[key] for key in preprocess if key != "size"}},
        "text": {
            "context_length": context_length(model),
            "tokenizer": name or "CLIP byte-pair encoding",
            "options": text.get("tokenizer_kwargs") or {},
            **({} if name else tokens),
        },
        "embed_dim": model.architecture["embed_dim"],
        "logit_scale": float(model.logit_scale.detach().exp()),
        "logit_bias": None if model.logit_bias is None else float(model.logit_bias.detach()),
    }
