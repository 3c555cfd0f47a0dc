"""Reading single samples out of shards, and what is said of those that cannot be read."""

import errno
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import make_cache, read_sample, write_tar

from clipmini.data import store as store_module
from clipmini.data.cache import ShardCache
from clipmini.data.health import Fault
from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import local_shard
from clipmini.data.store import MAX_CAPTION_BYTES, ShardStore
from clipmini.errors import UserError

LIMIT = 10_000_000


def make_store(extensions: tuple[str, ...] = ("txt",), cache: ShardCache | None = None) -> ShardStore:
    return ShardStore(PairFormat(extensions), cache, max_member_bytes=LIMIT)


def test_reads_what_tarfile_reads(shards: Path) -> None:
    store, shard = make_store(("json", "txt")), local_shard(str(shards / "b.tar"))
    with tarfile.open(shard.path) as archive:
        expected = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    found = {
        f"{store.key(shard, index)}.{extension}": data
        for index in range(20)
        for extension, data in store.read(shard, index).items()
    }
    assert found == expected


def test_only_some_members(shards: Path) -> None:
    shard = local_shard(str(shards / "a.tar"))
    assert set(make_store().read(shard, 0, only=("txt",))) == {"txt"}


def test_members_that_make_no_pair_are_never_read(tmp_path: Path) -> None:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    shard = local_shard(str(write_tar(tmp_path / "x.tar", [{**sample, "pyd": pickle.dumps({}), "npy": b"1"}])))
    assert set(make_store().read(shard, 0)) == {"webp", "txt"}


def test_travels_without_open_files(shards: Path) -> None:
    store, shard = make_store(), local_shard(str(shards / "a.tar"))
    first = store.read(shard, 3)
    copy = pickle.loads(pickle.dumps(store))
    assert store.files and not copy.files and copy.read(shard, 3) == first


def fault_of(store: ShardStore, shard: Shard, index: int) -> Fault:
    with pytest.raises(Fault) as caught:
        store.read(shard, index)
    return caught.value


def test_missing_shard(shards: Path, tmp_path: Path) -> None:
    store = make_store()
    assert fault_of(store, Shard(str(tmp_path / "x.tar"), 3), 0).cause == "missing_shard"
    assert store.key(Shard(str(tmp_path / "x.tar"), 3), 0) is None
    write_tar(tmp_path / "x.tar", read_sample("train/noto-00000.tar", 1))
    # What is gone stays gone for this process: looking again for every sample would be slow.
    assert fault_of(store, Shard(str(tmp_path / "x.tar"), 3), 0).cause == "missing_shard"


def test_shard_cut_after_it_was_counted(shards: Path, tmp_path: Path) -> None:
    data = (shards / "a.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: len(data) // 2])
    shard = Shard(str(tmp_path / "x.tar"), 30)
    store = make_store()
    assert set(store.read(shard, 0)) == {"jpg", "txt"}
    fault = fault_of(store, shard, 29)
    assert fault.cause == "damaged_shard" and "ends " in fault.detail and store.key(shard, 29) is None


def test_shard_cut_after_it_was_opened(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = (shards / "a.tar").read_bytes()
    path.write_bytes(data)
    store, shard = make_store(), Shard(str(path), 30)
    store.read(shard, 0)
    os.truncate(path, len(data) // 2)
    fault = fault_of(store, shard, 29)
    assert (fault.cause, fault.detail) == ("damaged_shard", "ends inside .jpg") and store.key(shard, 29)


def test_fewer_pairs_than_counted(shards: Path) -> None:
    fault = fault_of(make_store(), Shard(str(shards / "a.tar"), 33), 32)
    assert (fault.cause, fault.detail) == ("absent_sample", "there are 30 pairs, 33 were counted")


def test_more_pairs_than_counted_would_never_be_seen(shards: Path) -> None:
    with pytest.raises(UserError, match=r"a.tar holds 30 pairs, but 29 were counted.*`clipmini shards index`"):
        make_store().read(Shard(str(shards / "a.tar"), 29), 0)


def test_member_over_the_limit_is_refused_from_its_header(tmp_path: Path) -> None:
    size = 300 * 2**20  # a sparse file: it takes no room, and must not be read
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    tail = (tmp_path / "x.tar").read_bytes()
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + size)
        file.seek(512 + size)
        file.write(tail)
    fault = fault_of(make_store(), local_shard(str(tmp_path / "x.tar")), 0)
    assert (fault.cause, fault.detail) == ("too_many_bytes", f".jpg has {size}, data.max_member_bytes={LIMIT}")


def test_open_shards_are_limited(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN", 3)
    data = (shards / "c.tar").read_bytes()
    for number in range(8):
        (tmp_path / f"{number}.tar").write_bytes(data)
    store = make_store()
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(8), 0, 7, 1]:
        assert store.read(Shard(str(tmp_path / f"{number}.tar"), 14), 13)
        assert len(os.listdir("/proc/self/fd")) - before <= 3
    assert list(store.files) == [str(tmp_path / f"{number}.tar") for number in (0, 7, 1)]


def test_long_indexes_are_kept_and_used_again(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MIN_SAVED", 25)
    cache = make_cache(tmp_path / "cache")
    a, b = (local_shard(str(shards / f"{name}.tar")) for name in "ab")
    expected = [make_store(cache=cache).read(shard, 3) for shard in (a, b)]
    (kept,) = (tmp_path / "cache/shards").iterdir()  # that of 30 pairs, not that of 20
    assert kept.name == f"{a.identity()}.txt.npz"
    monkeypatch.setattr(store_module, "index_file", None)  # a walk would fail now
    assert make_store(cache=cache).read(a, 3) == expected[0]


def test_compressed_shard_that_was_not_seen_before(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(UserError, match="compressed by gzip"):
        make_store().read(Shard(str(tmp_path / "x.tar"), 1), 0)


def test_a_shard_without_pairs_of_the_format_tells_what_it_has(shards: Path) -> None:
    store = ShardStore(PairFormat(("cls",)), max_member_bytes=LIMIT)
    fault = fault_of(store, Shard(str(shards / "a.tar"), 30), 0)
    assert fault.cause == "absent_sample"
    assert fault.detail.endswith("and .cls (data.caption_key), found: .jpg, .json, .txt")


def test_captions_of_megabytes_are_refused_unread(tmp_path: Path) -> None:
    samples = [{"__key__": "a", "jpg": b"x", "txt": b"x" * (MAX_CAPTION_BYTES + 1)}]
    fault = fault_of(make_store(), local_shard(str(write_tar(tmp_path / "x.tar", samples))), 0)
    assert (fault.cause, fault.detail) == ("too_many_bytes", ".txt has 1048577, a caption may have 1048576")


def test_few_files_that_may_be_open_are_enough(shards: Path, tmp_path: Path) -> None:
    data = (shards / "c.tar").read_bytes()
    for number in range(40):
        (tmp_path / f"{number}.tar").write_bytes(data)
    code = (
        "import resource, sys\n"
        "from clipmini.data.index import PairFormat, Shard\n"
        "from clipmini.data.store import ShardStore\n"
        "store = ShardStore(PairFormat(), max_member_bytes=10**7)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        "for number in range(40): assert store.read(Shard(f'{sys.argv[1]}/{number}.tar', 14), 3)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 24))\n"
        "store.close(*store.files)\n"
        "store.read(Shard(f'{sys.argv[1]}/0.tar', 14), 3)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "UserError: cannot open" in result.stderr and "Too many open files; ulimit has the limits" in result.stderr


def test_a_passing_failure_of_the_disk_is_waited_out(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module.time, "sleep", lambda seconds: None)
    store, shard = make_store(), local_shard(str(shards / "a.tar"))
    expected = store.read(shard, 3)
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    pread = os.pread

    def fail(*arguments: int) -> bytes:
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr(store_module.os, "pread", fail)
    assert store.read(shard, 3) == expected and not failures
    failures += [OSError(errno.EIO, "Input/output error")] * 3
    fault = fault_of(store, shard, 3)
    assert (fault.cause, fault.detail) == ("damaged_shard", "Input/output error")
    assert store.read(shard, 3) == expected  # it is not given up for ever
