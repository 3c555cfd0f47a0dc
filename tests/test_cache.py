"""The cache of remote shards against servers and disks that fail in every way, with real processes."""

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_cache, read_sample, write_tar
from servers import Server, serve

from clipmini.data.cache import ShardCache
from clipmini.data.health import Fault
from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import locate
from clipmini.data.store import ShardStore
from clipmini.errors import UserError


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serve(shards) as server:
        yield server


def shard_of(server: Server, name: str, cache: ShardCache) -> Shard:
    (shard,) = locate(f"{server.url}/{name}", "data.train", cache.remote, allow_pipe=False)
    return shard


def left_over(directory: Path) -> list[str]:
    return [path.name for path in (directory / "shards").iterdir() if path.suffix != ".tar"]


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause 0.5, 1, 2 seconds between tries, so that the last try in 3 seconds has half of them on a busy machine."""
    monkeypatch.setattr(random, "uniform", lambda low, high: low)


@pytest.mark.parametrize(
    "faults", [["refuse", "refuse"], ["half"], ["short"], ["html"], ["stall"], ["slow"]], ids=lambda faults: faults[0]
)
def test_passing_faults_are_waited_out(faults: list[str], server: Server, shards: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, stall_timeout=0.5)
    shard = shard_of(server, "a.tar", cache)
    server.faults["a.tar"] = list(faults)
    assert cache.fetch(shard).read_bytes() == (shards / "a.tar").read_bytes()
    assert not server.faults["a.tar"] and not left_over(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuse", r"a\.tar: ClientResponseError: 503.*tried . times \(data.cache.fetch_timeout=3 seconds\)"),
        ("half", r"a\.tar: ClientPayloadError: .*tried . times"),
        ("short", r"a\.tar: WrongContent: .* bytes came of .*; tried . times"),
        ("html", r"a\.tar: WrongContent: this is no tar, it begins with b'<html>.*; tried . times"),
        ("stall", r"a\.tar: Stalled: (no byte for 0.3 seconds|only 128000 bytes came in time) .*; tried . times"),
    ],
)
def test_lasting_faults_end_in_one_message(
    fault: str, message: str, server: Server, tmp_path: Path, short_pauses: None
) -> None:
    cache = make_cache(tmp_path, fetch_timeout=3.0, stall_timeout=0.3 if fault == "stall" else 60.0)
    shard = shard_of(server, "a.tar", cache)
    server.faults["a.tar"] = [fault] * 50
    with pytest.raises(UserError, match=message) as caught:
        cache.fetch(shard)
    assert "nothing is lost" in str(caught.value) and "\n" not in str(caught.value)
    assert not left_over(tmp_path) and not cache.path(shard).exists()


@pytest.mark.parametrize("fault", ["short", "html", "half"])
def test_a_server_that_tells_no_size(fault: str, server: Server, shards: Path, tmp_path: Path) -> None:
    server.has_lengths = False
    cache = make_cache(tmp_path, fetch_timeout=20.0)
    shard = Shard(f"{server.url}/a.tar", -1)
    server.faults["a.tar"] = [fault]
    assert cache.fetch(shard).read_bytes() == (shards / "a.tar").read_bytes()
    server.faults["b.tar"] = [fault] * 9
    with pytest.raises(
        UserError, match=r"(the tar ends early, after|this is no tar, it begins with b'<html>).*tried 3"
    ):
        cache.fetch(Shard(f"{server.url}/b.tar", -1))


def test_no_permission_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    shard = shard_of(server, "a.tar", cache)
    server.faults["a.tar"] = ["forbid"] * 9
    with pytest.raises(UserError, match=r"a\.tar: ClientResponseError: 403.*give credentials in the environment"):
        cache.fetch(shard)
    assert server.requests["a.tar"] == 1


def test_shard_that_is_gone_is_a_fault_and_not_the_end(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    with pytest.raises(FileNotFoundError):
        cache.fetch(Shard(f"{server.url}/x.tar", 3, 10, "v"))
    store = ShardStore(PairFormat(), cache, max_member_bytes=10**7)
    with pytest.raises(Fault, match="missing_shard"):
        store.read(Shard(f"{server.url}/x.tar", 3, 10, "v"), 0)


def test_equal_base_names_are_kept_apart(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 2)
    for bucket, sample in zip(("laion", "coyo"), samples, strict=True):
        write_tar(tmp_path / f"www/{bucket}/00000.tar", [sample])
    cache = make_cache(tmp_path / "cache")
    store = ShardStore(PairFormat(), cache, max_member_bytes=10**7)
    with serve(tmp_path / "www") as server:
        for bucket, sample in zip(("laion", "coyo"), samples, strict=True):
            shard = shard_of(server, f"{bucket}/00000.tar", cache)
            assert store.read(shard, 0) == {"webp": sample["webp"], "txt": sample["txt"]}


@pytest.mark.parametrize("has_etags", [True, False])
def test_a_changed_shard_is_fetched_again(has_etags: bool, tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 2)
    path = write_tar(tmp_path / "www/a.tar", samples[:1])
    cache = make_cache(tmp_path / "cache")
    with serve(tmp_path / "www") as server:
        server.has_etags = has_etags
        before = shard_of(server, "a.tar", cache)
        cache.fetch(before)
        write_tar(path, samples[1:])
        os.utime(path, (time.time() + 5,) * 2)  # a date has whole seconds
        assert path.stat().st_size == before.size  # as of most tars: they are padded
        assert cache.fetch(shard_of(server, "a.tar", cache)).read_bytes() == path.read_bytes()


def fetch_and_read(shard: Shard, directory: str, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    assert os.path.getsize(make_cache(Path(directory)).fetch(shard)) == shard.size


def test_a_cached_shard_that_is_cut_is_fetched_again(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    shard = shard_of(server, "a.tar", cache)
    os.truncate(cache.fetch(shard), 1000)  # as after a crash of the node
    file = cache.open(shard)
    assert os.fstat(file).st_size == shard.size and server.requests["a.tar"] == 2
    os.close(file)


def test_a_server_that_trickles_is_given_up_at_the_deadline(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, fetch_timeout=0.3)
    shard = shard_of(server, "a.tar", cache)
    server.faults["a.tar"] = ["slow"]  # a second for a file, and never still for long
    with pytest.raises(UserError, match=r"Stalled: only \d+ bytes came in time \(data.cache.fetch_timeout\); tried 1"):
        cache.fetch(shard)


def test_many_processes_fetch_a_shard_once(server: Server, tmp_path: Path) -> None:
    shard = shard_of(server, "a.tar", make_cache(tmp_path))
    server.faults["a.tar"] = ["slow"]
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=fetch_and_read, args=(shard, str(tmp_path), start)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert server.requests["a.tar"] == 1


def test_a_process_that_dies_while_it_fetches_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    shard = shard_of(server, "a.tar", cache)
    server.faults["a.tar"] = ["stall"]
    context = multiprocessing.get_context("fork")
    start = context.Event()
    start.set()
    process = context.Process(target=fetch_and_read, args=(shard, str(tmp_path), start))
    process.start()
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in tmp_path.glob("shards/*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert left_over(tmp_path)
    assert cache.fetch(shard).stat().st_size == shard.size  # the lock went with the process
    assert not left_over(tmp_path)


def test_what_was_given_up_long_ago_is_removed(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    (tmp_path / "shards").mkdir()
    for name, age in (("old", 3600), ("new", 1)):
        part = tmp_path / f"shards/{name}.0.part"
        part.write_bytes(b"x")
        os.utime(part, (time.time() - age,) * 2)
    cache.fetch(shard_of(server, "a.tar", cache))
    assert left_over(tmp_path) == ["new.0.part"]


def test_cache_smaller_than_what_is_read_is_slow_but_right(server: Server, shards: Path, tmp_path: Path) -> None:
    sizes = {name: (shards / f"{name}.tar").stat().st_size for name in "abc"}
    cache = make_cache(tmp_path, max_bytes=sizes["a"] + 10)
    store = ShardStore(PairFormat(), cache, max_member_bytes=10**7)
    local = ShardStore(PairFormat(), max_member_bytes=10**7)
    found = {name: shard_of(server, f"{name}.tar", cache) for name in "abc"}
    for index in range(14):
        for name, shard in found.items():
            assert store.read(shard, index) == local.read(Shard(str(shards / f"{name}.tar"), -1), index)
    assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= sizes["a"] + 10
    assert server.requests["a.tar"] == 1  # an open shard that is deleted stays readable
    store.close_remote()
    assert store.read(found["a"], 13) and server.requests["a.tar"] == 2
    other = ShardStore(PairFormat(), cache, max_member_bytes=10**7)  # as another process, that has nothing open
    assert other.read(found["b"], 0) == store.read(found["b"], 0)
    assert server.requests["b.tar"] == 2


def test_least_recently_used_goes_first(server: Server, shards: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    paths = {name: cache.fetch(shard_of(server, f"{name}.tar", cache)) for name in "abc"}
    for age, name in ((300, "b"), (200, "c"), (100, "a")):
        os.utime(paths[name], (time.time() - age,) * 2)
    ShardStore(PairFormat(), cache, max_member_bytes=10**7).read(shard_of(server, "b.tar", cache), 0)  # used now
    write_tar(shards.parent / "d.tar", read_sample("train/noto-00000.tar", 3))
    small = make_cache(tmp_path, max_bytes=sum(path.stat().st_size for path in paths.values()))
    with serve(shards.parent) as other:
        small.fetch(shard_of(other, "d.tar", small))
    assert [name for name in "abc" if paths[name].exists()] == ["a", "b"]


def test_shards_that_come_at_the_same_time_keep_the_limit(server: Server, tmp_path: Path) -> None:
    found = [shard_of(server, f"{name}.tar", make_cache(tmp_path)) for name in "abc"]
    limit = max(shard.size for shard in found) + 10
    cache = make_cache(tmp_path, max_bytes=limit)
    server.faults = {f"{name}.tar": ["slow"] for name in "abc"}
    cache.prefetch(found)
    deadline = time.monotonic() + 20
    while sum(server.requests.values()) < 3 or left_over(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("shards/*.tar")) <= limit


def test_shard_larger_than_the_cache_is_refused(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, max_bytes=1000)
    with pytest.raises(
        UserError, match=r"a\.tar has \d+ bytes, but paths.cache=.* may hold 1000: raise data.cache.max"
    ):
        cache.fetch(shard_of(server, "a.tar", cache))


def test_full_disk_is_one_message_and_works_again_with_room(server: Server, small_disk: Path) -> None:
    cache = make_cache(small_disk, max_bytes=10**9)
    shard = shard_of(server, "a.tar", cache)
    (small_disk / "other").write_bytes(bytes(300 * 1024))
    with pytest.raises(UserError, match=r"paths.cache=.*disk: the disk is full while fetching .*a\.tar .*take another"):
        cache.fetch(shard)
    assert not left_over(small_disk)
    (small_disk / "other").unlink()
    assert cache.fetch(shard).stat().st_size == shard.size


def test_without_a_limit_some_of_the_disk_stays_free(server: Server, small_disk: Path) -> None:
    cache = make_cache(small_disk)
    for name in "abcabc":
        cache.fetch(shard_of(server, f"{name}.tar", cache))
        assert sum(path.stat().st_size for path in (small_disk / "shards").iterdir()) <= 0.95 * 400 * 1024
    assert sum(server.requests.values()) > 3  # they do not all fit


def test_prefetched_shards_are_there_before_they_are_asked_for(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    found = [shard_of(server, f"{name}.tar", cache) for name in "abc"]
    server.faults["b.tar"] = ["forbid"]  # fails in the background, without a word
    deadline = time.monotonic() + 20
    while not (cache.path(found[0]).exists() and cache.path(found[2]).exists() and not server.faults["b.tar"]):
        cache.prefetch(found)  # again: two that have the same lock by chance do not wait for each other
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert cache.fetch(found[1]).exists()


def test_nothing_is_started_for_what_is_there(server: Server, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    shard = shard_of(server, "a.tar", cache)
    cache.fetch(shard)
    before = threading.active_count()
    cache.prefetch([shard])
    cache.prefetch([])
    assert threading.active_count() == before and server.requests["a.tar"] == 1


def test_pipes_are_fetched_like_all_else(shards: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    path = cache.fetch(Shard(f"pipe:cat {shards}/a.tar | cat", -1))
    assert path.read_bytes() == (shards / "a.tar").read_bytes()


def test_a_file_that_others_delete_while_it_is_fetched_is_no_shard_that_is_gone(
    shards: Path, tmp_path: Path, short_pauses: None
) -> None:
    cache, delete = make_cache(tmp_path / "cache"), f"rm {tmp_path}/cache/shards/*.part"  # as a second node would
    path = cache.fetch(Shard(f"pipe:cat {shards}/a.tar; mkdir {tmp_path}/once 2>&- && {delete} || true", -1))
    assert path.read_bytes() == (shards / "a.tar").read_bytes()
    with pytest.raises(
        UserError, match=r"part was deleted while .*: paths.cache=.*/cache must be .* of one node; tried 3 times"
    ):
        cache.fetch(Shard(f"pipe:cat {shards}/a.tar; {delete}", -1))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {shards}/a.tar; exit 7", "exit code 7"),
        ("cat {shards}/nowhere.tar | cat", "exit code 1: cat: .*nowhere.tar: No such file"),
        ("head -c 5000 {shards}/a.tar", "WrongContent: the tar ends early, after 5000 bytes"),
        ("echo hello", r"WrongContent: this is no tar, it begins with b.hello"),
        ("true", r"WrongContent: this is no tar, it begins with b''"),
        ("sleep 60", r"Stalled: (no byte for 0.3 seconds|only 0 bytes came in time)"),
    ],
)
def test_pipes_that_fail_are_told(command: str, message: str, shards: Path, tmp_path: Path, short_pauses: None) -> None:
    cache = make_cache(tmp_path, fetch_timeout=3.0, stall_timeout=0.3 if "sleep" in command else 60.0)
    with pytest.raises(UserError, match=message):
        cache.fetch(Shard(f"pipe:{command.format(shards=shards)}", -1))
    assert not left_over(tmp_path)


def test_compressed_content_is_refused_at_once(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a tar compressed by gzip: samples are read at random"):
        make_cache(tmp_path).fetch(Shard(f"pipe:gzip < {shards}/a.tar", -1))


@pytest.mark.parametrize("name", ["key", "secret", "token", "aws_secret_access_key", "account_key", "password"])
def test_credentials_are_not_written_into_configs(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.cache.storage_options.s3.{name}: give credentials in the environment"):
        make_cache(tmp_path, storage_options={"s3": {name: "AKIA"}})
    with pytest.raises(UserError, match=rf"storage_options.s3.client_kwargs.{name}: give credentials"):
        make_cache(tmp_path, storage_options={"s3": {"anon": False, "client_kwargs": {name: "AKIA"}}})
    make_cache(tmp_path, storage_options={"s3": {"endpoint_url": "http://x", "anon": True, "requester_pays": True}})


@pytest.mark.parametrize("name", ["max_bytes", "fetch_timeout", "stall_timeout"])
def test_limits(name: str, tmp_path: Path) -> None:
    for under in ("data.", ""):
        with pytest.raises(UserError, match=f"^{under}cache.{name}=0: must be above 0"):
            make_cache(tmp_path, under=under, **{name: 0})


def test_the_directory_has_the_key_of_who_asks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for under, key in (("data.", "paths.cache"), ("", "cache.directory")):
        cache = make_cache(tmp_path / "file", under=under)
        with pytest.raises(UserError, match=f"^{key}={tmp_path}/file: cannot be written: "), cache.lock("a"):
            pass
