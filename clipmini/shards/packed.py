"""A directory of packed shards: what tells it from others, keeps two processes apart and says what is done."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmini.errors import UserError

SETTINGS, SIZES, REJECTED = "pack.json", "sizes.json", "rejected.jsonl"
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
    """Keep a second process from packing into a folder, where the file system can; it ends with the process.

    Raises:
        UserError: another process is at it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"output={folder}: another process is packing into it") from error
        except OSError:  # no locks on this file system
            pass
        yield
    finally:
        os.close(descriptor)


def check_output(folder: Path) -> None:
    """See that a directory is new, empty or the work of this command.

    Raises:
        UserError: it is not.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder}: is a file, not a directory")
    if folder.exists() and not (folder / SETTINGS).exists() and set(folder.iterdir()) - set(find_leftovers(folder)):
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
