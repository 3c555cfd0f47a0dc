"""What is measured on a set: zero-shot classification, retrieval, choices, and probes of the picture features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmini.errors import check_choice
from clipmini.evaluation import metrics
from clipmini.evaluation.datasets import Opened
from clipmini.evaluation.encoder import EncodedPictures, Encoder
from clipmini.evaluation.examples import Example, make_examples
from clipmini.evaluation.metrics import Outcome
from clipmini.evaluation.probes import linear_probe, nearest_neighbours
from clipmini.evaluation.prompts import Prompts
from clipmini.evaluation.retrieval import rank_pairs
from clipmini.evaluation.sets import ChoiceSet, ClassificationSet, EvaluationSet, RetrievalSet
from clipmini.evaluation.similarity import similarity, similarity_of_pairs
from clipmini.one_tower import text_tower

PROBES = ("knn", "linear_probe")
CHUNK = 4096  # pictures whose similarities to all classes are in memory


@dataclass(frozen=True)
class Protocol:
    """How sets are measured.

    Attributes:
        probes: of the picture features, beside zero-shot classification: knn, linear_probe.
        probe_features: embedding, or before_projection.
        knn_k: neighbours.
        knn_temperature: of their votes.
        l2: of the linear probe; None chooses it on a fifth of the training part.
        shuffled: the control: what belongs together is mixed up, and every number must fall to chance.
        seed: of that, of the choice of l2 and of the intervals.
        resamples: of the bootstrap.
    """

    probes: Sequence[str] = ()
    probe_features: str = "embedding"
    knn_k: int = 20
    knn_temperature: float = 0.07
    l2: float | None = None
    shuffled: bool = False
    seed: int = 0
    resamples: int = 1000


@dataclass(frozen=True)
class Finding:
    """What a task found on a set.

    Attributes:
        task: its name, CLIP_benchmark's where that has one.
        unreadable: key and cause of pictures that could not be read.
        predictions: int64 [n], the class chosen for each picture, and `labels` the right one.
        examples: some pictures with the texts nearest to them.
    """

    task: str
    outcome: Outcome
    unreadable: tuple[str, ...]
    labels: np.ndarray | None = None
    predictions: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()


def measure(opened: Opened, encoder: Encoder, protocol: Protocol) -> list[Finding]:
    """Encode a set and do what can be done with it; the same on every process.

    Raises:
        UserError: too many unreadable pictures, or a probe that cannot work.
    """
    dataset = opened.dataset
    encoded = encoder.pictures(dataset.pictures)
    if isinstance(dataset, RetrievalSet):
        return [retrieve(dataset, encoded, encoder, protocol)]
    if isinstance(dataset, ChoiceSet):
        return [choose(dataset, encoded, encoder, protocol)]
    found = [] if text_tower(encoder.model) is None else [classify(dataset, encoded, encoder, protocol)]
    return found + [probe(name, opened, encoder, protocol) for name in protocol.probes if not dataset.is_multilabel]


def name_metrics(dataset: EvaluationSet) -> tuple[str, ...]:
    """Return the names of what is measured on a set without probes; `main_metric` is the one that stands for it."""
    if isinstance(dataset, RetrievalSet):
        found = metrics.RETRIEVAL
    elif isinstance(dataset, ChoiceSet):
        found = metrics.CHOICES if (dataset.examples[:, 3] >= 0).all() else metrics.CHOICES[:1]
    elif dataset.is_multilabel:
        found = ("mean_average_precision",)
    else:
        found = metrics.name_classification(len(dataset.class_names), has_groups=dataset.groups is not None)
    return (*found, "main_metric")


def make_protocol(options: Mapping[str, Any], *, under: str = "") -> Protocol:
    """Take what decides numbers from a config.

    Args:
        under: what the keys begin with, for messages.

    Raises:
        UserError: an unknown probe, or unknown features for it.
    """
    for name in options["probes"]:
        check_choice(f"{under}probes", name, PROBES)
    check_choice(f"{under}probe_features", options["probe_features"], ("embedding", "before_projection"))
    return Protocol(
        probes=tuple(options["probes"]),
        probe_features=options["probe_features"],
        knn_k=options["knn_k"],
        knn_temperature=options["knn_temperature"],
        l2=options["l2"],
        shuffled=options["shuffled"],
        seed=options["seed"],
        resamples=options["bootstrap_resamples"],
    )


def permutation(count: int, protocol: Protocol) -> np.ndarray:
    """Return a seeded random order, in which nothing keeps its place (if there are two or more)."""
    order = np.random.Generator(np.random.Philox(key=protocol.seed)).permutation(count)
    mixed = np.empty_like(order)
    mixed[order] = np.roll(order, 1)  # one cycle through all
    return mixed


# Classification


def classify(dataset: ClassificationSet, encoded: EncodedPictures, encoder: Encoder, protocol: Protocol) -> Finding:
    """Classify without training: each picture against the sentences for the classes."""
    classifier = encoder.classifier(dataset.prompts)
    labels = dataset.labels[encoded.kept.numpy()]
    groups = [dataset.groups[number] for number in encoded.kept.tolist()] if dataset.groups else None
    if protocol.shuffled:
        labels = labels[permutation(len(labels), protocol)]
    task = "zeroshot_classification"
    if dataset.is_multilabel:
        scores = similarity(encoded.features, classifier).cpu().numpy()
        return Finding(task, metrics.multilabel(scores, labels), encoded.unreadable)
    ranks, predictions, scores = rank_classes(encoded.features, classifier, torch.from_numpy(labels), dataset.prompts)
    units = {**tell_pictures(dataset, encoded, labels, ranks, predictions), "similarity": scores.tolist()}
    outcome = metrics.classification(
        ranks, labels, len(dataset.class_names), name=dataset.name, groups=groups, units=units
    )
    examples = make_examples(
        encoded.features,
        classifier,
        dataset.class_names,
        hits=ranks == 0,
        right=lambda row: [labels[row]],
        kept=encoded.kept.tolist(),
    )
    return Finding(task, outcome, encoded.unreadable, labels, predictions, examples=examples)


def tell_pictures(
    dataset: ClassificationSet, encoded: EncodedPictures, labels: np.ndarray, ranks: np.ndarray, predictions: np.ndarray
) -> dict[str, list[Any]]:
    """Return columns for a file, with a row for each picture; ranks count from 1 there."""
    return {
        "key": [dataset.pictures.key(number) for number in encoded.kept.tolist()],
        "label": [dataset.class_names[label] for label in labels],
        "prediction": [dataset.class_names[label] for label in predictions],
        "rank": (ranks + 1).tolist(),
    }


def rank_classes(
    features: Tensor, classifier: Tensor, labels: Tensor, prompts: Prompts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank the right class of each picture.

    Equal scores count against the model, but for classes with the same sentences, such as ImageNet's two `missile`:
    of those the first wins, as in published numbers.

    Returns:
        int64 [n], the wrong classes before the right one; int64 [n], the first class; fp32 [n], its similarity.
    """
    firsts: dict[tuple[str, ...], int] = {}
    first = torch.tensor([firsts.setdefault(of_class, number) for number, of_class in enumerate(prompts)])
    earlier = (first[:, None] == first[None]).tril(-1).sum(dim=1)  # classes of the same sentences before it
    labels, first, earlier = (tensor.to(features.device) for tensor in (labels, first, earlier))
    ranks, predictions, best = [], [], []
    for part, label in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        scores = similarity(part, classifier)
        right = scores.gather(1, label[:, None])
        others = ~(scores < right) & (first[None] != first[label][:, None])
        ranks.append(others.sum(dim=1) + earlier[label])
        values, chosen = scores.max(dim=1)
        predictions.append(first[chosen])
        best.append(values)
    return tuple(torch.cat(parts).cpu().numpy() for parts in (ranks, predictions, best))  # type: ignore[return-value]


def probe(name: str, opened: Opened, encoder: Encoder, protocol: Protocol) -> Finding:
    """Learn the classes from the features of the training part.

    What such a probe gets from labels alone, with nothing in its features, is the share of the class that is most
    frequent in training: that is its chance.
    """
    dataset, train = opened.dataset, opened.train
    assert isinstance(dataset, ClassificationSet) and train is not None
    before = protocol.probe_features == "before_projection"
    known, asked = (encoder.pictures(one.pictures, before_projection=before) for one in (train, dataset))
    train_labels, labels = train.labels[known.kept.numpy()], dataset.labels[asked.kept.numpy()]
    if protocol.shuffled:
        train_labels = train_labels[permutation(len(train_labels), protocol)]
    targets = torch.from_numpy(train_labels).to(encoder.device), torch.from_numpy(labels).to(encoder.device)
    facts: dict[str, Any] = {"training_images": len(train_labels), "features": protocol.probe_features}
    num_classes = len(dataset.class_names)
    found: Sequence[Tensor]
    if name == "knn":
        features = [torch.nn.functional.normalize(one.features, dim=-1) for one in (known, asked)]
        found = nearest_neighbours(
            features[0],
            targets[0],
            features[1],
            targets[1],
            num_classes=num_classes,
            k=protocol.knn_k,
            temperature=protocol.knn_temperature,
        )
        facts["k"] = protocol.knn_k
    else:
        *found, facts["l2"] = linear_probe(
            known.features,
            targets[0],
            asked.features,
            targets[1],
            num_classes=num_classes,
            l2=protocol.l2,
            seed=protocol.seed,
        )
    ranks, predictions = (tensor.cpu().numpy() for tensor in found)
    most_frequent = np.bincount(train_labels, minlength=num_classes).argmax()
    chance = max(1 / num_classes, float((labels == most_frequent).mean()))
    units = tell_pictures(dataset, asked, labels, ranks, predictions)
    outcome = metrics.classification(ranks, labels, num_classes, name=dataset.name, chance=chance, units=units)
    return Finding(name, outcome, known.unreadable + asked.unreadable, labels, predictions, facts)


# Captions


def find_rows(dataset: RetrievalSet | ChoiceSet, encoded: EncodedPictures) -> np.ndarray:
    """Return the row of features of each picture, -1 where it cannot be read: int64 [N + 1], the last of no picture."""
    rows = np.full(len(dataset.pictures) + 1, -1)  # what is looked up for -1 is the last
    rows[encoded.kept.numpy()] = np.arange(len(encoded.kept))
    return rows


def retrieve(dataset: RetrievalSet, encoded: EncodedPictures, encoder: Encoder, protocol: Protocol) -> Finding:
    """Find the captions of each picture, and the pictures of each caption.

    A picture that cannot be read is left out, and so are captions that belong to no other.
    """
    pairs = np.stack([find_rows(dataset, encoded)[dataset.pairs[:, 0]], dataset.pairs[:, 1]], axis=1)
    pairs = pairs[pairs[:, 0] >= 0]
    used, pairs[:, 1] = np.unique(pairs[:, 1], return_inverse=True)
    captions = [dataset.captions[number] for number in used]
    if protocol.shuffled:
        pairs[:, 0] = permutation(len(encoded.kept), protocol)[pairs[:, 0]]
    text = encoder.texts(captions)
    image_to_text, text_to_image = rank_pairs(encoded.features, text, torch.from_numpy(pairs))
    outcome = metrics.retrieval(image_to_text, text_to_image, len(encoded.kept))
    examples = make_examples(
        encoded.features,
        text,
        captions,
        hits=image_to_text.ranks == 0,
        right=lambda row: pairs[pairs[:, 0] == row, 1].tolist(),
        kept=encoded.kept.tolist(),
    )
    facts = {"captions": len(captions)}
    return Finding("zeroshot_retrieval", outcome, encoded.unreadable, facts=facts, examples=examples)


def choose(dataset: ChoiceSet, encoded: EncodedPictures, encoder: Encoder, protocol: Protocol) -> Finding:
    """Choose between two captions of a picture, and where both have one between two pictures of a caption.

    SugarCrepe: a hit if the right caption is strictly nearer. Winoground: its text, image and group scores.
    """
    position = find_rows(dataset, encoded)
    examples = dataset.examples[position[dataset.examples[:, 0]] >= 0]
    has_two = bool((examples[:, 3] >= 0).all())
    if has_two:
        examples = examples[position[examples[:, 3]] >= 0]
    if protocol.shuffled:
        examples = mix(examples, protocol)
    text = encoder.texts(dataset.captions)

    def score(picture: int, caption: int) -> Tensor:
        rows = torch.from_numpy(position[examples[:, picture]]).to(encoded.features.device)
        return similarity_of_pairs(encoded.features[rows], text[torch.from_numpy(examples[:, caption]).to(text.device)])

    first, second = score(0, 1), score(0, 2)
    if not has_two:
        right = {"text_acc": first > second}
        chance = {"text_acc": 0.5}
    else:
        third, fourth = score(3, 2), score(3, 1)  # the other picture with its own caption, and with the first
        by_text = (first > second) & (third > fourth)
        by_image = (first > fourth) & (third > second)
        right = {"text_acc": by_text, "image_acc": by_image, "acc": by_text & by_image}
        chance = {"text_acc": 1 / 4, "image_acc": 1 / 4, "acc": 1 / 6}
    outcome = metrics.pair_choice({name: hits.cpu().numpy() for name, hits in right.items()}, chance, list(right)[-1])
    return Finding("image_caption_selection", outcome, encoded.unreadable)


def mix(examples: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Give each example the pictures of another, and swap right and wrong in a random half of them."""
    mixed = examples.copy()
    order = permutation(len(examples), protocol)
    mixed[:, 0], mixed[:, 3] = examples[order, 0], examples[order, 3]
    swapped = np.random.Generator(np.random.Philox(key=protocol.seed)).random(len(examples)) < 0.5
    mixed[swapped, 1], mixed[swapped, 2] = examples[swapped, 2], examples[swapped, 1]
    return mixed
