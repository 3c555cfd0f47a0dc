"""The batch at some positions: looked up, read, decoded, and always complete."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from clipmini.data.decode import Decoder, Example
from clipmini.data.features import FeatureStore, TeacherFeatures
from clipmini.data.health import MAX_IN_A_ROW, BadSample, Fault
from clipmini.data.index import Shard
from clipmini.data.manifest import Manifest
from clipmini.data.plan import Places, Plan
from clipmini.data.remote import is_remote
from clipmini.data.store import ShardStore
from clipmini.errors import UserError

# what `Decoder.collate` makes; with a ledger also lists of position and key
Batch = dict[str, Any]
BAD = "bad"  # where a batch carries its bad samples from a worker to the main process
ERROR = "error"  # and, in place of all else, what must stop the run


class PairDataset(Dataset):
    """The batch at some positions. A sample that cannot be used is replaced by the next one of its epoch."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        store: ShardStore,
        decoder: Decoder,
        *,
        with_keys: bool = False,
        features: FeatureStore | None = None,
        teacher: TeacherFeatures | None = None,
    ) -> None:
        self.manifest = manifest
        self.plan = plan
        self.store = store
        self.decoder = decoder
        self.with_keys = with_keys
        self.features = features
        self.teacher = teacher
        self.blocks: set[tuple[int, int, int, int]] = set()  # of the last batch: source, epoch, stream and block

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """Read and decode a batch; an error that must stop the run is part of it, so that it stays one message."""
        places = self.plan.lookup(positions)
        bad: list[BadSample] = []
        examples, keys = [], []
        try:
            self.prefetch(places)
            for row, position in enumerate(np.asarray(positions).tolist()):
                example, key = self.find_example(places, row, position, bad)
                examples.append(example)
                keys.append(key)
        except UserError as error:
            return {ERROR: error, BAD: bad}
        finally:
            self.store.close_remote()
        batch: Batch = self.decoder.collate(examples)
        if self.with_keys:
            batch |= {"position": np.asarray(positions).tolist(), "key": keys}
        return {**batch, BAD: bad}

    def find_example(self, places: Places, row: int, position: int, bad: list[BadSample]) -> tuple[Example, str]:
        """Decode the sample at a place or, as long as that cannot be used, the one after it; bad ones are added."""
        source = self.manifest.sources[int(places.source[row])]
        number, index = int(places.shard[row]), int(places.sample[row])
        for attempt in range(1, MAX_IN_A_ROW + 1):
            shard = source.shards[number]
            try:
                example = self.decode(shard, index, position)
                return example, (self.store.key(shard, index) or "") if self.with_keys else ""
            except Fault as fault:
                key = self.store.key(shard, index)
                bad.append(BadSample(position, source.name, shard.path, index, key, fault.cause, fault.detail))
                number, index = self.plan.following(position, attempt)
        raise UserError(
            f"{MAX_IN_A_ROW} samples in a row cannot be used, at position {position} of data.train ({source.name}); "
            f"the last: {bad[-1].shard}, sample {bad[-1].index} ({bad[-1].key}): {bad[-1].cause}, {bad[-1].detail}"
        )

    def decode(self, shard: Shard, index: int, position: int) -> Example:
        """Read and decode a sample; where its features are kept, in place of its picture."""
        if self.features is None:
            example = self.decoder.decode(self.store.read(shard, index), position)
        else:
            members = self.store.read(shard, index, only=self.store.pair_format.caption_extensions)
            example = self.decoder.decode(members, position, self.features.read(shard, index))
        if self.teacher is None:
            return example
        return example._replace(teacher=self.teacher.read(shard, index, example.captions))

    def prefetch(self, places: Places) -> None:
        """Have remote shards fetched in the background: of this batch, then of the next block of each stream."""
        if self.store.cache is None:
            return
        number = places.offset // self.plan.shuffle_block
        blocks = set(zip(*(column.tolist() for column in (*places[:3], number)), strict=True))
        new = sorted(blocks - self.blocks)
        self.blocks = blocks
        for ahead in (0, 1):
            for source, epoch, stream, block in new:
                shards = self.manifest.sources[source].shards
                found = self.plan.shards_of_block(source, epoch, stream, block + ahead)
                self.store.cache.prefetch(shards[index] for index in found if is_remote(shards[index].path))
