"""Sets and a model to rows of results, for the command, for what watches a run, and for training itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from clipmini import distributed
from clipmini.data.tokenizer import Tokenize
from clipmini.errors import UserError, tell_choices
from clipmini.evaluation.cache import FeatureCache, hash_weights
from clipmini.evaluation.datasets import Opened
from clipmini.evaluation.details import class_facts
from clipmini.evaluation.encoder import Encoder, evaluation_transform
from clipmini.evaluation.metrics import Estimate, estimate, name_classification
from clipmini.evaluation.probes import MIN_TRAIN
from clipmini.evaluation.results import Row, identity, make_row
from clipmini.evaluation.sets import ClassificationSet, hash_content
from clipmini.evaluation.tasks import Finding, Protocol, measure, name_metrics
from clipmini.model import Model, preprocess_cfg, without_projection
from clipmini.one_tower import check_has, text_tower


@dataclass(frozen=True)
class Result:
    """A row of results, and what it was made of unless it was known before."""

    opened: Opened
    row: Row
    finding: Finding | None
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """Judges models by sets.

    Attributes:
        opened: the sets.
        protocol: how they are measured.
        batch_size: pictures, and sentences, at a time on each device.
        num_workers: processes of each rank that decode pictures.
        precision: fp32, bf16 or fp16.
        under: what the keys of the config begin with, for messages.

    Raises:
        UserError: a training part is too small for a probe.
    """

    opened: Sequence[Opened]
    protocol: Protocol
    batch_size: int
    num_workers: int
    precision: str
    under: str = ""

    def __post_init__(self) -> None:
        for opened in self.opened:
            for probe in self.probes(opened):
                assert opened.train is not None
                check_training_part(probe, len(opened.train.pictures), opened.dataset.name, self.protocol, self.under)

    def encoder(
        self,
        model: Model,
        tokenize: Tokenize,
        device: torch.device,
        cache: FeatureCache | None = None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> Encoder:
        """Make what encodes with a model, which must be on the device; see `Encoder`."""
        self.check_model(model)
        options = (self.batch_size, self.num_workers, device, self.precision, cache, is_asked_to_stop)
        return Encoder(model, tokenize, evaluation_transform(model), *options)

    def run(self, encoder: Encoder, known: Sequence[Row], about: Mapping[str, Any]) -> Iterator[Result]:
        """Yield the results on each set as they are found, the same on every process.

        Args:
            known: rows of earlier results; those that would come out again are yielded without doing so.
            about: what else rows shall say.
        """
        weights = hash_weights(encoder.model)
        rows = {identity(row): row for row in distributed.all_gather_objects(list(known))[0]}
        # The first process looks at the files for all: they are many, and all must take the same rows for known.
        digests = distributed.from_first(lambda: [[part.pictures.digest for part in one.parts] for one in self.opened])
        for opened, pictures in zip(self.opened, digests, strict=True):
            said = {"weights": weights, "protocol": self.hash_protocol(opened, pictures, encoder)}
            done = [rows.get(identity({"key": key, **said})) for key in self.keys(opened, encoder.model)]
            if all(done):
                yield from (Result(opened, row, None) for row in done if row)
                continue
            for finding in measure(opened, encoder, self.protocol):
                protocol = self.protocol
                estimates = estimate(finding.outcome, resamples=protocol.resamples, seed=protocol.seed)
                row = make_row(opened.dataset, pictures[0], finding, protocol, estimates, {**about, **said})
                if finding.predictions is not None and isinstance(opened.dataset, ClassificationSet):
                    row |= class_facts(opened.dataset, finding)
                yield Result(opened, row, finding, estimates)

    def check_model(self, model: Model) -> None:
        """See that a model has what the sets ask for: probes of pictures need no text tower.

        Raises:
            UserError: it has not.
        """
        if self.protocol.probe_features == "before_projection" and any(map(self.probes, self.opened)):
            check_has(model, "image", f"{self.under}probes")
            with without_projection(model.visual):
                pass
        for opened in self.opened:
            name = opened.dataset.name
            check_has(model, "image", f"the set {name}")
            if not self.probes(opened):
                check_has(model, "text", f"the set {name}, without probes=[knn] or a training part for them,")

    def probes(self, opened: Opened) -> Sequence[str]:
        """Return the probes that a set takes."""
        dataset = opened.dataset
        takes = isinstance(dataset, ClassificationSet) and not dataset.is_multilabel
        return self.protocol.probes if takes else ()

    def keys(self, opened: Opened, model: Model | None) -> list[str]:
        """Return the keys of the rows that come out of a set; see `metric_names`."""
        name, probes = opened.dataset.name, self.probes(opened)
        has_text = model is None or text_tower(model) is not None
        return [*([name] if has_text or not probes else []), *(f"{name}/{probe}" for probe in probes)]

    def metric_names(self, model: Model | None = None) -> list[str]:
        """Return SET/METRIC and SET/PROBE/METRIC of all that comes out of a model; None for one with both towers."""
        names = []
        for opened in self.opened:
            dataset = opened.dataset
            for key in self.keys(opened, model):
                if key == dataset.name:
                    found = name_metrics(dataset)
                else:
                    assert isinstance(dataset, ClassificationSet)
                    found = (*name_classification(len(dataset.class_names)), "main_metric")
                names += [f"{key}/{metric}" for metric in found]
        return names

    def check_metric(self, name: str, model: Model | None = None, more: Sequence[str] = ()) -> None:
        """See that the metric by which the best checkpoint is kept will come out.

        Args:
            model: see `metric_names`.
            more: names of metrics that come from elsewhere.

        Raises:
            UserError: it will not.
        """
        known = [*more, *self.metric_names(model)]
        if name not in known:
            raise UserError(f"{self.under}best_metric={name}: no such metric{tell_choices(name, known)}")

    def hash_protocol(self, opened: Opened, pictures: Sequence[str], encoder: Encoder) -> str:
        """Hash all that decides a number beside the weights: the set, how it is measured, how pictures are prepared.

        Args:
            pictures: the digest of each part's.
        """
        return hash_content(
            [part.content() for part in opened.parts],
            list(pictures),
            asdict(self.protocol),
            [self.precision, repr(encoder.transform), preprocess_cfg(encoder.model)],
            encoder.model.architecture,
        )


def check_training_part(probe: str, count: int, name: str, protocol: Protocol, under: str) -> None:
    """See that the training part of a set has enough pictures for a probe, before any is encoded.

    Raises:
        UserError: it has not.
    """
    if probe == "knn" and protocol.knn_k > count:
        raise UserError(
            f"{under}knn_k={protocol.knn_k}: must be 1 to {count}, the number of training pictures of {name}"
        )
    if probe == "linear_probe" and protocol.l2 is None and count < MIN_TRAIN:
        raise UserError(
            f"{under}l2=null: must be a number, since {name} has {count} training pictures, and {MIN_TRAIN} are the "
            "least that it can be chosen on"
        )
