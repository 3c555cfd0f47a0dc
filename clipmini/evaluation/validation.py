"""The loss on held-out pairs: a function of the pairs, the weights and the loss, of no evaluation batch or process."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from clipmini import distributed
from clipmini.data.captions import caption_ids
from clipmini.data.content import Content
from clipmini.data.decode import VIEWS
from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.manifest import Manifest
from clipmini.data.store import ShardStore
from clipmini.errors import UserError
from clipmini.evaluation.encoder import Encoder
from clipmini.objective import TEXTS, ContrastiveLoss

VALIDATION = ("val/loss", "val/accuracy")  # what comes out


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs; what an `Encoder` takes for pictures.

    Attributes:
        store: reads them.
        places: shard and index of each.
        captions: of each, by their names in a batch: `text` and, where two captions are compared, `text_2`.
        group_size: pairs that the loss compares, about: the global batch of training, so that both losses compare.
    """

    store: ShardStore
    places: tuple[tuple[Shard, int], ...]
    captions: Mapping[str, tuple[str, ...]]
    group_size: int

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        shard, number = self.places[index]
        return f"{shard.path}, {self.store.key(shard, number)}"

    def read(self, index: int) -> bytes:
        shard, number = self.places[index]
        return self.store.read_picture(shard, number)

    def fingerprint(self) -> str:
        return repr([(shard.identity(), number) for shard, number in self.places])


def read_held_out(
    manifest: Manifest, store: ShardStore, content: Content, *, seed: int, group_size: int, max_bad_fraction: float
) -> HeldOut:
    """Read the captions of held-out pairs; where there are several, each pair always has the same ones.

    Raises:
        UserError: too many of them cannot be used, or there are none to compare.
    """
    captions, extensions = content.captions, content.pair_format.caption_extensions
    places: list[tuple[Shard, int]] = []
    texts: list[dict[str, str]] = []
    faults: list[str] = []
    for position, (shard, index) in enumerate(list_places(manifest)):
        try:
            draws = Draws(seed, position), Draws(seed, position, len(VIEWS))
            drawn = captions.draw_all(store.read(shard, index, only=extensions), *draws)
            texts.append({name: caption for name, caption in drawn.items() if name in TEXTS})
            places.append((shard, index))
        except Fault as fault:
            faults.append(f"{shard.path}, {store.key(shard, index)}: {fault.cause}: {fault.detail}")
    store.close_remote()
    if len(faults) > max_bad_fraction * manifest.num_samples:
        raise UserError(
            f"data.val: {len(faults)} of {manifest.num_samples} captions cannot be used, more than "
            f"data.max_bad_fraction={max_bad_fraction:g} allows: {'; '.join(faults[:3])}"
        )
    if not texts:
        raise UserError(
            f"data.val: none of the {manifest.num_samples} captions can be used, and data.max_bad_fraction="
            f"{max_bad_fraction:g} allows that, but there is nothing to compare: {'; '.join(faults[:3])}"
        )
    by_name = {name: tuple(text[name] for text in texts) for name in texts[0]}
    return HeldOut(store, tuple(places), by_name, group_size)


def list_places(manifest: Manifest) -> Iterator[tuple[Shard, int]]:
    """Yield shard and index of all pairs, in order."""
    for source in manifest.sources:
        for shard in source.shards:
            yield from ((shard, index) for index in range(shard.num_samples))


@torch.no_grad()
def validate(held_out: HeldOut, encoder: Encoder, loss: ContrastiveLoss) -> dict[str, float]:
    """Compute the mean loss and in-batch accuracy over groups of pairs, each pair once.

    Pictures are compared with their captions or, by a loss that does not do so, captions with the second ones.

    With N pairs there are N // group_size groups (at least one) and group k has the pairs k, k + groups, ...: in the
    order of the shards neighbours may be alike, and would be harder to tell apart than those of a training batch.
    """
    model, captions, features = encoder.model, dict(held_out.captions), {}
    if loss.judged == "image_text":
        encoded = encoder.pictures(held_out)
        features["image"] = encoded.features
        captions = {"text": tuple(captions["text"][number] for number in encoded.kept.tolist())}
    features |= {name: encoder.texts(of_name) for name, of_name in captions.items()}
    ids = caption_ids(captions["text"]).to(encoder.device)
    num_groups = max(1, len(ids) // held_out.group_size)
    totals = {"loss": 0.0, "accuracy": 0.0}
    with distributed.alone():  # every process has all pairs
        for group in range(num_groups):
            rows = slice(group, None, num_groups)
            parts = {name: of_name[rows] for name, of_name in features.items()}
            found = loss.compare_captions(parts, model.logit_scale.exp(), model.logit_bias, {"text": ids[rows]})
            for name, value in zip(totals, found, strict=True):
                totals[name] += float(value) * len(ids[rows]) / len(ids)
    return totals
