"""`clipmini evaluate` as users run it: one process or two, bad input, and a run watched while it trains."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, in_processes, read_sample, save_checkpoint, write_tar
from forked import Forked, run_forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_model import make_model

from clipmini.checkpoints.disk import load_checkpoint
from clipmini.cli import main
from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.model import open_clip_config
from clipmini.watch import keep_if_best, load_together


@pytest.fixture(scope="module")
def model(tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip directory."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    export_open_clip(make_model(str(tiny_json)), directory)
    return directory


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(model: Path, datasets: object, directory: Path, *overrides: str) -> int:
    return main(
        [
            *("evaluate", f"model={model}", f"datasets=[{datasets}]", f"output={directory}/results.jsonl"),
            *("bootstrap_resamples=20", f"cache={directory}/cache", "num_workers=0", *overrides),
        ]
    )


def test_two_processes_write_what_one_does(model: Path, classification_set: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", f"model={model}", f"datasets=[{classification_set}]", "bootstrap_resamples=20"]
    alone = run_forked([*arguments, "num_workers=1", "cache=null", "output=alone.jsonl"], tmp_path)
    assert alone.returncode == 0, alone.stderr
    together = run_forked([*arguments, "num_workers=0", "cache=null", "output=together.jsonl"], tmp_path, processes=2)
    assert together.returncode == 0, together.stderr
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "together.jsonl").read_bytes()
    assert "2 x CPU" in together.stdout and together.stdout.count("Zero-shot classification") == 1


def test_all_that_can_be_asked_for(
    model: Path, classification_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "wds_vtab-cifar10"
    shutil.copytree(classification_set, other)
    shutil.copytree(other / "test", other / "train")
    asked = ("probes=[knn,linear_probe]", "knn_k=3", "l2=0.1", f"details={tmp_path}/d", f"clip_benchmark={tmp_path}/cb")
    assert evaluate(model, other, tmp_path, *asked, "compare_to=ViT-B-32/openai") == 0
    printed = capsys.readouterr().out
    for title in ("Zero-shot classification", "Nearest neighbours", "Linear probe", "Beside ViT-B-32/openai"):
        assert title in printed
    assert [row["key"] for row in rows(tmp_path / "results.jsonl")] == [
        *("vtab-cifar10", "vtab-cifar10/knn", "vtab-cifar10/linear_probe"),
    ]
    assert len(list((tmp_path / "d").iterdir())) == 9 and len(list((tmp_path / "cb").iterdir())) == 3
    before = (tmp_path / "results.jsonl").read_bytes()
    assert evaluate(model, other, tmp_path, *asked) == 0
    assert capsys.readouterr().out.count("known from") == 3 and (tmp_path / "results.jsonl").read_bytes() == before
    assert evaluate(model, other, tmp_path, *asked, "again=true") == 0
    assert "known from" not in capsys.readouterr().out and len(rows(tmp_path / "results.jsonl")) == 3


def test_precision_of_the_model(model: Path, classification_set: Path, tmp_path: Path) -> None:
    assert evaluate(model, classification_set, tmp_path) == 0
    assert evaluate(model, classification_set, tmp_path, "precision=bf16") == 0
    first, second = rows(tmp_path / "results.jsonl")
    assert first["weights"] == second["weights"] and first["protocol"] != second["protocol"]


def test_check_reads_everything_without_a_model(
    classification_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", f"datasets=[{classification_set}]", "check=true", "num_workers=0"]) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out.replace("│", " "))
    assert "7 classes, 7 with pictures, 2 sentences each" in printed
    samples = read_sample("wds_twemoji/test/0.tar", 3)
    samples[0]["webp"] = b"broken"
    for sample in samples:
        sample["cls"] = b"0"
    broken = tmp_path / "wds_broken"
    shutil.copytree(classification_set, broken)
    write_tar(broken / "test/1.tar", samples)
    assert evaluate(tmp_path / "no-model", broken, tmp_path, "check=true") == 2
    captured = capsys.readouterr()
    assert "s0000000: picture: not a JPEG, PNG or WebP" in captured.out
    assert "more than 1% of the pictures cannot be read: broken has 1 of 16" in captured.err
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["datasets=[]"], "datasets=[]: no set to evaluate on"),
        (["datasts=[a]"], "unknown key datasts (did you mean 'datasets'"),
        (["datasets=[nowhere]"], "datasets=nowhere: there is no such file or directory"),
        (["datasets=[{path:nowhere,clases:a}]"], "unknown key datasets[0].clases (did you mean 'class_names'"),
        (["model=nowhere"], "model=nowhere: neither a file nor a directory, and no NAME/TAG of open_clip"),
        (["precision=fp8"], "precision=fp8: is one of fp32, bf16, fp16"),
        (["num_workers=-1"], "num_workers=-1: must be 0 or more, or null"),
        (["seed=-1"], "seed=-1: must be from 0 to 4294967295"),
        (["device=tpu"], "device=tpu: is one of auto, cpu, cuda"),
        (["device=cuda"], "device=cuda: torch sees no GPU here"),
        (["probes=[kn]"], "probes=kn: is one of knn, linear_probe (did you mean 'knn'?)"),
        (["knn_k=0"], "knn_k=0: must be 1 or more"),
        (["knn_temperature=0"], "knn_temperature=0.0: must be above 0"),
        (["bootstrap_resamples=-1"], "bootstrap_resamples=-1: must be 0 or more"),
        (["probes=[knn]"], "the split train needs it"),
        (["compare_to=ViT-B-32/opnai"], "compare_to=ViT-B-32/opnai: no published numbers of it (did you mean"),
        (["details_format=xlsx"], "details_format=xlsx: is one of csv, parquet"),
        (["best_metric=a/acc1"], "best_metric=a/acc1: is for watch=true"),
        (["watch=true"], "watch=true needs the directory of a run"),  # and not of a model
        (["watch=true", "model=nowhere"], "watch=true needs the directory of a run"),
        (
            ["watch=true", "again=true", "details=d"],
            "watch=true: is without again=, details=: it writes to output= and",
        ),
        (["model=null"], "model has no value: give it one, as in model=..., or only read the sets by check=true"),
        (["watch=true", "best_metric=seven/acc"], "no such metric (did you mean '"),
        (["output=/dev/full"], "/dev/full: is no file; output must be a file of results, or new"),
        (["poll_seconds=0"], "poll_seconds=0.0: must be above 0"),
        (["bootstrap_resamples=many"], "bootstrap_resamples: Value 'many' of type 'str' could not be converted"),
        (["architecture=ViT-B-32"], "architecture=ViT-B-32: is for files of weights"),
    ],
)
def test_bad_input(
    overrides: list[str],
    message: str,
    model: Path,
    classification_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    if torch.cuda.is_available() and "device=cuda" in overrides:
        pytest.skip("there is a GPU")
    arguments = {"model": f"model={model}", "datasets": f"datasets=[{classification_set}]"}
    kept = [text for key, text in arguments.items() if not any(other.startswith(f"{key}=") for other in overrides)]
    code = main(["evaluate", *kept, f"output={tmp_path}/results.jsonl", "cache=null", "num_workers=0", *overrides])
    printed = capsys.readouterr().err
    assert code == 2 and printed.startswith("clipmini: ") and message in printed, printed
    assert "Traceback" not in printed and list(tmp_path.iterdir()) == []


def test_a_table_that_could_not_be_written_is_told_before_anything_is_measured(
    model: Path,
    classification_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does with a package that is not there
    assert evaluate(model, classification_set, tmp_path, f"details={tmp_path}/d", "details_format=parquet") == 2
    assert "details_format=parquet: parquet needs pyarrow: pip install 'clipmini[par" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_prints_the_keys(capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--help"]) == 0
    assert "probes: [] # knn, linear_probe" in capsys.readouterr().out


# Watching


def write_checkpoint(run: Path, tiny_json: Path, step: int) -> Path:
    """Write what a run of `step` steps would: other weights at each step."""
    model = make_model(str(tiny_json))
    with torch.no_grad():
        model.visual.proj.add_(step / 100)
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "open_clip_config": open_clip_config(model),
        "global_step": step,
        "hyper_parameters": {},
    }
    return save_checkpoint(content, run / f"checkpoints/step-{step:08d}.ckpt")


def read_scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def watcher(tiny_json: Path, classification_set: Path, tmp_path: Path) -> Iterator[Forked]:
    """A companion of a run that has one checkpoint yet."""
    write_checkpoint(tmp_path / "run", tiny_json, 1)
    files = (tmp_path / "stdout", tmp_path / "stderr")
    with Forked(watch_arguments(tmp_path, classification_set), tmp_path, [files]) as process:
        yield process


def watch_arguments(directory: Path, classification_set: Path) -> list[str]:
    return [
        *("evaluate", f"model={directory / 'run'}"),
        *(f"datasets=[{classification_set}]", f"output={directory / 'results.jsonl'}", "watch=true", "num_workers=0"),
        *("bootstrap_resamples=20", "poll_seconds=0.1", "best_metric=" + set_name(classification_set) + "/acc1"),
    ]


def set_name(classification_set: Path) -> str:
    return classification_set.name.removeprefix("wds_")


def wait_for(path: Path, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 90
    while not path.exists() or len(rows(path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return rows(path)


def test_a_watched_run_has_each_checkpoint_once_over_a_kill(
    watcher: Forked, tiny_json: Path, classification_set: Path, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "results.jsonl"
    wait_for(output, 1)
    write_checkpoint(run, tiny_json, 2)
    wait_for(output, 2)
    watcher.kill()
    for step in (3, 4):
        write_checkpoint(run, tiny_json, step)
    time.sleep(0.01)
    export_open_clip(make_model(str(tiny_json)), run / "model")  # what a run does last
    result = run_forked(watch_arguments(tmp_path, classification_set), tmp_path)
    assert result.returncode == 0, result.stderr
    found = rows(output)
    assert [row["step"] for row in found] == [1, 2, 3, 4] and len({row["weights"] for row in found}) == 4
    name = set_name(classification_set)
    expected = [(row["step"], pytest.approx(row["metrics"]["acc1"])) for row in found]
    assert read_scalars(run, f"evaluation/{name}/acc1") == expected
    best = max(found, key=lambda row: (row["metrics"]["acc1"], -row["step"]))
    content = load_checkpoint(run / "checkpoints/best.ckpt")
    assert content["global_step"] == best["step"]
    assert "step 3:" in result.stdout and "step 2:" not in result.stdout


def test_the_best_checkpoint_is_the_best_of_its_run_in_its_way(tmp_path: Path) -> None:
    def row(step: int | None, acc1: float, **changes: Any) -> dict[str, Any]:
        return {"key": "a", "model": "m", "protocol": "p", "step": step, "metrics": {"acc1": acc1}, **changes}

    known = [row(None, 0.9, model="ViT-B-32 openai"), row(1, 0.9, protocol="of another seed")]
    for step, acc1, best in ((2, 0.2, 2), (3, 0.1, 2), (4, 0.3, 4)):
        path = tmp_path / f"step-{step:08d}.ckpt"
        path.mkdir()
        known.append(row(step, acc1))
        keep_if_best(path, known[-1:], known, "a/acc1")
        assert (tmp_path / "best.ckpt").resolve().name == f"step-{best:08d}.ckpt"


def load_of_a_process(directory: str) -> tuple[bool, str]:
    """Load a checkpoint that each process finds in a directory of its own."""
    path = Path(directory) / f"{torch.distributed.get_rank()}/checkpoints/step-00000001.ckpt"
    try:
        return load_together(path, "trained") is not None, ""
    except UserError as error:
        return False, str(error)


def test_processes_load_the_same_checkpoints_though_a_run_deletes_some(tiny_json: Path, tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / str(rank), tiny_json, 1) for rank in (0, 1)]
    (tmp_path / "torn").mkdir()
    os.truncate(paths[1] / "rank-00000.pt", 1000)
    (found, other) = in_processes(2, load_of_a_process, tmp_path / "torn", str(tmp_path))
    assert found == other and found[1].startswith(f"model={paths[1]}: rank-00000.pt has 1,000 bytes of")
    (tmp_path / "gone").mkdir()
    shutil.rmtree(paths[1])
    assert in_processes(2, load_of_a_process, tmp_path / "gone", str(tmp_path)) == [(False, "")] * 2


def test_a_watched_run_that_trains(shards: Path, classification_set: Path, tiny_json: Path, tmp_path: Path) -> None:
    options = [*QUICK, f"model.name={tiny_json}", f"data.train={shards}", f"paths.output={tmp_path}", "name=run"]
    assert run_forked(["train", *options, "checkpoint.keep_last=9"], tmp_path).returncode == 0
    result = run_forked(watch_arguments(tmp_path, classification_set), tmp_path)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(tmp_path / "results.jsonl")] == [2, 4]
