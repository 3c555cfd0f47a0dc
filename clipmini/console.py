"""What a person sees: log lines, the progress bar, the table at the end."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clipmini.redaction import RedactingFormatter

Item = TypeVar("Item")

log = logging.getLogger(__name__)
console = Console(highlight=False)
error_console = Console(highlight=False, stderr=True)


class ConsoleHandler(logging.Handler):
    """Prints above the progress bar, without breaking long lines; from some level on to stderr."""

    def __init__(self, level: int, stderr_level: int) -> None:
        super().__init__(level)
        self.stderr_level = stderr_level

    def emit(self, record: logging.LogRecord) -> None:
        target = error_console if record.levelno >= self.stderr_level else console
        target.print(self.format(record), soft_wrap=True, markup=False)


def set_up_logging(file: Path | None, *, rank: int = 0, to_stderr: bool = False) -> None:
    """Send the first process's log to the screen and to a file, and of the others only what goes wrong; no secrets.

    Args:
        to_stderr: all of it, where stdout is for results; else only errors.
    """
    is_first = rank == 0
    root, of_warnings = logging.getLogger(), logging.getLogger("py.warnings")
    for logger in (root, of_warnings):  # another run of this process, as in a sweep, has its own file
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
    stderr_level = logging.NOTSET if to_stderr else logging.ERROR
    handlers: list[logging.Handler] = [ConsoleHandler(logging.NOTSET if is_first else logging.ERROR, stderr_level)]
    handlers[0].setFormatter(RedactingFormatter("%(message)s" if is_first else f"rank {rank}: %(message)s"))
    if is_first and file:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("clipmini").setLevel(logging.INFO)
    for library in ("pytorch_lightning", "lightning_fabric"):  # they say at length what our header says
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    of_warnings.propagate = False  # other people's advice: in the file, not on the screen
    of_warnings.addHandler(handlers[-1] if is_first and file else logging.NullHandler())


def log_rows(rows: Mapping[str, str]) -> None:
    """Log names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        log.info("%s  %s", name.ljust(width), value)


def log_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, wraps: bool = False) -> None:
    """Log a table.

    Args:
        wraps: whether columns are text, of which the last is broken where the screen ends.
    """
    table = Table(title=escape(title), title_justify="left")
    for number, column in enumerate(columns):
        justify: JustifyMethod = "left" if number == 0 or wraps else "right"
        is_broken = wraps and number == len(columns) - 1
        table.add_column(
            column, justify=justify, no_wrap=wraps and not is_broken, overflow="fold" if wraps else "ellipsis"
        )
    for row in rows:
        table.add_row(*map(escape, row))
    with console.capture() as capture:
        console.print(table)
    log.info("%s", capture.get().rstrip())


def track(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Pass items on, with a bar on a terminal."""
    columns = (TextColumn("{task.description} {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=description)


class ProgressDisplay:
    """A bar on a terminal; where there is none, as in a job's output file, a line from time to time."""

    SECONDS_BETWEEN_LINES = 10

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}  ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("", total=total_steps, completed=first_step)
        self.total_steps = total_steps
        self.last_line = 0.0
        if console.is_terminal:
            self.progress.start()

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def update(self, step: int, text: str, seconds_left: float) -> None:
        """Show what was measured up to a step."""
        self.progress.update(self.task, description=text)
        is_due = time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES
        if not console.is_terminal and (is_due or step == self.total_steps):
            self.last_line = time.monotonic()
            log.info("step %d/%d  %s  ETA %s", step, self.total_steps, text, format_seconds(seconds_left))

    def stop(self) -> None:
        self.progress.stop()


def format_seconds(seconds: float) -> str:
    """Write a duration as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
