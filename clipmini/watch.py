"""Evaluates each checkpoint of a run as it comes, beside the training; may be killed and started again at any time."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from clipmini import distributed
from clipmini.checkpoints.disk import BEST, keep_best, list_checkpoints
from clipmini.errors import UserError
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.results import (
    Row,
    add_row,
    find_metric,
    is_best,
    log_results,
    log_short,
    read_rows,
    row_scalars,
)
from clipmini.sources import CONFIG_FILE, Source, load_run_checkpoint

log = logging.getLogger(__name__)


def watch(
    run: Path,
    evaluator: Evaluator,
    output: Path,
    device: torch.device,
    *,
    weights: str,
    best_metric: str | None,
    poll_seconds: float,
) -> None:
    """Evaluate the checkpoints that are there and those that come, oldest first, until the run has ended.

    Each result is in `output` as soon as it is found, and what is there is not done again. A checkpoint that the run
    deletes before its turn is lost, which is said: checkpoint.keep_last of the run must be large enough.

    Args:
        run: its directory.
        weights: `trained` or `average`.
        best_metric: SET/METRIC; the best checkpoint by it is kept as checkpoints/best.ckpt.

    Raises:
        UserError: there is no such directory.
    """
    if not run.is_dir() or (run / CONFIG_FILE).is_file():  # of an open_clip directory, which has no checkpoints
        raise UserError(f"model={run}: watch=true needs the directory of a run")
    seen: set[Path] = set()
    rows: list[Row] = []
    has_ended = False
    while not has_ended:
        # In this order: a checkpoint that comes between the two is seen the next time.
        has_ended, found = distributed.all_gather_objects((has_finished(run), list_checkpoints(run / "checkpoints")))[0]
        for path in found:
            if path not in seen:
                rows = evaluate_checkpoint(path, evaluator, output, device, weights, best_metric) or rows
        seen |= set(found)
        if not has_ended:
            time.sleep(poll_seconds)
    log_results(rows)


def has_finished(run: Path) -> bool:
    """Say whether a run has come to its end: then it has written its model after its last checkpoint."""
    model = run / "model"
    found = list_checkpoints(run / "checkpoints")
    return model.is_dir() and all(model.stat().st_mtime >= path.stat().st_mtime for path in found if path.exists())


def evaluate_checkpoint(
    path: Path, evaluator: Evaluator, output: Path, device: torch.device, weights: str, best_metric: str | None
) -> list[Row]:
    """Evaluate a checkpoint and write what is found, also to the run's TensorBoard, at the checkpoint's step.

    Returns:
        Its results, also those that were known; none if the checkpoint is gone.
    """
    source = load_together(path, weights)
    if source is None:
        log.warning("%s was deleted before its turn: a larger checkpoint.keep_last of the run keeps more", path)
        return []
    encoder = evaluator.encoder(source.model.to(device), source.tokenizer(), device)
    rows = []
    about = {"model": source.name if weights == "trained" else f"{source.name} average", "step": source.step}
    for result in evaluator.run(encoder, read_rows(output), about):
        rows.append(result.row)
        if distributed.rank() == 0 and result.finding is not None:
            assert source.run is not None and source.step is not None
            write_scalars(source.run / "tensorboard", result.row, source.step)
            add_row(output, result.row)
            log_short([result.row], source.step)
    if best_metric and distributed.rank() == 0:
        keep_if_best(path, rows, read_rows(output), best_metric)
    return rows


def load_together(path: Path, weights: str) -> Source | None:
    """Load a checkpoint in every process, or in none: a run may delete it while some have it and others have not.

    Raises:
        UserError: it is there, and one of them cannot load it.
    """
    source: Source | None = None
    reason: UserError | None = None
    try:
        source = load_run_checkpoint(path, weights)
    except UserError as error:
        reason = error if path.exists() else None
    found = distributed.all_gather_objects((source is not None, reason))
    for _, reason in found:
        if reason is not None:
            raise reason
    return source if all(is_loaded for is_loaded, _ in found) else None


def keep_if_best(path: Path, rows: Sequence[Row], all_rows: Sequence[Row], best_metric: str) -> None:
    """Keep a checkpoint if no other of the run has been as good, measured in the same way.

    Args:
        rows: of the checkpoint.
        all_rows: of the file of results, in which other models, settings and controls may be too.
    """
    value = find_metric(rows, best_metric)
    alike = {(row["key"], row["protocol"], row["model"]) for row in rows}
    others = [
        row
        for row in all_rows
        if row.get("step") != rows[0]["step"] and (row["key"], row.get("protocol"), row.get("model")) in alike
    ]
    known = [found for row in others if (found := find_metric([row], best_metric, must_exist=False)) is not None]
    if value is not None and is_best(value, known, best_metric):
        if path.exists():
            keep_best(path)
            log.info("%s = %.4f: the best so far, kept as %s", best_metric, value, path.with_name(BEST))
        else:
            log.warning(
                "%s = %.4f: the best so far, but %s is deleted (checkpoint.keep_last)", best_metric, value, path
            )


def write_scalars(directory: Path, row: Row, step: int) -> None:
    """Write the metrics of a row to TensorBoard."""
    with SummaryWriter(str(directory)) as writer:
        for name, value in row_scalars(row).items():
            writer.add_scalar(name, value, step)
