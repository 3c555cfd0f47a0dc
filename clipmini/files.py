"""Files that are complete or absent, and files of rows that a resumed run takes back to where it goes on."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TextIO


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whatever happens, its name holds all of the new content or all of the old.

    A temporary file in the same directory (a rename is atomic within a file system only), flushed to the disk, renamed,
    and the directory flushed too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # others may write it too
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_durably(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(content) if isinstance(content, bytes) else content(file)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def filter_rows(path: Path, choose: Callable[[TextIO], Iterable[str]]) -> None:
    """Rewrite a text file with the lines that are chosen of it; a file that is missing stays so."""
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            write_atomically(path, lambda new: new.writelines(line.encode() for line in choose(file)))
