"""What can be wrong with a sample or a shard, and what becomes of the batches: always complete, nothing silent."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_cache, make_data, read_sample, write_tar
from servers import serve

from clipmini.data.dataset import BAD, ERROR, Batch, PairDataset
from clipmini.data.health import BadSample
from clipmini.data.loader import ImageTextData
from clipmini.errors import UserError

BROKEN = 3  # which sample of the first shard


def whole(count: int = 12) -> list[dict]:
    return read_sample("train/noto-00000.tar", count)


def write(directory: Path, samples: list[dict]) -> Path:
    """Write shards of 12 samples each, the first of them damaged by the test."""
    write_tar(directory / "a.tar", samples)
    write_tar(directory / "b.tar", read_sample("train/noto-00000.tar", 24)[12:])
    return directory


def read_all(data: ImageTextData, steps: int = 2) -> list[Batch]:
    """Read whole batches as the loader does, with the bad samples in them."""
    dataset = PairDataset(data.manifest, data.plan, data.store, data.decoder, with_keys=True)
    batches = []
    for step in range(steps):
        batch = dataset[data.plan.batch(step, data.batch_size)]
        if ERROR in batch:
            raise batch[ERROR]
        batches.append(batch)
    return batches


def make(directory: object, tmp_path: Path, **changes: Any) -> ImageTextData:
    train = directory if isinstance(directory, dict) else str(directory)
    return make_data(train, make_cache(tmp_path / "cache"), **changes)


def compare(found: list[Batch], expected: list[Batch]) -> list[BadSample]:
    """See that all samples but the bad ones are as they are without the damage; return the bad ones."""
    bad = [sample for batch in found for sample in batch[BAD]]
    for a, b in zip(found, expected, strict=True):
        assert a["position"] == b["position"] and len(a["image"]) == len(b["image"])
        for row, position in enumerate(a["position"]):
            is_same = a["key"][row] == b["key"][row] and torch.equal(a["image"][row], b["image"][row])
            assert is_same == (position not in {sample.position for sample in bad}), position
    return bad


def damage(change: Callable[[dict], object]) -> Callable[[list[dict]], None]:
    return lambda samples: change(samples[BROKEN])


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def jpeg(sample: dict) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(sample.pop("webp"))).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


SAMPLES = {
    "corrupt jpeg": (lambda s: s.update(jpg=jpeg(s)[:250] + b"\xff" * 4000), "picture", ""),
    "truncated jpeg": (lambda s: s.update(jpg=jpeg(s)[:-400]), "picture", "truncated"),
    "no picture at all": (lambda s: s.update(webp=b"<html>gone</html>"), "picture", "not a JPEG, PNG or WebP"),
    "empty picture": (lambda s: s.update(webp=b""), "picture", "not a JPEG, PNG or WebP"),
    "picture of 10,000 x 10,000": (
        lambda s: (s.pop("webp"), s.update(png=png_header(10_000, 10_000))),
        "too_many_pixels",
        "10000 x 10000, max_pixels=10000000",
    ),
    "empty caption": (lambda s: s.update(txt=b""), "caption", "txt is blank"),
    "blank caption": (lambda s: s.update(txt=b" \n\t "), "caption", "txt is blank"),
    "caption that is not utf-8": (lambda s: s.update(txt="Bäcker".encode("latin-1")), "caption", "txt is not UTF-8"),
    "large member": (lambda s: s.update(txt=b"x" * 60_000), "too_many_bytes", ".txt has 60000, data.max_member_bytes"),
}


@pytest.mark.parametrize(("change", "cause", "detail"), SAMPLES.values(), ids=SAMPLES)
def test_bad_data_matrix(change: Callable[[dict], object], cause: str, detail: str, tmp_path: Path) -> None:
    samples = whole()
    key = samples[BROKEN]["__key__"]
    expected = read_all(make(write(tmp_path / "good", whole()), tmp_path, max_member_bytes=50_000))
    change(samples[BROKEN])
    data = make(write(tmp_path / "bad", samples), tmp_path, max_member_bytes=50_000)
    (bad,) = compare(read_all(data), expected)
    assert (bad.key, bad.index, bad.cause, bad.source) == (key, BROKEN, cause, "train")
    assert bad.shard == str(tmp_path / "bad/a.tar") and detail in bad.detail and "\n" not in bad.detail


def test_the_substitute_is_the_next_of_the_epoch_and_always_the_same(tmp_path: Path) -> None:
    samples = whole()
    samples[BROKEN]["webp"] = samples[5]["webp"][:50]
    data = make(write(tmp_path / "bad", samples), tmp_path)
    found, again = read_all(data), read_all(make(tmp_path / "bad", tmp_path))
    for a, b in zip(found, again, strict=True):
        assert a["key"] == b["key"] and torch.equal(a["image"], b["image"]) and a[BAD] == b[BAD]
    (bad,) = (sample for batch in found for sample in batch[BAD])
    number, index = data.plan.following(bad.position, 1)
    (row,) = (
        batch["key"][batch["position"].index(bad.position)] for batch in found if bad.position in batch["position"]
    )
    assert row == data.store.key(data.manifest.sources[0].shards[number], index) != samples[BROKEN]["__key__"]


HALVES = {"picture without caption": "txt", "caption without picture": "webp"}


@pytest.mark.parametrize("member", HALVES.values(), ids=HALVES)
def test_half_samples_are_no_pairs_and_not_counted(member: str, tmp_path: Path) -> None:
    samples = whole()
    del samples[BROKEN][member]
    data = make(write(tmp_path / "bad", samples), tmp_path, batch_size=23)
    assert data.manifest.num_samples == 23
    (batch,) = read_all(data, steps=1)
    assert not batch[BAD] and len(set(batch["key"])) == 23 and samples[BROKEN]["__key__"] not in batch["key"]


def test_members_that_others_would_unpickle_are_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "evil").mkdir, ())

    samples = whole()
    for sample in samples:
        sample |= {name: pickle.dumps(Evil()) for name in ("pyd", "pickle", "pkl", "pth")}
    expected = read_all(make(write(tmp_path / "good", whole()), tmp_path))
    assert not compare(read_all(make(write(tmp_path / "bad", samples), tmp_path)), expected)
    assert not (tmp_path / "evil").exists()


def test_tar_that_is_not_sorted_by_key(tmp_path: Path) -> None:
    directory = write(tmp_path / "bad", whole())
    with tarfile.open(directory / "a.tar") as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    with tarfile.open(directory / "a.tar", "w") as archive:
        for member, content in sorted(members, key=lambda pair: pair[0].name.rsplit(".")[1]):  # all pictures last
            archive.addfile(member, io.BytesIO(content))
    expected = read_all(make(write(tmp_path / "good", whole()), tmp_path))
    assert not compare(read_all(make(directory, tmp_path)), expected)


CUTS = {"inside a member": 700, "at a border": 0, "inside a header": 200}  # bytes after the border


@pytest.mark.parametrize("shift", CUTS.values(), ids=CUTS)
def test_shard_that_was_cut_after_it_was_counted(shift: int, tmp_path: Path) -> None:
    directory = write(tmp_path / "bad", whole())
    (directory / "sizes.json").write_text(json.dumps({"a.tar": 12, "b.tar": 12}))
    expected = read_all(make(directory, tmp_path))
    with tarfile.open(directory / "a.tar") as archive:
        place = [member.offset for member in archive][8 * 3]  # where the ninth of 12 samples begins
    data = (directory / "a.tar").read_bytes()
    (directory / "a.tar").write_bytes(data[: place + shift])
    bad = compare(read_all(make(directory, tmp_path)), expected)
    assert {sample.cause for sample in bad} == {"damaged_shard"} and {sample.index for sample in bad} == {8, 9, 10, 11}


def test_shard_that_is_gone_after_it_was_counted(tmp_path: Path) -> None:
    directory = write(tmp_path / "bad", whole())
    expected = read_all(make(directory, tmp_path))
    data = make(directory, tmp_path)
    (directory / "a.tar").unlink()
    bad = compare(read_all(data), expected)
    assert {sample.cause for sample in bad} == {"missing_shard"} and {sample.index for sample in bad} == set(range(12))
    assert all(sample.key is None for sample in bad)


def test_a_missing_shard_of_whole_blocks_does_not_stop_the_run(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 480)
    for number in range(4):
        write_tar(tmp_path / f"bad/{number}.tar", samples[120 * number : 120 * number + 120])
    shuffling = {"shuffle_streams": 4, "shuffle_block": 60, "batch_size": 48}
    expected = read_all(make(tmp_path / "bad", tmp_path, **shuffling), steps=10)
    data = make(tmp_path / "bad", tmp_path, **shuffling)
    (tmp_path / "bad/2.tar").unlink()
    bad = compare(read_all(data, steps=10), expected)
    # A stream of four is nothing but this shard: each of its samples is missed once, and once more as a substitute.
    assert {sample.index for sample in bad} == set(range(120)) and 120 <= len(bad) < 200


def test_shard_that_is_gone_before_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "bad", whole())
    with pytest.raises(UserError, match=r"data.train=.*: no shards found, .*/c\.tar does not exist \(of 3 shards\)"):
        make(f"{tmp_path}/bad/{{a..c}}.tar", tmp_path)


def test_empty_shard_is_left_out(tmp_path: Path) -> None:
    expected = read_all(make(write(tmp_path / "good", whole()), tmp_path))
    directory = write(tmp_path / "bad", whole())
    with tarfile.open(directory / "0.tar", "w"):
        pass
    (directory / "1.tar").touch()
    assert not compare(read_all(make(directory, tmp_path)), expected)


def test_told_counts_that_are_too_high_are_found_out(tmp_path: Path) -> None:
    directory = write(tmp_path / "bad", whole())
    (directory / "sizes.json").write_text(json.dumps({"a.tar": 13, "b.tar": 12}))
    bad = [sample for batch in read_all(make(directory, tmp_path, batch_size=25), 1) for sample in batch[BAD]]
    assert [(sample.cause, sample.index, sample.detail) for sample in bad] == [
        ("absent_sample", 12, "there are 12 pairs, 13 were counted")
    ]


def test_told_counts_that_are_too_low_stop_the_run(tmp_path: Path) -> None:
    directory = write(tmp_path / "bad", whole())
    (directory / "sizes.json").write_text(json.dumps({"a.tar": 11, "b.tar": 12}))
    with pytest.raises(
        UserError, match=r"a\.tar holds 12 pairs, but 11 were counted, so that some would never be seen"
    ):
        read_all(make(directory, tmp_path))


def test_equal_base_names_of_two_buckets(tmp_path: Path) -> None:
    samples = read_sample("train/noto-00000.tar", 24)
    for bucket, part in (("laion", samples[:12]), ("coyo", samples[12:])):
        write_tar(tmp_path / f"www/{bucket}/00000.tar", part)
    with serve(tmp_path / "www") as server:
        train = {bucket: {"shards": f"{server.url}/{bucket}/00000.tar"} for bucket in ("laion", "coyo")}
        remote = read_all(make(train, tmp_path))
    local = {bucket: {"shards": f"{tmp_path}/www/{bucket}"} for bucket in ("laion", "coyo")}
    assert not compare(remote, read_all(make(local, tmp_path)))


@pytest.mark.parametrize("faults", [["refuse", "refuse"], ["half"], ["short"], ["html"], ["slow"]], ids=lambda f: f[0])
def test_servers_that_fail_for_a_while_change_nothing(faults: list[str], tmp_path: Path) -> None:
    directory = write(tmp_path / "www", whole())
    (directory / "sizes.json").write_text(json.dumps({"a.tar": 12, "b.tar": 12}))
    expected = read_all(make(directory, tmp_path))
    with serve(directory) as server:
        server.faults["a.tar"] = list(faults)
        assert not compare(read_all(make(f"{server.url}/{{a,b}}.tar", tmp_path)), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_stops_the_run(workers: int, tmp_path: Path) -> None:
    samples = whole()
    for sample in samples:
        sample["webp"] = b"broken"
    write_tar(tmp_path / "bad/a.tar", samples)
    data = make(tmp_path / "bad", tmp_path, num_workers=workers)
    with pytest.raises(
        UserError,
        match=r"100 samples in a row cannot be used, at position \d+ of data.train \(train\); .*a\.tar, sample",
    ) as caught:
        list(data.loader(0, 1))
    assert "\n" not in str(caught.value)
