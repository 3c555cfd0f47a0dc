"""`clipmini report RUN` and `clipmini compare A B ...`: pages that open without a network or anything else."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from clipmini import config
from clipmini.console import log_table, set_up_logging
from clipmini.errors import UserError
from clipmini.files import write_atomically
from clipmini.report.page import make_page
from clipmini.report.read import Run, read_run

log = logging.getLogger(__name__)

REPORT = "report.html"


def run(arguments: Sequence[str]) -> int:
    """Write the report of a run.

    Returns:
        The exit code.

    Raises:
        UserError: there is no such run, or it has not measured anything yet.
    """
    options = config.read_options("report", arguments)
    set_up_logging(None)
    path = write_report(Path(options["run"]), None if options["output"] is None else Path(options["output"]))
    log.info("%s", path.absolute().as_uri())
    return 0


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Write the report of a run into its directory, or elsewhere, and return its path.

    Raises:
        UserError: see `read_run`; or it cannot be written.
    """
    from clipmini.report.sections import make_sections  # matplotlib, which a run needs at its end only

    found = read_run(directory)
    page = make_page(found.name, "", make_sections(found))
    return write(directory / REPORT if output is None else output, page)


def report_at_end(directory: Path) -> None:
    """Write the report of a run that is complete; whatever goes wrong with it, the run is."""
    try:
        write_report(directory)
    except UserError as error:
        log.warning("the report could not be written: %s", error)
    except Exception:
        log.warning("the report could not be written; `clipmini report %s` tries again", directory, exc_info=True)


def write(path: Path, page: bytes) -> Path:
    """Write a page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"output={path}: cannot be written: {error.strerror}") from error
    return path


def compare(arguments: Sequence[str]) -> int:
    """Compare runs on the screen, and on a page.

    Returns:
        The exit code.

    Raises:
        UserError: fewer than two runs, or one that cannot be read.
    """
    from clipmini.report.compare import compare_sections, list_config_differences, list_metric_differences

    options = config.read_options("compare", arguments)
    set_up_logging(None)
    if len(options["runs"]) < 2:
        raise UserError(f"runs={options['runs']}: needs two or more, as in `clipmini compare A B`")
    runs = name_apart([read_run(Path(directory)) for directory in options["runs"]])
    names = [one.name for one in runs]
    for table in (list_config_differences(runs), list_metric_differences(runs)):
        log_table(table.title, table.columns, table.rows)
    path = write(Path(options["output"]), make_page(" and ".join(names), "", compare_sections(runs)))
    log.info("%s", path.absolute().as_uri())
    return 0


def name_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, those of one name called by the end of their path that tells them apart."""
    paths = [run.directory.parts for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError(f"compare: {run_twice(runs)} is there twice")
    length = next(length for length in range(1, 100) if len({parts[-length:] for parts in paths}) == len(paths))
    return [run.called(os.path.join(*parts[-length:])) for run, parts in zip(runs, paths, strict=True)]


def run_twice(runs: Sequence[Run]) -> Path:
    """Return a directory that is there twice."""
    directories = [run.directory for run in runs]
    return next(one for one in directories if directories.count(one) > 1)
