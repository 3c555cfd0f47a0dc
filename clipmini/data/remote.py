"""Files from anywhere (fsspec URLs, the output of commands), with patience for networks that fail and stall."""

import asyncio
import itertools
import logging
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from clipmini.data.threads import Task, in_thread, watch, within
from clipmini.errors import UserError
from clipmini.redaction import redact_message

log = logging.getLogger(__name__)

PIPE = "pipe:"
MAX_WAIT = 30.0  # seconds between two tries
FEW_TRIES = 3  # of what time alone does not mend: wrong content, a full disk

Result = TypeVar("Result")


class WrongContent(Exception):
    """What came is no tar, or only part of one."""


class Refused(UserError):
    """Credentials are missing or wrong, or something is not there and not everyone may know that."""


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
        key: of the config, that holds these.
    """

    storage_options: Mapping[str, Mapping[str, Any]]
    fetch_timeout: float
    stall_timeout: float
    key: str = "data.cache"

    def file_system(self, url: str) -> tuple[Any, str]:
        """Return fsspec's file system for a URL, and the path in it.

        Raises:
            UserError: no such protocol, a package that is missing, or options that it does not take.
        """
        protocol = url.split("://", 1)[0]
        try:
            return fsspec.core.url_to_fs(url, **self.storage_options.get(protocol, {}))
        except ImportError as error:
            extra = {"s3": "'clipmini[s3]'", "gs": "'clipmini[gs]'"}.get(protocol, "what it names")
            raise UserError(f"{url}: {error}: pip install {extra}") from error
        except (ValueError, TypeError) as error:
            options = f"{self.key}.storage_options.{protocol}"
            raise UserError(f"{url}: cannot be read ({error}); {options} may set more") from error

    def persist(self, what: str, action: Callable[[float], Result]) -> Result:
        """Do something over the network, again and again while it fails, with growing pauses.

        Args:
            what: for messages.
            action: takes the time on the monotonic clock at which it must be done.

        Raises:
            FileNotFoundError: there is no such thing, for certain.
            Refused: no permission.
            OSError: a full disk.
            UserError: no success in `fetch_timeout`.
        """
        deadline = time.monotonic() + self.fetch_timeout
        for attempt in itertools.count(1):
            try:
                return action(deadline)
            except UserError:
                raise
            except Exception as error:  # each file system has its own
                failure = unwrap(error)
                is_full = isinstance(failure, OSError) and failure.errno in (ENOSPC, EDQUOT)
                if isinstance(failure, FileNotFoundError) or (is_full and attempt >= FEW_TRIES):
                    raise
                reason = redact_message(" ".join(str(failure).split()))[:300]
                message = f"{redact_message(what)}: {type(failure).__name__}: {reason}"
                if is_refusal(failure):
                    raise Refused(f"{message}; give credentials in the environment") from error
                pause = min(MAX_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                is_late = time.monotonic() + pause > deadline
                if is_late or (isinstance(failure, WrongContent) and attempt >= FEW_TRIES):
                    raise UserError(
                        f"{message}; tried {attempt} times ({self.key}.fetch_timeout={self.fetch_timeout:g} seconds); "
                        "nothing is lost, the same command goes on from the last checkpoint"
                    ) from error
                log.warning("%s; trying again in %.1f seconds", message, pause)
                time.sleep(pause)
        raise AssertionError

    def ask(self, what: str, action: Callable[[], Result]) -> Result:
        """Get an answer over the network, patiently; raises what `persist` does."""

        def attempt(deadline: float) -> Result:
            return within(min(self.stall_timeout, deadline - time.monotonic()), action, self.key)

        return self.persist(what, attempt)

    def read_bytes(self, path: str) -> bytes | None:
        """Read a small file, local or not; None if there is none, or a server does not say that there is."""
        try:
            if not is_remote(path):
                return Path(path).read_bytes()
            file_system, name = self.file_system(path)
            return self.ask(path, lambda: file_system.cat_file(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Refused as error:
            log.info("%s: taken for a file that is not there", error)
            return None

    def download(self, url: str, target: Path, deadline: float) -> None:
        """Try once to fetch a URL or the output of a command into a file, until some time on the monotonic clock."""
        if url.startswith(PIPE):
            task = run_pipe(url.removeprefix(PIPE), target)
        else:
            file_system, name = self.file_system(url)
            task = in_thread(lambda: file_system.get_file(name, str(target)))
        watch(target, task, stall_timeout=self.stall_timeout, deadline=deadline, key=self.key)


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
