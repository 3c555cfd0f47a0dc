"""Features of a locked image tower, computed once for all pairs and read in place of their pictures.

LiT (https://arxiv.org/abs/2111.07991, section 3) trains a text tower beside an image tower that stays as it is: what
that makes of a picture is the same in every epoch, if the picture is.
"""

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

from clipmini.data.decode import Decoder
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.store import ShardStore
from clipmini.files import write_atomically

MAX_OPEN = 256  # files of features that a process has mapped


@dataclass
class FeatureStore:
    """Reads the features of pictures.

    Attributes:
        directory: of one tower and one way to prepare pictures; a file for each shard, fp32 [pairs, D], NaN where there
            is no picture that can be used.
    """

    directory: Path
    files: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "files": OrderedDict()}

    def path(self, shard: Shard) -> Path:
        """Return where the features of a shard lie, or would lie."""
        return self.directory / f"{shard.identity()}.npy"

    def read(self, shard: Shard, index: int) -> Tensor:
        """Return the features of a picture: fp32 [D].

        Raises:
            Fault: there is no picture that can be used.
        """
        if shard.path not in self.files:
            if len(self.files) >= MAX_OPEN:
                self.files.popitem(last=False)
            self.files[shard.path] = np.load(self.path(shard), mmap_mode="r", allow_pickle=False)
        found = self.files[shard.path]
        if index >= len(found) or np.isnan(found[index, 0]):
            raise Fault("picture", "it could not be used when its features were computed")
        return torch.from_numpy(np.array(found[index]))

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards that have no features yet."""
        return [shard for shard in shards if not self.path(shard).is_file()]

    def write(self, shard: Shard, rows: Mapping[int, np.ndarray]) -> None:
        """Keep the features of a whole shard, by the number of a pair; if the process is killed, none of them."""
        width = len(next(iter(rows.values()))) if rows else 1
        features = np.full((shard.num_samples, width), np.nan, np.float32)
        for number, row in rows.items():
            features[number] = row
        content = io.BytesIO()
        np.save(content, features)
        write_atomically(self.path(shard), content.getvalue())


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


def name_features(about: Any, decoder: Decoder) -> str:
    """Return a name for features: another tower, of which `about` tells, or other pictures have another one."""
    transform = [decoder.size, repr(decoder.augmentation), decoder.draft, decoder.max_pixels]
    content = json.dumps([about, transform], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
