"""Reading single samples out of tars."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from conftest import read_sample, write_tar

from clipmini.data.store import PairFormat, ShardStore, index_shard, split_name


def test_reads_what_tarfile_reads(shards: Path) -> None:
    store = ShardStore(PairFormat(("json", "txt")))
    path = str(shards / "b.tar")
    with tarfile.open(path) as archive:
        expected = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    found = {
        f"{store.key(path, index)}.{extension}": data
        for index in range(20)
        for extension, data in store.read(path, index).items()
    }
    assert found == expected


def test_only_some_members(shards: Path) -> None:
    assert set(ShardStore(PairFormat()).read(str(shards / "a.tar"), 0, only=("txt",))) == {"txt"}


def test_members_that_make_no_pair_are_never_read(tmp_path: Path) -> None:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    write_tar(tmp_path / "x.tar", [{**sample, "pyd": pickle.dumps({}), "npy": b"1"}])
    assert set(ShardStore(PairFormat()).read(str(tmp_path / "x.tar"), 0)) == {"webp", "txt"}


def test_members_of_one_key_may_stand_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg", "a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(name[0].encode()))
    index = index_shard(str(tmp_path / "x.tar"), PairFormat())
    assert [sample.key for sample in index.samples] == ["a", "b"]


def test_long_names(tmp_path: Path) -> None:
    for format, name in ((tarfile.GNU_FORMAT, "gnu"), (tarfile.PAX_FORMAT, "pax")):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=format) as archive:
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{'d' * 120}/{'k' * 150}.{extension}")
                info.size = 3
                archive.addfile(info, io.BytesIO(extension.encode()))
        store = ShardStore(PairFormat())
        assert store.read(str(tmp_path / f"{name}.tar"), 0) == {"jpg": b"jpg", "txt": b"txt"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("dir.d/a.b.JPG", ("dir.d/a", "b.jpg")),
        ("plain", ("plain", "")),
        ("./x.txt", ("./x", "txt")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_a_tar_that_was_cut_after_its_index_was_made(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = (shards / "a.tar").read_bytes()
    path.write_bytes(data)
    store = ShardStore(PairFormat())
    assert store.read(str(path), 29)
    store.files.clear()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match="ends inside"):
        store.read(str(path), 29)


def test_travels_without_open_files(shards: Path) -> None:
    store = ShardStore(PairFormat())
    first = store.read(str(shards / "a.tar"), 3)
    copy = pickle.loads(pickle.dumps(store))
    assert not copy.files and copy.read(str(shards / "a.tar"), 3) == first
