"""A fresh process loads an export by the library that it is for, and must find the features that the model has here.

python -m clipmini.export.parity FORMAT DIRECTORY INPUTS     is that process; INPUTS is a file of image and text
"""

import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipmini.errors import UserError

log = logging.getLogger(__name__)

LIMIT = 1e-4  # of the difference of a component of two unit vectors
FEATURES = "features.safetensors"


def check_parity(
    format: str, directory: Path, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], scratch: Path
) -> dict[str, float]:
    """Compare the features of an export with those of the model.

    Args:
        inputs: image float32 [n, 3, S, S], normalised, and text int64 [n, L].
        expected: image and text float32 [n, D], unit vectors.
        scratch: directory for the files that the processes exchange.

    Returns:
        The largest absolute difference of image and of text.

    Raises:
        UserError: the export cannot be loaded, or differs.
    """
    file = scratch / "inputs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, file)
    command = [sys.executable, "-m", "clipmini.export.parity", format, str(directory), str(file)]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {process.returncode}"
        raise UserError(f"format={format}: the export cannot be loaded in a fresh process: {reason}")
    found = load_file(scratch / FEATURES)
    differences = {name: difference(found[name], expected[name]) for name in ("image", "text")}
    figures = f"parity: image {differences['image']:.1e}, text {differences['text']:.1e} (limit {LIMIT:.0e})"
    if not all(value <= LIMIT for value in differences.values()):
        raise UserError(f"format={format}: the export has other features than the model, nothing is written; {figures}")
    log.info("%s", figures)
    return differences


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinity for other shapes or values that are no numbers."""
    if a.shape != b.shape:
        return math.inf
    largest = float((a - b).abs().max())
    return math.inf if math.isnan(largest) else largest


def encode_open_clip(directory: Path, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as a user of open_clip does."""
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    model.eval()
    return model.encode_image(image), model.encode_text(text)


def encode_hugging_face(directory: Path, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as a user of transformers does."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(directory).eval()
    found = model.get_image_features(pixel_values=image), model.get_text_features(input_ids=text)
    first, second = (getattr(output, "pooler_output", output) for output in found)  # transformers before 5: tensors
    return first, second


def encode_onnx(directory: Path, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as a user of onnxruntime does, one input alone and then the others: any batch must do."""
    import onnxruntime

    features = []
    for name, inputs in (("image", image), ("text", text)):
        session = onnxruntime.InferenceSession(directory / f"{name}.onnx", providers=["CPUExecutionProvider"])
        parts = [session.run(None, {name: part.numpy()})[0] for part in (inputs[:1], inputs[1:])]
        features.append(torch.cat([torch.from_numpy(part) for part in parts]))
    return features[0], features[1]


ENCODERS = {"open_clip": encode_open_clip, "hf": encode_hugging_face, "onnx": encode_onnx}


@torch.no_grad()
def main(format: str, directory: str, inputs: str) -> None:
    """Load, encode, and write features.safetensors beside the inputs: image and text float32 [n, D], unit vectors."""
    tensors = load_file(inputs)
    image, text = ENCODERS[format](Path(directory), tensors["image"], tensors["text"])
    features = {"image": F.normalize(image, dim=-1).contiguous(), "text": F.normalize(text, dim=-1).contiguous()}
    save_file(features, Path(inputs).with_name(FEATURES))


if __name__ == "__main__":
    main(*sys.argv[1:])
