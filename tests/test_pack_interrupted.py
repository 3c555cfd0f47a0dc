"""Packing that is killed, interrupted, run twice or out of room: nothing is lost, and the same command goes on."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forked
from packing import OPTIONS, SLOW, read_files, run_pack, write_folder
from PIL import Image

from clipmini.errors import UserError
from clipmini.shards.packed import Packed


@pytest.fixture(scope="module")
def slow_pictures(samples: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 pictures that take a while each."""
    large = []
    for sample in samples[:16]:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(sample["webp"])).resize((1000, 1000)).save(buffer, "JPEG")
        large.append({"__key__": sample["__key__"], "jpg": buffer.getvalue(), "txt": sample["txt"]})
    return write_folder(tmp_path_factory.mktemp("slow") / "slow", large)


@pytest.fixture(scope="module")
def slowly_packed(slow_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files that packing those makes when nothing comes in between."""
    output = tmp_path_factory.mktemp("reference") / "output"
    run_pack(slow_pictures, output, **SLOW)
    return read_files(output)


@contextlib.contextmanager
def packing_slowly(source: Path, output: Path) -> Iterator[Forked]:
    """Start the command, and go on when some shards are there, but not all."""
    options = {**OPTIONS, **SLOW, "resize": "null", "input": source, "output": output}
    arguments = [f"{key}={value}" for key, value in options.items()]
    stdout, stderr = (output.parent / name for name in ("stdout", "stderr"))
    with Forked(["shards", "pack", *arguments], output.parent, [(stdout, stderr)]) as process:
        while len(list(output.glob("*.tar"))) < 2:
            assert process.poll() is None, stderr.read_text()
            time.sleep(0.01)
        yield process


def wait_for_end_of_group(group: int) -> None:
    """Return when no process of a group is left."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("processes are left")


# Stopped and started again


def test_the_same_command_goes_on_after_a_kill(
    slow_pictures: Path, slowly_packed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with packing_slowly(slow_pictures, output) as process:
        process.kill()
    wait_for_end_of_group(process.pids[0])
    there = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.glob("*.tar")}
    assert 2 <= len(there) < 8, "it was to be killed in the middle"
    assert all(content == slowly_packed[name] for name, (content, _) in there.items())
    assert not (output / "sizes.json").exists()
    run_pack(slow_pictures, output, **SLOW)
    assert read_files(output) == slowly_packed
    # A shard has its report before it has its name, so that none is written twice.
    assert all((output / name).stat().st_mtime_ns == written for name, (_, written) in there.items())


def test_ctrl_c_ends_all_processes_and_loses_nothing(
    slow_pictures: Path, slowly_packed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with packing_slowly(slow_pictures, output) as process:
        process.send_to_groups(signal.SIGINT)
        assert process.wait(timeout=60) == [130]
        assert (tmp_path / "stderr").read_text() == "clipmini: interrupted\n"
        wait_for_end_of_group(process.pids[0])
    assert {path.name for path in output.iterdir()} < {*slowly_packed, ".pack"}  # nothing half written
    assert 2 <= len(list(output.glob("*.tar"))) < 6, "the two processes did not stop in the middle of a shard"
    run_pack(slow_pictures, output, **SLOW)
    assert read_files(output) == slowly_packed


def test_a_second_process_is_refused(pictures: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from clipmini.shards.packed import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"locked\n"
        who = f"process {first.pid} on {re.escape(socket.gethostname())}"
        with pytest.raises(UserError, match=f"^output={tmp_path}: another command writes into it .{who}.: wait for"):
            run_pack(pictures, tmp_path)
        assert (tmp_path / ".lock").exists()
        first.kill()
    run_pack(pictures, tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_second_run_changes_nothing(copy: Path, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clipmini")
    before = {path: (path.read_bytes(), path.stat()) for path in copy.iterdir()}
    assert run_pack(pictures, copy, num_workers=1) == Packed({"00000.tar": 10, "00001.tar": 10, "00002.tar": 5}, 0)
    assert {path: (path.read_bytes(), path.stat()) for path in copy.iterdir()} == before
    assert f"already packed: 25 pairs in 3 shards in {copy}" in caplog.messages


def test_what_a_process_left_that_was_killed_at_the_very_end_is_removed(
    copy: Path, packed: Path, pictures: Path
) -> None:
    (copy / ".pack").mkdir()
    (copy / ".pack/00002.json").write_bytes(b"{}")
    (copy / ".sizes.json.0123abcd.tmp").write_bytes(b"{")
    run_pack(pictures, copy)
    assert read_files(copy) == read_files(packed) and not (copy / ".pack").exists()


def test_a_process_killed_at_its_very_start_leaves_a_directory_that_can_be_used(
    packed: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / ".pack.json.0123abcd.tmp").write_bytes(b"{")
    run_pack(pictures, output)
    assert read_files(output) == read_files(packed)


def test_a_full_disk_leaves_whole_files_and_can_be_mended(
    slow_pictures: Path, small_disk: Path, tmp_path: Path
) -> None:
    run_pack(slow_pictures, tmp_path / "reference", samples_per_shard=1)
    expected = read_files(tmp_path / "reference")
    half = sum(map(len, expected.values())) // 2
    subprocess.run(["mount", "-o", f"remount,size={half}", small_disk], check=True)
    with pytest.raises(UserError, match="output=.*No space left on device.*the same command goes on"):
        run_pack(slow_pictures, small_disk / "output", samples_per_shard=1)
    there = {path.name: path.read_bytes() for path in (small_disk / "output").glob("[!.]*") if path.name != "pack.json"}
    assert 0 < len(there) < 16 and all(content == expected[name] for name, content in there.items())
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    run_pack(slow_pictures, small_disk / "output", samples_per_shard=1)
    assert read_files(small_disk / "output") == expected
