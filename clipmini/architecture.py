"""A model's JSON in open_clip's form: found by its name, checked, changed, compared."""

import json
import typing
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from clipmini.annotations import check_values
from clipmini.errors import UserError, tell_choices
from clipmini.files import tell_neighbours
from clipmini.one_tower import Towers

# Fields of a tower's JSON that may differ from those that weights were trained with.
CHANGEABLE = {"image_size", "patch_dropout", "context_length", "hf_model_pretrained", "timm_model_pretrained"}
SCHEMAS: dict[str, Any] = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
MODEL_CONFIGS = Path(__file__).resolve().parent / "model_configs"


def read_architecture(
    *,
    name: str | None,
    start: Mapping[str, Any] | None = None,
    start_towers: Towers = "both",
    embed_dim: int | None = None,
    vision_cfg: Mapping[str, Any] | None = None,
    text_cfg: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a model's JSON in open_clip's form, with changes on top.

    Args:
        name: of an open_clip model, of one in `clipmini/model_configs`, or a path to such a JSON file; None takes
            `start`, that of the model whose weights are to be loaded.
        start_towers: of that model, which are to be loaded.
        embed_dim: replaces the embedding width.
        vision_cfg: fields of open_clip's `CLIPVisionCfg`; `timm_model_name` makes the image tower any timm model.
        text_cfg: fields of open_clip's `CLIPTextCfg`; `hf_model_name` makes the text tower a Hugging Face model.

    Raises:
        UserError: an unknown name or field, a field of the wrong type, or another model than `start`.
    """
    architecture = read_named_architecture(name, start, start_towers)
    for key, changes in (("vision_cfg", vision_cfg), ("text_cfg", text_cfg)):
        hints = typing.get_type_hints(SCHEMAS[key])
        check_values(f"model.{key}", changes or {}, hints, hints)
        architecture[key] = {**architecture[key], **(changes or {})}
    if embed_dim is not None:
        architecture["embed_dim"] = embed_dim
    if "multimodal_cfg" in architecture:
        raise UserError(f"model.name={name}: captioning models (CoCa) are not supported")
    return architecture


def read_named_architecture(name: str | None, start: Mapping[str, Any] | None, start_towers: Towers) -> dict[str, Any]:
    """Return a model's JSON, as trained where it is the one to start from."""
    if name is None:
        if start is None:
            raise UserError("model.name=null: there is no model.pretrained whose model it could be")
        return deepcopy(dict(start))
    own = {path.stem: path for path in MODEL_CONFIGS.glob("*.json")}
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"model.name={name}: no such file{tell_neighbours(path)}")
        try:
            architecture = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"model.name={name}: is not JSON: {error}") from error
    elif name in own:
        architecture = json.loads(own[name].read_text())
    else:
        architecture = open_clip.get_model_config(name)
    if architecture is None:
        known = [*own, *open_clip.list_models()]
        raise UserError(f"model.name={name}: no such model{tell_choices(name, known)}")
    check_parts(architecture, name)
    if start is not None:
        check_same_architecture(architecture, start, name, start_towers)
        if bool(start.get("quick_gelu")) != bool(architecture.get("quick_gelu")):
            architecture["quick_gelu"] = bool(start.get("quick_gelu"))  # the other makes another model of the weights
    return architecture


def check_parts(architecture: Any, name: str) -> None:
    """See that a model's JSON describes both towers by fields that open_clip knows.

    Raises:
        UserError: it does not.
    """
    for part, schema in SCHEMAS.items():
        if not isinstance(architecture, Mapping) or not isinstance(architecture.get(part), Mapping):
            raise UserError(f"model.name={name}: the model JSON has no mapping {part!r}")
        known = typing.get_type_hints(schema)
        check_values(f"model.name={name}: {part}", architecture[part], known, {})  # open_clip's own are of other types


def check_same_architecture(named: Mapping[str, Any], start: Mapping[str, Any], name: str, towers: Towers) -> None:
    """See that the weights to start from are of the model that is named, also where shapes would not tell.

    Raises:
        UserError: they are not.
    """
    for tower, (part, schema) in zip(("image", "text"), SCHEMAS.items(), strict=True):
        if towers not in ("both", tower):
            continue
        ours, theirs = asdict(schema(**named[part])), asdict(schema(**start[part]))
        for key in sorted(ours.keys() - CHANGEABLE):
            if ours[key] != theirs[key]:
                raise UserError(
                    f"model.pretrained is of another model than model.name={name}: {part}.{key} is {theirs[key]}, not "
                    f"{ours[key]}; model.name=null takes the model that it is of"
                )


def check_timm_name(name: str | None) -> None:
    """See that timm has an image tower of this name; names with a colon say where else it comes from.

    Raises:
        UserError: it has not.
    """
    if name and ":" not in name and not timm.is_model(name):
        known = timm.list_models()
        raise UserError(f"model.vision_cfg.timm_model_name={name}: no such model of timm{tell_choices(name, known)}")
