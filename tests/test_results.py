"""What is written and printed of results, and that nothing is done twice."""

import csv
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import clip_benchmark.cli
import pyarrow.parquet
import pytest
import torch
from conftest import in_processes, read_sample
from judging import open_one, write_wds
from test_model import make_model
from test_zero_shot import make_encoder

from clipmini.console import set_up_logging
from clipmini.errors import UserError
from clipmini.evaluation.details import class_table, confusion_table, write_details
from clipmini.evaluation.evaluator import Evaluator, Result
from clipmini.evaluation.published import check_published, compare, log_comparison, published_name, read_published
from clipmini.evaluation.results import (
    add_row,
    find_metric,
    is_best,
    keep_rows,
    log_results,
    read_rows,
    write_clip_benchmark,
)
from clipmini.evaluation.sets import ClassificationSet
from clipmini.evaluation.tasks import Protocol


@pytest.fixture(scope="module")
def result(classification_set: Path, tiny_json: Path) -> Result:
    (found,) = run(classification_set, tiny_json, [])
    return found


def run(path: Path, tiny_json: Path, known: list, **options: Any) -> list[Result]:
    protocol = Protocol(resamples=50, **options)
    evaluator = Evaluator([open_one(path)], protocol, 4, 0, "fp32")
    encoder = make_encoder(make_model(str(tiny_json)))
    return list(evaluator.run(encoder, known, {"model": "tiny", "step": 9}))


def test_a_row_has_datacomps_fields_and_company(result: Result, classification_set: Path) -> None:
    row = json.loads(json.dumps(result.row))
    assert row["key"] == row["dataset"] == classification_set.name.removeprefix("wds_")
    metrics = row["metrics"]
    assert metrics.keys() == {"acc1", "acc5", "mean_per_class_recall", "main_metric"}
    assert metrics["main_metric"] == metrics["acc1"]
    assert row["chance"] == {"acc1": 1 / 7, "acc5": 5 / 7, "mean_per_class_recall": 1 / 7}
    for name, (low, high) in row["interval"].items():
        assert low <= metrics[name] <= high and low < high
    assert (row["classes"], row["images"], row["unreadable"], row["step"]) == (7, 21, 0, 9)
    assert len(row["weights"]) == len(row["protocol"]) == 16 and row["shuffled"] is False
    assert row["majority"] == pytest.approx(3 / 21)


def test_less_than_five_classes_have_no_top_five(tmp_path: Path, tiny_json: Path) -> None:
    for name, sample in zip(("cat", "dog"), read_sample("wds_twemoji/test/0.tar", 2), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.webp").write_bytes(sample["webp"])
    (found,) = run(tmp_path, tiny_json, [])
    assert found.row["metrics"]["acc5"] is None and "acc5" not in found.row["interval"]


def test_what_is_known_is_not_done_again(result: Result, classification_set: Path, tiny_json: Path) -> None:
    (again,) = run(classification_set, tiny_json, [{"key": "other"}, result.row])
    assert again.finding is None and again.row == result.row
    (control,) = run(classification_set, tiny_json, [result.row], shuffled=True)
    assert control.finding is not None and control.row["protocol"] != result.row["protocol"]


def test_weights_and_protocol_make_a_result_another_one(
    result: Result, classification_set: Path, tiny_json: Path, tmp_path: Path
) -> None:
    hashes = {(result.row["weights"], result.row["protocol"])}
    model = make_model(str(tiny_json))
    model.logit_scale.data += 0.5
    evaluator = Evaluator([open_one(classification_set)], Protocol(resamples=50), 4, 0, "fp32")
    for encoder, changed in (
        (make_encoder(model), evaluator),
        (make_encoder(make_model(str(tiny_json))), Evaluator(evaluator.opened, Protocol(resamples=51), 4, 0, "fp32")),
        (
            make_encoder(make_model(str(tiny_json))),
            Evaluator([open_one(classification_set, templates=["{}"])], Protocol(resamples=50), 4, 0, "fp32"),
        ),
    ):
        (found,) = changed.run(encoder, [], {})
        hashes.add((found.row["weights"], found.row["protocol"]))
    assert len(hashes) == 4
    # The place of the files is no part of it, and neither is the batch.
    moved = tmp_path / classification_set.name
    moved.symlink_to(classification_set)
    (found,) = Evaluator([open_one(moved)], Protocol(resamples=50), 7, 0, "fp32").run(
        make_encoder(make_model(str(tiny_json)), batch_size=7), [], {}
    )
    assert found.row["protocol"] == result.row["protocol"]


def test_other_pictures_of_the_same_names_make_a_result_another_one(tmp_path: Path, tiny_json: Path) -> None:
    samples = iter(read_sample("wds_twemoji/test/0.tar", 4))
    for kind in ("noise", "blur"):  # as ImageNet-C has them, each at several strengths
        for name in ("cat", "dog"):
            (tmp_path / kind / "1" / name).mkdir(parents=True)
            (tmp_path / kind / "1" / name / "1.webp").write_bytes(next(samples)["webp"])
    (noise,) = run(tmp_path / "noise/1", tiny_json, [])
    (blur,) = run(tmp_path / "blur/1", tiny_json, [noise.row])
    assert blur.finding is not None and blur.row["key"] == noise.row["key"]
    for name in ("protocol", "resamples"):
        assert blur.row[name] != noise.row[name]
    shutil.copytree(tmp_path / "noise", tmp_path / "moved")
    (again,) = run(tmp_path / "moved/1", tiny_json, [noise.row])
    assert again.finding is None


def test_rows_are_replaced_by_the_same_result_only(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    add_row(path, result.row)
    add_row(path, {**result.row, "weights": "other"})
    add_row(path, {**result.row, "step": 10})
    assert [(row["weights"], row["step"]) for row in read_rows(path)] == [("other", 9), (result.row["weights"], 10)]
    keep_rows(path, lambda row: row["step"] < 10)
    assert [row["step"] for row in read_rows(path)] == [9]


def add_rows(path: str) -> None:
    rank = torch.distributed.get_rank()
    for number in range(30):
        add_row(Path(path), {"key": f"{rank}-{number}", "metrics": {}})


def test_processes_that_write_into_one_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results/results.jsonl"
    in_processes(3, add_rows, tmp_path, str(path))
    assert {row["key"] for row in read_rows(path)} == {f"{rank}-{number}" for rank in range(3) for number in range(30)}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}'])
def test_a_file_of_something_else_is_not_touched(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{text}\n")
    with pytest.raises(UserError, match=r"notes.txt, line 1: is no result; output must be a file of results, or new"):
        add_row(path, {"key": "a"})
    assert path.read_text() == f"{text}\n"


def test_the_table_shows_numbers_with_their_company(result: Result, capsys: pytest.CaptureFixture) -> None:
    set_up_logging(None)
    log_results([result.row, {**result.row, "dataset": "again", "shuffled": True}])
    printed = capsys.readouterr().out
    assert "Zero-shot classification - control" in printed and "95 % interval" in printed
    assert "14.3%" in printed and "71.4%" in printed  # chance of top-1 and top-5
    assert "21 pictures" in printed and "7 classes" in printed
    assert f"weights {result.row['weights']}, protocol {result.row['protocol']}" in printed
    assert "worst classes:" not in printed  # 3 pictures a class say nothing of the worst
    log_results([{**result.row, "images": 35}])
    assert "worst classes: thing" in capsys.readouterr().out


def test_classes_and_confusions_add_up(result: Result) -> None:
    assert result.finding is not None and isinstance(result.opened.dataset, ClassificationSet)
    classes = class_table(result.opened.dataset, result.finding)
    assert len(classes) == 7 and sum(row["pictures"] for row in classes) == 21
    assert sum(row["recall"] for row in classes) / 7 == pytest.approx(result.row["metrics"]["mean_per_class_recall"])
    pairs = confusion_table(result.opened.dataset, result.finding)
    assert sum(row["pictures"] for row in pairs) == 21
    right = sum(row["pictures"] for row in pairs if row["class"] == row["prediction"])
    assert right / 21 == pytest.approx(result.row["metrics"]["acc1"])


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_details(file_format: str, result: Result, tmp_path: Path) -> None:
    assert result.finding is not None
    for weights in ("step 9", "step 10"):  # each has files of its own
        write_details(tmp_path, result.opened.dataset, result.finding, file_format, "tiny", weights)
    stem = f"{result.row['dataset']}-zeroshot_classification-tiny-step"
    path = tmp_path / f"{stem}-9-predictions.{file_format}"
    if file_format == "csv":
        rows = list(csv.DictReader(path.open()))
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == 21 and rows[3]["label"] == "thing 3"
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert hits / 21 == pytest.approx(result.row["metrics"]["acc1"])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}-{step}-{what}.{file_format}" for step in (9, 10) for what in ("predictions", "classes", "confusion")
    }


def test_clip_benchmark_builds_its_table_of_our_json(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [("ViT-B-32", "mine"), ("ViT-B-32", "openai")]
    for model in models:
        write_clip_benchmark(tmp_path, result.row, *model)
    paths = map(str, sorted(tmp_path.iterdir()))
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", *paths, "--output", str(tmp_path / "all.csv")])
    clip_benchmark.cli.main()
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [(row["model"], row["pretrained"]) for row in rows] == models
    for row in rows:
        assert row["task"] == "zeroshot_classification"
        assert float(row["acc1"]) == pytest.approx(result.row["metrics"]["acc1"])


def test_metrics_are_found_by_name() -> None:
    rows = [{"key": "a", "metrics": {"acc1": 0.5}}, {"key": "a/knn", "metrics": {"acc1": 0.25}}]
    assert (find_metric(rows, "a/acc1"), find_metric(rows, "a/knn/acc1")) == (0.5, 0.25)
    assert find_metric(rows, "b/acc1", must_exist=False) is None
    with pytest.raises(UserError, match=r"best_metric=a/acc: no such metric \(did you mean 'a/acc1'"):
        find_metric(rows, "a/acc")


def test_what_is_better() -> None:
    assert is_best(0.5, [], "a/acc1") and is_best(0.5, [0.4], "a/acc1") and not is_best(0.5, [0.5], "a/acc1")
    assert is_best(1.0, [2.0], "val/loss") and not is_best(2.0, [1.0], "val/loss")
    assert is_best(3.0, [9.0], "flickr30k/text_retrieval_median_rank") and not is_best(float("nan"), [], "val/loss")


def test_published_numbers() -> None:
    published = read_published()
    assert published["ViT-B-32/openai"]["imagenet1k", "acc1"] == 0.6332
    assert published["ViT-B-32/laion2b_s34b_b79k"]["flickr30k", "text_retrieval_recall@1"] == 0.841
    assert all(0 < value < 1 for numbers in published.values() for value in numbers.values())
    names = ("vtab-cifar10", "wds_imagenet1k", "vtab/flowers", "imagenet", "mscoco_captions", "mnist")
    expected = ["cifar10", "imagenet1k", "flowers", "imagenet1k", "mscoco", "mnist"]
    assert [published_name(name) for name in names] == expected
    with pytest.raises(UserError, match=r"compare_to=ViT-B-32/opnai: no published numbers of it \(did .* 'ViT-B-32/op"):
        check_published("ViT-B-32/opnai")


def test_comparison_with_published_numbers(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"key": "vtab-cifar10", "dataset": "vtab-cifar10", "metrics": {"acc1": 0.9083}},
        {"key": "vtab-cifar10/knn", "dataset": "vtab-cifar10", "metrics": {"acc1": 0.5}},
        {"key": "mine", "dataset": "mine", "metrics": {"acc1": 0.1}},
    ]
    assert compare(rows, "ViT-B-32/openai") == [["vtab-cifar10", "acc1", "90.8%", "89.8%", "+1.0"]]
    with caplog.at_level(logging.INFO, logger="clipmini"):
        log_comparison(rows[2:], "ViT-B-32/openai")
    assert "none of these sets has published numbers" in caplog.text


def test_broken_shards_leave_the_file_of_results_as_it_was(tmp_path: Path, tiny_json: Path, result: Result) -> None:
    path = tmp_path / "results.jsonl"
    add_row(path, result.row)
    before = path.read_bytes()
    samples = read_sample("wds_twemoji/test/0.tar", 3)
    for sample in samples:
        sample["webp"] = b"broken"
        sample["cls"] = b"0"
    root = write_wds(tmp_path / "wds_b", samples, classnames="a\nb", zeroshot_classification_templates="{c}")
    with pytest.raises(UserError, match="3 of 3 pictures cannot be read"):
        run(root, tiny_json, read_rows(path))
    assert path.read_bytes() == before


NO_RESULTS = [b"\xff\xfe\n", b"{\n", b"[1]\n", b'{"key": 3, "metrics": {}}\n', b'{"key": "a"}\n']


@pytest.mark.parametrize("content", NO_RESULTS)
def test_what_is_no_file_of_results_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b'{"key": "a", "metrics": {}}\n' + content)
    with pytest.raises(UserError, match="results.jsonl, line 2: is no result; output must be a file of results, or"):
        read_rows(tmp_path / "results.jsonl")


def test_each_run_of_a_process_has_a_log_of_its_own(tmp_path: Path) -> None:
    for name in ("first", "second"):
        set_up_logging(tmp_path / name / "train.log")
        logging.getLogger("py.warnings").warning("warning of the %s", name)
        logging.getLogger("clipmini").info("line of the %s", name)
    set_up_logging(None)
    for name in ("first", "second"):
        lines = (tmp_path / name / "train.log").read_text().splitlines()
        assert [line.rpartition(": ")[2] for line in lines] == [f"warning of the {name}", f"line of the {name}"]
