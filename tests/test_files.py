"""Files are complete or absent."""

import os
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from clipmini.files import filter_rows, write_atomically


def test_writes_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new/file"
    write_atomically(path, b"one")

    def fail(file: BinaryIO) -> None:
        file.write(b"tw")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["file"]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    link, target = tmp_path / "results.jsonl", tmp_path / "shared/results.jsonl"
    link.symlink_to(target)  # which is not there yet
    for content in (b"one", b"two"):
        write_atomically(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    assert os.listdir(tmp_path / "shared") == ["results.jsonl"]


def test_a_pipe_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"one")
    assert os.read(reader, 9) == b"one" and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)


def test_an_error_names_the_file(small_disk: Path) -> None:
    with pytest.raises(OSError, match=rf"No space left on device: '{small_disk}/file'$"):
        write_atomically(small_disk / "file", bytes(500_000))
    with pytest.raises(OSError, match=r"No such file or directory: '/proc/self/file'$"):
        write_atomically(Path("/proc/self/file"), b"one")


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [
        threading.Thread(target=write_atomically, args=(path, content)) for content in contents for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["file"]


def test_rows_are_filtered(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    filter_rows(path, lambda file: file)
    assert not path.exists()
    path.write_text("a\nb\nc")
    filter_rows(path, lambda file: (line for line in file if line.strip() != "b"))
    assert path.read_text() == "a\nc"
