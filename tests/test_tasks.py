"""Retrieval, choices and probes on sets on disk, against loops over the same features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_processes, read_sample
from judging import PETS, open_one, write_folders, write_npy, write_wds
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from test_model import make_model
from test_zero_shot import make_encoder, values

from clipmini.errors import UserError
from clipmini.evaluation.datasets import open_sets
from clipmini.evaluation.encoder import EncodedPictures
from clipmini.evaluation.entries import SetEntry
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.sets import ChoiceSet, ClassificationSet, Pictures, Place, RetrievalSet
from clipmini.evaluation.tasks import Protocol, choose, measure, retrieve


@pytest.fixture(scope="session")
def retrieval_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 pictures with 1 to 3 captions each, in CLIP_benchmark's layout."""
    samples = read_sample("wds_twemoji/test/0.tar", 11)
    for number, sample in enumerate(samples):
        del sample["cls"]
        sample["txt"] = "\n".join(f"picture {number} of {part}" for part in range(1 + number % 3)).encode()
    return write_wds(tmp_path_factory.mktemp("wds_retrieval"), samples, dataset_type="retrieval")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with 3 folders each, of 8 and 5 pictures; those of a class are one colour, more or less."""
    root = tmp_path_factory.mktemp("folders")
    samples = iter(read_sample("train/noto-00000.tar", 39))
    for part, count in (("train", 8), ("test", 5)):
        for name in ("bird", "cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                (root / part / name / f"{number}.webp").write_bytes(next(samples)["webp"])
    return root


def evaluate(model: str, path: str, probes: tuple[str, ...], entry: dict[str, Any], **options: Any) -> list[dict]:
    protocol = Protocol(probes=probes, knn_k=5, **options)
    opened = open_one(path, with_train=bool(probes), **entry)
    found = measure(opened, make_encoder(make_model(model), batch_size=3), protocol)
    return [{"task": one.task, **values(one)} for one in found]


def features(model: str, path: Path, **entry: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    encoder, dataset = make_encoder(make_model(model)), open_one(path, **entry).dataset
    captions = None if isinstance(dataset, ClassificationSet) else encoder.texts(dataset.captions).double()
    return dataset, encoder.pictures(dataset.pictures).features.double(), captions


def test_retrieval_equals_a_loop(retrieval_set: Path, tiny_json: Path) -> None:
    (found,) = evaluate(str(tiny_json), str(retrieval_set), (), {})
    dataset, image, text = features(str(tiny_json), retrieval_set)
    assert isinstance(dataset, RetrievalSet) and text is not None and len(dataset.captions) == 21
    scores = (image @ text.T).tolist()
    owner = dict(dataset.pairs[:, ::-1].tolist())  # picture of each caption
    hits = {(side, k): 0 for side in ("image", "text") for k in (1, 5, 10)}
    for caption in range(21):
        order = sorted(range(11), key=lambda picture: -scores[picture][caption])
        for k in (1, 5, 10):
            hits["image", k] += owner[caption] in order[:k]
    for picture in range(11):
        order = sorted(range(21), key=lambda caption: -scores[picture][caption])
        for k in (1, 5, 10):
            hits["text", k] += any(owner[caption] == picture for caption in order[:k])
    for k in (1, 5, 10):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(hits["image", k] / 21)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(hits["text", k] / 11)
    assert found["mean_recall@1"] == pytest.approx((hits["image", 1] / 21 + hits["text", 1] / 11) / 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_change_nothing(world_size: int, retrieval_set: Path, tiny_json: Path, tmp_path: Path) -> None:
    arguments: tuple = (str(tiny_json), str(retrieval_set), (), {})
    expected = evaluate(*arguments)
    assert in_processes(world_size, evaluate, tmp_path, *arguments) == [expected] * world_size


def test_processes_change_nothing_of_probes(folders: Path, tiny_json: Path, tmp_path: Path) -> None:
    entry = {"train": str(folders / "train")}
    arguments = (str(tiny_json), str(folders / "test"), ("knn", "linear_probe"), entry)
    expected = evaluate(*arguments)
    assert [row["task"] for row in expected] == ["zeroshot_classification", "knn", "linear_probe"]
    assert in_processes(2, evaluate, tmp_path, *arguments) == [expected] * 2


def test_probes_learn_from_the_training_part(folders: Path, tiny_json: Path) -> None:
    entry = {"train": str(folders / "train")}
    _, knn, probe = evaluate(str(tiny_json), str(folders / "test"), ("knn", "linear_probe"), entry, l2=1e-3)
    train, known, _ = features(str(tiny_json), folders / "train")
    test, asked, _ = features(str(tiny_json), folders / "test")
    theirs = LogisticRegression(C=1 / (1e-3 * 24), tol=1e-10, max_iter=10_000).fit(known, train.labels)
    assert probe["acc1"] == pytest.approx(theirs.score(asked, test.labels))
    expected = balanced_accuracy_score(test.labels, theirs.predict(asked))
    assert probe["mean_per_class_recall"] == pytest.approx(expected)
    hits = 0
    for number, label in enumerate(test.labels):
        similarity = (known @ asked[number]).numpy()
        nearest = np.argsort(-similarity)[:5]
        votes = np.bincount(train.labels[nearest], np.exp(similarity[nearest] / 0.07), minlength=3)
        hits += int(votes.argmax() == label)
    assert knn["acc1"] == pytest.approx(hits / 15)


def test_probes_on_themselves_know_everything(folders: Path, tiny_json: Path) -> None:
    entry = {"train": str(folders / "train"), "name": "same"}
    _, probe = evaluate(str(tiny_json), str(folders / "train"), ("linear_probe",), entry, l2=1e-9)
    assert probe["acc1"] == 1.0


def test_the_chance_of_a_probe_is_what_labels_alone_give(tmp_path: Path, tiny_json: Path) -> None:
    samples = iter(read_sample("train/noto-00000.tar", 20))
    for part, counts in (("train", (6, 2)), ("test", (9, 3))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / part / name / f"{number}.webp").write_bytes(next(samples)["webp"])
    model = make_model(str(tiny_json))
    torch.nn.init.zeros_(model.visual.proj)  # collapsed
    opened = open_one(tmp_path / "test", with_train=True, train=str(tmp_path / "train"))
    _, knn, probe = measure(opened, make_encoder(model), Protocol(probes=("knn", "linear_probe"), knn_k=3))
    assert values(knn)["acc1"] == 0
    assert values(probe)["acc1"] <= probe.outcome.chance["acc1"] == 0.75


def test_probes_without_a_training_part(folders: Path) -> None:
    with pytest.raises(UserError, match="test: probes learn from a training part: the key train"):
        open_sets([SetEntry(str(folders / "test"))], "datasets", with_train=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": ("knn",), "knn_k": 5}, "^evaluation.knn_k=5: must be 1 to 4, the number of training pictures of t"),
        ({"probes": ("linear_probe",)}, "^evaluation.l2=null: must be a number, since test has 4 training pictures, "),
    ],
)
def test_a_training_part_that_is_too_small_is_told_before_anything_is_done(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_folders(tmp_path, "test/cat/1.jpg", *(f"train/cat/{number}.jpg" for number in range(4)))
    opened = [open_one(tmp_path / "test", with_train=True, train=str(tmp_path / "train"))]
    with pytest.raises(UserError, match=message):
        Evaluator(opened, Protocol(**options), 4, 0, "fp32", "evaluation.")
    Evaluator(opened, Protocol(probes=("knn", "linear_probe"), knn_k=4, l2=1.0), 4, 0, "fp32")


def test_what_is_known_of_a_model_without_a_text_tower_is_not_done_again(folders: Path, tiny_json: Path) -> None:
    opened = [open_one(folders / "test", with_train=True, train=str(folders / "train"))]
    evaluator = Evaluator(opened, Protocol(probes=("knn",), knn_k=5, resamples=0), 4, 0, "fp32")
    encoder = make_encoder(make_model(str(tiny_json), towers="image"))
    (found,) = evaluator.run(encoder, [], {})
    (again,) = evaluator.run(encoder, [found.row], {})
    assert found.finding is not None and again.finding is None and again.row == found.row
    assert {f"test/knn/{name}" for name in found.row["metrics"]} == set(evaluator.metric_names(encoder.model)) | {
        "test/knn/acc5"
    }


def write_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name, sample in zip(names, read_sample("train/noto-00000.tar", len(names)), strict=True):
        (folder / name).write_bytes(sample["webp"])


def test_sugarcrepe(tmp_path: Path, tiny_json: Path) -> None:
    names = [f"{number}.webp" for number in range(6)]
    write_pictures(tmp_path / "val2017", names)
    rows = {
        str(number): {"filename": name, "caption": f"thing {number}", "negative_caption": f"no thing {number}"}
        for number, name in enumerate(names)
    }
    (tmp_path / "crepe").mkdir()
    (tmp_path / "crepe/swap_obj.json").write_text(json.dumps(rows))
    entry = {"images": str(tmp_path / "val2017")}
    (found,) = evaluate(str(tiny_json), str(tmp_path / "crepe"), (), entry)
    dataset, image, text = features(str(tiny_json), tmp_path / "crepe", **entry)
    assert isinstance(dataset, ChoiceSet) and dataset.name == "crepe/swap_obj" and text is not None
    hits = [float(image[p] @ text[a]) > float(image[p] @ text[b]) for p, a, b, _ in dataset.examples]
    assert found["text_acc"] == pytest.approx(np.mean(hits))


def test_winoground(tmp_path: Path, tiny_json: Path) -> None:
    names = [f"ex_{number}_img_{side}" for number in range(8) for side in (0, 1)]
    write_pictures(tmp_path / "images", [f"{name}.webp" for name in names])
    rows = [
        {
            "id": number,
            "image_0": f"ex_{number}_img_0",
            "image_1": f"ex_{number}_img_1",
            "caption_0": f"a {number} beside b",
            "caption_1": f"b {number} beside a",
        }
        for number in range(8)
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (found,) = evaluate(str(tiny_json), str(tmp_path), (), {})
    dataset, image, text = features(str(tiny_json), tmp_path)
    assert isinstance(dataset, ChoiceSet) and text is not None
    scores = {"text_acc": [], "image_acc": [], "acc": []}  # type: dict[str, list[bool]]
    for i0, c0, c1, i1 in dataset.examples:
        s = {(i, c): float(image[i] @ text[c]) for i in (i0, i1) for c in (c0, c1)}
        by_text = s[i0, c0] > s[i0, c1] and s[i1, c1] > s[i1, c0]
        by_image = s[i0, c0] > s[i1, c0] and s[i1, c1] > s[i0, c1]
        for name, hit in (("text_acc", by_text), ("image_acc", by_image), ("acc", by_text and by_image)):
            scores[name].append(hit)
    assert {name: found[name] for name in scores} == {name: pytest.approx(np.mean(hit)) for name, hit in scores.items()}


def test_all_that_comes_out_is_named_before(
    folders: Path, retrieval_set: Path, classification_set: Path, tmp_path: Path, tiny_json: Path
) -> None:
    test_winoground(tmp_path / "w", tiny_json)
    test_sugarcrepe(tmp_path / "s", tiny_json)
    samples = [{"webp": sample["webp"]} for sample in read_sample("wds_twemoji/test/0.tar", 4)]
    groups = [{**sample, "cls": b"0", "json": b'{"g": %d}' % row} for row, sample in enumerate(samples)]
    write_wds(tmp_path / "groups", groups, **PETS)
    write_wds(tmp_path / "groups", groups, split="train", **PETS)
    several = [{**sample, "npy": write_npy([1, 0, 1])} for sample in samples]
    write_wds(tmp_path / "several", several, dataset_type="multilabel", **PETS)
    entries = [
        *(SetEntry(str(tmp_path / name)) for name in ("w", "several")),
        *(SetEntry(str(path), train=str(folders / "train")) for path in (retrieval_set, folders / "test")),
        SetEntry(str(tmp_path / "s/crepe"), images=str(tmp_path / "s/val2017")),
        SetEntry(str(tmp_path / "groups"), group_key="g"),
    ]
    opened = [*open_sets(entries, "datasets", with_train=True), open_one(classification_set)]
    evaluators = [
        Evaluator(opened[:-1], Protocol(probes=("knn",), knn_k=2, resamples=0), 4, 0, "fp32"),
        Evaluator(opened[-1:], Protocol(resamples=0), 4, 0, "fp32"),
    ]
    for evaluator in evaluators:
        found = set()
        for result in evaluator.run(make_encoder(make_model(str(tiny_json))), [], {}):
            found |= {
                f"{result.row['key']}/{name}" for name, value in result.row["metrics"].items() if value is not None
            }
        assert found == set(evaluator.metric_names())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_collapsed_model_chooses_nothing(value: float, tmp_path: Path, retrieval_set: Path, tiny_json: Path) -> None:
    test_winoground(tmp_path, tiny_json)
    for parameter in ("text_projection", "visual.proj"):
        model = make_model(str(tiny_json))
        torch.nn.init.constant_(model.get_parameter(parameter), value)
        (choice,) = measure(open_one(tmp_path), make_encoder(model), Protocol())
        (retrieval,) = measure(open_one(retrieval_set), make_encoder(model), Protocol())
        for finding in (choice, retrieval):
            for name, found in values(finding).items():
                chance = finding.outcome.chance[name]
                assert found >= chance if name.endswith("rank") else found <= chance, name


def test_shuffled_choices_and_retrieval_fall_to_chance() -> None:
    class Perfect:
        """Knows every pair."""

        def texts(self, captions: list[str]) -> torch.Tensor:
            rows = torch.eye(400)
            return torch.stack([rows[int(caption.split()[-1])] for caption in captions])

    pictures = Pictures(tuple(Place(str(number), "") for number in range(400)))
    encoded = EncodedPictures(torch.eye(400), torch.arange(400), ())
    captions = tuple(f"caption {number}" for number in range(400))
    pairs = np.stack([np.arange(400)] * 2, axis=1)
    right, wrong = np.arange(400), np.roll(np.arange(400), 1)
    for has_two in (False, True):
        other = wrong if has_two else np.full(400, -1)
        choice = ChoiceSet("c", pictures, captions, np.stack([right, right, wrong, other], axis=1))
        for shuffled in (False, True):
            finding = choose(choice, encoded, Perfect(), Protocol(shuffled=shuffled))  # type: ignore[arg-type]
            for name, value in values(finding).items():
                assert value == 1 if not shuffled else value <= finding.outcome.chance[name] + 0.06
    for shuffled in (False, True):
        dataset = RetrievalSet("r", pictures, captions, pairs)
        finding = retrieve(dataset, encoded, Perfect(), Protocol(shuffled=shuffled))  # type: ignore[arg-type]
        assert values(finding)["mean_recall@1"] == (0 if shuffled else 1)
