"""Shards that are packed anew: whole, damaged, and with members that are left out."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import write_tar
from packing import (
    captions,
    make_samples,
    metadata,
    read_packed_samples,
    read_rejected,
    run_pack,
)

from clipmini.errors import UserError
from clipmini.shards.packed import Packed


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{a,b,c}.tar", "/[abc].tar"])
def test_shards_are_cut_anew(pattern: str, shards: Path, tmp_path: Path) -> None:
    packed = run_pack(f"{shards}{pattern}", tmp_path / "output", samples_per_shard=18)  # they have 30, 20 and 14
    assert packed == Packed({"00000.tar": 18, "00001.tar": 18, "00002.tar": 18, "00003.tar": 10}, 0)
    before = [members for name in "abc" for members in read_packed_samples(shards / f"{name}.tar").items()]
    after = list(read_packed_samples(tmp_path / "output").values())
    assert [members["jpg"] for members in after] == [members["jpg"] for _, members in before]
    assert [members["txt"] for members in after] == [members["txt"].strip() for _, members in before]
    for (key, members), packed_members in zip(before, after, strict=True):
        assert json.loads(packed_members["json"]) == {"source": key, **json.loads(members["json"])}


def test_shards_that_are_packed_twice_keep_where_samples_come_from(shards: Path, tmp_path: Path) -> None:
    run_pack(shards / "c.tar", tmp_path / "one", samples_per_shard=5, num_workers=1)
    run_pack(tmp_path / "one", tmp_path / "two", samples_per_shard=5, num_workers=1)
    assert read_packed_samples(tmp_path / "one") == read_packed_samples(tmp_path / "two")


def test_a_key_of_the_json_can_be_the_caption(tmp_path: Path) -> None:
    samples = make_samples(5)
    for sample, value in zip(samples, ["one", ["two", "zwei"], None, 5, ["three", " "]], strict=True):
        sample["json"] = json.dumps({"title": value, "number": float("inf")}).encode()
    run_pack(write_tar(tmp_path / "input.tar", samples), tmp_path / "output", caption_key="title")
    assert captions(tmp_path / "output") == ["one", "two"]
    assert metadata(tmp_path / "output")[1] == {"number": None, "source": "key1", "title": ["two", "zwei"]}
    assert read_rejected(tmp_path / "output") == [
        ("key2", "caption", "title is missing"),
        ("key3", "caption", "title is int, not text"),
        ("key4", "caption", "title is blank"),
    ]


def test_incomplete_samples_of_shards_are_left_out(tmp_path: Path) -> None:
    samples = make_samples(4)
    del samples[1]["jpg"], samples[2]["txt"]
    samples[3] = {"__key__": "key3", "cls": b"1"}
    run_pack(write_tar(tmp_path / "input.tar", samples), tmp_path / "output")
    assert captions(tmp_path / "output") == ["caption 0"]
    assert read_rejected(tmp_path / "output") == [
        ("key1", "picture", "in input.tar there is only .json, .txt"),
        ("key2", "caption", "in input.tar there is only .jpg, .json"),
    ]


def test_members_that_are_dropped_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clipmini")
    (sample,) = make_samples(1)
    later = {"__key__": "key0", "txt": b"later", "png": b"a second picture", "pyd": b"code"}
    run_pack(write_tar(tmp_path / "input.tar", [sample, later]), tmp_path / "output")
    assert captions(tmp_path / "output") == ["later"]  # a name that comes again replaces the first, as in any tar
    (members,) = read_packed_samples(tmp_path / "output").values()
    assert members["jpg"] == sample["jpg"] and "png" not in members
    assert ("not packed, as no part of a pair: 1 x .png, 1 x .pyd, 1 x .txt") in caplog.messages


@pytest.mark.parametrize("place", ["inside a member", "at a border"])
def test_a_damaged_shard_gives_what_it_has_and_is_told(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = make_samples(9)
    for number in range(3):
        write_tar(tmp_path / f"input/{number}.tar", samples[3 * number : 3 * number + 3])
    tar = tmp_path / "input/1.tar"
    data = tar.read_bytes()
    # The members of a sample follow each other, each with a header before it: .jpg, .json, .txt.
    end = data.index(b"key5.txt") if place == "at a border" else data.index(b"key5.jpg") + 700
    tar.write_bytes(data[:end])
    run_pack(tmp_path / "input", tmp_path / "output", samples_per_shard=4)
    if place == "at a border":  # key5 has lost its .txt
        broken, what = [("key5", "caption", "in 1.tar there is only .jpg, .json")], "ends without the two empty blocks"
    else:
        broken, what = [], "ends inside key5.jpg, at byte"
    *others, damage = read_rejected(tmp_path / "output")
    assert others == broken
    assert damage[:2] == ("1.tar", "damaged_shard") and damage[2].startswith(what)
    assert damage[2].endswith("; what follows is lost")
    assert captions(tmp_path / "output") == [f"caption {number}" for number in (0, 1, 2, 3, 4, 6, 7, 8)]
    assert any(message.startswith(f"damaged: {tar} {what}") for message in caplog.messages)
    packed = run_pack(tmp_path / "input", tmp_path / "output", samples_per_shard=4)
    assert packed.rejected == len(broken)  # the damage is not a sample


def test_damage_is_listed_where_it_is(tmp_path: Path) -> None:
    samples = make_samples(4)
    samples[1]["txt"] = samples[2]["txt"] = b" "
    first = write_tar(tmp_path / "input/0.tar", samples[:2])
    first.write_bytes(first.read_bytes().rstrip(b"\0"))
    write_tar(tmp_path / "input/1.tar", samples[2:])
    run_pack(tmp_path / "input", tmp_path / "output", samples_per_shard=2)
    assert [name for name, _, _ in read_rejected(tmp_path / "output")] == ["key1", "0.tar", "key2"]


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "input/0.tar", [{"__key__": "a", "cls": b"1"}])
    (tmp_path / "input/1.tar").write_bytes(b"no tar" * 200)
    message = r"input=.*: no samples in 2 shards, found: .cls; .*1.tar has no tar header at byte 0"
    with pytest.raises(UserError, match=message):
        run_pack(tmp_path / "input", tmp_path / "output")


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tgz"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_compressed_shard_is_refused(name: str, is_folder: bool, shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "input"
    source.mkdir()
    (source / name).write_bytes(gzip.compress((shards / "c.tar").read_bytes()))
    with pytest.raises(UserError, match=f"{name} is a tar compressed by gzip: .*decompress it once"):
        run_pack(source if is_folder else source / name, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_missing_shard_of_a_pattern_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input=.*: no shards found, .*d.tar does not exist \(of 2 shards\)"):
        run_pack(f"{shards}/{{c,d}}.tar", tmp_path / "output")


def test_more_shards_than_processes_give_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    for num_workers in (1, 3):
        run_pack(shards, tmp_path / str(num_workers), samples_per_shard=7, num_workers=num_workers, resize=20)
    tars = [sorted((tmp_path / str(num_workers)).glob("*.tar")) for num_workers in (1, 3)]
    assert len(tars[0]) == 10
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]
