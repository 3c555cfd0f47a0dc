"""Features on the disk, under a name made of the weights and of all else that they depend on."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import clipmini
from clipmini import distributed
from clipmini.files import write_atomically
from clipmini.lora import merge_lora
from clipmini.model import Model

Tower = Literal["image", "text"]


def is_of_tower(name: str, tower: Tower) -> bool:
    """Say whether a weight is one of a tower; the scale and the bias of the logits are of none."""
    return name.startswith("visual.") == (tower == "image") and not name.startswith("logit_")


def hash_weights(model: Model, tower: Tower | None = None) -> str:
    """Hash names, shapes and values of the weights of a tower, or of all: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(merge_lora(model.state_dict()).items()):
        if tower is None or is_of_tower(name, tower):
            tensor = tensor.detach().contiguous().cpu()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class FeatureCache:
    """Keeps features; a changed weight, picture, sentence or setting makes another name, so that none are stale.

    Args:
        directory: of this node.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hashes: dict[Tower, str] = {}  # of the one model that it is made for

    def path(self, model: Model, tower: Tower, content: Sequence[Any]) -> Path:
        """Return where features of a tower are kept."""
        if tower not in self.hashes:
            self.hashes[tower] = hash_weights(model, tower)
        # All of the architecture: some of what counts for a tower, as quick_gelu, lies beside vision_cfg and text_cfg.
        settings = [model.architecture, model.visual.preprocess_cfg]
        whole = [clipmini.__version__, self.hashes[tower], *settings, list(content)]
        text = json.dumps(whole, sort_keys=True, default=str)
        return self.directory / f"{tower}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def load(
        self, model: Model, tower: Tower, content: Sequence[Any]
    ) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
        """Return what is kept, and the notes with it; None unless every process has it."""
        found = read(self.path(model, tower, content))
        return found if all(distributed.all_gather_objects(found is not None)) else None

    def save(
        self,
        model: Model,
        tower: Tower,
        content: Sequence[Any],
        tensors: Mapping[str, Tensor],
        notes: Sequence[str] = (),
    ) -> None:
        """Keep tensors; one process of a node writes."""
        if int(os.environ.get("LOCAL_RANK", distributed.rank())) == 0:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_atomically(self.path(model, tower, content), save(on_cpu, {"notes": json.dumps(list(notes))}))


def read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Read a file of tensors; None if it is not there, or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, tuple(json.loads(file.metadata()["notes"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
