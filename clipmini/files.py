"""Files that are complete or absent, and files of rows that a resumed run takes back to where it goes on."""

import contextlib
import fcntl
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from clipmini.errors import did_you_mean

MAX_NEIGHBOURS = 1000  # names of a directory that are looked at for one like that of a file that is not there


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whatever happens, its name holds all of the new content or all of the old.

    A temporary file in the same directory (a rename is atomic within a file system only), flushed to the disk, renamed,
    and the directory flushed too. A link stays, and what it leads to is written; so is a device or a pipe, at once.

    Raises:
        OSError: it cannot be written; with its name, which errors of a full disk lack.
    """
    real = Path(os.path.realpath(path))
    real.parent.mkdir(parents=True, exist_ok=True)
    temporary = real.with_name(f".{real.name}.{os.urandom(4).hex()}.tmp")  # others may write it too
    try:
        if real.exists() and not real.is_file():
            with open(real, "wb") as file:
                write_to(file, content)
            return
        write_durably(temporary, content)
        os.replace(temporary, real)
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(temporary), str(real)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(real.parent)


def write_durably(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as file:
        write_to(file, content)
        file.flush()
        os.fsync(file.fileno())


def write_to(file: BinaryIO, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write into an open file."""
    file.write(content) if isinstance(content, bytes) else content(file)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a file that is read and then replaced, where the file system can.

    The file itself is locked, and made if it is not there, so that nothing else lies about; the lock ends with the
    process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "ab") as file:
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return
            # Its holder has replaced it since: what is locked is the old one.


def tell_neighbours(path: str | Path) -> str:
    """Return ` (did you mean ...?)` with what has a name like that of a path that does not exist, or nothing."""
    parent, name = os.path.split(path)
    with contextlib.suppress(OSError), os.scandir(parent or ".") as entries:
        return did_you_mean(name, [entry.name for entry in itertools.islice(entries, MAX_NEIGHBOURS)])
    return ""


def filter_rows(path: Path, choose: Callable[[TextIO], Iterable[str]]) -> None:
    """Rewrite a text file with the lines that are chosen of it; a file that is missing stays so."""
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            write_atomically(path, lambda new: new.writelines(line.encode() for line in choose(file)))
