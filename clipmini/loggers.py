"""Loggers that go on where a resumed run does: metrics in a CSV file, and in one run of MLflow or of W&B."""

import csv
import importlib.util
import io
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from clipmini.errors import UserError
from clipmini.files import write_atomically

log = logging.getLogger(__name__)


class CsvMetrics(Logger):
    """Appends a row for each step, of one or more calls; rows of steps that a resumed run does again go first.

    Lightning's own logger deletes the file of the run it continues.

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
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, content.getvalue().encode())
        return dict(row)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The config is a file of the run already."""


class MlflowRun(Logger):
    """Sends metrics to MLflow, to the same run of it for all of a run, however often that is stopped and goes on.

    Lightning's own logger makes another run each time. Only metrics and the name are sent: neither the config nor the
    command line, user, host or git address that MLflow's own start of a run takes down. What is done again after a
    resume is there twice, as MLflow can take nothing back. Nothing is made or imported before training begins.

    Args:
        tracking_uri: `sqlite:///` and a path, or the address of a server.
        experiment_name: what MLflow lists runs under; made if it is not there.
        run_name: what MLflow calls the run.
        id_file: in the run's directory, which is its identity: the id that MLflow gave it.
        retry_seconds: before it is tried again if MLflow took nothing; the run goes on without.
        telemetry: whether MLflow may send its makers how it is used.

    Raises:
        UserError: no address, or one of a database for which a package is missing.
    """

    def __init__(
        self,
        *,
        tracking_uri: str,
        experiment_name: str,
        run_name: str,
        id_file: str,
        retry_seconds: float,
        telemetry: bool,
    ) -> None:
        super().__init__()
        if not tracking_uri:
            raise UserError("logger.mlflow.tracking_uri is empty: must be an address (is MLFLOW_TRACKING_URI empty?)")
        if "sql" in tracking_uri.partition(":")[0] and importlib.util.find_spec("alembic") is None:
            raise UserError(
                f"logger.mlflow.tracking_uri={tracking_uri}: needs the packages sqlalchemy and alembic: "
                "pip install 'clipmini[mlflow]'"
            )
        self.tracking_uri = tracking_uri
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.id_file = Path(id_file)
        self.retry_seconds = retry_seconds
        self.telemetry = telemetry
        self.client: Any = None
        self.run_id: str | None = None
        self.next_try = 0.0  # on the monotonic clock

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str | None:
        return self.run_id

    @rank_zero_only
    def log_graph(self, *_: Any, **__: Any) -> None:
        """Find or make the run and have it run; Lightning calls this as training begins.

        Raises:
            UserError: MLflow cannot be reached, or takes nothing.
        """
        try:
            self.open()
            self.client.update_run(self.run_id, status="RUNNING")
        except Exception as error:
            raise UserError(f"logger.mlflow.tracking_uri={self.tracking_uri}: {error}") from error

    def open(self) -> None:
        """Go on with the run of the id file, or make one."""
        if self.client is not None:
            return
        client = make_client(self.tracking_uri, telemetry=self.telemetry)
        self.run_id = self.find_run(client) or self.make_run(client)
        self.client = client

    def find_run(self, client: Any) -> str | None:
        """Return the id that is written down, if MLflow still has that run."""
        if not self.id_file.exists():
            return None
        run_id = self.id_file.read_text(encoding="utf-8").strip()
        try:
            stage = client.get_run(run_id).info.lifecycle_stage
        except Exception as error:  # MlflowException, of a package that need not be there
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            stage = "not there"
        if stage == "active":
            return run_id
        log.warning("MLflow's run %s, of %s, is %s: another one is made", run_id, self.id_file, stage)
        return None

    def make_run(self, client: Any) -> str:
        """Make a run, and write its id down before anything is sent to it."""
        found = client.get_experiment_by_name(self.experiment_name)
        experiment_id = found.experiment_id if found else client.create_experiment(self.experiment_name)
        run_id = client.create_run(experiment_id, run_name=self.run_name).info.run_id
        write_atomically(self.id_file, f"{run_id}\n".encode())
        return run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if time.monotonic() < self.next_try:
            return
        try:
            self.open()
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            # MLflow takes no other characters, as the @ of recall@5.
            names = {name: re.sub(r"[^/\w.\- ]", "_", name) for name in metrics}
            rows = [Metric(names[name], float(value), now, step or 0) for name, value in metrics.items()]
            self.client.log_batch(self.run_id, metrics=rows)
        except Exception as error:  # a run must not end because a server that only looks on is away
            self.next_try = time.monotonic() + self.retry_seconds
            text = "step %s: MLflow took no metrics, is tried again in %g s (logger.mlflow.retry_seconds): %s"
            log.warning(text, step, self.retry_seconds, error)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The config is a file of the run already."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Say in MLflow how the run ended."""
        if self.client is None:
            return
        try:
            self.client.set_terminated(self.run_id, "FAILED" if status == "failed" else "FINISHED")
        except Exception as error:
            log.warning("MLflow could not be told that the run has ended: %s", error)


def make_client(tracking_uri: str, *, telemetry: bool) -> Any:
    """Make MLflow's client; the import takes a second, and begins to send telemetry if that is not forbidden before."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", str(not telemetry).lower())
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it would tell of each table that it makes
    return MlflowClient(tracking_uri)


class WandbRun(WandbLogger):
    """Lightning's logger of W&B, in the same run of W&B when this one goes on.

    By the name of a run all runs of a sweep would be one, and those of others in the project too.

    Args:
        id_file: in the run's directory, which is its identity: the id of W&B's run, a random one at first.
        options: of Lightning's own.
    """

    def __init__(self, *, id_file: str, **options: Any) -> None:
        self.id_file = Path(id_file)
        kept = self.id_file.read_text(encoding="utf-8").strip() if self.id_file.exists() else uuid.uuid4().hex
        super().__init__(**{"id": kept, **options})

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; its id is written down before anything is sent to it."""
        if not self.id_file.exists():
            write_atomically(self.id_file, f"{self.version}\n".encode())
        return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End W&B's run with this one: the next of a sweep in this process would go on in it."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None
