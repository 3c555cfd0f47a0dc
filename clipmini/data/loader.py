"""Batches for the trainer: the plan's positions, read and decoded by workers, resumable at any step."""

import math
import time
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clipmini.annotations import Limits
from clipmini.data.augment import Augmentation
from clipmini.data.cache import ShardCache
from clipmini.data.content import Content
from clipmini.data.dataset import BAD, ERROR, Batch, PairDataset
from clipmini.data.decode import Decoder
from clipmini.data.features import FeatureStore, TeacherFeatures
from clipmini.data.health import Health
from clipmini.data.locate import real_path
from clipmini.data.manifest import Manifest, read_manifest
from clipmini.data.plan import Plan
from clipmini.data.processes import leave_signals_to_main
from clipmini.data.store import ShardStore
from clipmini.data.tokenizer import Tokenize
from clipmini.data.workers import read_batches
from clipmini.errors import UserError
from clipmini.lengths import count_used, round_up

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # what Pillow itself takes


def default_num_workers(num_cores: int) -> int:
    """Return the cores that a process has, less one for training, from 1 to 8."""
    return max(1, min(8, num_cores - 1))


def pass_on(batch: Any) -> Any:
    """Leave a batch as the data set made it."""
    return batch


class BatchPositions:
    """The positions of this rank's part of each global batch, from a step on."""

    def __init__(
        self, plan: Plan, *, batch_size: int, rank: int, world_size: int, first_step: int, num_steps: int
    ) -> None:
        self.plan = plan
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.steps = range(first_step, num_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in self.steps:
            yield np.split(self.plan.batch(step, self.batch_size), self.world_size)[self.rank]


class TrainLoader:
    """Yields this rank's batches; its state is the number of samples given out, the same on every rank.

    The length is that of the whole run, also after a resume: Lightning counts the batches before it in.

    Args:
        dataset: gives a batch for positions.
        batch_size: global.
        num_steps: of the whole run.
        num_workers: processes; 0 reads in this one.
        start_method: of the workers, or null for Python's.
        prefetch_factor: batches that each worker has ready.
        timeout: seconds after which a batch that does not come ends the run.
        padding: the token that is cut off the end of captions, if any.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        batch_size: int,
        num_steps: int,
        rank: int,
        world_size: int,
        num_workers: int,
        start_method: str | None,
        prefetch_factor: int,
        timeout: float,
        padding: int | None,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.start_method = start_method
        self.prefetch_factor = prefetch_factor
        self.timeout = timeout
        self.padding = padding
        self.pin_memory = pin_memory
        self.samples = 0
        self.waited = 0.0  # seconds that the trainer waited for batches
        self.health = Health()

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        start = time.perf_counter()
        for batch in self.read_batches():
            self.waited += time.perf_counter() - start
            self.health.new += batch.pop(BAD)
            if ERROR in batch:
                raise batch[ERROR]
            self.samples += self.batch_size
            if self.padding is not None:
                for name in {"text", "text_2", "negative_text"} & batch.keys():
                    lengths = count_used(batch[name], self.padding)
                    longest = round_up(int(lengths.max()))
                    batch[name], batch[f"{name}_length"] = batch[name][:, :longest], lengths
            yield batch
            start = time.perf_counter()

    def read_batches(self) -> Iterator[Batch]:
        """Run the workers; see `workers.read_batches`."""
        positions = BatchPositions(
            self.dataset.plan,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            first_step=self.samples // self.batch_size,
            num_steps=self.num_steps,
        )
        has_workers = self.num_workers > 0
        loader = DataLoader(
            self.dataset,
            sampler=positions,  # of whole batches, so that none are made of single items
            batch_size=None,
            collate_fn=pass_on,
            num_workers=self.num_workers,
            multiprocessing_context=self.start_method if has_workers else None,
            prefetch_factor=self.prefetch_factor if has_workers else None,
            timeout=self.timeout if has_workers else 0,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_signals_to_main,
        )
        settings = f"data.timeout={self.timeout:g} seconds, data.num_workers={self.num_workers}"
        return read_batches(loader, settings)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "plan": self.dataset.plan.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found, expected = state["plan"], self.dataset.plan.digest()
        if found != expected:
            raise UserError(
                f"the checkpoint was made with other shards, counts, weights, seed or shuffling (plan {found}, now "
                f"{expected}): give back data.train, data.shuffle_streams, data.shuffle_block and seed, or choose "
                "another name"
            )
        self.samples = state["samples"]


class ImageTextData(pl.LightningDataModule):
    """Picture-caption shards as the training data of a run.

    Args:
        train: where the shards are: a directory of tars, a glob, a brace pattern, a list of those, or a mapping
            `name: {shards, weight}`; local paths or URLs (s3, gs, hf, http, https).
        val: shards that are held out, in the same way, or null.
        caption_key: `txt` or `OTHER.txt`, a key of a sample's json (a caption, or a list of which one is drawn at each
            visit), a mapping of those to probabilities, or null, where there are no captions or none is needed.
        second_caption_key: of another caption that belongs to the picture; of a list that is not the first one;
            `same` for the first one again; or null.
        hard_negatives: key of the json with captions that are wrong for the picture, of which one is drawn at each
            visit, or null.
        augmentation: what may happen to a picture.
        view_augmentation: the same for its further views, or null.
        extra_views: how many there are, at most 2; null: one, if views are compared.
        draft: `auto` decodes large JPEGs at a part of their size where that leaves 1.5 pixels for each of the result.
        shuffle_streams: parts of the data that each batch mixes.
        shuffle_block: samples of such a part that are shuffled at a time.
        max_member_bytes: larger members of shards are refused.
        max_pixels: larger pictures are refused.
        max_bad_fraction: of the last 10,000 samples; more stop the run; also of the captions of `val`.
        num_workers: loader processes of each rank; null takes the cores there are, less one for training, at
            most 8.
        start_method: of the workers: fork, forkserver, spawn, or null for Python's own.
        prefetch_factor: batches that each worker has ready.
        timeout: seconds after which a batch that does not come ends the run.
        cache: for remote shards.
        allow_pipe: whether `pipe:` may run commands.
        ledger: whether batches carry the positions and keys of their samples, to be written down.
        batch_size: global, over all ranks.
        seed: decides the order and every random choice, with the position of a sample.
        num_cores: of this process.
        terms: kinds of pairs that the loss compares, and so what is read.
        all_views: whether it compares each view of a picture with each of its captions.
        cached_features: whether pictures are encoded once, see `clipmini.locked_features`.

    Raises:
        UserError: no shards, no pairs, augmentation out of its range, or nothing of what the loss compares.
    """

    def __init__(
        self,
        *,
        train: str | list[str] | dict[str, Any],
        val: str | list[str] | dict[str, Any] | None,
        caption_key: str | dict[str, float] | None,
        second_caption_key: str | None,
        hard_negatives: str | None,
        augmentation: Augmentation,
        view_augmentation: Augmentation | None,
        extra_views: int | None,
        draft: Literal["auto", "off"],
        shuffle_streams: int,
        shuffle_block: int,
        max_member_bytes: Annotated[int, Limits(least=1)],
        max_pixels: Annotated[int, Limits(least=1, most=MOST_PIXELS)],
        max_bad_fraction: Annotated[float, Limits(least=0, most=1)],
        num_workers: Annotated[int | None, Limits(least=0)],
        start_method: Literal["fork", "forkserver", "spawn"] | None,
        prefetch_factor: Annotated[int, Limits(least=1)],
        timeout: Annotated[float, Limits(least=0.1)],
        cache: ShardCache,
        allow_pipe: bool,
        ledger: bool,
        batch_size: int,
        seed: int,
        num_cores: int,
        terms: Collection[str],
        all_views: bool,
        cached_features: bool,
    ) -> None:
        super().__init__()
        augmentation.check("data.augmentation")
        if view_augmentation is not None:
            view_augmentation.check("data.view_augmentation")
        self.content = Content.choose(terms, all_views, caption_key, second_caption_key, hard_negatives, extra_views)
        self.store = ShardStore(self.content.pair_format, cache, max_member_bytes=max_member_bytes)
        self.manifest = read_manifest(train, self.store.pair_format, cache, allow_pipe=allow_pipe)
        self.held_out = find_held_out(val, self.manifest, self.store, allow_pipe=allow_pipe)
        self.plan = Plan(self.manifest, seed=seed, shuffle_streams=shuffle_streams, shuffle_block=shuffle_block)
        self.augmentation = augmentation
        self.view_augmentation = view_augmentation or augmentation
        self.draft = draft
        self.features: FeatureStore | None = None
        self.teacher: TeacherFeatures | None = None
        self.cached_features = cached_features
        self.is_prepared = False
        if cached_features:
            check_same_each_time(augmentation, self.content)
        self.max_pixels = max_pixels
        self.max_bad_fraction = max_bad_fraction
        self.num_workers = default_num_workers(num_cores) if num_workers is None else num_workers
        self.start_method = start_method
        self.prefetch_factor = prefetch_factor
        self.timeout = timeout
        self.ledger = ledger
        self.batch_size = batch_size
        self.seed = seed
        check_batch_size(batch_size, self.manifest)

    def prepare(
        self,
        *,
        tokenize: Tokenize,
        padding: int | None,
        size: int,
        num_steps: int,
        size_limits: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Take what the model and the length of the run decide.

        Args:
            tokenize: of the model.
            padding: the token that may be cut off the end of captions, if the model has one.
            size: pixels of its pictures.
            num_steps: batches of the whole run.
            size_limits: see `Decoder`.
        """
        self.padding = padding
        self.decoder = Decoder(
            size,
            self.augmentation,
            self.content.captions,
            tokenize,
            self.seed,
            max_pixels=self.max_pixels,
            draft=self.draft,
            view_augmentation=self.view_augmentation,
            num_views=self.content.num_views,
            size_limits=size_limits,
        )
        self.num_steps = num_steps
        self.is_prepared = True

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None
        return self.loader(trainer.global_rank, trainer.world_size)

    def loader(self, rank: int, world_size: int) -> TrainLoader:
        """Make the loader of a rank."""
        return TrainLoader(
            PairDataset(
                self.manifest,
                self.plan,
                self.store,
                self.decoder,
                with_keys=self.ledger,
                features=self.features,
                teacher=self.teacher,
            ),
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            start_method=self.start_method,
            prefetch_factor=self.prefetch_factor,
            timeout=self.timeout,
            padding=self.padding,
            pin_memory=torch.cuda.is_available(),
        )


def find_held_out(
    val: str | list[str] | dict[str, Any] | None, train: Manifest, store: ShardStore, *, allow_pipe: bool
) -> Manifest | None:
    """Find and count the shards of `data.val`.

    Raises:
        UserError: they cannot be read, or one of them is trained on.
    """
    if val is None:
        return None
    assert store.cache is not None
    held_out = read_manifest(val, store.pair_format, store.cache, allow_pipe=allow_pipe, part="val")
    trained = {real_path(shard.path) for source in train.sources for shard in source.shards}
    for path in (shard.path for source in held_out.sources for shard in source.shards):
        if real_path(path) in trained:
            raise UserError(f"data.val: {path} is a shard of data.train too, so that it would not be held out")
    return held_out


def check_batch_size(batch_size: int, train: Manifest) -> None:
    """See that there are as many pairs as a batch takes.

    Raises:
        UserError: there are not so many.
    """
    if batch_size > train.num_samples:
        raise UserError(f"batch_size={batch_size} is larger than the data: data.train has {train.num_samples} pairs")


def check_same_each_time(augmentation: Augmentation, content: Content) -> None:
    """See that a picture is the same whenever it is seen, so that its features may be kept.

    Raises:
        UserError: it is not.
    """
    if augmentation.is_random or content.num_views != 1:
        raise UserError(
            "data.cached_features=true: a picture would have other features each time: set data.augmentation to "
            "what is the same (scale=[1.0,1.0], ratio=[1.0,1.0] and nothing else), without further views"
        )
