"""Sources, weights, and the digest of what decides the order."""

import tarfile
from pathlib import Path

import pytest
from conftest import make_cache, read_sample, write_tar

from clipmini.data.index import PairFormat, Shard
from clipmini.data.manifest import Manifest, Source, read_manifest
from clipmini.errors import UserError


def read(train: object, tmp_path: Path, extensions: tuple[str, ...] = ("txt",)) -> Manifest:
    return read_manifest(train, PairFormat(extensions), make_cache(tmp_path / "cache"))  # type: ignore[arg-type]


def test_one_source_is_called_train(shards: Path, tmp_path: Path) -> None:
    (source,) = read(str(shards), tmp_path).sources
    assert (source.name, source.weight, source.num_samples) == ("train", 64.0, 64)
    assert [shard.num_samples for shard in source.shards] == [30, 20, 14]


def test_mapping_of_sources_with_weights(shards: Path, tmp_path: Path) -> None:
    train = {"first": {"shards": f"{shards}/a.tar", "weight": 3}, "second": {"shards": f"{shards}/b.tar"}}
    first, second = read(train, tmp_path).sources
    assert (first.name, first.weight, first.num_samples) == ("first", 3.0, 30)
    assert (second.name, second.weight) == ("second", 20.0)  # its size


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "data.train={}: no shards"),
        ({"x": "{root}"}, "data.train.x=.*expected {shards: ..., weight: ...}"),
        ({"x": {"shards": "{root}", "wait": 1}}, "data.train.x=.*expected {shards"),
        (5, r"data.train=5: expected a path or a list of paths"),
        ([5], r"data.train=\[5\]: expected a path or a list of paths"),
        ({"x": {"shards": 5}}, r"data.train.x.shards=5: expected a path or a list of paths"),
        ({"x": {"shards": [5]}}, r"data.train.x.shards=\[5\]: expected a path or a list of paths"),
        ({"x": {"shards": "{root}", "weight": 0}}, "data.train.x.weight=0: expected a number above 0"),
        ({"x": {"shards": "{root}", "weight": "much"}}, "data.train.x.weight='much': expected a number above 0"),
        ({"x": {"shards": "{root}", "weight": True}}, "data.train.x.weight=True: expected a number above 0"),
        ({"x": {"shards": "{root}", "weight": float("inf")}}, "data.train.x.weight=inf: expected a number above 0"),
        ({"x": {"shards": "{root}/nowhere"}}, "data.train.x=.*nowhere: no shards found"),
    ],
)
def test_wrong_sources_are_refused(train: object, message: str, shards: Path, tmp_path: Path) -> None:
    def fill(value: object) -> object:
        if isinstance(value, str):
            return value.format(root=shards)
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    with pytest.raises(UserError, match=message):
        read(fill(train), tmp_path)


def test_shards_without_pairs_name_what_they_have(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [{"__key__": "a", "input.jpg": b"x"}, {"__key__": "b", "mp3": b"x", "txt": b"x"}])
    with pytest.raises(
        UserError,
        match=r"data.train: no picture-caption pairs in 1 shards.*/x\.tar; a pair is a picture \(\.jpg.*\) and "
        r"\.txt of the same name up to the first dot \(data\.caption_key\), found: \.input\.jpg, \.mp3, \.txt",
    ):
        read(str(tmp_path), tmp_path)


@pytest.mark.parametrize("content", [b"hello" * 1000, b""], ids=["no tar", "no bytes"])
def test_only_a_damaged_shard(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"no picture-caption pairs in 1 shards.*found: none; .*x\.tar (has no|ends)"):
        read(str(tmp_path), tmp_path)


def test_damaged_shard_among_good_ones_is_told(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = read_sample("train/noto-00000.tar", 6)
    path = write_tar(tmp_path / "shards/x.tar", samples)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    write_tar(tmp_path / "shards/y.tar", samples)
    with tarfile.open(tmp_path / "shards/z.tar", "w"):
        pass
    (source,) = read(str(tmp_path / "shards"), tmp_path).sources
    counts = {Path(shard.path).name: shard.num_samples for shard in source.shards}
    assert counts["y.tar"] == 6 and 0 < counts["x.tar"] < 6 and "z.tar" not in counts  # empty: nothing to draw from
    assert "x.tar ends inside" in caplog.text and f"{counts['x.tar']} pairs before that can be read" in caplog.text


def test_captions_in_json_alone(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 8)
    for sample in samples:
        del sample["txt"]
    write_tar(tmp_path / "a.tar", samples)
    assert read(str(tmp_path), tmp_path, ("json",)).num_samples == 8
    with pytest.raises(UserError, match="no picture-caption pairs"):
        read(str(tmp_path), tmp_path)


def test_digest_is_about_the_order_and_not_about_the_place() -> None:
    def digest(directory: str, name: str = "a.tar", count: int = 3, weight: float = 1, source: str = "s") -> str:
        return Manifest((Source(source, weight, (Shard(f"{directory}/{name}", count, 5, "v"),)),)).digest()

    assert digest("/here") == digest("/there") == digest("s3://bucket")
    others = [
        digest("/here", "b.tar"),
        digest("/here", count=4),
        digest("/here", weight=2),
        digest("/here", source="t"),
    ]
    assert len({digest("/here"), *others}) == 5
