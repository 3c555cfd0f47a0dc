"""A directory of packed shards: what tells it from others, keeps two commands apart and says what is done."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clipmini.errors import UserError

SETTINGS, SIZES, REJECTED = "pack.json", "sizes.json", "rejected.jsonl"
LOCK = ".lock"  # held by the command that writes; what it says is the command's, for others
REPORTS = ".pack"  # one report for each shard that is there, until all are
DIGEST = "digest"  # key of the settings: of the input's files
DAMAGED = "damaged_shard"  # cause in rejected.jsonl: not of a sample, but of all after it
# As `write_atomically` names what is not complete.
LEFTOVERS = tuple(f"{name}.*.tmp" for name in (".[0-9]*.tar", f".{SETTINGS}", f".{SIZES}", f".{REJECTED}"))


@dataclass(frozen=True)
class Packed:
    """What was packed: pairs by the name of their shard, and how many samples were left out."""

    sizes: dict[str, int]
    rejected: int

    def __str__(self) -> str:
        return f"{sum(self.sizes.values()):,} pairs in {len(self.sizes):,} shards"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other commands from writing into a folder, where the file system can; it ends with the process.

    The folder is made if it is not there, and removed if nothing was written into it.

    Raises:
        UserError: another command is at it, or it cannot be written.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = take(folder / LOCK)
    except FileExistsError as error:
        raise UserError(f"output={folder}: is a file, not a directory") from error
    except OSError as error:
        raise UserError(f"output={folder}: {error}; once that is mended, the same command goes on") from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def take(path: Path) -> BinaryIO:
    """Open a file that nobody else has locked, lock it, and write into it who did.

    Raises:
        UserError: somebody else has.
        OSError: it cannot be written.
    """
    while True:
        file = open(path, "a+b", buffering=0)  # an exclusive lock on a network needs one that may be written
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "it has just begun"
            file.close()
            raise UserError(
                f"output={path.parent}: another command writes into it ({holder}): wait for its end, or choose another"
            ) from error
        except OSError:  # no locks on this file system
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            with contextlib.suppress(OSError):  # a full disk, on which there may be nothing left to write
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()  # its holder has removed it since


def check_output(folder: Path) -> None:
    """See that a directory is new, empty or the work of this command.

    Raises:
        UserError: it is not.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder}: is a file, not a directory")
    ours = {*find_leftovers(folder), folder / LOCK}
    if folder.exists() and not (folder / SETTINGS).exists() and set(folder.iterdir()) - ours:
        raise UserError(f"output={folder}: is not empty, and holds nothing packed by this command; choose another")


def find_leftovers(folder: Path) -> list[Path]:
    """List what a killed process left half written."""
    return [path for pattern in (*LEFTOVERS, f"{REPORTS}/.[0-9]*.json.*.tmp") for path in folder.glob(pattern)]


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written, and the reports if it died while it removed them."""
    for path in find_leftovers(folder):
        path.unlink(missing_ok=True)  # its worker may only just be dying, and remove it too
    if (folder / SIZES).exists():
        shutil.rmtree(folder / REPORTS, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"output={path.parent}: cannot read its {path.name}: {error}; choose another output") from error
    if not isinstance(content, dict):
        raise UserError(f"output={path.parent}: its {path.name} is not of this command; choose another output")
    return content


def check_record(folder: Path, record: dict[str, Any]) -> None:
    """Compare what was packed into a folder with what is asked for.

    Raises:
        UserError: they differ.
    """
    before = read_object(folder / SETTINGS)
    if record.keys() - before.keys():
        raise UserError(f"output={folder}: its {SETTINGS} is not of this command; choose another output")
    check_same(folder, record, before)


def check_same(folder: Path, record: dict[str, Any], before: dict[str, Any]) -> None:
    """See that what a folder was begun with is what is asked for.

    Raises:
        UserError: it is not; the digest of the input's files is told in words.
    """
    different = [key for key in record if before.get(key) != record[key]]
    told = [f"{key}={record[key]} (it was {before.get(key)})" for key in different if key != DIGEST]
    if different == [DIGEST]:
        told = ["files of the input: their names, sizes or times have changed"]
    if different:
        raise UserError(f"output={folder}: was begun with other {', '.join(told)}; choose another output")


def read_packed(folder: Path) -> Packed:
    """Return what was packed.

    Raises:
        UserError: files have been taken away since.
    """
    sizes = read_object(folder / SIZES)
    names = (*sizes, REJECTED)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"output={folder}: was packed, but {len(missing)} of its {len(names)} files are gone, first {missing[0]}; "
            "choose another output"
        )
    rejected = [json.loads(line)["cause"] != DAMAGED for line in (folder / REJECTED).read_bytes().splitlines()]
    return Packed(sizes, sum(rejected))
