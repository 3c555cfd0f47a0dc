"""The loss on held-out pairs: a function of the pairs, the weights and the loss, of no evaluation batch or process."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from clipmini import distributed
from clipmini.data.captions import Captions, caption_ids
from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.manifest import Manifest
from clipmini.data.store import ShardStore
from clipmini.errors import UserError
from clipmini.evaluation.encoder import MAX_UNREADABLE, Encoder
from clipmini.objective import ContrastiveLoss


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs; what an `Encoder` takes for pictures.

    Attributes:
        store: reads them.
        places: shard and index of each.
        captions: of each.
        group_size: pairs that the loss compares, about: the global batch of training, so that both losses compare.
    """

    store: ShardStore
    places: tuple[tuple[Shard, int], ...]
    captions: tuple[str, ...]
    group_size: int

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        shard, number = self.places[index]
        return f"{shard.path}, {self.store.key(shard, number)}"

    def read(self, index: int) -> bytes:
        shard, number = self.places[index]
        (data,) = self.store.read(shard, number, only=self.store.pair_format.image_extensions).values()
        return data

    def fingerprint(self) -> str:
        return repr([(shard.identity(), number) for shard, number in self.places])


def read_held_out(manifest: Manifest, store: ShardStore, captions: Captions, *, seed: int, group_size: int) -> HeldOut:
    """Read the captions of held-out pairs; where there are several, each pair always has the same one.

    Raises:
        UserError: more than 1 % of them cannot be used.
    """
    places: list[tuple[Shard, int]] = []
    texts: list[str] = []
    faults: list[str] = []
    extensions = ("txt", "json")
    for position, (shard, index) in enumerate(list_places(manifest)):
        try:
            texts.append(captions.draw(store.read(shard, index, only=extensions), Draws(seed, position)))
            places.append((shard, index))
        except Fault as fault:
            faults.append(f"{shard.path}, {store.key(shard, index)}: {fault.cause}: {fault.detail}")
    store.close_remote()
    if len(faults) > MAX_UNREADABLE * manifest.num_samples:
        raise UserError(
            f"data.val: {len(faults)} of {manifest.num_samples} captions cannot be used, more than "
            f"{MAX_UNREADABLE:.0%}: {'; '.join(faults[:3])}"
        )
    return HeldOut(store, tuple(places), tuple(texts), group_size)


def list_places(manifest: Manifest) -> Iterator[tuple[Shard, int]]:
    """Yield shard and index of all pairs, in order."""
    for source in manifest.sources:
        for shard in source.shards:
            yield from ((shard, index) for index in range(shard.num_samples))


@torch.no_grad()
def validate(held_out: HeldOut, encoder: Encoder, loss: ContrastiveLoss) -> dict[str, float]:
    """Compute the mean loss and in-batch accuracy over groups of pairs, each pair once.

    With N pairs there are N // group_size groups (at least one) and group k has the pairs k, k + groups, ...: in the
    order of the shards neighbours may be alike, and would be harder to tell apart than those of a training batch.
    """
    encoded = encoder.pictures(held_out)
    captions = [held_out.captions[number] for number in encoded.kept.tolist()]
    text = encoder.texts(captions)
    ids = caption_ids(captions).to(encoder.device)
    num_groups = max(1, len(captions) // held_out.group_size)
    model = encoder.model
    totals = {"loss": 0.0, "accuracy": 0.0}
    with distributed.alone():  # every process has all pairs
        for group in range(num_groups):
            rows = slice(group, None, num_groups)
            features = {"image": encoded.features[rows], "text": text[rows]}
            found = loss.compare_views(features, model.logit_scale.exp(), model.logit_bias, {"text": ids[rows]})
            for name, value in zip(totals, found, strict=True):
                totals[name] += float(value) * len(ids[rows]) / len(captions)
    return totals
