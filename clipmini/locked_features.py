"""Features of a locked image tower, computed once and read in place of pictures.

LiT (https://arxiv.org/abs/2111.07991, section 3) trains a text tower beside an image tower that stays as it is: what
that makes of a picture is the same in every epoch, if the picture is.
"""

import functools

import torch
from torch import nn

from clipmini.data.decode import Decoder
from clipmini.data.features import FeatureStore
from clipmini.data.loader import ImageTextData
from clipmini.errors import UserError
from clipmini.evaluation.cache import hash_weights
from clipmini.kept_features import check_precision, directory_of, fill_pictures
from clipmini.launch import Launch
from clipmini.model import encode_image, list_projection, preprocess_cfg
from clipmini.one_tower import Model


class Transform:
    """What happens to a picture before it is encoded; the same whenever it is seen.

    Attributes:
        size: pixels.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.size = decoder.size

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.decoder.fixed_view(data)


def check_locked(model: Model) -> bool:
    """See that an image tower makes the same of a picture whenever it sees it, up to its last projection.

    Returns:
        Whether that learns, so that what is the same is what goes into it.

    Raises:
        UserError: more of the tower learns, or it is random, or looks at other pictures too.
    """
    learning = {id(parameter) for parameter in model.visual.parameters() if parameter.requires_grad}
    if learning - set(map(id, list_projection(model))):
        raise UserError(
            "data.cached_features=true: the image tower learns, and not its last projection alone: set "
            "model.lock_image=true and model.lock_image_unlocked_groups=0"
        )
    for layer in model.visual.modules():
        chance = max(float(getattr(layer, name, 0.0) or 0.0) for name in ("p", "prob", "drop_prob"))
        if chance > 0 or isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"data.cached_features=true: the image tower has {type(layer).__name__}, by which a picture has other "
                "features each time: set model.patch_dropout=0.0 or the tower's own dropout, and "
                "model.lock_image_freeze_bn_stats=true"
            )
    return bool(learning)


def keep_features(
    model: Model, data: ImageTextData, processes: Launch, *, device: torch.device, precision: str, batch_size: int
) -> None:
    """Have the data give the features of its pictures in place of them; every rank must call it.

    Args:
        model: its image tower is locked; on any device, it stays there.
        data: prepared.
        precision: Lightning's, of the run.
        batch_size: pictures at a time.

    Raises:
        UserError: the tower or the data would give other features each time.
    """
    before_projection = check_locked(model)
    of_towers = check_precision(precision, "data.cached_features=true")
    decoder = data.decoder
    tower = model.architecture["vision_cfg"], model.architecture["embed_dim"], model.architecture.get("quick_gelu")
    about = (hash_weights(model, "image"), tower, preprocess_cfg(model), before_projection, of_towers)
    transform = (decoder.size, repr(decoder.augmentation), decoder.draft, decoder.max_pixels)
    store = FeatureStore(directory_of(data, (about, transform)))
    home, was_training = next(model.parameters()).device, model.training
    encode = functools.partial(encode_image, model.to(device).eval(), before_projection=before_projection)
    options = {"device": device, "precision": of_towers, "batch_size": batch_size}
    fill_pictures(store, encode, Transform(decoder), data, processes, "the features", **options)
    model.to(home).train(was_training)
    data.features = store
