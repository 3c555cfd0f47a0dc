"""CLIP_benchmark reads the same sets, and its own code gives the same numbers for the same model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from conftest import read_sample
from judging import open_one, write_npy, write_wds
from open_clip.transform import PreprocessCfg, image_transform_v2
from test_model import make_model
from test_zero_shot import make_encoder, values
from torch import Tensor
from torch.utils.data import default_collate

from clipmini.evaluation.tasks import Protocol, measure

NAMES = ["cat", "sea lion", "traffic light", "red kite", "cup", "house"]
TEMPLATES = ["a photo of a {c}.", "{c}", "the large {c} in the middle of a long sentence"]


class Batches:
    """What CLIP_benchmark takes for a data loader."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        self.dataset, self.collate = dataset, collate

    def __iter__(self) -> Any:
        samples = list(self.dataset)
        return iter([self.collate(samples[start : start + 5]) for start in range(0, len(samples), 5)])


def write_set(root: Path, extension: str, targets: Sequence[bytes], **files: str) -> Path:
    pictures = read_sample("wds_twemoji/test/0.tar", len(targets))
    rows = [{"webp": picture["webp"], extension: target} for picture, target in zip(pictures, targets, strict=True)]
    return write_wds(root, rows[:11], rows[11:], **files)


def run_theirs(root: Path, tiny_json: Path, *, captions: bool = False) -> dict[str, float]:
    model = make_model(str(tiny_json))
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    dataset = build_wds_dataset("mine", transform, data_dir=str(root))
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    if captions:
        batches = Batches(dataset, image_captions_collate_fn)
        return zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    batches = Batches(dataset, default_collate)
    classes, templates = dataset.classes, dataset.templates
    return zeroshot_classification.evaluate(model, batches, tokenizer, classes, templates, "cpu", amp=False)


def run_ours(root: Path, tiny_json: Path) -> dict[str, float]:
    (finding,) = measure(open_one(root), make_encoder(make_model(str(tiny_json))), Protocol())
    return values(finding)


def files(**more: str) -> dict[str, str]:
    return {"classnames": "\n".join(NAMES), "zeroshot_classification_templates": "\n".join(TEMPLATES), **more}


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int]) -> list[float]:
    return [float((output.topk(k, dim=1).indices == target[:, None]).any(dim=1).float().mean()) for k in topk]


def test_classification(tiny_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own makes a float of an array with one number in it, which numpy 2.4 refuses.
    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    labels = np.random.default_rng(0).integers(6, size=23)
    root = write_set(tmp_path / "wds_mine", "cls", [b"%d" % label for label in labels], **files())
    theirs, ours = run_theirs(root, tiny_json), run_ours(root, tiny_json)
    assert theirs.keys() == ours.keys() == {"acc1", "acc5", "mean_per_class_recall"}
    assert ours == pytest.approx(theirs)


def test_several_classes_of_a_picture(tiny_json: Path, tmp_path: Path) -> None:
    targets = (np.random.default_rng(0).random((23, 6)) < 0.4).astype(np.uint8)
    root = write_set(tmp_path / "wds_mine", "npy", list(map(write_npy, targets)), **files(dataset_type="multilabel"))
    assert run_ours(root, tiny_json) == pytest.approx(run_theirs(root, tiny_json), abs=1e-6)


def test_retrieval(tiny_json: Path, tmp_path: Path) -> None:
    captions = [f"picture {number} from the left\nthe {number}. one".encode() for number in range(23)]
    root = write_set(tmp_path / "wds_mine", "txt", captions, dataset_type="retrieval")
    theirs, ours = run_theirs(root, tiny_json, captions=True), run_ours(root, tiny_json)
    assert len(theirs) == 6
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)
