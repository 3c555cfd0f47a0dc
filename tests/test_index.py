"""Walking tars of every dialect, whole, damaged and hostile."""

import io
import os
import pickle
import random
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE, read_sample, write_tar

from clipmini.data.index import (
    DamagedShard,
    Member,
    PairFormat,
    Shard,
    index_shard,
    load_index,
    split_name,
    walk,
)
from clipmini.errors import UserError

FORMAT = PairFormat()


@contextmanager
def opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def walk_path(path: Path) -> list[Member]:
    with opened(path) as file:
        return list(walk(file, str(path)))


def pack(path: Path, names: list[str], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar with Python's own writer: each member holds its own name."""
    with tarfile.open(path, "w", format=format) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            archive.addfile(info, io.BytesIO(name.encode()))
    return path


def oracle(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isreg()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walks_as_tarfile_does(format: int, tmp_path: Path) -> None:
    names = ["a.jpg", "dir/b.txt", "é/ü.jpg", "x" * 99 + "y", "d" * 60 + "/" + "n" * 60 + ".txt", "last.json"]
    if format != tarfile.USTAR_FORMAT:
        names += ["d" * 120 + "/" + "k" * 150 + ".jpg", "ключ" * 60 + ".txt"]
    path = pack(tmp_path / "x.tar", names, format)
    assert [(member.name, member.offset, member.size) for member in walk_path(path)] == oracle(path)
    assert [member.name for member in walk_path(path)] == names


def test_walks_what_gnu_tar_writes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    long = folder / ("deep" * 30) / ("deeper" * 30)
    long.mkdir(parents=True)
    (long / "a.jpg").write_bytes(b"picture")
    (folder / "b.txt").write_bytes(b"x" * 1000)
    (folder / "link.txt").symlink_to("b.txt")
    for format in ("gnu", "posix", "ustar" if len(str(long.relative_to(folder))) < 200 else "oldgnu"):
        path = tmp_path / f"{format}.tar"
        assert os.system(f"tar --format={format} --sort=name -cf {path} -C {folder} .") == 0
        assert [(member.name, member.offset, member.size) for member in walk_path(path)] == oracle(path)


def test_sizes_beyond_eight_gibibytes_of_a_sparse_file(tmp_path: Path) -> None:
    size = 9 * 2**30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        info = tarfile.TarInfo("huge.jpg")
        info.size = size
        with open(path, "wb") as file:
            header = info.tobuf(format)
            file.write(header)
            file.truncate(len(header) + size + 1024)
        (member,) = walk_path(path)
        assert (member.size, member.offset) == (size, len(header))
        assert index_shard(path, PairFormat(())).sizes.tolist() == [[2**32 - 1]]  # too large for any limit
        path.unlink()


def test_the_embedded_sample_is_indexed_as_tarfile_reads_it() -> None:
    path = SAMPLE / "train/noto-00003.tar"
    index = index_shard(path, PairFormat(("json", "txt")))
    found = {}
    with opened(path) as file:
        for number in range(len(index)):
            for extension, (offset, size) in index.members(number).items():
                found[f"{index.key(number)}.{extension}"] = os.pread(file, size, offset)
    with tarfile.open(path) as archive:
        assert found == {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert not index.damage and index.extensions == (".json", ".txt", ".webp")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("dir.d/a.b.JPG", ("dir.d/a", "b.jpg")),
        ("plain", ("plain", "")),
        ("./x.txt", ("./x", "txt")),
        ("dir/.hidden", ("dir/", "hidden")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_members_of_one_key_may_stand_apart(tmp_path: Path) -> None:
    index = index_shard(pack(tmp_path / "x.tar", ["a.jpg", "b.jpg", "a.txt", "b.txt"]), FORMAT)
    assert [index.key(number) for number in range(len(index))] == ["a", "b"]


def test_half_samples_make_no_pair(tmp_path: Path) -> None:
    names = ["a.jpg", "b.txt", "c.jpg", "c.txt", "d.input.jpg", "d.txt", "e.JPG", "e.TXT"]
    index = index_shard(pack(tmp_path / "x.tar", names), FORMAT)
    assert [index.key(number) for number in range(len(index))] == ["c", "e"]
    assert index.extensions == (".input.jpg", ".jpg", ".txt")


def test_which_members_make_a_pair_follows_the_format(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", ["a.jpg", "a.txt", "b.jpg", "b.json", "c.png", "c.json", "c.txt"])
    assert len(index_shard(path, PairFormat(("txt",)))) == 2
    assert len(index_shard(path, PairFormat(("json",)))) == 2
    index = index_shard(path, PairFormat(("json", "txt")))
    assert len(index) == 1 and list(index.members(0)) == ["png", "json", "txt"]


def test_keys_that_are_not_utf8_survive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for extension in ("jpg", "txt"):
            archive.addfile(tarfile.TarInfo(f"caf\xe9.{extension}"))
    index = index_shard(tmp_path / "x.tar", FORMAT)
    assert index.key(0).encode("utf-8", "surrogateescape") == b"caf\xe9"


CUTS = [
    (lambda size, member: member.offset + member.size // 2, "ends inside m2.jpg, at byte"),
    (lambda size, member: member.offset - 512, "ends without the two empty blocks of a complete tar"),
    (lambda size, member: member.offset - 200, "ends inside a header"),
]


@pytest.mark.parametrize(("cut", "message"), CUTS, ids=["inside a member", "at a border", "inside a header"])
def test_cut_tars_are_told_from_whole_ones(cut, message: str, tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [f"m{number}.{extension}" for number in range(4) for extension in ("jpg", "txt")])
    data, member = path.read_bytes(), walk_path(path)[4]
    path.write_bytes(data[: cut(len(data), member)])
    with pytest.raises(DamagedShard, match=message):
        walk_path(path)
    index = index_shard(path, FORMAT)
    assert len(index) == 2 and message in index.damage  # all before the cut can be read


def test_a_header_that_is_none_ends_the_walk(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", ["a.jpg", "a.txt", "b.jpg", "b.txt"])
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 5] ^= 0xFF  # in the name of b.jpg
    path.write_bytes(data)
    index = index_shard(path, FORMAT)
    assert len(index) == 1 and "has no tar header at byte 2048: wrong checksum" in index.damage


@pytest.mark.parametrize("between", [b"", bytes(70_000)], ids=["joined", "joined with zeros between"])
def test_what_follows_the_end_is_not_passed_over(between: bytes, tmp_path: Path) -> None:
    first, second = (pack(tmp_path / f"{name}.tar", [f"{name}.jpg", f"{name}.txt"]).read_bytes() for name in "ab")
    (tmp_path / "x.tar").write_bytes(first + between + second)
    index = index_shard(tmp_path / "x.tar", FORMAT)
    assert len(index) == 1 and "has data after its end, at byte" in index.damage


def test_a_hole_is_not_the_end(tmp_path: Path) -> None:
    data = bytearray(pack(tmp_path / "x.tar", ["a.jpg", "a.txt", "b.jpg", "b.txt"]).read_bytes())
    data[2048:2560] = bytes(512)
    (tmp_path / "x.tar").write_bytes(data)
    assert index_shard(tmp_path / "x.tar", FORMAT).damage == "has data after its end, at byte 2560"


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"<html>not found</html>" * 100)
    index = index_shard(tmp_path / "x.tar", FORMAT)
    assert len(index) == 0 and "has no tar header at byte 0" in index.damage


def test_empty_tars(tmp_path: Path) -> None:
    assert len(index_shard(pack(tmp_path / "x.tar", []), FORMAT)) == 0
    assert not index_shard(tmp_path / "x.tar", FORMAT).damage
    (tmp_path / "y.tar").touch()
    assert "ends without the two empty blocks" in index_shard(tmp_path / "y.tar", FORMAT).damage


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused_with_the_reason(mode: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(UserError, match=r"x\.tar is a tar compressed by .*samples are read at random.*decompress it"):
        index_shard(tmp_path / "x.tar", FORMAT)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Make a header whose checksum is right, whatever the rest says."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"a.jpg", b"-0000001000"), "a size of -512"),
        (header(b"a.jpg", b"99999999999"), "invalid literal"),
        (header(b"a.jpg", b"\x80" + b"\xff" * 11), "ends inside a.jpg"),
        (header(b"a.jpg", b"\xff" * 12), "has no tar header at byte 0"),
        (header(b"p", b"00000000020", b"x") + b"0 path=a.jpg\n".ljust(512), "has a pax header that cannot be read"),
        (header(b"p", b"00000000020", b"x") + b"99 path=a.jpg\n".ljust(512), "has a pax header that cannot be read"),
        (header(b"p", b"00000000020", b"x") + b"\xb2 path=a.jpg\n".ljust(512), "has a pax header that cannot be read"),
        (
            header(b"p", b"00000003727", b"x") + b"9" * 2000 + b" path=a".ljust(48),
            "has a pax header that cannot be read",
        ),
        (header(b"p", b"00000012000", b"x") + b"5120 path=" + b"n" * 5110, "has a name of more than 4096 bytes"),
        (header(b"p", b"00000012000", b"L") + b"n" * 5120, "has a name of more than 4096 bytes"),
        (header(b"p", b"00000000015", b"x") + b"13 size=-512\n".ljust(512) + header(b"a", b"0"), "a size of -512"),
    ],
)
def test_hostile_headers_end_the_walk(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    with pytest.raises(DamagedShard, match=message):
        walk_path(tmp_path / "x.tar")


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "d" * 150 + "/b.jpg", "d" * 150 + "/b.txt", "c.jpg", "c.txt"]
    rng = random.Random(0)
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        good = pack(tmp_path / "x.tar", names, format).read_bytes()
        for _ in range(300):
            data = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.3 else good)
            for _ in range(rng.randrange(1, 6)):
                if data:
                    data[rng.randrange(len(data))] = rng.choice((0, 0xFF, 0x2D, 0x80, rng.randrange(256)))
            (tmp_path / "y.tar").write_bytes(data)
            try:
                assert len(index_shard(tmp_path / "y.tar", FORMAT)) <= 3
            except UserError as error:
                assert "compressed" in str(error)


def test_index_is_the_same_when_it_was_saved(tmp_path: Path) -> None:
    index = index_shard(SAMPLE / "train/noto-00003.tar", FORMAT)
    index.save(tmp_path / "i.npz")
    loaded = load_index(tmp_path / "i.npz", FORMAT)
    assert loaded is not None and len(loaded) == len(index) > 50
    for number in range(len(index)):
        assert loaded.key(number) == index.key(number) and loaded.members(number) == index.members(number)
    assert (loaded.extensions, loaded.damage) == (index.extensions, index.damage)


def test_saved_index_that_is_broken_or_hostile_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "i.npz"
    assert load_index(path, FORMAT) is None
    index_shard(SAMPLE / "train/noto-00003.tar", FORMAT).save(path)
    good = path.read_bytes()
    for data in (b"", b"no zip", good[: len(good) // 2], pickle.dumps([1]), good[:-20]):
        path.write_bytes(data)
        assert load_index(path, FORMAT) is None
    np.savez(path, ends=np.zeros(1))
    assert load_index(path, FORMAT) is None


def test_identity_tells_equal_names_and_other_contents_apart() -> None:
    shards = [
        Shard("s3://laion/00000.tar", 3, 10, "a"),
        Shard("s3://coyo/00000.tar", 3, 10, "a"),
        Shard("s3://laion/00000.tar", 3, 10, "b"),
        Shard("s3://laion/00000.tar", 3, 11, "a"),
    ]
    assert len({shard.identity() for shard in shards}) == 4
    assert Shard("s3://laion/00000.tar", 99, 10, "a").identity() == shards[0].identity()  # counts are no content


def test_pickle_members_are_not_even_looked_at(tmp_path: Path) -> None:
    (sample,) = read_sample("train/noto-00000.tar", 1)
    write_tar(tmp_path / "x.tar", [{**sample, "pyd": pickle.dumps({}), "pkl": b"1", "npy": b"1"}])
    assert set(index_shard(tmp_path / "x.tar", FORMAT).members(0)) == {"webp", "txt"}
