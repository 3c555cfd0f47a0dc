"""Metrics in a CSV file that survives a resume: Lightning's own logger deletes the file of the run it continues."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only


class CsvMetrics(Logger):
    """Appends a row for each step, of one or more calls; rows of steps that a resumed run does again go first.

    Args:
        path: the file, with a column `step` first.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns: list[str] = []
        self.step: int | None = None  # of the last row

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step, **metrics}
        if step == self.step or not set(row) <= set(self.columns):
            row = self.start(row)
        self.step = step
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def start(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Rewrite the file with the columns of this row and the rows before it; return it with what its step has."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                found = [old for old in csv.DictReader(file) if int(old["step"]) <= row["step"]]
            rows = [old for old in found if int(old["step"]) < row["step"]]
            row = {**next((old for old in found if int(old["step"]) == row["step"]), {}), **row}
        names = dict.fromkeys([*row, *(name for old in rows for name in old)])
        self.columns = list(names)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        return dict(row)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The config is a file of the run already."""
