"""A cache of shards on the disk of a node, shared by all processes there."""

import contextlib
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout

from clipmini.annotations import LONGEST, Limits, matches
from clipmini.data.index import BLOCK, END, Shard, check_first_block, parse_header
from clipmini.data.remote import Remote, WrongContent
from clipmini.errors import UserError, tell_choices

log = logging.getLogger(__name__)

FREE_SHARE = 0.05  # of the disk, left free where no limit is given
PREFETCH_THREADS = 4  # of each loader process
Files = list[tuple[float, int, str]]  # time of the last use, bytes, path


class ShardCache:
    """Fetched shards in a directory of this node: the least recently used go when it is full.

    One process fetches a shard, all others wait for it. A shard that is deleted while it is open stays readable, so
    that a directory smaller than what is in use is slow, but right.

    Args:
        directory: of this node, not of the cluster.
        max_bytes: of the shards in it, but for those that are being fetched; null leaves 5 % of the disk free.
        fetch_timeout: seconds that a shard may take with all tries.
        stall_timeout: seconds without a byte after which a try is given up.
        storage_options: options of fsspec's file systems, by protocol; null: none.
        under: what the keys begin with where this is asked for, for messages; all but training have none.

    Raises:
        UserError: a value out of range, or credentials.
    """

    def __init__(
        self,
        *,
        directory: str,
        max_bytes: int | None,
        fetch_timeout: float,
        stall_timeout: float,
        storage_options: Mapping[str, Mapping[str, Any]] | None,
        under: str = "data.",
    ) -> None:
        self.under, key = under, f"{under}cache"
        for name, value in {"fetch_timeout": fetch_timeout, "stall_timeout": stall_timeout}.items():
            Limits(above=0, most=LONGEST).check(f"{key}.{name}", value)
        Limits(above=0).check(f"{key}.max_bytes", max_bytes, int | None)
        if not matches(storage_options, Mapping[str, Mapping[str, Any]] | None):
            text = "must be options by protocol, as in {s3:{endpoint_url:...}}, or null"
            raise UserError(f"{key}.storage_options={storage_options}: {text}")
        for name in storage_options or {}:
            if name not in (known := fsspec.available_protocols()):
                raise UserError(f"{key}.storage_options.{name}: no such protocol{tell_choices(name, known)}")
        self.directory = Path(directory)
        self.told = f"{'paths.cache' if under else 'cache.directory'}={directory}"  # in messages
        self.max_bytes = max_bytes
        check_no_secrets(storage_options or {}, f"{key}.storage_options")
        self.remote = Remote(storage_options or {}, fetch_timeout, stall_timeout, key)
        self.waiting: queue.Queue[Shard] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "waiting": None}  # a thread does not travel

    def path(self, shard: Shard, suffix: str = ".tar") -> Path:
        """Return where a shard, or something made of it, lies or would lie."""
        return self.directory / "shards" / f"{shard.identity()}{suffix}"

    @contextlib.contextmanager
    def lock(self, name: str, timeout: float = -1) -> Iterator[None]:
        """Keep the other processes of this node out; the system frees the lock when its holder dies.

        Raises:
            Timeout: it was not free for so many seconds; -1 waits as long as it takes.
            UserError: the directory cannot be written.
        """
        path = self.directory / "locks" / f"{name}.lock"
        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout)
        except Timeout:
            raise
        except OSError as error:
            raise UserError(f"{self.told}: cannot be written: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def open(self, shard: Shard) -> int:
        """Open a shard, and fetch it first if it is not here; what is open stays readable when it is deleted.

        Raises:
            FileNotFoundError: there is no such shard.
            UserError: it cannot be had.
        """
        path = self.path(shard)
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(shard)
                continue  # another process may have deleted it since, to make room
            if shard.size not in (-1, os.fstat(file).st_size):  # after a crash of the node, or by someone's hand
                os.close(file)
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):  # another user's
                os.utime(file)  # in use now
            return file

    def fetch(self, shard: Shard, *, wait: bool = True) -> Path:
        """Return a local copy of a shard, which may be deleted to make room as soon as the lock is free.

        Args:
            wait: for another process that is fetching it; else that is a Timeout.

        Raises:
            FileNotFoundError: there is no such shard.
            UserError: it cannot be had.
        """
        path = self.path(shard)
        # 4,096 locks are enough to keep processes apart, and few enough to stay.
        with self.lock(path.name[:3], timeout=-1 if wait else 0):
            if not path.exists():
                start = time.monotonic()
                self.fetch_into(shard, path)
                log.debug("fetched %s in %.1f seconds", shard.path, time.monotonic() - start)
        return path

    def fetch_into(self, shard: Shard, path: Path) -> None:
        """Fetch a shard, look at what came, and only then give it its name."""
        for left in path.parent.glob(f"{path.stem}.*.part"):  # of a process that died: the lock is ours now
            left.unlink(missing_ok=True)

        def attempt(deadline: float) -> None:
            # A name of its own: a try that was given up may still write to its file.
            part = path.with_suffix(f".{os.urandom(4).hex()}.part")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.begin(shard, part)
                self.remote.download(shard.path, part, deadline)
                check_content(part, shard)
                sync(part)
                self.take_in(part, path)
            except (PermissionError, FileNotFoundError) as error:
                if not str(error.filename).startswith(str(self.directory)):
                    raise
                if isinstance(error, PermissionError):
                    raise UserError(f"{self.told}: cannot be written: {error}") from error
                # The locks keep out the processes of one node, and not always those of others.
                reason = f"{error.filename} was deleted while it was fetched"
                raise WrongContent(f"{reason}: {self.told} must be a directory of one node") from error
            finally:
                part.unlink(missing_ok=True)

        try:
            self.remote.persist(shard.path, attempt)
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
            raise UserError(
                f"{self.told}: the disk is full while fetching {shard.path} ({shard.size} bytes): "
                f"take another disk, or a lower {self.under}cache.max_bytes"
            ) from error

    def begin(self, shard: Shard, part: Path) -> None:
        """Make an empty file for a shard, and room for what will come, beside all that is being fetched.

        Raises:
            UserError: it is larger than the whole cache may be.
        """
        with self.lock("room"):
            files = self.list_files(part.parent)
            limit = self.limit(files)
            if shard.size > limit:
                raise UserError(
                    f"{shard.path} has {shard.size} bytes, but {self.told} may hold {max(limit, 0)}: "
                    f"raise {self.under}cache.max_bytes or take another disk"
                )
            # What is being fetched will grow, to about the size of this one.
            coming = sum(max(size, shard.size) for _, size, path in files if path.endswith(".part"))
            delete_oldest(files, limit - coming - max(shard.size, 0))
            part.touch()

    def take_in(self, part: Path, path: Path) -> None:
        """Give a shard that has come its name; those that were fetched at the same time may have taken its room."""
        with self.lock("room"):
            files = self.list_files(part.parent)
            delete_oldest(files, self.limit(files) - part.stat().st_size)
            os.replace(part, path)

    def limit(self, files: Files) -> int:
        """Return the bytes that the directory may hold."""
        if self.max_bytes is not None:
            return self.max_bytes
        disk = shutil.disk_usage(self.directory / "shards")
        return sum(size for _, size, _ in files) + disk.free - int(FREE_SHARE * disk.total)

    def list_files(self, directory: Path) -> Files:
        """List the time of the last use, the size and the path of what is there, and remove what was given up."""
        given_up = time.time() - self.remote.fetch_timeout - self.remote.stall_timeout
        files = []
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".part") and status.st_mtime < given_up:
                    os.unlink(entry.path)  # its process died: one that lives writes to it, or ends
                else:
                    files.append((status.st_mtime, status.st_size, entry.path))
        return files

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Fetch shards in the background; whoever needs one that failed fetches it again and says why."""
        for shard in shards:
            if self.path(shard).exists():
                continue
            if self.waiting is None:
                self.waiting = queue.Queue()
                for _ in range(PREFETCH_THREADS):
                    threading.Thread(target=self.fetch_waiting, args=(self.waiting,), daemon=True).start()
            self.waiting.put(shard)

    def fetch_waiting(self, waiting: "queue.Queue[Shard]") -> None:
        while True:
            shard = waiting.get()
            with contextlib.suppress(OSError, UserError):  # a lock that another process holds is a TimeoutError
                self.fetch(shard, wait=False)


def delete_oldest(files: Files, limit: int) -> None:
    """Delete the shards that were used least recently until the others have so many bytes at most."""
    shards = sorted(file for file in files if not file[2].endswith(".part"))
    total = sum(size for _, size, _ in shards)
    for _, size, path in shards:
        if total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= size


def check_no_secrets(options: Mapping[str, Any], key: str) -> None:
    """Refuse credentials: a config is written into every run and every checkpoint.

    Raises:
        UserError: there are some.
    """
    for name, value in options.items():
        if isinstance(value, Mapping):
            check_no_secrets(value, f"{key}.{name}")
        elif re.search(r"secret|passw|token|credential|connection_string|(^|_)key($|_id$)", str(name)):
            raise UserError(f"{key}.{name}: give credentials in the environment, the config is written to files")


def sync(path: Path) -> None:
    """Have the content of a file on the disk before its name is."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_content(path: Path, shard: Shard) -> None:
    """See that what came is a tar, and all of it.

    Raises:
        WrongContent: it is not.
        UserError: it is a compressed tar.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(BLOCK)
        file.seek(max(0, size - BLOCK))
        last = file.read()
    check_first_block(first, shard.path)
    try:
        if first != END:
            parse_header(first)
    except ValueError as error:
        raise WrongContent(f"this is no tar, it begins with {first[:40]!r}") from error
    if shard.size >= 0 and size != shard.size:
        raise WrongContent(f"{size} bytes came of {shard.size}")
    if shard.size < 0 and last != END:
        raise WrongContent(f"the tar ends early, after {size} bytes")
