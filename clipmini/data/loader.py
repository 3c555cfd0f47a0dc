"""Batches for the trainer: the plan's positions, read and decoded by workers, resumable at any step."""

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clipmini.data.augment import Augmentation
from clipmini.data.decode import DECODE_ERRORS, Captions, Decoder
from clipmini.data.manifest import Manifest, read_manifest
from clipmini.data.plan import Plan
from clipmini.data.store import PairFormat, ShardStore
from clipmini.data.tokenizer import Tokenize, trim
from clipmini.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]  # image uint8 [b, 3, size, size], text int64 [b, context], id int64 [b]
MAX_BAD_IN_A_ROW = 100


class PairDataset(Dataset):
    """The sample at each position. A sample that cannot be used is replaced by the next one of its shard."""

    def __init__(self, manifest: Manifest, plan: Plan, store: ShardStore, decoder: Decoder) -> None:
        self.manifest = manifest
        self.plan = plan
        self.store = store
        self.decoder = decoder

    def __getitem__(self, position: int) -> Batch | UserError:
        source, number, index = self.plan.lookup(position)
        shard = self.manifest.sources[source].shards[number]
        for attempt in range(min(shard.num_samples, MAX_BAD_IN_A_ROW)):
            candidate = (index + attempt) % shard.num_samples
            try:
                return self.decoder(self.store.read(shard.path, candidate), position)
            except DECODE_ERRORS as error:
                key = self.store.key(shard.path, candidate)
                log.warning("bad sample %s in %s, the next one takes its place: %s", key, shard.path, error)
        return UserError(f"no usable sample in {attempt + 1} tries in {shard.path}, from {key} back")


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples; an error travels to the main process as a value, so that it stays one message."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return default_collate(list(samples))


def ignore_interrupts(_: int) -> None:
    """Let the main process decide what Ctrl-C means: a worker that dies would take the step down with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def default_num_workers(local_ranks: int) -> int:
    """Return the cores there are for each rank of this machine, less one for training, from 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // local_ranks - 1))


class BatchPositions:
    """The positions of this rank's slice of each global batch, from a step on."""

    def __init__(self, *, batch_size: int, rank: int, world_size: int, first_step: int, num_steps: int) -> None:
        self.batch_size = batch_size
        self.local = batch_size // world_size
        self.offset = rank * self.local
        self.steps = range(first_step, num_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size + self.offset
            yield list(range(first, first + self.local))


class TrainLoader:
    """Yields this rank's batches; its state is the number of samples given out, the same on every rank.

    The length is that of the whole run, also after a resume: Lightning counts the batches before it in.
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
        padding: int | None,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.padding = padding
        self.pin_memory = pin_memory
        self.samples = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        positions = BatchPositions(
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            first_step=self.samples // self.batch_size,
            num_steps=self.num_steps,
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=positions,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            worker_init_fn=ignore_interrupts,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            self.samples += self.batch_size
            yield {**batch, "text": trim(batch["text"], self.padding)}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "plan": self.dataset.plan.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found, expected = state["plan"], self.dataset.plan.digest()
        if found != expected:
            raise UserError(
                f"the checkpoint was made with other shards, weights or seed (plan {found}, now {expected}): "
                "give back data.train and seed as they were, or choose another name"
            )
        self.samples = state["samples"]


class ImageTextData(pl.LightningDataModule):
    """Picture-caption shards as the training data of a run.

    Args:
        train: where the shards are: a directory of tars, a glob, a brace pattern, a list of those, or a mapping
            `name: {shards, weight}`.
        caption_key: `txt`, a key of a sample's json (a caption, or a list of which one is drawn at each visit), or
            a mapping of those to probabilities.
        augmentation: what may happen to a picture.
        num_workers: loader processes of each rank; null takes the cores there are, less one for training.
        batch_size: global, over all ranks.
        seed: decides the order and every random choice, with the position of a sample.

    Raises:
        UserError: no shards, no pairs, or values out of range.
    """

    def __init__(
        self,
        *,
        train: str | list[str] | dict[str, Any],
        caption_key: str | dict[str, float],
        augmentation: Augmentation,
        num_workers: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        if num_workers is not None and num_workers < 0:
            raise UserError(f"data.num_workers={num_workers}: must be 0 or more, or null")
        self.captions = Captions.from_key(caption_key)
        self.pair_format = PairFormat(self.captions.extensions)
        self.manifest = read_manifest(train, self.pair_format)
        self.plan = Plan(self.manifest, seed)
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.batch_size = batch_size
        self.seed = seed
        if batch_size > self.manifest.num_samples:
            raise UserError(
                f"batch_size={batch_size} is larger than the data: data.train has {self.manifest.num_samples} pairs"
            )

    def prepare(self, *, tokenize: Tokenize, padding: int | None, size: int, num_steps: int) -> None:
        """Take what the model and the length of the run decide.

        Args:
            tokenize: of the model.
            padding: the token that may be cut off the end of captions, if the model has one.
            size: pixels of its pictures.
            num_steps: batches of the whole run.
        """
        self.padding = padding
        self.decoder = Decoder(size, self.augmentation, self.captions, tokenize, self.seed)
        self.num_steps = num_steps

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None
        return TrainLoader(
            PairDataset(self.manifest, self.plan, ShardStore(self.pair_format), self.decoder),
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=default_num_workers(trainer.num_devices) if self.num_workers is None else self.num_workers,
            padding=self.padding,
            pin_memory=torch.cuda.is_available(),
        )
