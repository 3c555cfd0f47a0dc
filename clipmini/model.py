"""The model is open_clip's own object; this file creates it from a config and encodes with it.

Shapes: b pictures or captions, S pixels, L tokens, D embedding width.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from clipmini.annotations import Limits
from clipmini.architecture import check_timm_name, read_architecture
from clipmini.blocks import Block, adopt_blocks, run_blocks
from clipmini.errors import UserError
from clipmini.lengths import split
from clipmini.one_tower import Model, OneTower, Towers, text_tower
from clipmini.towers import check_learning, lock
from clipmini.weights import start_from


def create_model(
    *,
    name: str | None,
    pretrained: str | None = None,
    pretrained_towers: Towers = "both",
    start: Model | None = None,
    embed_dim: Annotated[int | None, Limits(least=1)] = None,
    vision_cfg: dict[str, Any] | None = None,
    text_cfg: dict[str, Any] | None = None,
    patch_dropout: Annotated[float | None, Limits(least=0, below=1)] = None,
    lock_image: bool = False,
    lock_image_unlocked_groups: int = 0,
    lock_image_freeze_bn_stats: bool = True,
    lock_text: bool = False,
    lock_text_unlocked_layers: int = 0,
    lock_text_freeze_layer_norm: bool = True,
    grad_checkpointing: bool = False,
    image_size: int | None = None,
    init_scale: float,
    init_bias: float | None,
    towers: Towers = "both",
) -> Model:
    """Create an open_clip model.

    Args:
        name, embed_dim, vision_cfg, text_cfg: see `read_architecture`.
        pretrained, pretrained_towers: what `start` is, for messages; `both`, or `image` or `text` alone.
        start: a model whose towers' weights and mean and std of pictures are taken; it stays as it is.
        patch_dropout: share of a vision transformer's patches left out in training.
        lock_image, lock_text: freeze towers, with the options of `towers.lock`.
        grad_checkpointing: recompute activations in the backward pass.
        image_size: pixels; null takes the model's own.
        init_scale, init_bias: what similarities are multiplied with at the start, and what is added; None is no bias.
        towers: that it has.

    Returns:
        A `CLIP`, `CustomTextCLIP` or `OneTower`. Two attributes are added: `architecture`, its JSON, and
        `visual.pixel_mean` and `pixel_std`, buffers [3, 1, 1] outside the state_dict.

    Raises:
        UserError: an unknown name, tag or field, or layers to lock that are not there.
    """
    changes: dict[str, Any] = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    told = getattr(start, "architecture", None)
    architecture = read_architecture(name=name, start=told, start_towers=pretrained_towers, **changes)
    changed = {"patch_dropout": patch_dropout, "image_size": image_size}.items()
    architecture["vision_cfg"] |= {key: value for key, value in changed if value is not None}
    architecture.pop("init_logit_bias", None)
    architecture["init_logit_scale"] = float(torch.tensor(init_scale).log())
    architecture |= {} if init_bias is None else {"init_logit_bias": init_bias}
    model = create_from_architecture(architecture, towers)
    set_preprocess(model, preprocess_cfg(start))
    if start is not None:
        start_from(model, start, f"model.pretrained={pretrained}", pretrained_towers)
    lock(model, "image", lock_image, lock_image_unlocked_groups, freeze_bn_stats=lock_image_freeze_bn_stats)
    lock(model, "text", lock_text, lock_text_unlocked_layers, freeze_layer_norm=lock_text_freeze_layer_norm)
    check_learning(model)
    if grad_checkpointing:
        recompute_activations(model)
    return model


def recompute_activations(model: Model) -> None:
    """Have the blocks of both towers compute their activations again in the backward pass."""
    model.set_grad_checkpointing()
    if isinstance(tower := text_tower(model), HFTextEncoder):
        # The other kind, which was the default, has no gradient where what goes in has none, as in a locked tower.
        tower.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def create_from_architecture(architecture: dict[str, Any], towers: Towers = "both") -> Model:
    """Make the object that open_clip makes of this JSON, or one tower of it, with random weights.

    Raises:
        UserError: values that open_clip cannot use, or an image size that it could not load again.
    """
    options = {key: value for key, value in deepcopy(architecture).items() if key != "custom_text"}
    is_hugging_face = "hf_model_name" in options["text_cfg"]
    if is_hugging_face:
        options["text_cfg"].setdefault("hf_model_pretrained", False)
    whole = CustomTextCLIP if is_hugging_face or architecture.get("custom_text") else CLIP
    model_class = whole if towers == "both" else functools.partial(OneTower, towers)
    check_timm_name(options["vision_cfg"].get("timm_model_name"))
    try:
        model = model_class(**options)
    except Exception as error:  # whatever open_clip, timm or transformers think of these numbers and names
        reason = str(error) or "its numbers do not fit together"
        raise UserError(f"model: open_clip cannot make it from {json.dumps(options)}: {reason}") from error
    if isinstance(model.visual, VisionTransformer) and min(model.visual.grid_size) < 1:
        size, patch = model.visual.image_size[0], model.visual.patch_size[0]
        raise UserError(f"image_size={size}: must be at least {patch}, the size of the model's patches")
    if isinstance(model.visual, TimmModel):
        shapes = [parameter.shape for parameter in model.visual.parameters()]
        model.visual.set_input_size(model.visual.image_size)
        if [parameter.shape for parameter in model.visual.parameters()] != shapes:
            timm_name = options["vision_cfg"]["timm_model_name"]
            default = model.visual.trunk.default_cfg["input_size"][-1]
            raise UserError(
                f"image_size={model.visual.image_size[0]}: open_clip loads the timm tower {timm_name} at {default} "
                f"pixels only; set image_size={default} or take a timm model of the size you want"
            )
    model.architecture = architecture
    text = text_tower(model)
    adopt_blocks(model.visual, None if is_hugging_face else text, is_causal=padding(model) is not None)
    if model.visual is not None:
        # Convolutions are faster with the channels last; to a transformer it makes no difference.
        model.visual.to(memory_format=torch.channels_last)
    return model


def set_preprocess(model: Model, preprocess: Mapping[str, Any]) -> None:
    """Tell a model how its pictures are prepared: open_clip's preprocess_cfg, and buffers with mean and std."""
    if model.visual is None:
        return
    set_model_preprocess_cfg(model, {**preprocess, "size": model.visual.image_size})
    for buffer, values in (("pixel_mean", preprocess["mean"]), ("pixel_std", preprocess["std"])):
        model.visual.register_buffer(buffer, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)


def preprocess_cfg(model: Model | None) -> dict[str, Any]:
    """Return how a model's pictures are prepared, by default where it has none."""
    return asdict(PreprocessCfg()) if model is None or model.visual is None else model.visual.preprocess_cfg


def image_size(model: Model) -> int:
    """Return the side of a model's pictures in pixels, 0 where it takes none; open_clip has one number or two."""
    size = 0 if model.visual is None else model.visual.image_size
    return size if isinstance(size, int) else size[0]


def count_parameters(model: Model) -> int:
    """Return the number of weights of a model, learned or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def open_clip_config(model: Model) -> dict[str, Any]:
    """Return the content of open_clip's `open_clip_config.json`."""
    return {"model_cfg": model.architecture, "preprocess_cfg": preprocess_cfg(model)}


def create_from_open_clip_config(config: Mapping[str, Any], towers: Towers = "both") -> Model:
    """Make the model of an `open_clip_config.json`, or one tower of it, with random weights.

    Raises:
        UserError: it is none, or open_clip cannot make it.
    """
    architecture = config.get("model_cfg")
    if not isinstance(architecture, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= architecture.keys():
        raise UserError("open_clip_config.json: model_cfg needs embed_dim, vision_cfg and text_cfg")
    if "multimodal_cfg" in architecture:
        raise UserError("open_clip_config.json: captioning models (CoCa) are not supported")
    model = create_from_architecture(architecture, towers)
    set_preprocess(model, merge_preprocess_dict(asdict(PreprocessCfg()), config.get("preprocess_cfg") or {}))
    return model


def synchronize_batch_norm(model: Model) -> Model:
    """Have BatchNorm normalise over the batch of all processes; names of parameters and buffers stay.

    By timm's converter: torch's own loses the activations that timm's BatchNormAct2d holds.
    """
    return convert_sync_batchnorm(model)


def encode_image(model: Model, image: Tensor, *, before_projection: bool = False) -> Tensor:
    """Encode pictures: uint8 [b, 3, S, S] to unit vectors [b, D].

    Args:
        before_projection: return what goes into the last projection of the tower instead, not normalised.

    Raises:
        UserError: the tower has no such projection.
    """
    pixels = (image - model.visual.pixel_mean) / model.visual.pixel_std
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    if not before_projection:
        return F.normalize(model.encode_image(pixels), dim=-1)
    with without_projection(model.visual):
        return model.encode_image(pixels)


def project_image(model: Model, features: Tensor) -> Tensor:
    """Turn what `encode_image` returns with `before_projection` into what it returns without: unit vectors [b, D]."""
    visual = model.visual
    projected = visual.head(features) if isinstance(visual, TimmModel) else features @ visual.proj
    return F.normalize(projected, dim=-1)


def list_projection(model: Model) -> list[nn.Parameter]:
    """List the weights of the last projection of an image tower; none where it cannot be taken apart."""
    visual = model.visual
    if isinstance(visual, TimmModel):
        return list(visual.head.parameters())
    return [] if getattr(visual, "proj", None) is None else [visual.proj]


def width_before_projection(model: Model) -> int:
    """Return the width of what goes into the last projection of an image tower.

    Raises:
        UserError: the tower has no such projection.
    """
    with without_projection(model.visual), torch.no_grad():
        size = image_size(model)
        weight = next(model.visual.parameters())
        was_training = model.visual.training
        features = model.visual.eval()(torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device))
        model.visual.train(was_training)
    return features.shape[-1]


@contextlib.contextmanager
def without_projection(visual: nn.Module) -> Iterator[None]:
    """Take the last projection out of an image tower, and put it back.

    Raises:
        UserError: it has none that can be taken out.
    """
    name, nothing = ("head", nn.Identity()) if isinstance(visual, TimmModel) else ("proj", None)
    if getattr(visual, name, None) is None:
        raise UserError(
            f"{type(visual).__name__} has no projection at its end: probe_features=before_projection and "
            "loss.head.layers take what goes into one"
        )
    projection = getattr(visual, name)
    setattr(visual, name, nothing)
    try:
        yield
    finally:
        setattr(visual, name, projection)


def encode_text(model: Model, text: Tensor, lengths: np.ndarray | None = None) -> Tensor:
    """Encode captions: int64 [b, L] to unit vectors [b, D]; L may be shorter than the context, see `padding`.

    Args:
        lengths: tokens of each caption, [b]: those of like lengths are encoded together, and no padding of others.
    """
    if lengths is None:
        return encode_together(model, text)
    groups, places = split(text, lengths)
    features = torch.cat([encode_together(model, group) for group in groups])
    return features if places is None else features.index_select(0, places)


def encode_together(model: Model, text: Tensor) -> Tensor:
    """Encode captions, all as long as the longest."""
    tower = text_tower(model)
    if isinstance(tower, HFTextEncoder) or padding(model) is None:
        return F.normalize(model.encode_text(text), dim=-1)
    length = text.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(text).to(dtype) + tower.positional_embedding[:length].to(dtype)  # [b, L, width]
    pool_type, end_token = text_pooling(tower)
    if isinstance(tower.transformer.resblocks[-1], Block):
        ends = (text if pool_type == "argmax" else (text == end_token).int()).argmax(dim=-1)
        x = tower.ln_final(run_blocks(tower.transformer, x, ends))  # [b, width]
    else:
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        x = text_global_pool(x, text, pool_type, eos_token_id=end_token)
    projection = tower.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return F.normalize(x, dim=-1)


def text_pooling(tower: CLIP | TextTransformer) -> tuple[str, int]:
    """Return how a text tower pools its tokens, and its end token."""
    if isinstance(tower, CLIP):
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id


def padding(model: Model) -> int | None:
    """Return the id of the padding that can be cut off captions without changing their features, or None.

    That is exact for a causal tower that pools at the end token, where nothing looks past it, and for a Hugging Face
    tower, where padding is masked. Other towers look at all their tokens.
    """
    tower = text_tower(model)
    if tower is None:
        return None
    if isinstance(tower, HFTextEncoder):
        return tower.config.pad_token_id
    if isinstance(tower, TextTransformer) and (tower.cls_emb is not None or tower.use_pad_mask):
        return None
    causal = tower.attn_mask is not None
    return 0 if causal and text_pooling(tower)[0] in ("argmax", "eos") else None
