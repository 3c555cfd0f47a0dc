"""Checkpoints are complete or absent, and checked before they are used; killed and full disks lose none."""

import collections
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint

import clipmini.files
from clipmini.checkpoints import disk
from clipmini.checkpoints.writer import DurableCheckpointIO
from clipmini.errors import UserError


def save(directory: Path, step: int, value: float = 0.0) -> Path:
    """Write a checkpoint with one weight."""
    content = {"global_step": step, "state_dict": {"w": torch.full((40,), value)}}
    return save_checkpoint(content, path_of(directory, step))


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.ckpt"


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for name in ("step-00000020.ckpt", "step-00000003.ckpt", ".step-00000030.ckpt.tmp", "step-x.ckpt", "other.ckpt"):
        (tmp_path / name).mkdir()
    found = disk.list_checkpoints(tmp_path)
    assert [disk.checkpoint_step(path) for path in found] == [3, 20]


def test_a_manifest_says_what_a_checkpoint_is(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    manifest = disk.verify_checkpoint(path)
    content = (path / "rank-00000.pt").read_bytes()
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["files"] == {"rank-00000.pt": record} and manifest["step"] == 7
    assert torch.equal(disk.load_checkpoint(path)["state_dict"]["w"], torch.zeros(40))


def flip_a_bit(path: Path) -> None:
    file = path / "rank-00000.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_a_bit, "rank-00000.pt is not what was written"),
    "cut": (lambda path: os.truncate(path / "rank-00000.pt", 100), "rank-00000.pt has 100 bytes of"),
    "empty": (lambda path: os.truncate(path / "rank-00000.pt", 0), "rank-00000.pt has 0 bytes of"),
    "part gone": (lambda path: (path / "rank-00000.pt").unlink(), "rank-00000.pt has no bytes of"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or cannot be read"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 60), "manifest.json is missing or cannot"),
    "other manifest": (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json is missing or cannot"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_past_corrupt(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    action, message = DAMAGES[damage]
    action(path_of(tmp_path, 3))
    with pytest.raises(disk.Damaged, match=message):
        disk.load_checkpoint(path_of(tmp_path, 3))
    assert disk.find_newest_valid(tmp_path) == path_of(tmp_path, 2)
    assert f"{path_of(tmp_path, 3)} is not used: " in caplog.text and message in caplog.text
    # The run goes on from 2: what is damaged is out of its way, but not lost.
    disk.set_aside(tmp_path, path_of(tmp_path, 2))
    assert names(tmp_path) == ["damaged-step-00000003.ckpt", "step-00000001.ckpt", "step-00000002.ckpt"]


def test_never_silently_restarts(tmp_path: Path) -> None:
    assert disk.find_newest_valid(tmp_path / "new") is None
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step))
    with pytest.raises(UserError, match="none of the 2 checkpoints in .* is valid.*choose another name="):
        disk.find_newest_valid(tmp_path)
    assert len(names(tmp_path)) == 2


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
        if step == 2:
            disk.keep_best(path_of(tmp_path, step))
        disk.prune(tmp_path, 2, 3)
    steps = [2, 3, 6, 7]  # the best, multiples of 3, the last two
    assert disk.list_checkpoints(tmp_path) == [path_of(tmp_path, step) for step in steps]
    assert disk.load_checkpoint(tmp_path / "best.ckpt")["global_step"] == 2
    disk.keep_best(path_of(tmp_path, 7))
    disk.prune(tmp_path, 2, None)
    assert names(tmp_path) == ["best.ckpt", "step-00000006.ckpt", "step-00000007.ckpt"]


def test_what_cannot_be_deleted_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError("busy")))
    disk.prune(tmp_path, 2, None)
    assert "step-00000001.ckpt cannot be deleted: busy" in caplog.text


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    path = save(tmp_path, 1, 2.0)
    assert disk.load_checkpoint(path)["state_dict"]["w"][0] == 2 and names(tmp_path) == [path.name]


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "evil"),)

    path = save_checkpoint({"state_dict": Evil()}, path_of(tmp_path, 1))
    with pytest.raises(
        UserError, match="rank-00000.pt is what its manifest.json says, but holds code, which is not run"
    ):
        disk.load_checkpoint(path)
    assert not (tmp_path / "evil").exists()


# Killed at any moment


class Recorder:
    """Numbers what is done to the disk, notes it, and ends the process like a power cut at one of these points."""

    def __init__(self, last: int | None = None) -> None:
        self.last = last
        self.done: list[tuple[str, str]] = []

    def at(self, what: str, path: Any) -> None:
        if len(self.done) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.done.append((what, Path(os.fspath(path)).name))

    def install(self) -> None:
        """Replace what the modules that write checkpoints call; for a process of its own."""
        for name in ("rename", "replace", "mkdir"):
            setattr(os, name, self.around(name, getattr(os, name)))
        files: dict[int, str] = {}
        fsync, descriptor_open, file_open = os.fsync, os.open, open

        def opened(path: Any, *arguments: Any, **options: Any) -> Any:
            file = file_open(path, *arguments, **options)
            files[file.fileno()] = str(path)
            if file.writable():
                self.at("open", path)
                return RecordedFile(file, str(path), self)
            return file

        def os_opened(path: Any, *arguments: Any, **options: Any) -> int:
            descriptor = descriptor_open(path, *arguments, **options)
            files[descriptor] = os.fspath(path)
            return descriptor

        def synced(descriptor: int) -> None:
            self.at("fsync", files[descriptor])
            fsync(descriptor)

        os.fsync, os.open = synced, os_opened  # type: ignore[assignment]
        disk.open = clipmini.files.open = opened  # type: ignore[attr-defined]

    def around(self, name: str, function: Callable) -> Callable:
        def recorded(path: Any, *arguments: Any, **options: Any) -> Any:
            self.at(name, path)
            return function(path, *arguments, **options)

        return recorded


class RecordedFile:
    """A file whose writes are counted, and half done when the process ends there."""

    def __init__(self, file: Any, path: str, recorder: Recorder) -> None:
        self.file, self.path, self.recorder = file, path, recorder

    def write(self, data: Any) -> int:
        if len(self.recorder.done) == self.recorder.last:
            self.file.write(bytes(data)[: memoryview(data).nbytes // 2])
            self.file.flush()
        self.recorder.at("write", self.path)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "RecordedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def save_recorded(directory: Path, last: int | None) -> list[tuple[str, str]]:
    """Save step 2 with the writer of runs, in a process that ends at a point; return what it did if it did not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        recorder = Recorder(last)
        recorder.install()
        durable = DurableCheckpointIO(background=False, retries=0, retry_seconds=0, parts_timeout=1)
        durable.committed = lambda: disk.prune(directory, 2, None)
        path = path_of(directory, 2)
        state = {"w": torch.full((40,), 2.0), "v": torch.arange(30)}
        durable.save_checkpoint({"global_step": 2, "state_dict": state, "about": {"step": 2, "parts": 1}}, path)
        os.write(writer, json.dumps(recorder.done).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if content else -signal.SIGKILL)
    return [(what, name) for what, name in json.loads(content)] if content else []


def test_kill_at_every_write_point(tmp_path: Path) -> None:
    for step in (0, 1):
        save(tmp_path / "whole", step, float(step))
    shutil.copytree(tmp_path / "whole", tmp_path / "uninterrupted")
    done = save_recorded(tmp_path / "uninterrupted", None)
    counts = collections.Counter(what for what, _ in done)
    assert counts["write"] > 5 and counts["fsync"] == 4 and counts["rename"] == 2  # the new one, the oldest
    found = set()
    for point in range(len(done)):
        directory = tmp_path / str(point)
        shutil.copytree(tmp_path / "whole", directory)
        assert not save_recorded(directory, point)
        newest = disk.find_newest_valid(directory)
        assert newest is not None
        content = disk.load_checkpoint(newest)
        step = content["global_step"]
        assert newest == path_of(directory, step) and torch.all(content["state_dict"]["w"] == step)
        assert path_of(directory, 1).exists()
        found.add(step)
        # The next start cleans up, and the same step can be saved.
        disk.set_aside(directory, newest)
        assert all(name.startswith("step-") for name in names(directory))
        save_recorded(directory, None)
        assert disk.find_newest_valid(directory) == path_of(directory, 2)
    assert found == {1, 2}  # the one before, until the new one has its name


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    done = save_recorded(tmp_path, None)
    temporary = ".step-00000002.ckpt.tmp"
    assert [event for event in done if event[0] != "write"] == [
        ("mkdir", temporary),
        ("open", "rank-00000.pt"),
        ("fsync", "rank-00000.pt"),
        ("open", "manifest.json"),
        ("fsync", "manifest.json"),
        ("fsync", temporary),
        ("rename", temporary),
        ("fsync", tmp_path.name),
    ]
