"""Computes the features of a locked image tower, once for all runs with the same tower and the same pictures.

Each process of a node takes its share of the shards; what is there already is not done again, so that it goes on where
it was stopped.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clipmini import distributed
from clipmini.console import format_seconds, track
from clipmini.data.decode import Decoder
from clipmini.data.features import FeatureStore, ShardPictures, name_features
from clipmini.data.index import Shard
from clipmini.data.loader import ImageTextData
from clipmini.errors import UserError
from clipmini.evaluation.cache import hash_weights
from clipmini.evaluation.encoder import load_pictures, make_batches
from clipmini.launch import Launch
from clipmini.model import encode_image, list_projection, preprocess_cfg
from clipmini.one_tower import Model

log = logging.getLogger(__name__)

DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of the towers, by precision


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
    if precision not in DTYPES:
        raise UserError(f"data.cached_features=true: goes with trainer.precision {', '.join(DTYPES)}, not {precision}")
    tower = model.architecture["vision_cfg"], model.architecture["embed_dim"], model.architecture.get("quick_gelu")
    about = (hash_weights(model, "image"), tower, preprocess_cfg(model), before_projection, precision)
    assert data.store.cache is not None
    store = FeatureStore(Path(data.store.cache.directory) / "features" / name_features(about, data.decoder))
    shards = list({shard.identity(): shard for source in data.manifest.sources for shard in source.shards}.values())
    with distributed.patient():
        missing = distributed.all_gather_objects(store.missing(shards))[distributed.rank()]
        mine = missing[processes.rank % processes.local_world_size :: processes.local_world_size]
        if missing:
            log.info("computing the features of %d of %d shards, once: %s", len(missing), len(shards), store.directory)
        start = time.perf_counter()
        home = next(model.parameters()).device
        encode = functools.partial(encode_image, model.to(device), before_projection=before_projection)
        compute(encode, model, data, store, mine, device=device, dtype=DTYPES[precision], batch_size=batch_size)
        model.to(home)
        distributed.all_gather_objects(None)  # no process trains before all features are there
    if missing:
        log.info("computed in %s", format_seconds(time.perf_counter() - start))
    data.features = store


@torch.inference_mode()
def compute(
    encode: Callable[[torch.Tensor], torch.Tensor],
    model: Model,
    data: ImageTextData,
    store: FeatureStore,
    shards: Sequence[Shard],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    batch_size: int,
) -> None:
    """Compute and keep the features of shards."""
    was_training = model.training
    model.eval()
    for shard in track(shards, len(shards), "computing features"):
        rows: dict[int, np.ndarray] = {}
        batches = make_batches(shard.num_samples, batch_size)
        pictures = ShardPictures(data.store, shard)
        for numbers, images, _ in load_pictures(pictures, Transform(data.decoder), batches, data.num_workers):
            if numbers:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    rows |= dict(zip(numbers, encode(images.to(device)).float().cpu().numpy(), strict=True))
        store.write(shard, rows)
        data.store.close_remote()
    model.train(was_training)
