"""Whole runs as a user starts them: plain shards, several processes, Ctrl-C, the loss that falls."""

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import QUICK, SAMPLE, read_sample, run_clipmini, write_tar
from forked import run_forked
from judging import write_wds
from omegaconf import DictConfig

from clipmini.train import train

COLUMNS = {
    "step",
    "train/loss",
    "train/accuracy",
    "train/scale",
    "train/image_spread",
    "train/text_spread",
    "train/lr",
    "train/grad_norm",
    "train/bad_steps",
    "throughput/samples_per_second",
    "throughput/data_wait",
    "data/bad_samples",
    "checkpoint/failures",
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_plain_shards_to_a_model_that_open_clip_loads(
    shards: Path, tiny_json: Path, classification_set: Path, tmp_path: Path
) -> None:
    result = run_forked(
        [
            "train",
            "name=two",
            "trainer=cpu",
            "steps=20",
            f"data.train={shards}",
            f"model.name={tiny_json}",
            "image_size=48",
            "batch_size=16",
            f"evaluation.datasets=[{classification_set}]",
            "trainer.log_every_n_steps=5",
        ],
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "outputs/two"
    files = "environment.jsonl evaluation metrics.csv model report.html results.jsonl tensorboard train.log"
    names = f"checkpoints config.yaml {files}"
    assert sorted(os.listdir(run)) == names.split()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))

    metrics = read_metrics(run)
    assert set(metrics[0]) == COLUMNS
    assert set(metrics[-1]) > COLUMNS  # and what the evaluation at the end has found
    assert [row["step"] for row in metrics] == [5, 10, 15, 20]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert metrics[-1]["train/lr"] == 0.0 and metrics[-1]["throughput/samples_per_second"] > 0

    (line,) = (run / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["classes"] == 7
    for words in (
        "64 pairs",
        "20 = 320 samples seen = 5.0 epochs",
        "48 px",
        "14.3%",
        "step 20/20",
        "outputs/two/model",
    ):
        assert words in result.stdout, words
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run / 'model'}")
    assert model.visual.image_size == (48, 48)


def test_processes_micro_batches_and_workers_make_the_same_run(
    shards: Path, tiny_json: Path, classification_set: Path, tmp_path: Path
) -> None:
    options = [
        *QUICK,
        f"model.name={tiny_json}",
        "name=run",
        "steps=5",
        "batch_size=16",
        "checkpoint.every_n_steps=5",
        f"data.train={shards}",
        "data.augmentation.flip=0.5",
        "schedule.warmup_steps=0",
        f"evaluation.datasets=[{classification_set}]",
    ]
    kinds = [(1, "null", 0), (1, "3", 2), (2, "null", 2), (2, "4", 0)]
    runs = []
    for number, (world_size, micro_batch, num_workers) in enumerate(kinds):
        runs.append(tmp_path / str(number))
        runs[-1].mkdir()
        kind = [f"micro_batch={micro_batch}", f"data.num_workers={num_workers}"]
        result = run_forked(["train", *options, *kind], runs[-1], processes=world_size)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Zero-shot classification") == 1
        assert os.listdir(runs[-1] / "outputs") == ["run"]
    first, *others = (read_metrics(run / "outputs/run") for run in runs)
    assert len(first) == 5 and first[-1]["train/loss"] < first[0]["train/loss"]
    for kind, other in zip(kinds[1:], others, strict=True):
        assert len(other) == 5
        for a, b in zip(first, other, strict=True):
            for column in ("train/loss", "train/accuracy", "train/scale", "train/grad_norm"):
                assert a[column] == pytest.approx(b[column], abs=1e-5, rel=1e-5), (kind, a["step"], column)
    rows = [json.loads((run / "outputs/run/results.jsonl").read_text()) for run in runs]
    numbers = [{name: row[name] for name in ("metrics", "interval", "protocol", "worst_classes")} for row in rows]
    assert all(other == numbers[0] for other in numbers)


def test_all_kinds_of_pairs_make_the_same_run(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    terms = {"image_text": 1.0, "image_image": 0.5, "text_text": 0.25}
    options = [
        *QUICK,
        *(f"model.name={tiny_json}", "name=run", "batch_size=12", f"data.train={shards}", "schedule.warmup_steps=0"),
        *(f"loss.terms.{name}={weight}" for name, weight in terms.items()),
        *("loss.head.layers=3", "loss.head.hidden_width=32", "loss.head.width=16", "loss.all_views=true"),
        *("data.caption_key=keywords", "data.second_caption_key=keywords", "data.extra_views=2", "data.ledger=true"),
        "data/augmentation@data.view_augmentation=simclr",
    ]
    runs = []
    for number, (world_size, micro_batch, num_workers) in enumerate([(1, "null", 0), (2, "4", 1), (3, "null", 0)]):
        runs.append(tmp_path / str(number))
        runs[-1].mkdir()
        kind = [f"micro_batch={micro_batch}", f"data.num_workers={num_workers}"]
        result = run_forked(["train", *options, *kind], runs[-1], processes=world_size)
        assert result.returncode == 0, result.stderr
    first, *others = (read_metrics(run / "outputs/run") for run in runs)
    for row in first:
        parts = sum(weight * row[f"train/loss_{name}"] for name, weight in terms.items())
        assert row["train/loss"] == pytest.approx(parts, rel=1e-6)
    assert first[-1]["train/loss"] < first[0]["train/loss"]
    for other in others:
        for a, b in zip(first, other, strict=True):
            for column in ("train/loss", "train/loss_image_image", "train/loss_text_text", "train/grad_norm"):
                assert a[column] == pytest.approx(b[column], abs=1e-5, rel=1e-5), (a["step"], column)


@pytest.mark.parametrize(("loss", "steps"), [("infonce", 100), ("siglip", 500)])
def test_equal_captions_that_are_shared_reach_a_loss_that_others_cannot(
    loss: str, steps: int, compose: Callable[..., DictConfig], tiny_json: Path, tmp_path: Path
) -> None:
    # 16 pairs of which 8 have a caption of their own, and 4 times 2 have the same: half of a batch, in every batch.
    samples = read_sample("train/noto-00000.tar", 16)
    for number, sample in enumerate(samples[8:]):
        sample["json"] = samples[8 + number // 2 * 2]["json"]
    write_tar(tmp_path / "shards/a.tar", samples)
    reached = {}
    for duplicates in ("ignore", "share"):
        overrides = [
            *QUICK,
            f"loss={loss}",
            f"model.name={tiny_json}",
            f"data.train={tmp_path / 'shards'}",
            "data.caption_key=name",
            "data.augmentation.scale=[1.0,1.0]",
            "data.augmentation.ratio=[1.0,1.0]",
            f"loss.duplicates={duplicates}",
            "batch_size=16",
            f"steps={steps}",
            "optimizer.lr=3e-3",
            f"checkpoint.every_n_steps={steps}",
            f"paths.run={tmp_path / duplicates}",
        ]
        train(compose(*overrides))
        reached[duplicates] = read_metrics(tmp_path / duplicates)[-1]["train/loss"]
    # Two equal captions cannot be told apart: half of the pairs cost log 2 each, however long the training; the sigmoid
    # of what is right once and wrong once costs 2 log 2 for both.
    floor = math.log(2) / 2 if loss == "infonce" else math.log(2)
    assert reached["ignore"] > floor
    assert reached["share"] < floor / 2


def test_hard_negatives_are_trained_with(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 32)
    for number, sample in enumerate(samples):
        name = json.loads(sample["json"])["name"]
        sample["json"] = json.dumps({"wrong": [f"no {name}", f"not {name}"]} if number % 2 else {}).encode()
    write_tar(tmp_path / "shards/a.tar", samples)
    options = [*QUICK, "name=run", f"model.name={tiny_json}", f"data.train={tmp_path / 'shards'}"]
    losses = {}
    for key in ("null", "wrong"):
        (tmp_path / key).mkdir()
        processes = 1 if key == "null" else 2
        result = run_forked(["train", *options, f"data.hard_negatives={key}"], tmp_path / key, processes=processes)
        assert result.returncode == 0, result.stderr
        losses[key] = read_metrics(tmp_path / key / "outputs/run")[0]["train/loss"]
    # Up to 8 more columns for each of 16 rows; the columns of captions stay.
    assert 0.05 < losses["wrong"] - losses["null"] < math.log(24 / 16)


def test_learns_pairs_by_heart_and_names_their_classes(
    compose: Callable[..., DictConfig], tiny_json: Path, tmp_path: Path
) -> None:
    samples = read_sample("train/noto-00000.tar", 32)
    write_tar(tmp_path / "shards/a.tar", samples)
    names = [json.loads(sample["json"])["name"] for sample in samples]
    pictures = [
        {"__key__": sample["__key__"], "webp": sample["webp"], "cls": str(label).encode()}
        for label, sample in enumerate(samples)
    ]
    files = {"classnames": "".join(f"{name}\n" for name in names), "zeroshot_classification_templates": "{c}\n"}
    root = write_wds(tmp_path / "wds_seen", pictures, **files)
    overrides = [
        *QUICK,
        f"model.name={tiny_json}",
        f"data.train={tmp_path / 'shards'}",
        "data.caption_key=name",
        "data.augmentation.scale=[1.0,1.0]",
        "data.augmentation.ratio=[1.0,1.0]",
        "batch_size=32",
        "steps=250",
        "optimizer.lr=3e-3",
        "checkpoint.every_n_steps=100",
        f"evaluation.datasets=[{root}]",
        f"paths.run={tmp_path / 'run'}",
    ]
    train(compose(*overrides))
    metrics = read_metrics(tmp_path / "run")
    assert metrics[0]["train/loss"] > math.log(32) - 0.6  # nothing known yet
    assert metrics[-1]["train/loss"] < 0.3
    (line,) = (tmp_path / "run/results.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"]["acc1"] > 0.9


def test_the_embedded_sample_trains(tmp_path: Path) -> None:
    result = run_clipmini("train", "steps=3", "trainer.log_every_n_steps=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Zero-shot classification" in result.stdout and "1,610" in result.stdout
    assert "3,186 pairs" in result.stdout
    assert SAMPLE.is_dir() and torch.get_num_threads() == 1


def test_sweep_makes_a_run_for_each_value(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    options = [*QUICK, "name=sweep", "steps=1", f"model.name={tiny_json}", f"data.train={shards}"]
    result = run_forked(["train", "--multirun", *options, "seed=0,1"], tmp_path)
    assert result.returncode == 0, result.stderr
    for number in (0, 1):
        run = tmp_path / f"outputs/sweep/{number}"
        assert f"seed: {number}" in (run / "config.yaml").read_text()
        assert (run / "model/open_clip_config.json").exists()
