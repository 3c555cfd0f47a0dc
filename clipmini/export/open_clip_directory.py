"""The model that plain open_clip loads."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from clipmini.lora import merge_lora
from clipmini.model import Model, open_clip_config

WEIGHTS = "open_clip_model.safetensors"


def export_open_clip(model: Model, directory: Path) -> None:
    """Write a directory for `open_clip.create_model_and_transforms("local-dir:<directory>")`.

    Replaces an older export as a whole.
    """
    new = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "open_clip_config.json").write_text(json.dumps(open_clip_config(model), indent=2))
    state = merge_lora(model.state_dict())
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(weights, new / WEIGHTS)
    (new / WEIGHTS).chmod((new / "open_clip_config.json").stat().st_mode)  # safetensors lets only the owner read
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)
