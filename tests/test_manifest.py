"""Which shards are found, how many pairs they have, and what is said when there are none."""

import io
import tarfile
from pathlib import Path

import pytest
from conftest import read_sample, write_tar

from clipmini.data.manifest import Manifest, Shard, Source, read_manifest
from clipmini.data.store import PairFormat
from clipmini.errors import UserError

FORMAT = PairFormat()


@pytest.mark.parametrize(
    "pattern",
    ["{root}", "{root}/*.tar", "{root}/{{a..c}}.tar", ["{root}/a.tar", "{root}/{{b,c}}.tar"]],
    ids=["directory", "glob", "brace", "list"],
)
def test_forms_of_train(pattern: str | list[str], shards: Path) -> None:
    train = pattern.format(root=shards) if isinstance(pattern, str) else [part.format(root=shards) for part in pattern]
    (source,) = read_manifest(train, FORMAT).sources
    assert [Path(shard.path).name for shard in source.shards] == ["a.tar", "b.tar", "c.tar"]
    assert [shard.num_samples for shard in source.shards] == [30, 20, 14]


def test_mapping_of_sources_with_weights(shards: Path) -> None:
    train = {"first": {"shards": f"{shards}/a.tar", "weight": 3}, "second": {"shards": f"{shards}/b.tar"}}
    first, second = read_manifest(train, FORMAT).sources
    assert (first.name, first.weight, first.num_samples) == ("first", 3.0, 30)
    assert (second.name, second.weight) == ("second", 20.0)  # its size


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{root}/nowhere", "data.train=.*nowhere: no shards found"),
        ("{root}/*.tgz", "data.train=.*: no shards found"),
        ("{root}/{{a..d}}.tar", "no shards found, .*d.tar does not exist"),
        ([], "no shards"),
        ("s3://bucket/a.tar", "only local files"),
        ("pipe:cat a.tar", "only local files"),
        ({"x": "{root}"}, "data.train.x=.*expected"),
        ({"x": {"shards": "{root}", "wait": 1}}, "data.train.x=.*expected"),
        ({"x": {"shards": "{root}", "weight": 0}}, "data.train.x.weight=0: expected a number above 0"),
        ({"x": {"shards": "{root}", "weight": "much"}}, "data.train.x.weight='much'"),
    ],
)
def test_wrong_train_is_refused(train: object, message: str, shards: Path) -> None:
    def fill(value: object) -> object:
        if isinstance(value, str):
            return value.format(root=shards)
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    with pytest.raises(UserError, match=message):
        read_manifest(fill(train), FORMAT)  # type: ignore[arg-type]


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no .tar files"):
        read_manifest(str(tmp_path), FORMAT)


def test_tar_without_pairs_names_what_it_has(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [{"__key__": "a", "input.jpg": b"x"}, {"__key__": "b", "mp3": b"x", "txt": b"x"}])
    with pytest.raises(
        UserError, match=r"no picture-caption pairs in 1 shards.*\.txt.*found: \.input\.jpg, \.mp3, \.txt"
    ):
        read_manifest(str(tmp_path), FORMAT)


def test_file_that_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match="cannot read the shard .*x.tar"):
        read_manifest(str(tmp_path), FORMAT)


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(UserError, match="cannot read the shard .*x.tar"):
        read_manifest(str(tmp_path), FORMAT)


def test_half_samples_are_not_counted(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 4)
    del samples[1]["txt"]
    del samples[2]["webp"]
    write_tar(tmp_path / "x.tar", samples)
    assert read_manifest(str(tmp_path), FORMAT).num_samples == 2


def test_digest_is_about_the_order_and_not_about_the_place() -> None:
    def digest(directory: str, count: int, weight: float) -> str:
        return Manifest((Source("s", weight, (Shard(f"{directory}/a.tar", count),)),)).digest()

    assert digest("/here", 3, 1) == digest("/there", 3, 1)
    assert len({digest("/here", 3, 1), digest("/here", 4, 1), digest("/here", 3, 2)}) == 3
