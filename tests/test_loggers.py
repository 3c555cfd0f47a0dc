"""metrics.csv over restarts and new columns; one run of MLflow for a run that goes on; packages that are missing."""

import csv
import importlib.machinery
import importlib.util
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import QUICK
from forked import run_forked

from clipmini.errors import UserError
from clipmini.loggers import CsvMetrics, MlflowRun
from clipmini.targets import Allowed, check_targets

Run = Callable[..., subprocess.CompletedProcess]
HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_step(tmp_path: Path) -> None:
    logger = CsvMetrics(path=str(tmp_path / "run/metrics.csv"))
    logger.log_metrics({"a": 1.5}, 10)
    logger.log_metrics({"a": 2.5}, 20)
    assert read(tmp_path / "run/metrics.csv") == [{"step": "10", "a": "1.5"}, {"step": "20", "a": "2.5"}]


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = CsvMetrics(path=str(path))
    for step in (10, 20, 30):
        first.log_metrics({"a": step}, step)
    second = CsvMetrics(path=str(path))
    second.log_metrics({"a": 99}, 20)
    assert [(row["step"], row["a"]) for row in read(path)] == [("10", "10"), ("20", "99")]


def test_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CsvMetrics(path=str(path))
    logger.log_metrics({"a": 1}, 1)
    logger.log_metrics({"b": 2}, 2)
    logger.log_metrics({"a": 3}, 3)
    rows = [{name: value for name, value in row.items() if value} for row in read(path)]
    assert rows == [{"step": "1", "a": "1"}, {"step": "2", "b": "2"}, {"step": "3", "a": "3"}]


def test_one_step_in_several_calls_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CsvMetrics(path=str(path))
    logger.log_metrics({"a": 1}, 1)
    logger.log_metrics({"b": 2}, 2)
    logger.log_metrics({"a": 3}, 2)
    again = CsvMetrics(path=str(path))  # of the same command after the end
    again.log_metrics({"b": 4}, 2)
    rows = [{name: value for name, value in row.items() if value} for row in read(path)]
    assert rows == [{"step": "1", "a": "1"}, {"step": "2", "a": "3", "b": "4"}]


def test_the_rows_before_are_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    CsvMetrics(path=str(path)).log_metrics({"a": 1}, 1)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        CsvMetrics(path=str(path)).log_metrics({"b": 2}, 2)
    assert read(path) == [{"step": "1", "a": "1"}] and list(tmp_path.iterdir()) == [path]


# What is not installed


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_told_before_anything_is_written(
    package: str, run_here: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    result = run_here("train", *QUICK, f"logger={package}", f"data.train={shards}")
    hint = f"needs the package {package}, which is not installed: pip install 'clipmini[{package}]'"
    assert result.returncode == 2 and result.stderr == f"clipmini: logger.{package} {hint}\n"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["train.log"]


def test_a_directory_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    with pytest.raises(UserError, match="^logger.x needs the package wandb"):
        check_targets({"_target_": "pytorch_lightning.loggers.WandbLogger"}, "logger.x", Allowed(frozenset()))


# MLflow


class Server:
    """What MLflow keeps, and its client's functions that are used."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: list[str] = []
        self.is_away = False

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments.index(name)) if name in self.experiments else None

    def create_experiment(self, name: str) -> int:
        self.experiments.append(name)
        return len(self.experiments) - 1

    def create_run(self, experiment_id: int, run_name: str) -> Any:
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {"name": run_name, "status": "RUNNING", "stage": "active", "metrics": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def get_run(self, run_id: str) -> Any:
        if run_id not in self.runs:
            raise type("MlflowException", (Exception,), {"error_code": "RESOURCE_DOES_NOT_EXIST"})
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=self.runs[run_id]["stage"]))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics: list[tuple]) -> None:
        if self.is_away:
            raise ConnectionError("no route to host")
        self.runs[run_id]["metrics"] += [(name, value, step) for name, value, _, step in metrics]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server in the place of MLflow's, and of the package."""
    server, entities = Server(), ModuleType("mlflow.entities")
    entities.Metric = lambda *values: values  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr("clipmini.loggers.make_client", lambda address, telemetry: server)
    return server


def make_logger(directory: Path, **changes: Any) -> MlflowRun:
    options = {"tracking_uri": "http://host", "experiment_name": "e", "run_name": "mine", "telemetry": False}
    return MlflowRun(**{**options, "id_file": str(directory / "run/id.txt"), "retry_seconds": 0.0, **changes})


def test_nothing_is_made_before_training_begins(server: Server, tmp_path: Path) -> None:
    make_logger(tmp_path).finalize("failed")
    assert not server.runs and not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(server: Server, tmp_path: Path) -> None:
    for step in (1, 2):
        logger = make_logger(tmp_path)
        logger.log_graph()
        assert server.runs["run0"]["status"] == "RUNNING"
        logger.log_metrics({"train/loss": 3.0 / step}, step)
        logger.finalize("failed" if step == 1 else "success")
        assert server.runs["run0"]["status"] == ("FAILED" if step == 1 else "FINISHED")
    assert [run["metrics"] for run in server.runs.values()] == [[("train/loss", 3.0, 1), ("train/loss", 1.5, 2)]]
    assert server.experiments == ["e"] and server.runs["run0"]["name"] == "mine"
    make_logger(tmp_path, id_file=str(tmp_path / "other/id.txt")).log_graph()
    assert len(server.runs) == 2  # of another directory


def test_numbers_after_the_end_leave_it_ended(server: Server, tmp_path: Path) -> None:
    first = make_logger(tmp_path)
    first.log_graph()
    first.finalize("success")
    first.log_metrics({"eval/a": 1.0}, 3)
    make_logger(tmp_path).log_metrics({"eval/b": 1.0}, 3)  # of a run that is complete already
    assert server.runs["run0"]["status"] == "FINISHED" and len(server.runs["run0"]["metrics"]) == 2


@pytest.mark.parametrize("loss", ["deleted", "not there"])
def test_a_run_that_mlflow_has_no_more(
    loss: str, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_logger(tmp_path).log_graph()
    server.runs["run0"]["stage"] = "deleted"
    if loss == "not there":
        server.runs["another"] = server.runs.pop("run0")
    make_logger(tmp_path).log_graph()
    assert len(server.runs) == 2 and f"is {loss}: another one is made" in caplog.text


def test_a_server_that_goes_away_does_not_end_a_run(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = make_logger(tmp_path, retry_seconds=100.0)
    logger.log_graph()
    server.is_away = True
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    assert caplog.text.count("MLflow took no metrics") == 1 and "step 1" in caplog.text
    server.is_away, logger.next_try = False, 0.0
    logger.log_metrics({"a": 3.0}, 3)
    assert server.runs["run0"]["metrics"] == [("a", 3.0, 3)]


def test_a_server_that_is_not_there_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, telemetry: bool) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr("clipmini.loggers.make_client", refuse)
    with pytest.raises(UserError, match="^logger.mlflow.tracking_uri=http://host: refused$"):
        make_logger(tmp_path).log_graph()
    with pytest.raises(UserError, match="^logger.mlflow.tracking_uri is empty"):
        make_logger(tmp_path, tracking_uri="")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the packages sqlalchemy and alembic: pip install 'clipmini\[mlflow\]'"):
        make_logger(tmp_path, tracking_uri="sqlite:///a.db")


@pytest.mark.skipif(not HAS_MLFLOW, reason="needs MLflow")
def test_mlflow_itself(tiny_json: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "CANARY")
    arguments = [*QUICK, "logger=mlflow", "name=x", f"model.name={tiny_json}", f"data.train={shards}"]
    for steps in (2, 4):
        result = run_forked(["train", *arguments, f"steps={steps}"], tmp_path, processes=2)
        assert result.returncode == 0, result.stderr
    with sqlite3.connect(tmp_path / "outputs/x/mlflow.db") as database:
        runs = database.execute("select run_uuid, name, status from runs").fetchall()
        losses = database.execute("select step from metrics where key='train/loss' order by step").fetchall()
        tags = database.execute("select key from tags").fetchall()
    assert [run[1:] for run in runs] == [("x", "FINISHED")] and [step for (step,) in losses] == [1, 2, 3, 4]
    assert runs[0][0] == (tmp_path / "outputs/x/mlflow_run_id.txt").read_text().strip()
    assert tags == [("mlflow.runName",)]  # no command line, user or git address
    assert b"CANARY" not in (tmp_path / "outputs/x/mlflow.db").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "outputs"}  # no mlruns
    assert not (tmp_path / "home/.config").exists()  # where MLflow's telemetry keeps an id


# W&B


def test_wandb_itself(shards: Path, tmp_path: Path) -> None:
    given = ["train", *QUICK, "model=vit_tiny", "logger=wandb", "logger.wandb.offline=true", f"data.train={shards}"]
    for name, steps in (("a/b", 2), ("a/b", 4), ("c", 2)):
        result = run_forked([*given, f"name={name}", f"steps={steps}"], tmp_path)
        assert result.returncode == 0, result.stderr
    ids = [(tmp_path / "outputs" / name / "wandb_run_id.txt").read_text().strip() for name in ("a/b", "c")]
    assert ids[0] != ids[1]
    for run_id, name, count in zip(ids, ("a/b", "c"), (2, 1), strict=True):
        runs = list((tmp_path / "outputs" / name / "wandb").glob("offline-run-*"))
        assert len(runs) == count and all(run.name.endswith(f"-{run_id}") for run in runs)


def test_the_next_run_of_a_process_is_another_one_of_wandb(
    shards: Path, classification_set: Path, tmp_path: Path
) -> None:
    given = ["train", "--multirun", *QUICK, "model=vit_tiny", "logger=wandb", "logger.wandb.offline=true", "steps=2"]
    given += [f"evaluation.datasets=[{classification_set}]", "evaluation.bootstrap_resamples=10"]
    result = run_forked([*given, f"data.train={shards}", "name=sweep", "seed=0,1"], tmp_path)
    assert result.returncode == 0, result.stderr
    for number in "01":
        run = tmp_path / "outputs/sweep" / number
        kept = (run / "wandb_run_id.txt").read_text().strip()
        made = list((run / "wandb").glob("offline-run-*/*.wandb"))
        assert {path.name for path in made} == {f"run-{kept}.wandb"}
        content = b"".join(path.read_bytes() for path in made)
        assert b"train/loss" in content and b"evaluation/" in content
