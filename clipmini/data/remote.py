"""Files from anywhere (fsspec URLs, the output of commands), with patience for networks that fail and stall."""

import asyncio
import itertools
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from clipmini.errors import UserError

log = logging.getLogger(__name__)

PIPE = "pipe:"
MAX_WAIT = 30.0  # seconds between two tries
TRIES_OF_WRONG_CONTENT = 3

Result = TypeVar("Result")


class WrongContent(Exception):
    """What came is no tar, or only part of one."""


class Stalled(Exception):
    """Nothing came for too long."""


def is_remote(path: str) -> bool:
    """Say whether a shard must be fetched."""
    return path.startswith(PIPE) or "://" in path


@dataclass(frozen=True)
class Remote:
    """How to reach what is not on a local disk.

    Attributes:
        storage_options: options of fsspec's file systems, by protocol.
        fetch_timeout: seconds that a request may take with all tries.
        stall_timeout: seconds without a byte after which a try is given up.
    """

    storage_options: Mapping[str, Mapping[str, Any]]
    fetch_timeout: float
    stall_timeout: float

    def file_system(self, url: str) -> tuple[Any, str]:
        """Return fsspec's file system for a URL, and the path in it.

        Raises:
            UserError: no such protocol, a package that is missing, or options that it does not take.
        """
        protocol = url.split("://", 1)[0]
        try:
            return fsspec.core.url_to_fs(url, **self.storage_options.get(protocol, {}))
        except (ImportError, ValueError, TypeError) as error:
            options = f"data.cache.storage_options.{protocol}"
            raise UserError(f"{url}: cannot be read ({error}); {options} may set more") from error

    def persist(self, what: str, action: Callable[[], Result]) -> Result:
        """Do something over the network, again and again while it fails, with growing pauses.

        Raises:
            FileNotFoundError: there is no such thing, for certain.
            UserError: no permission, no success in `fetch_timeout`, or a full disk.
        """
        deadline = time.monotonic() + self.fetch_timeout
        for attempt in itertools.count(1):
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # each file system has its own
                failure = unwrap(error)
                if isinstance(failure, FileNotFoundError) or getattr(failure, "errno", None) in (ENOSPC, EDQUOT):
                    raise
                message = f"{what}: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
                if is_refusal(failure):
                    raise UserError(f"{message}; give credentials in the environment") from error
                pause = min(MAX_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                is_late = time.monotonic() + pause > deadline
                if is_late or (isinstance(failure, WrongContent) and attempt >= TRIES_OF_WRONG_CONTENT):
                    raise UserError(
                        f"{message}; tried {attempt} times (data.cache.fetch_timeout={self.fetch_timeout:g} seconds); "
                        "nothing is lost, the same command goes on from the last checkpoint"
                    ) from error
                log.warning("%s; trying again in %.1f seconds", message, pause)
                time.sleep(pause)
        raise AssertionError

    def read_bytes(self, path: str) -> bytes | None:
        """Read a small file, local or not; None if there is none."""
        try:
            if not is_remote(path):
                return Path(path).read_bytes()
            file_system, name = self.file_system(path)
            return self.persist(path, lambda: within(self.stall_timeout, lambda: file_system.cat_file(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def download(self, url: str, target: Path) -> None:
        """Try once to fetch a URL or the output of a command into a file."""
        if url.startswith(PIPE):
            watch(target, self.stall_timeout, run_pipe(url.removeprefix(PIPE), target))
        else:
            file_system, name = self.file_system(url)
            watch(target, self.stall_timeout, in_thread(lambda: file_system.get_file(name, str(target))))


def unwrap(error: Exception) -> BaseException:
    """Return what really happened: fsspec's HTTP calls every failure a missing file, and keeps its cause."""
    cause = error.__cause__
    is_of_network = isinstance(cause, OSError | asyncio.TimeoutError) and not isinstance(cause, FileNotFoundError)
    is_status = getattr(cause, "status", 404) not in (404, 410)
    return cause if isinstance(error, FileNotFoundError) and cause and (is_of_network or is_status) else error


def is_refusal(failure: BaseException) -> bool:
    """Say whether credentials are missing or wrong, so that trying again is no use."""
    has_status = getattr(failure, "status", None) in (401, 403)
    return has_status or isinstance(failure, PermissionError) or "Credentials" in type(failure).__name__


class Task:
    """Something that runs on its own: `done` is set at its end, `error` if it failed, `stop` gives it up."""

    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.result: Any = None
        self.stop = stop

    def run(self, action: Callable[[], Any]) -> None:
        try:
            self.result = action()
        except BaseException as error:  # it is raised where the task is waited for
            self.error = error
        self.done.set()


def in_thread(action: Callable[[], Any], stop: Callable[[], None] = lambda: None) -> Task:
    """Start an action in a thread that does not keep the process from ending."""
    task = Task(stop)
    threading.Thread(target=task.run, args=(action,), daemon=True).start()
    return task


def run_pipe(command: str, target: Path) -> Task:
    """Start a shell command with its output in a file; any command of a pipeline that fails fails it."""
    with open(target, "wb") as file:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            stdout=file,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait() -> None:
        _, error = process.communicate()
        if process.returncode:
            raise OSError(f"exit code {process.returncode}: {error.decode(errors='replace')[-300:]}")

    return in_thread(wait, lambda: os.killpg(process.pid, signal.SIGKILL))


def watch(target: Path, stall_timeout: float, task: Task) -> None:
    """Wait for a task while its file grows.

    Raises:
        Stalled: it did not grow for too long.
    """
    size, changed = -1, time.monotonic()
    while not task.done.wait(0.05):
        now = target.stat().st_size if target.exists() else -1
        if now != size:
            size, changed = now, time.monotonic()
        elif time.monotonic() - changed > stall_timeout:
            task.stop()
            raise Stalled(f"no byte for {stall_timeout:g} seconds (data.cache.stall_timeout)")
    if task.error:
        raise task.error


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Do something that must not take longer.

    Raises:
        Stalled: it did.
    """
    task = in_thread(action)
    if not task.done.wait(seconds):
        raise Stalled(f"no answer for {seconds:g} seconds (data.cache.stall_timeout)")
    if task.error:
        raise task.error
    return task.result
