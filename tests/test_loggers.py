"""metrics.csv over restarts and new columns."""

import csv
from pathlib import Path

from clipmini.loggers import CsvMetrics


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
