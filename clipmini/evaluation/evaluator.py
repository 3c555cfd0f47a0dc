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
from clipmini.evaluation.results import Row, identity, make_row
from clipmini.evaluation.sets import ClassificationSet, hash_content
from clipmini.evaluation.tasks import Finding, Protocol, measure, name_metrics
from clipmini.model import Model, preprocess_cfg
from clipmini.one_tower import check_has


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
    """

    opened: Sequence[Opened]
    protocol: Protocol
    batch_size: int
    num_workers: int
    precision: str

    def encoder(
        self,
        model: Model,
        tokenize: Tokenize,
        device: torch.device,
        cache: FeatureCache | None = None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> Encoder:
        """Make what encodes with a model, which must be on the device; see `Encoder`."""
        self.check_towers(model)
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
            keys = [opened.dataset.name, *(f"{opened.dataset.name}/{name}" for name in self.probes(opened))]
            done = [rows.get(identity({"key": key, **said})) for key in keys]
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

    def check_towers(self, model: Model) -> None:
        """See that a model has the towers that the sets ask for: probes of pictures need no text tower.

        Raises:
            UserError: it has not.
        """
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

    def metric_names(self) -> list[str]:
        """Return SET/METRIC and SET/PROBE/METRIC of all that comes out, of a model with both towers."""
        names = []
        for opened in self.opened:
            dataset = opened.dataset
            names += [f"{dataset.name}/{metric}" for metric in name_metrics(dataset)]
            for probe in self.probes(opened):
                assert isinstance(dataset, ClassificationSet)
                found = (*name_classification(len(dataset.class_names)), "main_metric")
                names += [f"{dataset.name}/{probe}/{metric}" for metric in found]
        return names

    def check_metric(self, key: str, name: str, more: Sequence[str] = ()) -> None:
        """See that a metric will come out.

        Args:
            key: of the config.
            more: names of metrics that come from elsewhere.

        Raises:
            UserError: it will not.
        """
        known = [*more, *self.metric_names()]
        if name not in known:
            raise UserError(f"{key}={name}: no such metric{tell_choices(name, known)}")

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
