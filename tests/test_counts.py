"""Where the numbers of pairs come from, in which order, and when they are too old to be used."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import make_cache, read_sample, write_tar
from forked import Forked
from servers import serve

from clipmini.data import counts
from clipmini.data.counts import INDEX_NAME, count_pairs
from clipmini.data.index import PairFormat
from clipmini.data.locate import locate
from clipmini.errors import UserError

FORMAT = PairFormat()


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """The three shards in a directory of the test's own."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def count(shards: Path | str, cache: Path, *, again: bool = False, pair_format: PairFormat = FORMAT) -> list[int]:
    store = make_cache(cache)
    found = locate(str(shards), "data.train", store.remote, allow_pipe=False)
    return [shard.num_samples for shard in count_pairs(found, pair_format, store, "data.train", again=again)]


def tell_sizes(directory: Path, sizes: dict[str, int]) -> None:
    (directory / "sizes.json").write_text(json.dumps(sizes))


def tell_statistics(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        statistics = {"count": size + 5, "successes": size, "failed_to_download": 5}
        (directory / name.replace(".tar", "_stats.json")).write_text(json.dumps(statistics))


def tell_energon(directory: Path, sizes: dict[str, int]) -> None:
    (directory / ".nv-meta").mkdir()
    (directory / ".nv-meta/.info.yaml").write_text(yaml.dump({"shard_counts": sizes}))


def tell_energon_json(directory: Path, sizes: dict[str, int]) -> None:
    (directory / ".nv-meta").mkdir()
    (directory / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": sizes}))


@pytest.mark.parametrize("tell", [tell_sizes, tell_statistics, tell_energon, tell_energon_json])
def test_what_others_counted_is_believed(tell, copy: Path, tmp_path: Path) -> None:
    tell(copy, {"a.tar": 31, "b.tar": 21, "c.tar": 15})  # one more than there are, to tell it from a walk
    assert count(copy, tmp_path / "cache") == [31, 21, 15]


def test_what_only_some_shards_have_is_walked_for_the_others(copy: Path, tmp_path: Path) -> None:
    tell_sizes(copy, {"a.tar": 31})
    assert count(copy, tmp_path / "cache") == [31, 20, 14]


def test_a_file_that_tells_nonsense_is_an_error_and_not_passed_over(copy: Path, tmp_path: Path) -> None:
    (copy / "sizes.json").write_text("{")
    with pytest.raises(UserError, match=r"sizes\.json cannot be read .*: mend or delete it"):
        count(copy, tmp_path / "cache")


def test_told_counts_of_a_web_server(copy: Path, tmp_path: Path) -> None:
    tell_statistics(copy, {"a.tar": 31, "b.tar": 21, "c.tar": 15})
    with serve(copy) as server:
        assert count(f"{server.url}/{{a..c}}.tar", tmp_path / "cache") == [31, 21, 15]
        assert not any(name.endswith(".tar") for name in server.requests)  # nothing was fetched for that


@pytest.mark.parametrize("fault", ["forbid", "html"])
def test_servers_that_do_not_tell_what_they_lack(fault: str, copy: Path, tmp_path: Path) -> None:
    with serve(copy) as server:
        for name in ("sizes.json", ".nv-meta/.info.json", ".nv-meta/.info.yaml", "a_stats.json", "b_stats.json"):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text("{}")  # for the server to forbid, or to have a page for
            server.faults[name] = [fault] * 9
        assert count(f"{server.url}/{{a,b}}.tar?download=true", tmp_path / "cache") == [30, 20]
        assert server.requests["a.tar"] == server.requests["b.tar"] == 1


@pytest.mark.parametrize(
    "told", ['{"a.tar": -5, "b.tar": true, "c.tar": "14"}', '{"a.tar": 1e3, "b.tar": null}', "[" * 3 + "]" * 3]
)
def test_told_counts_that_are_none_are_not_believed(told: str, copy: Path, tmp_path: Path) -> None:
    (copy / "sizes.json").write_text(told)
    assert count(copy, tmp_path / "cache") == [30, 20, 14]


@pytest.mark.parametrize(
    "kept", ["5", '{"txt": 5}', '{"txt": {"a.tar": 5, "b.tar": [1]}}', '{"txt": {"a.tar": [', "[" * 9999]
)
def test_broken_index_is_not_used(kept: str, copy: Path, tmp_path: Path) -> None:
    (copy / INDEX_NAME).write_text(kept)
    assert count(copy, tmp_path / "cache") == [30, 20, 14]
    assert count(copy, tmp_path / "cache", again=True) == [30, 20, 14]
    assert set(json.loads((copy / INDEX_NAME).read_text())["txt"]) == {"a.tar", "b.tar", "c.tar"}


def test_ctrl_c_does_not_wait_for_servers(copy: Path, tmp_path: Path) -> None:
    with serve(copy) as server:
        server.faults["a.tar"] = ["stall"] * 9
        arguments = [f"data.train={server.url}/a.tar", f"paths.cache={tmp_path}/cache", "data.cache.stall_timeout=600"]
        stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
        with Forked(["shards", "index", *arguments], tmp_path, [(stdout, stderr)]) as process:
            while not server.requests["a.tar"]:
                assert process.poll() is None, stderr.read_text()
                time.sleep(0.05)
            os.kill(process.pids[0], signal.SIGINT)
            assert process.wait(timeout=60) == [130]  # the server would stall for ten minutes
    assert stderr.read_text() == "clipmini: interrupted\n"


def test_remote_shards_without_counts_are_fetched_and_counted(copy: Path, tmp_path: Path) -> None:
    with serve(copy) as server:
        assert count(f"{server.url}/{{a..c}}.tar", tmp_path / "cache") == [30, 20, 14]
        assert len(list((tmp_path / "cache/shards").glob("*.tar"))) == 3  # they are kept for training


def test_counting_works_in_a_cache_that_holds_one_shard_at_a_time(copy: Path, tmp_path: Path) -> None:
    for number in range(12):
        shutil.copy(copy / "c.tar", copy / f"d{number:02d}.tar")
    small = make_cache(tmp_path / "cache", max_bytes=300_000)
    with serve(copy) as server:
        found = locate(f"{server.url}/d{{00..11}}.tar", "data.train", small.remote, allow_pipe=False)
        counted = count_pairs(found, FORMAT, small, "data.train")
    assert [shard.num_samples for shard in counted] == [14] * 12


def test_counts_of_commands_are_not_kept_and_not_said_to_be(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_cache(tmp_path / "cache")
    found = locate(f"pipe:cat {copy}/{{a,b}}.tar", "data.train", store.remote, allow_pipe=True)
    with caplog.at_level("INFO"):
        counted = count_pairs(found, FORMAT, store, "data.train", again=True)
    assert [shard.num_samples for shard in counted] == [30, 20]
    assert [record.message for record in caplog.records] == [
        "fetching 2 shards to count their pairs",
        "the counts of 2 shards are not kept: nothing tells when they change",
    ]
    assert not (tmp_path / "cache/counts").exists()


def test_index_is_kept_beside_the_shards_and_used(copy: Path, tmp_path: Path) -> None:
    assert count(copy, tmp_path / "cache", again=True) == [30, 20, 14]
    kept = json.loads((copy / INDEX_NAME).read_text())
    assert {name: entry[2] for name, entry in kept["txt"].items()} == {"a.tar": 30, "b.tar": 20, "c.tar": 14}
    kept["txt"]["a.tar"][2] = 29
    (copy / INDEX_NAME).write_text(json.dumps(kept))
    assert count(copy, tmp_path / "other") == [29, 20, 14]
    moved = copy.rename(tmp_path / "moved")
    assert count(moved, tmp_path / "other") == [29, 20, 14]  # it goes along
    assert count(moved, tmp_path / "other", pair_format=PairFormat(("json",))) == [30, 20, 14]  # of another format


@pytest.mark.parametrize("change", ["size", "time"])
def test_index_of_a_shard_that_has_changed_is_not_used(change: str, copy: Path, tmp_path: Path) -> None:
    count(copy, tmp_path / "cache", again=True)
    if change == "size":
        write_tar(copy / "b.tar", read_sample("train/noto-00000.tar", 5))
    else:
        write_tar(tmp_path / "b.tar", read_sample("train/noto-00000.tar", 5))
        content = (tmp_path / "b.tar").read_bytes()
        (copy / "b.tar").write_bytes(content + bytes((copy / "b.tar").stat().st_size - len(content)))
        os.utime(copy / "b.tar", (time.time() + 5, time.time() + 5))
    assert count(copy, tmp_path / "cache") == [30, 5, 14]


def test_counting_that_took_long_is_kept_without_being_asked(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count(copy, tmp_path / "cache") == [30, 20, 14]
    assert not (copy / INDEX_NAME).exists()
    monkeypatch.setattr(counts, "ALONE_SECONDS", 0.0)  # every count is long then, and done by other processes
    assert count(copy, tmp_path / "cache") == [30, 20, 14]
    assert (copy / INDEX_NAME).exists()


@pytest.fixture
def nobody() -> Iterator[None]:
    """A user who may write nothing that is not his: root may write anything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


@pytest.fixture
def open_directory(copy: Path) -> Iterator[Path]:
    """A directory that everyone can enter, with shards that nobody may write beside."""
    root = Path(shutil.copytree(copy, f"/tmp/clipmini-{os.getpid()}/shards")).parent
    (root / "cache").mkdir(mode=0o777)
    (root / "cache").chmod(0o777)
    (root / "shards").chmod(0o555)
    yield root
    (root / "shards").chmod(0o755)
    shutil.rmtree(root)


def test_index_of_a_directory_that_is_read_only_goes_to_the_cache(open_directory: Path, nobody: None) -> None:
    shards, cache = open_directory / "shards", open_directory / "cache"
    assert count(shards, cache, again=True) == [30, 20, 14]
    (kept,) = (cache / "counts").iterdir()
    content = json.loads(kept.read_text())
    content["txt"]["a.tar"][2] = 29
    kept.write_text(json.dumps(content))
    assert count(shards, cache) == [29, 20, 14]


def test_of_what_two_indexes_keep_of_a_shard_the_newer_is_believed_and_only_if_it_is_of_now(
    copy: Path, tmp_path: Path
) -> None:
    count(copy, tmp_path / "cache", again=True)
    store = make_cache(tmp_path / "cache")
    found = locate(str(copy), "data.train", store.remote, allow_pipe=False)
    beside, cached = counts.KeptCounts(found, FORMAT, store).paths
    kept = json.loads(beside.read_text())
    cached.parent.mkdir()

    def keep(path: Path, age: int, pairs: int, **changes: str) -> None:
        size, version, _, damage = kept["txt"]["a.tar"]
        entry = [size, changes.get("version", version), pairs, damage]
        path.write_text(json.dumps({"txt": {**kept["txt"], "a.tar": entry}}))
        os.utime(path, (time.time() - age,) * 2)

    keep(beside, 100, 28)
    keep(cached, 50, 29)  # as `shards index` does where the directory can no longer be written
    assert count(copy, tmp_path / "cache") == [29, 20, 14]
    keep(beside, 0, 28)
    assert count(copy, tmp_path / "cache") == [28, 20, 14]
    keep(beside, 0, 28, version="0")  # of a shard that has changed since
    assert count(copy, tmp_path / "cache") == [29, 20, 14]


def test_index_that_can_be_kept_nowhere_is_an_error(open_directory: Path, nobody: None) -> None:
    (open_directory / "cache/counts").write_text("a file in its place")
    with pytest.raises(UserError, match="the counts cannot be kept .*: set paths.cache"):
        count(open_directory / "shards", open_directory / "cache", again=True)


def test_cache_that_cannot_be_written_is_needed_for_remote_shards_alone(open_directory: Path, nobody: None) -> None:
    shards, read_only = open_directory / "shards", open_directory / "shards/cache"
    assert count(shards, read_only) == [30, 20, 14]
    with serve(shards) as server, pytest.raises(UserError, match="paths.cache=.*shards/cache: cannot be written"):
        count(f"{server.url}/{{a..c}}.tar", read_only)
