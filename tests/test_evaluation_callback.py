"""Evaluation while training: changes nothing of the run, survives a resume, keeps the best."""

import csv
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUICK, in_processes, make_cache, make_data, make_objective, read_sample, save_checkpoint, write_tar
from omegaconf import DictConfig
from servers import serve
from test_model import make_model
from test_one_tower import PICTURES
from test_zero_shot import make_encoder

from clipmini import train
from clipmini.checkpoints.disk import checkpoint_path, checkpoint_step, keep_best, list_checkpoints, load_checkpoint
from clipmini.data.captions import caption_ids
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.tasks import Protocol
from clipmini.evaluation.validation import read_held_out, validate
from clipmini.evaluation_callback import Evaluation

Compose = Callable[..., DictConfig]
# 30 pictures, and 14 to learn from.
PROBED = (
    "evaluation.datasets=[{path:SHARDS/a.tar,train:SHARDS/c.tar,label_key:group,name:t}]",
    "evaluation.probes=[knn]",
    "evaluation.knn_k=5",
)


def run(compose: Compose, tiny_json: Path, shards: Path, directory: Path, *overrides: str) -> Path:
    common = (f"model.name={tiny_json}", f"data.train={shards}", f"paths.run={directory}", "data.shuffle_streams=3")
    train.train(compose(*QUICK, *common, *overrides))
    return directory


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(directory: Path, *names: str) -> list[tuple[str, ...]]:
    with open(directory / "metrics.csv", newline="") as file:
        return [tuple(row.get(name, "") for name in ("step", *names)) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs."""
    samples = read_sample("train/fluent-00000.tar", 40)
    return write_tar(tmp_path_factory.mktemp("held_out") / "val.tar", samples)


def test_evaluating_changes_nothing_of_the_run(
    compose: Compose, tiny_json: Path, shards: Path, classification_set: Path, held_out: Path, tmp_path: Path
) -> None:
    patch_dropout = "model.patch_dropout=0.5"  # draws random numbers in the step
    plain = run(compose, tiny_json, shards, tmp_path / "plain", patch_dropout)
    evaluated = run(
        compose,
        tiny_json,
        shards,
        tmp_path / "evaluated",
        patch_dropout,
        f"evaluation.datasets=[{classification_set}]",
        f"data.val={held_out}",
        "evaluation.every_n_steps=1",
        "evaluation.bootstrap_resamples=10",
        "data.num_workers=1",
    )
    first, second = (load_checkpoint(list_checkpoints(path / "checkpoints")[-1]) for path in (plain, evaluated))
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert metrics(plain, "train/loss", "train/grad_norm") == metrics(evaluated, "train/loss", "train/grad_norm")
    found = rows(evaluated / "results.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4] and len({row["weights"] for row in found}) == 4
    name = found[0]["key"]
    logged = metrics(evaluated, "val/loss", f"evaluation/{name}/acc1")
    assert [step for step, loss, acc1 in logged if loss and acc1] == ["1", "2", "3", "4"]
    assert [float(acc1) for _, _, acc1 in logged] == [row["metrics"]["acc1"] for row in found]


def test_the_best_checkpoint_is_kept_over_a_resume(
    compose: Compose, tiny_json: Path, shards: Path, held_out: Path, tmp_path: Path
) -> None:
    overrides = (
        f"data.val={held_out}",
        "evaluation.every_n_steps=1",
        "evaluation.best_metric=val/loss",
        "optimizer.lr=0.05",
        "schedule=constant",
        "steps=6",
    )
    directory = run(compose, tiny_json, shards, tmp_path / "run", *overrides)
    losses = {int(step): float(loss) for step, loss in metrics(directory, "val/loss")}
    best = min(losses, key=losses.__getitem__)
    saved = sorted(
        {2, 4, 6} | {step for step in losses if losses[step] < min([losses[n] for n in range(1, step)] or [9])}
    )
    found = list_checkpoints(directory / "checkpoints")
    assert [checkpoint_step(path) for path in found] == sorted({*saved[-2:], best})
    assert load_checkpoint(directory / "checkpoints/best.ckpt")["global_step"] == best

    # From the one before the last on again: the same best one, and every step is in the files once.
    shutil.rmtree(found[-1])
    run(compose, tiny_json, shards, tmp_path / "run", *overrides)
    assert {int(step): float(loss) for step, loss in metrics(directory, "val/loss")} == losses
    assert list_checkpoints(directory / "checkpoints") == found
    assert load_checkpoint(directory / "checkpoints/best.ckpt")["global_step"] == best

    # Started when all is done, it still knows of a better one.
    content = load_checkpoint(found[-1])
    content["callbacks"]["Evaluation"]["best_value"] = 0.0
    save_checkpoint(content, found[-1])
    keep_best(found[0])
    run(compose, tiny_json, shards, tmp_path / "run", *overrides)
    assert load_checkpoint(directory / "checkpoints/best.ckpt")["global_step"] == checkpoint_step(found[0]) < 6


def test_a_checkpoint_that_is_not_saved_is_not_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = Evaluation(
        Evaluator([], Protocol(), 1, 0, "fp32"),
        None,
        ClipTokenizer(24),
        output=tmp_path / "results.jsonl",
        shown=tmp_path,
        at_start=False,
        every_n_steps=1,
        best_metric="val/loss",
        best=tmp_path / "best.ckpt",
        weights="trained",
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for step, loss, is_saved, best in ((1, 3.0, True, 1), (2, 1.0, False, 1), (3, 2.0, True, 3), (4, 2.5, True, 3)):
        path = checkpoint_path(tmp_path, step)
        if is_saved:
            path.mkdir()
        evaluation.save_if_best(trainer, {"val/loss": loss}, step)
        assert (tmp_path / "best.ckpt").resolve() == checkpoint_path(tmp_path, best)
    assert evaluation.best_value == 2.0
    assert "step 2: val/loss = 1.0000 is the best so far, but its checkpoint is not saved" in caplog.text
    assert "step 2: val/loss = 1.0000 is the best so far, kept" not in caplog.text


def test_results_of_steps_that_are_done_again_are_replaced(
    compose: Compose, tiny_json: Path, shards: Path, classification_set: Path, tmp_path: Path
) -> None:
    overrides = (f"evaluation.datasets=[{classification_set}]", "evaluation.every_n_steps=1")
    directory = run(compose, tiny_json, shards, tmp_path / "run", *overrides)
    expected = rows(directory / "results.jsonl")
    shutil.rmtree(directory / "checkpoints/step-00000004.ckpt")
    run(compose, tiny_json, shards, tmp_path / "run", *overrides)
    assert rows(directory / "results.jsonl") == expected
    run(compose, tiny_json, shards, tmp_path / "run", *overrides)  # complete: nothing is done
    assert rows(directory / "results.jsonl") == expected
    assert len(metrics(directory)) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.every_n_steps=0"], r"evaluation.every_n_steps=0: must be 1 or more, or null"),
        (["evaluation.best_metric=val/loss"], "best_metric=val/loss: is measured on held-out pairs: set data.val"),
        (["evaluation.precision=fp8"], r"evaluation.precision=fp8: is one of fp32, bf16, fp16"),
        (["evaluation.probes=[kn]"], r"evaluation.probes=kn: is one of knn, linear_probe \(did you mean 'knn'"),
        (["evaluation.batch_size=0"], r"evaluation.batch_size=0: must be 1 or more"),
        (["evaluation.bootstrap_resamples=-1"], r"evaluation.bootstrap_resamples=-1: must be 0 or more"),
        (["evaluation.datasets=[{pth:a}]"], r"unknown key evaluation.datasets\[0\].pth \(did you mean 'path'"),
        (["data.val=${data.train}/a.tar"], r"data.val: .*a.tar is a shard of data.train too"),
        (["data.val=nowhere"], r"data.val=nowhere: no shards found"),
        (
            [*PROBED, "evaluation.knn_k=15"],
            "^evaluation.knn_k=15: must be 1 to 14, the number of training pictures of t",
        ),
        (
            [
                *PROBED,
                "evaluation.probe_features=before_projection",
                "model.vision_cfg={layers:[1,1,1,1],head_width:32}",
            ],
            "ModifiedResNet has no projection at its end: probe_features=before_projection",
        ),
        (
            [*PROBED, *PICTURES, "evaluation.best_metric=t/acc1"],
            r"^evaluation.best_metric=t/acc1: no such metric \(did you mean 't/knn/acc1'",
        ),
        ([*PROBED, "evaluation.best_metric=t/acc"], r"^evaluation.best_metric=t/acc: .*\(did you mean 't/acc1'"),
    ],
)
def test_wrong_values(
    overrides: list[str], message: str, compose: Compose, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    given = [text.replace("SHARDS", str(shards)) for text in overrides]
    with pytest.raises(UserError, match=message):
        run(compose, tiny_json, shards, tmp_path / "run", *given)
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {"train.log"}


# The validation loss


def validation(model: str, shards: str, cache: str, batch_size: int, **options: Any) -> dict[str, float]:
    data = make_data(shards, make_cache(Path(cache)))
    held_out = read_held_out(
        data.manifest, data.store, data.content, seed=0, group_size=options.get("group_size", 16), max_bad_fraction=0.01
    )
    encoder = make_encoder(make_model(model), batch_size=batch_size, num_workers=options.get("num_workers", 0))
    return validate(held_out, encoder, make_objective(duplicates="mask"))


@torch.no_grad()
def test_the_validation_loss_equals_a_loop(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    found = validation(str(tiny_json), str(shards), str(tmp_path), 8)
    data, model, loss = make_data(str(shards), make_cache(tmp_path)), make_model(str(tiny_json)), make_objective()
    held_out = read_held_out(data.manifest, data.store, data.content, seed=0, group_size=16, max_bad_fraction=0.01)
    assert len(held_out) == 64 and len(set(held_out.captions["text"])) == 64
    encoder = make_encoder(model)
    image, text = encoder.pictures(held_out).features.double(), encoder.texts(held_out.captions["text"]).double()
    total = 0.0
    for group in range(4):
        logits = model.logit_scale.exp() * image[group::4] @ text[group::4].T
        target = torch.arange(16)
        total += float(torch.nn.functional.cross_entropy(logits, target))
        total += float(torch.nn.functional.cross_entropy(logits.T, target))
    assert found["loss"] == pytest.approx(total / 8, rel=1e-5)
    assert loss.duplicates == "ignore" and len(set(caption_ids(held_out.captions["text"]).tolist())) == 64


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_validation_loss_is_the_same_for_any_batch(
    batch_size: int, tiny_json: Path, shards: Path, tmp_path: Path
) -> None:
    expected = validation(str(tiny_json), str(shards), str(tmp_path), 8)
    found = validation(str(tiny_json), str(shards), str(tmp_path), batch_size, num_workers=2)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6) and found["accuracy"] == expected["accuracy"]


def test_the_validation_loss_is_the_same_for_any_processes(tiny_json: Path, shards: Path, tmp_path: Path) -> None:
    arguments = (str(tiny_json), str(shards), str(tmp_path / "cache"), 8)
    expected = validation(*arguments)
    assert in_processes(3, validation, tmp_path, *arguments) == [expected] * 3


def test_remote_pairs_are_open_only_while_they_are_read(shards: Path, tmp_path: Path) -> None:
    with serve(shards) as server:
        data = make_data(f"{server.url}/a.tar", make_cache(tmp_path))
        held_out = read_held_out(data.manifest, data.store, data.content, seed=0, group_size=4, max_bad_fraction=0.01)
        assert len(held_out) == 30 and not data.store.files
        assert held_out.read(3) and len(data.store.files) == 1


def test_each_pair_has_the_same_caption_every_time(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 30)
    for number, sample in enumerate(samples):
        sample["json"] = json.dumps({"captions": [f"{number} {word}" for word in "abcde"]}).encode()
    write_tar(tmp_path / "a.tar", samples)
    data = make_data(str(tmp_path / "a.tar"), make_cache(tmp_path), caption_key="captions")
    read = functools.partial(
        read_held_out, data.manifest, data.store, data.content, group_size=4, max_bad_fraction=0.01
    )
    found = [read(seed=seed).captions["text"] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len({caption.split()[1] for caption in found[0]}) > 2


def test_captions_that_cannot_be_used(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 30)
    samples[3]["txt"] = b" "
    write_tar(tmp_path / "a.tar", samples)
    data = make_data(str(tmp_path / "a.tar"), make_cache(tmp_path))
    with pytest.raises(
        UserError,
        match=r"data.val: 1 of 30 captions cannot be used, more than data.max_bad_fraction=0.01 allows: .*a.tar.*blank",
    ):
        read_held_out(data.manifest, data.store, data.content, seed=0, group_size=4, max_bad_fraction=0.01)


def test_no_caption_that_can_be_used(tmp_path: Path) -> None:
    samples = [{**sample, "txt": b" "} for sample in read_sample("train/noto-00000.tar", 30)]
    write_tar(tmp_path / "a.tar", samples)
    data = make_data(str(tmp_path / "a.tar"), make_cache(tmp_path), max_bad_fraction=1.0)
    with pytest.raises(
        UserError, match=r"data.val: none of the 30 captions can be used, and .*=1 allows .*a.tar.*blank"
    ):
        read_held_out(data.manifest, data.store, data.content, seed=0, group_size=4, max_bad_fraction=1.0)
