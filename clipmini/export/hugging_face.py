"""A directory for transformers' CLIPModel and CLIPProcessor, of the models that are one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.export.hugging_face_tokenizer import write_tokenizer
from clipmini.model import Model, image_size, text_pooling, text_tower

VOCABULARY = ClipTokenizer.end_token + 1
RESAMPLING = {"bilinear": 2, "bicubic": 3, "random": 3}  # Pillow's numbers; open_clip evaluates `random` as bicubic


def check_architecture(model: Model) -> None:
    """See that a model is a CLIPModel.

    Raises:
        UserError: names all that CLIPModel lacks.
    """
    lacks = [*lacks_for_images(model), *lacks_for_text(model)]
    if model.logit_bias is not None:
        lacks.append("bias of similarities (loss.init_bias)")
    if model.visual.preprocess_cfg["resize_mode"] == "longest":
        lacks.append("padding of pictures (resize_mode=longest)")
    if lacks:
        raise UserError(
            f"format=hf: transformers' CLIPModel has no {', no '.join(lacks)}; use format=open_clip or format=onnx"
        )


def lacks_for_images(model: Model) -> Iterator[str]:
    """Name what an image tower has and CLIPModel has not."""
    visual, config = model.visual, model.architecture["vision_cfg"]
    if isinstance(visual, TimmModel):
        yield f"timm tower ({config['timm_model_name']})"
    elif isinstance(visual, ModifiedResNet):
        yield f"residual network (vision_cfg.layers={config['layers']})"
    else:
        if visual.attn_pool is not None:
            yield "pooling by attention (vision_cfg.attentional_pool)"
        elif visual.pool_type != "tok":
            yield f"pooling of patches (vision_cfg.pool_type={visual.pool_type})"
        if not isinstance(visual.ln_pre, nn.LayerNorm):
            yield "image tower without a LayerNorm before its blocks (vision_cfg.no_ln_pre)"
        if visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
            yield "pictures or patches that are not square (vision_cfg.image_size, patch_size)"
        yield from lacks_for_blocks(visual.transformer, "vision_cfg")


def lacks_for_text(model: Model) -> Iterator[str]:
    """Name what a text tower or its tokenizer has and CLIPModel has not."""
    tower, config = text_tower(model), model.architecture["text_cfg"]
    options = {"clean": "lower", **(config.get("tokenizer_kwargs") or {})}
    if isinstance(tower, HFTextEncoder):
        yield f"Hugging Face text tower ({config['hf_model_name']})"
        return
    if config.get("hf_tokenizer_name") or options != {"clean": "lower"} or tower.vocab_size < VOCABULARY:
        yield "tokenizer but CLIP's (text_cfg.hf_tokenizer_name, tokenizer_kwargs, vocab_size)"
    if getattr(tower, "cls_emb", None) is not None:
        yield "class token of captions (text_cfg.embed_cls)"
    if tower.attn_mask is None:
        yield "text tower that looks ahead (text_cfg.no_causal_mask)"
    pool_type, end_token = text_pooling(tower)
    if pool_type not in ("argmax", "eos"):
        yield f"pooling of captions but at their end (text_cfg.pool_type={pool_type})"
    elif pool_type == "eos" and end_token != ClipTokenizer.end_token:
        yield f"pooling at a token that does not end captions (text_cfg.eos_id={end_token})"
    if not isinstance(tower.text_projection, nn.Parameter):
        yield "text tower without a projection, or with a bias in it (text_cfg.proj_type, proj_bias)"
    yield from lacks_for_blocks(tower.transformer, "text_cfg")


def lacks_for_blocks(transformer: Transformer, key: str) -> Iterator[str]:
    """Name what the blocks of a transformer have and CLIPModel's have not."""
    block = transformer.resblocks[0]
    if not isinstance(block, ResidualAttentionBlock):
        yield f"normalised or scaled attention ({key}.block_type, qk_norm, scale_...)"
        return
    if not isinstance(block.ls_1, nn.Identity):
        yield f"layer scale ({key}.ls_init_value)"
    if block.ln_1.weight is None or block.ln_1.bias is None:
        yield f"LayerNorm without weights ({key}.norm_kwargs)"
    if activation(block) is None:
        yield f"such activation ({key}.act_kwargs)"


def activation(block: ResidualAttentionBlock) -> str | None:
    """Return transformers' name of a block's activation, None if it has none."""
    layer = block.mlp.gelu
    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}.get(getattr(layer, "approximate", ""))


def write_clip_model(model: Model, directory: Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer.

    Args:
        model: one that `check_architecture` has passed; float32, on the CPU, in evaluation mode.
    """
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    directory.mkdir()
    theirs = CLIPModel(CLIPConfig(**make_config(model))).eval()
    theirs.load_state_dict(rename_weights(model))
    has_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    theirs.save_pretrained(directory)
    if has_bar:
        logging.enable_progress_bar()
    preprocessor = make_preprocessor_config(model.visual.preprocess_cfg, image_size(model))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    write_tokenizer(directory, text_tower(model).context_length)


def make_config(model: Model) -> dict[str, Any]:
    """Return the arguments of CLIPConfig."""
    visual, tower = model.visual, text_tower(model)
    width = {"projection_dim": visual.proj.shape[1]}
    vision = {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0]}
    # 49407 takes the first end token of a caption. That is open_clip's `eos` and, since no id of a caption is higher,
    # its `argmax`. The 2 of older configs means the highest id; but it is not the tokenizer's end token.
    text = {
        "vocab_size": tower.vocab_size,
        "max_position_embeddings": tower.positional_embedding.shape[0],
        "bos_token_id": ClipTokenizer.start_token,
        "eos_token_id": ClipTokenizer.end_token,
        "pad_token_id": ClipTokenizer.end_token,
    }
    return {
        **width,
        "vision_config": {**width, **vision, **describe_blocks(visual.transformer)},
        "text_config": {**width, **text, **describe_blocks(tower.transformer)},
        "logit_scale_init_value": model.architecture.get("init_logit_scale", 2.6592),
    }


def describe_blocks(transformer: Transformer) -> dict[str, Any]:
    """Return the fields that CLIPVisionConfig and CLIPTextConfig share."""
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation(block),
        "layer_norm_eps": block.ln_1.eps,
    }


def rename_weights(model: Model) -> dict[str, Tensor]:
    """Return the weights under CLIPModel's names, contiguous."""
    visual: VisionTransformer = model.visual
    tower = text_tower(model)
    weights = {
        "logit_scale": model.logit_scale.reshape([]),
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": tower.text_projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": tower.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": tower.positional_embedding,
        **rename("vision_model.pre_layrnorm", visual.ln_pre),
        **rename("vision_model.post_layernorm", visual.ln_post),
        **rename("text_model.final_layer_norm", tower.ln_final),
    }
    for prefix, transformer in (("vision_model", visual.transformer), ("text_model", tower.transformer)):
        for number, block in enumerate(transformer.resblocks):
            weights |= rename_block(f"{prefix}.encoder.layers.{number}", block)
    return {name: weight.detach().contiguous() for name, weight in weights.items()}


def rename(prefix: str, layer: nn.LayerNorm | nn.Linear) -> dict[str, Tensor]:
    return {f"{prefix}.weight": layer.weight, f"{prefix}.bias": layer.bias}


def rename_block(prefix: str, block: ResidualAttentionBlock) -> dict[str, Tensor]:
    """Return the weights of a block; open_clip keeps those of queries, keys and values in one matrix."""
    weights = {
        **rename(f"{prefix}.layer_norm1", block.ln_1),
        **rename(f"{prefix}.layer_norm2", block.ln_2),
        **rename(f"{prefix}.self_attn.out_proj", block.attn.out_proj),
        **rename(f"{prefix}.mlp.fc1", block.mlp.c_fc),
        **rename(f"{prefix}.mlp.fc2", block.mlp.c_proj),
    }
    for kind in ("weight", "bias"):
        parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
        for letter, part in zip("qkv", parts, strict=True):
            weights[f"{prefix}.self_attn.{letter}_proj.{kind}"] = part
    return weights


def make_preprocessor_config(preprocess: dict[str, Any], size: int) -> dict[str, Any]:
    """Return what CLIPImageProcessor does with a picture, from open_clip's `preprocess_cfg`."""
    square = {"height": size, "width": size}
    is_squashed = preprocess["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if is_squashed else {"shortest_edge": size},
        "resample": RESAMPLING[preprocess["interpolation"]],
        "do_center_crop": not is_squashed,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }
