"""Pictures and sentences to unit vectors: each process encodes its share, and all get all of them.

Batches are the same ones whatever the number of processes and workers (batch k is of process k modulo their number), so
that features are too, bit by bit, and nothing is padded or seen twice.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipmini import distributed
from clipmini.data.decode import EvaluationTransform
from clipmini.data.health import Fault
from clipmini.data.processes import leave_signals_to_main
from clipmini.data.tokenizer import Tokenize, trim
from clipmini.data.workers import read_batches
from clipmini.errors import UserError, check_choice
from clipmini.evaluation.cache import FeatureCache
from clipmini.evaluation.prompts import Prompts
from clipmini.model import Model, encode_image, encode_text, image_size, padding, preprocess_cfg

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_UNREADABLE = 0.01  # of the pictures of a set


def check_precision(precision: str, key: str = "precision") -> None:
    """See that a precision is one of a model's.

    Raises:
        UserError: it is none.
    """
    check_choice(key, precision, PRECISIONS)


class Interrupted(Exception):
    """A process was asked to stop, so that all of them have given up what they encoded."""


@dataclass(frozen=True)
class EncodedPictures:
    """The features of the pictures that could be read.

    Attributes:
        features: fp32 [n, D], on the device.
        kept: int64 [n], their numbers in the set, ascending.
        unreadable: key and cause of the others.
    """

    features: Tensor
    kept: Tensor
    unreadable: tuple[str, ...]


class AnyPictures(Protocol):
    """What is asked of pictures, wherever they are."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...

    def fingerprint(self) -> str: ...


class AnyTransform(Protocol):
    """What makes uint8 [3, size, size] of an encoded picture."""

    @property
    def size(self) -> int: ...

    def __call__(self, data: bytes) -> Tensor: ...


def evaluation_transform(model: Model) -> EvaluationTransform:
    """Return how a model's pictures are prepared where nothing is random."""
    preprocess = preprocess_cfg(model)
    return EvaluationTransform(image_size(model), preprocess["resize_mode"], preprocess["interpolation"])


class PictureDataset(Dataset):
    """Decodes batches of pictures: (numbers, uint8 [b, 3, S, S], what is wrong with the others)."""

    def __init__(self, pictures: AnyPictures, transform: AnyTransform) -> None:
        self.pictures = pictures
        self.transform = transform

    def __getitem__(self, numbers: Sequence[int]) -> tuple[list[int], Tensor, list[str]]:
        kept, images, bad = [], [], []
        for number in numbers:
            try:
                images.append(self.transform(self.pictures.read(number)))
                kept.append(number)
            except Fault as fault:
                bad.append(f"{self.pictures.key(number)}: {fault.cause}: {fault.detail}")
        size = self.transform.size
        return kept, torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8), bad


def make_batches(count: int, batch_size: int) -> list[range]:
    """Return the numbers of a set's pictures or sentences, batch by batch."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def load_pictures(
    pictures: AnyPictures,
    transform: AnyTransform,
    batches: Sequence[range],
    num_workers: int,
    *,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Yield some batches of pictures, each as `PictureDataset` decodes it.

    Raises:
        UserError: a worker died.
    """
    loader = DataLoader(
        PictureDataset(pictures, transform),
        sampler=batches,  # whole batches
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_main,
        generator=torch.Generator(),  # its own: a training run's random numbers stay what they are
    )
    return read_batches(loader, f"num_workers={num_workers}")


@dataclass
class Encoder:
    """Encodes with a model.

    Attributes:
        batch_size: pictures, and sentences, at a time.
        num_workers: processes that decode; 0 decodes in this one.
        precision: fp32, bf16 or fp16; features are normalised and kept in fp32 anyway.
        cache: where features are kept, or None.
        is_asked_to_stop: looked at after each batch; see `Interrupted`.
        sentences: how many have been encoded, by all processes.
    """

    model: Model
    tokenize: Tokenize
    transform: EvaluationTransform
    batch_size: int
    num_workers: int
    device: torch.device
    precision: str = "fp32"
    cache: FeatureCache | None = None
    is_asked_to_stop: Callable[[], bool] = lambda: False
    sentences: int = field(default=0, init=False)

    def shares(self, count: int) -> list[list[range]]:
        """Return the batches of each process."""
        batches, world_size = make_batches(count, self.batch_size), distributed.world_size()
        return [batches[rank::world_size] for rank in range(world_size)]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Put the model into the mode for evaluation, and afterwards every part of it back."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        dtype = PRECISIONS[self.precision]
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32"):
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def pictures(self, pictures: AnyPictures, *, before_projection: bool = False) -> EncodedPictures:
        """Encode pictures.

        Args:
            before_projection: return what the image tower has before its last projection, not normalised.

        Raises:
            UserError: more than 1 % of them cannot be read.
            Interrupted: a process was asked to stop.
        """
        if self.cache is None:
            return self.encode_pictures(pictures, before_projection)
        content = (pictures.fingerprint(), repr(self.transform), before_projection, self.precision)
        stored = self.cache.load(self.model, "image", content)
        if stored is None:
            encoded = self.encode_pictures(pictures, before_projection)
            tensors = {"features": encoded.features, "kept": encoded.kept}
            self.cache.save(self.model, "image", content, tensors, encoded.unreadable)
            return encoded
        tensors, unreadable = stored
        return EncodedPictures(tensors["features"].to(self.device), tensors["kept"], unreadable)

    def encode_pictures(self, pictures: AnyPictures, before_projection: bool) -> EncodedPictures:
        batches, pin_memory = self.shares(len(pictures))[distributed.rank()], self.device.type == "cuda"
        loaded = load_pictures(pictures, self.transform, batches, self.num_workers, pin_memory=pin_memory)
        features: list[Tensor] = []
        kept: list[int] = []
        unreadable: list[str] = []
        with self.ready():
            for numbers, images, bad in loaded:
                if numbers:
                    images = images.to(self.device, non_blocking=True)
                    features.append(encode_image(self.model, images, before_projection=before_projection).float())
                kept += numbers
                unreadable += bad
                if self.is_asked_to_stop():
                    break
        self.check_interrupted()
        return self.collect(len(pictures), features, kept, unreadable)

    def check_interrupted(self) -> None:
        """Go on if no process was asked to stop; every rank must call it, after its share.

        Raises:
            Interrupted: one was.
        """
        if any(asked for (asked,) in distributed.all_gather_numbers(int(self.is_asked_to_stop()))):
            raise Interrupted

    def collect(self, count: int, features: list[Tensor], kept: list[int], unreadable: list[str]) -> EncodedPictures:
        """Put together what all processes have encoded, in the order of the set."""
        shares = distributed.all_gather_objects((kept, unreadable, features[0].shape[1] if features else 0))
        bad = tuple(sorted(text for _, texts, _ in shares for text in texts))
        if len(bad) > MAX_UNREADABLE * count:
            raise UserError(
                f"{len(bad)} of {count} pictures cannot be read, more than {MAX_UNREADABLE:.0%}, "
                f"so nothing can be said of the model: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}"
            )
        width = max(width for *_, width in shares)
        mine = torch.cat(features) if features else torch.empty(0, width, device=self.device)
        gathered = distributed.all_gather_uneven(mine)
        numbers = torch.tensor([number for numbers, *_ in shares for number in numbers])
        numbers, order = numbers.sort()
        return EncodedPictures(gathered[order.to(self.device)], numbers, bad)

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Encode sentences, each different one once: fp32 unit vectors [T, D].

        Raises:
            Interrupted: a process was asked to stop.
        """
        # Of like lengths together: what is padding to all of a batch is not computed. Characters tell enough.
        ordered = sorted(set(sentences), key=lambda sentence: (len(sentence), sentence))
        shares = self.shares(len(ordered))
        parts = []
        with self.ready():
            for batch in shares[distributed.rank()]:
                text = trim(self.tokenize(ordered[batch.start : batch.stop]), padding(self.model)).to(self.device)
                parts.append(encode_text(self.model, text).float())
                if self.is_asked_to_stop():
                    break
        self.check_interrupted()
        self.sentences += len(ordered)
        mine = torch.cat(parts) if parts else torch.empty(0, self.model.architecture["embed_dim"], device=self.device)
        gathered = distributed.all_gather_uneven(mine)
        numbers = (number for of_rank in shares for batch in of_rank for number in batch)  # as they are gathered
        rows = {ordered[number]: row for row, number in enumerate(numbers)}
        return gathered[torch.tensor([rows[sentence] for sentence in sentences], dtype=torch.long, device=self.device)]

    def classifier(self, prompts: Prompts) -> Tensor:
        """Return a unit vector for each class, the mean of those of its sentences: fp32 [C, D].

        The protocol of CLIP (https://arxiv.org/abs/2103.00020, section 3.1.4), as open_clip and CLIP_benchmark run it.
        """
        content = (prompts, self.precision)
        stored = self.cache.load(self.model, "text", content) if self.cache else None
        if stored is not None:
            return stored[0]["classifier"].to(self.device)
        features = self.texts([sentence for of_class in prompts for sentence in of_class])
        parts: Any = features.split([len(of_class) for of_class in prompts])
        classifier = F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1)
        if self.cache:
            self.cache.save(self.model, "text", content, {"classifier": classifier})
        return classifier
