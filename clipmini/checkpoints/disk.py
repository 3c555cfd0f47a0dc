"""Checkpoints on disk: complete or absent, and checked before they are used.

A checkpoint is a directory, `step-00001000.ckpt`, that is renamed to this name when all of it has reached the disk:
`rank-00000.pt` holds the state (and `rank-00001.pt` the next process's rows of what is in shards), and `manifest.json`,
which is written last, the size and SHA-256 of each file, the step, the samples seen, the digest of the plan, the number
of processes, and versions.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, BinaryIO, cast

import torch

from clipmini.cluster.sharding import merge
from clipmini.errors import UserError
from clipmini.files import sync_directory, write_atomically, write_durably

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BEST = "best.ckpt"  # beside the numbered checkpoints: a link to one of them, or a checkpoint
PARTS_POLL_SECONDS = 0.1
READ_BYTES = 2**20


class Damaged(Exception):
    """A checkpoint is not what its manifest says, or has none."""


class HashedFile:
    """Counts and hashes what torch writes to a file.

    An error of the file is raised by `record`, not in the middle of torch's writer, which would not survive it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
            self.hash.update(data)
        self.bytes += size
        return size

    def flush(self) -> None:
        """Torch asks for it; what needs it flushes the file itself."""

    def record(self) -> dict[str, Any]:
        """Return what a manifest says of this file."""
        if self.error is not None:
            raise self.error
        return {"bytes": self.bytes, "sha256": self.hash.hexdigest()}


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """Return the number of optimizer steps that a checkpoint's name tells."""
    return int(path.stem.removeprefix("step-"))


def list_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first; whether they are valid is not looked at."""
    return sorted(path for path in directory.glob("step-*.ckpt") if re.fullmatch(r"step-\d+\.ckpt", path.name))


def part_name(rank: int) -> str:
    """Return the name of the file that a process writes."""
    return f"rank-{rank:05d}.pt"


def temporary_path(path: Path) -> Path:
    """Return where a checkpoint lies until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def begin_checkpoint(path: Path) -> None:
    """Make the empty temporary directory of a checkpoint; by the first process, before any writes to it.

    Raises:
        OSError: it cannot be made.
    """
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def write_part(path: Path, rank: int, content: Any) -> dict[str, Any]:
    """Write what a process has of a checkpoint, and flush it to the disk.

    Returns:
        What the manifest says of it.
    """
    with open(temporary_path(path) / part_name(rank), "wb") as file:
        hashed = HashedFile(file)
        torch.save(content, cast(IO[bytes], hashed))
        record = hashed.record()
        file.flush()
        os.fsync(file.fileno())
    return record


def discard_checkpoint(path: Path) -> None:
    """Take away what was written of a checkpoint that cannot be completed."""
    shutil.rmtree(temporary_path(path), ignore_errors=True)


def write_record(path: Path, rank: int, record: Mapping[str, Any]) -> None:
    """Tell the first process, which waits for it in `collect_records`, that a part is complete."""
    write_atomically(temporary_path(path) / f"{part_name(rank)}.json", json.dumps(record).encode())


def collect_records(path: Path, world_size: int, timeout: Callable[[], float]) -> dict[str, Any]:
    """Wait for the parts of the other processes, and return what they say of them by the files' names.

    Args:
        timeout: seconds for all of them, asked again and again, since it may become shorter.

    Raises:
        OSError: one did not come in time.
    """
    start = time.monotonic()
    records = {}
    for name in map(part_name, range(1, world_size)):
        file = temporary_path(path) / f"{name}.json"
        while not file.exists():
            if time.monotonic() - start > timeout():
                raise OSError(f"{name} did not come within {timeout():g} seconds: is {path.parent} on a shared disk?")
            time.sleep(PARTS_POLL_SECONDS)
        records[name] = json.loads(file.read_bytes())
        file.unlink()
    return records


def commit_checkpoint(path: Path, about: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write the manifest and give the checkpoint its name; what has this name already is replaced."""
    temporary, old = temporary_path(path), path.with_name(f".{path.name}.old.tmp")
    write_durably(temporary / MANIFEST, json.dumps({**about, "files": files}, indent=2).encode())
    sync_directory(temporary)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself.

    Raises:
        Damaged: it does not.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        assert isinstance(manifest["files"], dict) and isinstance(manifest["step"], int)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise Damaged(f"its {MANIFEST} is missing or cannot be read") from error
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """See that a checkpoint is what its manifest says, byte by byte, and return the manifest.

    Raises:
        Damaged: it is not.
    """
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        file = path / Path(name).name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            raise Damaged(f"{name} has {'no' if size is None else f'{size:,}'} bytes of {record['bytes']:,}")
        if hash_file(file) != record["sha256"]:
            raise Damaged(f"{name} is not what was written (SHA-256)")
    return manifest


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def load_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run.

    Args:
        verify: compare it with its manifest first.

    Raises:
        Damaged: it is not what its manifest says, or has none.
    """
    if verify:
        verify_checkpoint(path)
    return merge(load_parts(path))


def load_parts(path: Path) -> list[dict[str, Any]]:
    """Read what each process wrote of a checkpoint, mapped into memory; no code in it is run.

    Raises:
        Damaged: it does not say how many did.
    """
    return [load_part(path, rank) for rank in range(len(read_manifest(path)["files"]))]


def load_part(path: Path, rank: int = 0) -> dict[str, Any]:
    """Read what a process wrote of a checkpoint; the first one's has all but the others' rows of tensors in shards.

    Raises:
        UserError: there is code in it.
    """
    try:
        return torch.load(path / part_name(rank), map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path}: {part_name(rank)} is what its {MANIFEST} says, but holds code, which is not run: take {path} "
            "away, and the run goes on from the checkpoint before"
        ) from error


def find_newest_valid(directory: Path) -> Path | None:
    """Return the newest checkpoint that is what its manifest says, and tell of each that is not.

    Raises:
        UserError: there are checkpoints, but none of them is valid.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except Damaged as damage:
            log.warning("%s is not used: %s", path, damage)
        else:
            return path
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {directory} is valid, and a run that has some does not start "
            "from the beginning by itself: put back a copy of one, move the directory away, or choose another name="
        )
    return None


def set_aside(directory: Path, newest: Path | None) -> None:
    """Take damaged checkpoints out of the way of the run that goes on before them, and what was never completed.

    They stay, as damaged-step-00001000.ckpt.
    """
    for path in directory.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(directory):
        if newest is not None and path.name > newest.name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(directory: Path, keep_last: int, keep_every_n_steps: int | None) -> None:
    """Delete the oldest checkpoints but for the last ones, milestones, and what best.ckpt is a link to.

    One that cannot be deleted is told, and stays.
    """
    best = directory / BEST
    for path in list_checkpoints(directory)[:-keep_last]:
        is_milestone = keep_every_n_steps is not None and checkpoint_step(path) % keep_every_n_steps == 0
        if is_milestone or (best.is_symlink() and os.readlink(best) == path.name):
            continue
        doomed = path.with_name(f".{path.name}.deleted.tmp")
        try:
            path.rename(doomed)  # at once, so that nobody reads a half of it
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("%s cannot be deleted: %s", path, error)


def keep_best(path: Path) -> None:
    """Make best.ckpt a link to a checkpoint, which `prune` then keeps."""
    best = path.with_name(BEST)
    new = best.with_name(f".{BEST}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(path.name)
    new.replace(best)
