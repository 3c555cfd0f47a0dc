"""A trained model that a run learns from: what it makes of pairs is computed once and read beside them."""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from clipmini import distributed
from clipmini.data.content import needs_teacher
from clipmini.data.features import CaptionFeatureStore, FeatureStore, TeacherFeatures
from clipmini.data.health import Fault
from clipmini.data.index import Shard
from clipmini.data.loader import ImageTextData
from clipmini.errors import UserError
from clipmini.evaluation.cache import Tower, hash_weights
from clipmini.evaluation.encoder import Encoder, evaluation_transform
from clipmini.kept_features import check_precision, directory_of, fill, fill_pictures
from clipmini.launch import Launch
from clipmini.model import Model, encode_image, preprocess_cfg
from clipmini.objective import ContrastiveLoss
from clipmini.one_tower import check_has
from clipmini.sources import Source, load_model


@dataclass(frozen=True)
class Teacher:
    """A teacher, and which of its towers a loss compares with.

    Attributes:
        source: the model, in evaluation mode, and where it came from.
        image, text: whether what these towers make is compared.
    """

    source: Source
    image: bool
    text: bool

    @functools.cached_property
    def fingerprint(self) -> list[Any]:
        """What tells it from any other teacher: hashes of the weights that are used, and how the model is made."""
        towers: tuple[tuple[Tower, bool], ...] = (("image", self.image), ("text", self.text))
        hashes = [hash_weights(self.model, tower) if is_used else None for tower, is_used in towers]
        return [*hashes, self.model.architecture, preprocess_cfg(self.model)]

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.source.model

    @property
    def width(self) -> int:
        """How wide its embeddings are."""
        return int(self.model.architecture["embed_dim"])

    @property
    def scale(self) -> float:
        """What it multiplies similarities with."""
        return math.exp(self.model.logit_scale.item())


def load_teacher(path: str | None, loss: ContrastiveLoss) -> Teacher | None:
    """Load what a loss compares with, if any term does.

    Args:
        path: what `load_model` takes.

    Raises:
        UserError: there is no such model, it lacks a tower, or there is a teacher and no such term, or the other way
            round.
    """
    image, text = (needs_teacher(loss.terms, tower) for tower in ("image", "text"))
    if not (image or text):
        if path is not None:
            raise UserError(f"teacher={path}: no term of loss.terms compares with it: set one, or teacher=null")
        return None
    if path is None:
        raise UserError(
            "teacher=null: loss.terms compares with one: set it to any model that `clipmini evaluate` takes"
        )
    try:
        source = load_model(path)
        if image:
            check_has(source.model, "image", "loss.terms")
        if text:
            check_has(source.model, "text", "loss.terms")
    except UserError as error:
        raise UserError(f"teacher={path}: {str(error).removeprefix(f'model={path}: ')}") from error
    return Teacher(source, image, text)


def keep_teacher_features(
    teacher: Teacher,
    data: ImageTextData,
    processes: Launch,
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> None:
    """Have the data give what a teacher makes of each pair beside it; every rank must call it.

    Of a picture it sees all that its own transform leaves, whatever part of it the student sees.

    Args:
        data: prepared.
        precision: Lightning's, of the run.
        batch_size: pictures at a time, and captions.
    """
    precision = check_precision(precision, "teacher")
    model, pictures, captions = teacher.model.to(device), None, None
    transform = evaluation_transform(model)
    options: Any = {"device": device, "precision": precision, "batch_size": batch_size}
    if teacher.image:
        about: Any = ("image", teacher.fingerprint, precision)
        pictures = FeatureStore(directory_of(data, about))
        encode, what = functools.partial(encode_image, model), "the teacher's features of pictures"
        fill_pictures(pictures, encode, transform, data, processes, what, **options)
    if teacher.text:
        about = ("text", teacher.fingerprint, precision, sorted(data.content.captions.probabilities))
        captions = CaptionFeatureStore(directory_of(data, about))
        encoder = Encoder(model, teacher.source.tokenizer(), transform, num_workers=0, **options)
        compute = functools.partial(compute_captions, encoder, data, captions)
        fill(captions, data, processes, compute, "the teacher's features of captions")
    data.teacher = TeacherFeatures(pictures, captions)


def compute_captions(encoder: Encoder, data: ImageTextData, store: CaptionFeatureStore, shard: Shard) -> None:
    """Compute and keep the features of the captions of a shard."""
    texts = list_captions(data, shard)
    with distributed.alone():  # each process has shards of its own
        features = encoder.texts(texts).cpu().numpy()
    store.write(shard, dict(zip(texts, features, strict=True)))


def list_captions(data: ImageTextData, shard: Shard) -> list[str]:
    """List the captions of a shard that may be drawn, each once."""
    extensions = data.content.pair_format.caption_extensions
    found: dict[str, None] = {}
    for index in range(shard.num_samples):
        with contextlib.suppress(Fault):  # it is told when the run comes to it
            members = data.store.read(shard, index, only=extensions)
            found |= dict.fromkeys(data.content.captions.list_first(members))
    return list(found)
