"""The layers of a model's towers: which of them stay as they are, and how much slower the early ones learn.

The groups are those that open_clip 3.3.0 locks by (`lock` of its towers). It has none for a residual network of
OpenAI's kind, which here has its stem, four stages and pooling, nor for some Hugging Face models; and it never unlocks
pooling by attention, which here goes with the last block.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipmini.annotations import Limits
from clipmini.errors import UserError
from clipmini.one_tower import check_has, towers_of

Kind: TypeAlias = Literal["image", "text"]
Layers: TypeAlias = list[list[str]]  # names of parameters by layer, from the input to the output

FIRST = r"conv1\.|class_embedding|positional_embedding|ln_pre\.|token_embedding\.|cls_emb|embeddings\.|embed_|shared\."
LAST = r"proj$|text_projection"
TEXT = r"token_embedding\.|positional_embedding|cls_emb|transformer\.|ln_final\.|text_projection"  # of a CLIP


def list_names(model: CLIP | CustomTextCLIP, kind: Kind) -> tuple[list[str], list[str]]:
    """Return a tower's parameters, and those of the projection that open_clip puts onto timm's and Hugging Face's."""
    names = [name for name, _ in model.named_parameters()]
    if kind == "image":
        has_head = isinstance(model.visual, TimmModel)
        tower, head = (r"visual\.trunk\.", r"visual\.head\.") if has_head else (r"visual\.", None)
    elif isinstance(model, CLIP):
        tower, head = TEXT, None
    else:
        has_head = isinstance(model.text, HFTextEncoder)
        tower, head = (r"text\.transformer\.", r"text\.proj\.") if has_head else (r"text\.", None)
    return [name for name in names if re.match(tower, name)], [name for name in names if head and re.match(head, name)]


def list_layers(model: CLIP | CustomTextCLIP, kind: Kind) -> Layers:
    """Return the parameters of a tower by layer, without a projection of timm's and Hugging Face's.

    Raises:
        UserError: timm does not say what the layers of this tower are.
    """
    if kind == "image" and isinstance(model.visual, TimmModel):
        return list_timm_layers(model.visual)
    names, _ = list_names(model, kind)
    is_resnet = kind == "image" and isinstance(model.visual, ModifiedResNet)
    return (place_in_resnet if is_resnet else place_in_transformer)(names)


def list_timm_layers(visual: TimmModel) -> Layers:
    """Return the layers of a tower as timm groups them."""
    if not hasattr(visual.trunk, "group_matcher"):
        raise UserError(
            f"timm's {type(visual.trunk).__name__} does not say what its layers are: set layer_decay.image=1.0 and "
            "model.lock_image_unlocked_groups=0"
        )
    groups = group_parameters(visual.trunk, visual.trunk.group_matcher())
    return [[f"visual.trunk.{name}" for name in groups[number]] for number in sorted(groups)]


def place_in_transformer(names: Sequence[str]) -> Layers:
    """Put the embeddings first, then each block, the last one with what follows it, and a projection at the end."""
    numbers = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    last = 1 + max(numbers.values(), default=0)
    layers: Layers = [[] for _ in range(last + 2)]
    for name in names:
        if name in numbers:
            layers[1 + numbers[name]].append(name)
        elif re.search(rf"(^|\.)({FIRST})", name):
            layers[0].append(name)
        else:
            layers[last + 1 if re.search(rf"(^|\.)({LAST})", name) else last].append(name)
    return [layer for layer in layers if layer]


def place_in_resnet(names: Sequence[str]) -> Layers:
    """Put the stem first, then each stage, and the pooling at the end."""
    layers: Layers = [[] for _ in range(6)]
    for name in names:
        stage = re.match(r"visual\.layer(\d)\.", name)
        layers[int(stage[1]) if stage else 5 if ".attnpool." in name else 0].append(name)
    return layers


def lock(
    model: CLIP | CustomTextCLIP,
    kind: Kind,
    is_locked: bool,
    unlocked: int,
    *,
    freeze_bn_stats: bool = False,
    freeze_layer_norm: bool = True,
) -> None:
    """Freeze a tower as LiT does (https://arxiv.org/abs/2111.07991), by the options that open_clip's trainer has.

    The projection that open_clip puts onto towers of timm and Hugging Face learns.

    Args:
        is_locked: whether at all.
        unlocked: layers at the end of the tower, which go on learning.
        freeze_bn_stats: BatchNorm in locked layers of the image tower keeps the averages that it has.
        freeze_layer_norm: false has LayerNorm learn in locked layers.

    Raises:
        UserError: layers that are not there.
    """
    option = f"model.lock_{kind}_{'unlocked_groups' if kind == 'image' else 'unlocked_layers'}={unlocked}"
    if not is_locked and unlocked:
        raise UserError(f"{option}, but nothing is locked: set model.lock_{kind}=true")
    if not is_locked:
        return
    check_has(model, kind, f"model.lock_{kind}=true")
    layers = list_layers(model, kind) if unlocked else [list_names(model, kind)[0]]
    if not 0 <= unlocked < len(layers):
        raise UserError(
            f"{option}: must be from 0 to {len(layers) - 1}, as this tower has {len(layers)} groups of layers"
        )
    spared = set() if freeze_layer_norm else list_layer_norms(model)
    for layer in layers[: len(layers) - unlocked]:
        for name in set(layer) - spared:
            model.get_parameter(name).requires_grad = False
    if freeze_bn_stats:
        freeze_statistics(model.visual)


def check_learning(model: CLIP | CustomTextCLIP) -> None:
    """See that something is left to train.

    Raises:
        UserError: all towers that there are, are locked as a whole.
    """
    if not any(value.requires_grad for name, value in model.named_parameters() if not name.startswith("logit_")):
        kinds = ("image", "text") if (towers := towers_of(model)) == "both" else (towers,)
        locked = " and ".join(f"model.lock_{kind}=true" for kind in kinds)
        raise UserError(f"{locked} leave nothing to train but the scale")


def list_layer_norms(model: nn.Module) -> set[str]:
    """Return the names of the gains and biases of LayerNorm; those of Hugging Face need not be torch's."""
    return {
        f"{prefix}.{name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, nn.LayerNorm) or type(layer).__name__.endswith("LayerNorm")
        for name, _ in layer.named_parameters()
    }


def freeze_statistics(tower: nn.Module) -> None:
    """Have BatchNorm in locked layers use its averages, in training too, and leave them as they are.

    By timm's converter: open_clip's own loses the activations that timm's BatchNormAct2d holds.

    Raises:
        UserError: there is a kind of BatchNorm that it cannot convert.
    """
    for name, layer in list(tower.named_modules()):
        if not isinstance(layer, _BatchNorm) or any(value.requires_grad for value in layer.parameters()):
            continue
        frozen = freeze_batch_norm_2d(layer)
        if frozen is layer:
            raise UserError(
                f"model.lock_image_freeze_bn_stats=true: the averages of {type(layer).__name__} ({name}) cannot be "
                "frozen; false has them move in locked layers too"
            )
        parent, _, last = name.rpartition(".")
        tower.get_submodule(parent).add_module(last, frozen)


def decay_learning_rates(model: CLIP | CustomTextCLIP, decays: Mapping[Kind, float]) -> dict[str, float]:
    """Return the share of the learning rate of each parameter that learns slower.

    The last layer of a tower, its projection, learns at the full rate, and each layer before it at `decay` times the
    rate of the next one (BEiT, https://arxiv.org/abs/2106.08254, appendix on fine-tuning).

    Args:
        decays: of each tower; 1 leaves it as it is.

    Raises:
        UserError: outside 0 to 1.
    """
    shares: dict[str, float] = {}
    for kind, decay in decays.items():
        Limits(above=0, most=1).check(f"layer_decay.{kind}", decay)
        if decay < 1:
            check_has(model, kind, f"layer_decay.{kind}={decay}")
            _, head = list_names(model, kind)
            layers = list_layers(model, kind)
            shares |= share_by_layer([*layers, head] if head else layers, decay)
    return shares


def share_by_layer(layers: Iterable[Iterable[str]], decay: float) -> dict[str, float]:
    """Return decay ** (layers after its own) of each name."""
    return {name: decay**distance for distance, layer in enumerate(reversed([*layers])) for name in layer if distance}
