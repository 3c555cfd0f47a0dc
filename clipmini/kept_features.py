"""Computes features that stay the same for a whole run, once for all runs with the same model and the same pairs.

Each process of a node takes its share of the shards; what is there already is not done again, so that it goes on where
it was stopped.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmini import distributed
from clipmini.cluster import signals
from clipmini.console import format_seconds, track
from clipmini.data.features import FeatureStore, ShardArrays, ShardPictures, name_features
from clipmini.data.index import Shard
from clipmini.data.loader import ImageTextData
from clipmini.errors import ProcessLost, UserError
from clipmini.evaluation.encoder import PRECISIONS, AnyTransform, Interrupted, load_pictures, make_batches
from clipmini.launch import Launch

log = logging.getLogger(__name__)

OF_TRAINER = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}  # precisions of the towers, by Lightning's


def check_precision(precision: str, key: str) -> str:
    """Return the precision in which features are computed, by that of the run.

    Raises:
        UserError: there is none for it.
    """
    if precision not in OF_TRAINER:
        raise UserError(f"{key}: goes with trainer.precision {', '.join(OF_TRAINER)}, not {precision}")
    return OF_TRAINER[precision]


def directory_of(data: ImageTextData, about: Any) -> Path:
    """Return where features of some model and some transform are kept on this node."""
    assert data.store.cache is not None
    return Path(data.store.cache.directory) / "features" / name_features(about, data.store)


def fill(
    store: ShardArrays, data: ImageTextData, processes: Launch, compute: Callable[[Shard], None], what: str
) -> None:
    """Have the processes of each node compute what a store has not; every rank must call it.

    Each computes a shard at a time, and then all see whether any has failed or is asked to stop: none waits long.

    Args:
        compute: computes and keeps what there is to a shard.
        what: it is, for the log.

    Raises:
        UserError: shards of which nothing says whether they have changed.
        Interrupted: a process was asked to stop.
        ProcessLost: another one could not go on.
    """
    shards = list({shard.identity(): shard for source in data.manifest.sources for shard in source.shards}.values())
    if unknown := [shard.path for shard in shards if not shard.version]:
        raise UserError(f"data.train: {what} cannot be kept: nothing tells when the content of {unknown[0]} changes")
    local_rank = processes.rank % processes.local_world_size
    # Of one process of a node for all of them: another run may fill the same store meanwhile.
    missing = distributed.all_gather_objects(store.missing(shards))[processes.rank - local_rank]
    mine = missing[local_rank :: processes.local_world_size]
    start, turns = time.perf_counter(), max(distributed.all_gather_numbers(len(mine)))[0]
    if missing:
        log.info("computing %s of %d of %d shards, once: %s", what, len(missing), len(shards), store.directory)
    for turn in track(range(turns), turns, f"computing {what}"):
        take_turn(compute, mine[turn : turn + 1])
        data.store.close_remote()
    if missing:
        log.info("computed in %s", format_seconds(time.perf_counter() - start))


def take_turn(compute: Callable[[Shard], None], shards: Sequence[Shard]) -> None:
    """Compute what there is to one shard, or to none, and see how the other processes have fared."""
    failure: Exception | None = None
    try:
        for shard in shards:
            compute(shard)
    except Exception as error:  # of whatever is computed; the others must not wait for this process
        failure = error
    with distributed.patient():
        found = distributed.all_gather_numbers(int(failure is not None), int(signals.received() is not None))
    if failure is not None:
        raise failure
    if any(has_failed for has_failed, _ in found):
        raise ProcessLost("another process of this run could not compute its part of the features")
    if any(is_asked for _, is_asked in found):
        raise Interrupted


def fill_pictures(
    store: FeatureStore,
    encode: Callable[[torch.Tensor], torch.Tensor],
    transform: AnyTransform,
    data: ImageTextData,
    processes: Launch,
    what: str,
    **options: Any,
) -> None:
    """Compute the features of pictures that a store has not; see `fill`, and `encode_shard` for the options."""

    def compute(shard: Shard) -> None:
        store.write(shard, encode_shard(encode, transform, data, shard, **options))

    fill(store, data, processes, compute, what)


@torch.inference_mode()
def encode_shard(
    encode: Callable[[torch.Tensor], torch.Tensor],
    transform: AnyTransform,
    data: ImageTextData,
    shard: Shard,
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> dict[int, np.ndarray]:
    """Return the features of the pictures of a shard, fp32 [D] by the number of a pair, of those that can be used."""
    rows: dict[int, np.ndarray] = {}
    batches = make_batches(shard.num_samples, batch_size)
    for numbers, images, _ in load_pictures(ShardPictures(data.store, shard), transform, batches, data.num_workers):
        if numbers:
            with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
                rows |= dict(zip(numbers, encode(images.to(device)).float().cpu().numpy(), strict=True))
    return rows
