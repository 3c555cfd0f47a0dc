"""What an export is tried with, and what the model makes of it here."""

import torch
from torch import Tensor

from clipmini.data.tokenizer import create_tokenizer
from clipmini.model import Model, image_size

NUM_PICTURES = 4


def make_inputs(model: Model) -> dict[str, Tensor]:
    """Make pictures of noise and captions of several lengths, from nothing to more than the context.

    Returns:
        image float32 [4, 3, S, S], normalised as the model has it, and text int64 [4, L].
    """
    size, preprocess = image_size(model), model.visual.preprocess_cfg
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_PICTURES, 3, size, size), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    tokenize = create_tokenizer(model.architecture)
    words = "a photo of two red kites over the sea at noon"
    text = tokenize(["", "a dog", words, " ".join([words] * 100)])
    return {"image": (pixels / 255 - mean) / std, "text": text}


@torch.no_grad()
def encode(model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encode with open_clip's own methods, not with ours: image and text float32 [4, D], unit vectors."""
    return {
        "image": model.encode_image(inputs["image"], normalize=True),
        "text": model.encode_text(inputs["text"], normalize=True),
    }
