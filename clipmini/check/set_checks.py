"""Evaluation sets before they are needed: a set that cannot be read at the end of a run makes it worth less."""

from collections import Counter

import numpy as np

from clipmini.check.findings import Findings
from clipmini.data.decode import EvaluationTransform
from clipmini.data.health import Fault
from clipmini.evaluation.datasets import Opened
from clipmini.evaluation.encoder import MAX_UNREADABLE
from clipmini.evaluation.sets import ClassificationSet

PROBED = 200  # pictures of each set
FEW = 0.5  # share of classes that have pictures


def check_set(opened: Opened, findings: Findings) -> None:
    """Look at the pictures and the classes of a set."""
    dataset = opened.dataset
    name = f"evaluation.{dataset.name}"
    numbers = np.unique(np.linspace(0, len(dataset.pictures) - 1, PROBED).astype(int)).tolist()
    transform, bad = EvaluationTransform(32), []
    for number in numbers:
        try:
            transform(dataset.pictures.read(number))
        except Fault as fault:
            bad.append(f"{dataset.pictures.key(number)}: {fault.detail}")
    told = f"{len(dataset.pictures):,} pictures, {len(numbers):,} of them decoded"
    if len(bad) > MAX_UNREADABLE * len(numbers):
        text = f"{told}, and {len(bad)} cannot be, more than {MAX_UNREADABLE:.0%}: {bad[0]}; see evaluation.datasets"
        findings.fail(name, text)
    elif bad:
        findings.warn(name, f"{told}, and {len(bad)} cannot be: {bad[0]}; see evaluation.datasets")
    else:
        findings.ok(name, told)
    if isinstance(dataset, ClassificationSet):
        check_classes(dataset, name, findings)


def check_classes(dataset: ClassificationSet, name: str, findings: Findings) -> None:
    """Look for classes without pictures, and for classes that no sentence tells apart."""
    labels = dataset.labels
    present = int(labels.any(axis=0).sum()) if dataset.is_multilabel else len(np.unique(labels))
    if present < FEW * len(dataset.class_names):
        findings.warn(
            name,
            f"only {present} of {len(dataset.class_names)} classes have pictures: see its class_names, or whether its "
            "labels are numbers of another list",
        )
    same = [sentences for sentences, count in Counter(dataset.prompts).items() if count > 1]
    if len(same) > 0.01 * len(dataset.prompts):
        findings.warn(name, f"{len(same)} classes have the same sentences, as {same[0][0]!r}: see its templates")
