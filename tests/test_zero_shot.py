"""Zero-shot numbers against open_clip's classifier and a float64 loop; a collapsed model scores nothing."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, read_sample, write_tar
from open_clip.transform import PreprocessCfg, image_transform_v2
from test_model import make_model

from clipmini.data.decode import EvaluationTransform, open_image
from clipmini.data.store import ShardStore
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.evaluation.datasets import FORMAT, ClassificationSet, read_classification_set
from clipmini.evaluation.results import write_results
from clipmini.evaluation.zero_shot import build_classifier, count_not_below, evaluate_zero_shot
from clipmini.model import Model

CPU = torch.device("cpu")


def evaluate(model: Model, dataset: ClassificationSet, **options: Any) -> dict[str, float]:
    return evaluate_zero_shot(
        model,
        ClipTokenizer(24),
        dataset,
        transform=EvaluationTransform(32),
        **{"batch_size": 4, "num_workers": 0, "device": CPU, **options},
    )


def test_reads_the_layout(classification_set: Path) -> None:
    dataset = read_classification_set(str(classification_set))
    assert dataset.name == classification_set.name.removeprefix("wds_")
    assert dataset.class_names == tuple(f"thing {number}" for number in range(7))
    assert [label for _, _, label in dataset.samples] == [number % 7 for number in range(21)]
    assert dataset.prompts(3) == ["a photo of thing 3", "thing 3"]


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_classifier_is_open_clips(batch_size: int, classification_set: Path, tiny_json: Path) -> None:
    model, dataset = make_model(str(tiny_json)), read_classification_set(str(classification_set))
    ours = build_classifier(model, ClipTokenizer(24), dataset, batch_size=batch_size, device=CPU)
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.SimpleTokenizer(context_length=24), dataset.class_names, ["a photo of {}", "{}"]
    )
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)


@torch.no_grad()
def test_numbers_equal_a_float64_loop(classification_set: Path, tiny_json: Path) -> None:
    model, dataset = make_model(str(tiny_json)), read_classification_set(str(classification_set))
    found = evaluate(model, dataset)

    model.double()
    preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    store, tokenizer = ShardStore(FORMAT, max_member_bytes=10**9), open_clip.SimpleTokenizer(context_length=24)
    classes = []
    for name in dataset.class_names:
        vectors = model.encode_text(tokenizer([f"a photo of {name}", name]), normalize=True)
        classes.append(F.normalize(vectors.mean(dim=0), dim=0))
    top1, top5, by_class = 0, 0, {label: [0, 0] for label in range(7)}
    for shard, index, label in dataset.samples:
        image = preprocess(open_image(store.read(shard, index)["webp"])).double()
        vector = model.encode_image(image[None], normalize=True)[0]
        order = sorted(range(7), key=lambda c: -float(vector @ classes[c]))
        top1, top5 = top1 + (order[0] == label), top5 + (label in order[:5])
        by_class[label][0] += order[0] == label
        by_class[label][1] += 1
    assert found["acc1"] == pytest.approx(top1 / 21) and found["acc5"] == pytest.approx(top5 / 21)
    assert found["mean_per_class_recall"] == pytest.approx(sum(hit / n for hit, n in by_class.values()) / 7)
    assert found["chance1"] == 1 / 7 and found["chance5"] == 5 / 7


def test_batches_and_workers_change_nothing(classification_set: Path, tiny_json: Path) -> None:
    model, dataset = make_model(str(tiny_json)), read_classification_set(str(classification_set))
    expected = evaluate(model, dataset)
    for batch_size, num_workers in ((1, 0), (21, 0), (4, 3)):
        assert evaluate(model, dataset, batch_size=batch_size, num_workers=num_workers) == expected


def evaluate_in_a_process(model: str, directory: str) -> dict[str, float]:
    return evaluate(make_model(model), read_classification_set(directory))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_change_nothing(world_size: int, classification_set: Path, tiny_json: Path, tmp_path: Path) -> None:
    arguments = (str(tiny_json), str(classification_set))
    expected = evaluate_in_a_process(*arguments)
    assert in_processes(world_size, evaluate_in_a_process, tmp_path, *arguments) == [expected] * world_size


def test_a_collapsed_model_scores_nothing(classification_set: Path, tiny_json: Path) -> None:
    dataset = read_classification_set(str(classification_set))
    for tower in ("text", "image"):
        for value in (0.0, float("nan")):
            model = make_model(str(tiny_json))
            torch.nn.init.constant_(model.text_projection if tower == "text" else model.visual.proj, value)
            found = evaluate(model, dataset)
            assert (found["acc1"], found["acc5"]) == (0.0, 0.0)


def test_ties_count_as_misses() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [3.0, 2.0, 1.0], [float("nan")] * 3])
    assert count_not_below(logits, torch.tensor([1, 0, 0])).tolist() == [1, 0, 2]


def test_the_mode_of_the_model_is_given_back(classification_set: Path, tiny_json: Path) -> None:
    model = make_model(str(tiny_json)).train()
    evaluate(model, read_classification_set(str(classification_set)))
    assert model.training


def copy_set(source: Path, target: Path) -> Path:
    for path in source.rglob("*.*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, "classnames.txt is missing"),
        ("classnames.txt", "", "classnames.txt is empty"),
        ("classnames.txt", "a\nb\n", r"\.cls: label '2', but classnames.txt has 2 lines, from 0"),
        ("test/nshards.txt", None, "nshards.txt is missing"),
        ("test/nshards.txt", "two\n", "expected a number, found 'two'"),
        ("test/nshards.txt", "3\n", "cannot read the shard .*2.tar"),
        ("test/nshards.txt", "0\n", "0 shards without a single pair"),
        ("zeroshot_classification_templates.txt", "a {c}\na photo\n", "line 2: 'a photo' has neither {c} nor {}"),
    ],
)
def test_broken_sets_are_refused(
    file: str, content: str | None, message: str, classification_set: Path, tmp_path: Path
) -> None:
    root = copy_set(classification_set, tmp_path / "wds_broken")
    (root / file).unlink() if content is None else (root / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_classification_set(str(root))


def test_no_such_directory() -> None:
    with pytest.raises(UserError, match="evaluation.datasets: nowhere is not a directory"):
        read_classification_set("nowhere")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_picture_is_named(
    num_workers: int, classification_set: Path, tiny_json: Path, tmp_path: Path
) -> None:
    root = copy_set(classification_set, tmp_path / "wds_broken")
    samples = read_sample("wds_twemoji/test/0.tar", 3)
    samples[1]["webp"] = b"broken"
    for sample in samples:
        sample["cls"] = b"1"
    write_tar(root / "test/1.tar", samples)
    with pytest.raises(UserError, match="s0000001: picture: not a JPEG, PNG or WebP"):
        evaluate(make_model(str(tiny_json)), read_classification_set(str(root)), num_workers=num_workers)


def test_results_have_datacomps_fields(classification_set: Path, tmp_path: Path) -> None:
    dataset = read_classification_set(str(classification_set))
    write_results(tmp_path / "results.jsonl", [(dataset, {"acc1": 0.5, "acc5": 0.75})], step=9)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["key"] == row["dataset"] == dataset.name
    assert row["metrics"] == {"acc1": 0.5, "acc5": 0.75, "main_metric": 0.5}
    assert (row["classes"], row["images"], row["step"]) == (7, 21, 9)
