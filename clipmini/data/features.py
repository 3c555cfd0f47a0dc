"""Features that stay the same for a whole run, computed once for all pairs: of a locked image tower, of a teacher."""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipmini
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.store import ShardStore
from clipmini.files import write_atomically

MAX_OPEN = 256  # files of features that a process has mapped


@dataclass
class ShardArrays:
    """Keeps an array for each shard, in a file of its own that is there whole or not at all.

    Attributes:
        directory: of all that the arrays depend on but the shard.
    """

    directory: Path
    files: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "files": OrderedDict()}

    def path(self, shard: Shard) -> Path:
        """Return where the array of a shard lies, or would lie."""
        return self.directory / f"{shard.identity()}.npy"

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards that have none yet."""
        return [shard for shard in shards if not self.path(shard).is_file()]

    def open(self, shard: Shard) -> np.ndarray:
        """Map the array of a shard.

        Raises:
            Fault: nothing of the shard could be read, so that it has none.
        """
        if shard.path not in self.files:
            if not self.path(shard).is_file():
                raise Fault("missing_shard", "it could not be read when features were computed")
            if len(self.files) >= MAX_OPEN:
                self.files.popitem(last=False)
            self.files[shard.path] = np.load(self.path(shard), mmap_mode="r", allow_pickle=False)
        return self.files[shard.path]

    def save(self, shard: Shard, array: np.ndarray) -> None:
        """Keep the array of a shard; if the process is killed, none of it."""
        content = io.BytesIO()
        np.save(content, array)
        write_atomically(self.path(shard), content.getvalue())


class FeatureStore(ShardArrays):
    """Features of pictures: fp32 [pairs, D] for each shard, NaN where there is no picture that can be used."""

    def read(self, shard: Shard, index: int) -> Tensor:
        """Return the features of a picture: fp32 [D].

        Raises:
            Fault: there is no picture that can be used.
        """
        found = self.open(shard)
        if index >= len(found) or np.isnan(found[index, 0]):
            raise Fault("picture", f"it could not be used when its features were computed, {self.path(shard)}")
        return torch.from_numpy(np.array(found[index]))

    def write(self, shard: Shard, rows: Mapping[int, np.ndarray]) -> None:
        """Keep the features of a whole shard, by the number of a pair; of none nothing: the next run tries again."""
        if not rows:
            return
        width = len(next(iter(rows.values())))
        features = np.full((shard.num_samples, width), np.nan, np.float32)
        for number, row in rows.items():
            features[number] = row
        self.save(shard, features)


class CaptionFeatureStore(ShardArrays):
    """Features of captions: for each shard those of all that may be drawn, by hashes of them in ascending order."""

    def read(self, shard: Shard, caption: str) -> Tensor:
        """Return the features of a caption: fp32 [D].

        Raises:
            Fault: it was not there when they were computed.
        """
        found, wanted = self.open(shard), hash_caption(caption)
        row = int(np.searchsorted(found["hash"], wanted))
        if row >= len(found) or found["hash"][row] != wanted:
            raise Fault("caption", f"it was not there when its features were computed, {self.path(shard)}")
        return torch.from_numpy(np.array(found["features"][row]))

    def write(self, shard: Shard, rows: Mapping[str, np.ndarray]) -> None:
        """Keep the features of all captions of a shard; of none nothing, as with pictures."""
        if not rows:
            return
        width = len(next(iter(rows.values())))
        found = np.empty(len(rows), [("hash", np.uint64), ("features", np.float32, (width,))])
        for number, (caption, row) in enumerate(sorted(rows.items(), key=lambda item: hash_caption(item[0]))):
            found[number] = hash_caption(caption), row
        self.save(shard, found)


def hash_caption(caption: str) -> np.uint64:
    """Hash a caption as it is: a tokenizer may tell small letters from capitals."""
    return np.uint64(int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little"))


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher makes of the pairs that a run compares with it.

    Attributes:
        pictures, captions: None where no term of the loss compares them.
    """

    pictures: FeatureStore | None
    captions: CaptionFeatureStore | None

    def read(self, shard: Shard, index: int, captions: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the features of a pair by their names in a batch: fp32 [D] each.

        Raises:
            Fault: the teacher could not use it.
        """
        found = {}
        if self.pictures is not None:
            found["teacher_image"] = self.pictures.read(shard, index)
        if self.captions is not None:
            found["teacher_text"] = self.captions.read(shard, captions["text"])
        return found


@dataclass(frozen=True)
class ShardPictures:
    """The pictures of a shard, for what encodes pictures."""

    store: ShardStore
    shard: Shard

    def __len__(self) -> int:
        return self.shard.num_samples

    def key(self, index: int) -> str:
        return f"{self.shard.path}, {index}"

    def read(self, index: int) -> bytes:
        return self.store.read_picture(self.shard, index)

    def fingerprint(self) -> str:
        return self.shard.identity()


def name_features(about: Any, store: ShardStore) -> str:
    """Return a name for features by all that they depend on but the shard.

    Args:
        about: what they are of.
        store: what makes a pair, and so the number of each, and which members are too large to be read.
    """
    pairs = (store.pair_format.caption_extensions, store.pair_format.image_extensions, store.max_member_bytes)
    content = json.dumps([clipmini.__version__, about, pairs], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
