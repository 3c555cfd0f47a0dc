"""Folders of pictures that are packed: where captions come from, and each thing that can be wrong."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from packing import (
    captions,
    encode,
    metadata,
    read_packed_samples,
    read_rejected,
    run_pack,
    write_folder,
)
from PIL import Image

from clipmini import cli
from clipmini.errors import UserError
from clipmini.shards.packed import Packed


def test_a_folder_takes_captions_from_beside_the_pictures(image: Image.Image, tmp_path: Path) -> None:
    jpg, png = encode(image), encode(image, "PNG")
    source = tmp_path / "source"
    write_folder(source, [{"__key__": "b.c", "JPG": jpg, "txt": b"\xef\xbb\xbf \xc3\xa9t\xc3\xa9 \r\n"}])
    write_folder(source / "a", [{"__key__": "z", "png": png, "jpeg": jpg, "txt": b"both", "json": b'{"k": [1, null]}'}])
    write_folder(source / ".hidden", [{"__key__": "z", "png": png, "txt": b"hidden"}])
    write_folder(source / "empty", [{"__key__": "._z", "jpg": b"resource fork", "md": b"# no picture"}])
    run_pack(source, tmp_path / "output")
    assert captions(tmp_path / "output") == ["both", "both", "\u00e9t\u00e9"]
    assert metadata(tmp_path / "output") == [
        {"k": [1, None], "source": "a/z.jpeg"},
        {"k": [1, None], "source": "a/z.png"},
        {"source": "b.c.JPG"},
    ]
    assert [sorted(members) for members in read_packed_samples(tmp_path / "output").values()] == [
        ["jpg", "json", "txt"],
        ["json", "png", "txt"],
        ["jpg", "json", "txt"],
    ]


def test_what_is_beside_a_picture_is_found_in_any_case_of_its_extension(image: Image.Image, tmp_path: Path) -> None:
    source = tmp_path / "source"
    upper = {"JPG": encode(image), "TXT": b"loud", "JSON": b'{"k": 1}'}
    write_folder(source, [{"__key__": "IMG", **upper}, {"__key__": "both", **upper, "txt": b"quiet"}])
    run_pack(source, tmp_path / "output")
    assert captions(tmp_path / "output") == ["loud", "quiet"]
    assert metadata(tmp_path / "output") == [{"k": 1, "source": f"{name}.JPG"} for name in ("IMG", "both")]


def test_captions_without_a_picture_are_told(
    image: Image.Image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(
        tmp_path / "source", [{"__key__": "a", "jpg": encode(image), "txt": b"a"}, {"__key__": "b", "txt": b"b"}]
    )
    with caplog.at_level("INFO"):
        assert run_pack(tmp_path / "source", tmp_path / "output").sizes == {"00000.tar": 1}
    assert "not packed, as no part of a pair: 1 x .txt without a picture" in caplog.text


def test_a_folder_takes_captions_from_the_names_of_folders(
    image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "my_pictures"
    for name in (".", "black_cat", "black_cat/close-up"):
        write_folder(source / name, [{"__key__": "a", "jpg": encode(image)}])
    monkeypatch.chdir(source)
    run_pack(".", tmp_path / "output", caption_key="folder")
    assert captions(tmp_path / "output") == ["my pictures", "black cat", "close-up"]


def test_links_are_followed_and_rings_of_them_are_not(image: Image.Image, tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", [{"__key__": "a", "jpg": encode(image), "txt": b"linked"}])
    source = write_folder(tmp_path / "source", [{"__key__": "b", "jpg": encode(image), "txt": b"here"}])
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "ring").symlink_to(source)
    (source / "nothing.jpg").symlink_to(tmp_path / "nothing")
    run_pack(source, tmp_path / "output")
    assert captions(tmp_path / "output") == ["here", "linked"]
    assert read_rejected(tmp_path / "output") == [
        ("nothing.jpg", "caption", "nothing.txt: No such file or directory"),
    ]


def test_what_is_wrong_with_a_sample_is_told_by_cause(image: Image.Image, tmp_path: Path) -> None:
    jpg = encode(image, quality=95)
    bad: dict[str, dict[str, bytes]] = {
        "blank": {"txt": b" \n\t"},
        "byte": {"txt": b"caf\xe9"},
        "corrupt": {"jpg": b"no picture at all"},
        "deep": {"json": b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}"},
        "empty": {"jpg": b""},
        "json": {"json": b"{"},
        "large": {"jpg": encode(image.resize((200, 100)))},
        "list": {"json": b"[]"},
        "missing": {},
        "truncated": {"jpg": jpg[: len(jpg) // 2]},
    }
    samples = [{"__key__": key, **({"jpg": jpg, "txt": b"ok"} | change)} for key, change in bad.items()]
    source = write_folder(tmp_path / "source", [{"__key__": "good", "jpg": jpg, "txt": b"good"}, *samples])
    (source / "missing.txt").unlink()
    os.mkfifo(source / "pipe.jpg")
    (source / "pipe.txt").write_text("ok")
    run_pack(source, tmp_path / "output", samples_per_shard=3, max_pixels=60 * 48)
    assert [(name, cause) for name, cause, _ in read_rejected(tmp_path / "output")] == [
        ("blank.jpg", "caption"),
        ("byte.jpg", "caption"),
        ("corrupt.jpg", "picture"),
        ("deep.jpg", "json"),
        ("empty.jpg", "picture"),
        ("json.jpg", "json"),
        ("large.jpg", "too_many_pixels"),
        ("list.jpg", "json"),
        ("missing.jpg", "caption"),
        ("pipe.jpg", "picture"),
        ("truncated.jpg", "picture"),
    ]
    details = {name: detail for name, _, detail in read_rejected(tmp_path / "output")}
    assert details["blank.jpg"] == "caption is blank"
    assert details["byte.jpg"].startswith("caption is not UTF-8")
    assert details["missing.jpg"] == "missing.txt: No such file or directory"
    assert details["large.jpg"] == "200 x 100, max_pixels=2880"
    assert details["pipe.jpg"] == "pipe.jpg is not a file"
    assert details["truncated.jpg"].startswith("image file is truncated")
    # A shard that loses its samples stays, and keys say where a sample stood.
    assert json.loads((tmp_path / "output/sizes.json").read_text()) == {
        "00000.tar": 0,
        "00001.tar": 1,
        "00002.tar": 0,
        "00003.tar": 0,
    }
    assert list(read_packed_samples(tmp_path / "output")) == ["000010002"]


def test_a_picture_that_is_too_large_is_not_decoded(image: Image.Image, tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10 GB once decoded, and no pixels follow
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    samples = [{"__key__": "a", "png": bomb, "txt": b"a"}, {"__key__": "b", "jpg": encode(image), "txt": b"b"}]
    run_pack(write_folder(tmp_path / "source", samples), tmp_path / "output", max_pixels=3_599_999_999)
    assert read_rejected(tmp_path / "output") == [
        ("a.png", "too_many_pixels", "60000 x 60000, max_pixels=3599999999"),
    ]


def test_bad_samples_are_summed_up(
    image: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [{"__key__": f"{number}", "jpg": encode(image), "txt": b" "} for number in range(3)]
    samples += [{"__key__": "3", "jpg": b"x", "txt": b"a"}, {"__key__": "4", "jpg": encode(image), "txt": b"a"}]
    source = write_folder(tmp_path / "source", samples)
    assert cli.main(["shards", "pack", f"input={source}", f"output={tmp_path / 'output'}", "num_workers=1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "left out 4 of 5 samples: 3 x caption (0.jpg: caption is blank), 1 x picture (3.jpg: not a JPEG, PNG or WebP)",
        f"each of them is in {tmp_path / 'output/rejected.jsonl'}",
        f"packed 1 pairs in 1 shards in {tmp_path / 'output'}",
    ]
    assert run_pack(source, tmp_path / "output", samples_per_shard=10_000, max_pixels=50_000_000) == Packed(
        {"00000.tar": 1}, 4
    )


def test_a_name_that_is_not_utf_8_is_packed(image: Image.Image, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encode(image))
    (source / os.fsdecode(b"caf\xe9.txt")).write_text("coffee")
    run_pack(source, tmp_path / "output")
    assert os.fsencode(metadata(tmp_path / "output")[0]["source"]) == b"caf\xe9.jpg"


@pytest.mark.parametrize("names", [[], ["a.txt"], ["a.gif"], [".a.tar"], ["a.parquet"]])
def test_a_folder_without_pictures_is_refused(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in names:
        (tmp_path / "source" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"input=.*: no pictures \(.jpg, .jpeg, .png, .webp\) and no .tar files in it"):
        run_pack(tmp_path / "source", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_folder_with_pictures_and_shards_is_refused(image: Image.Image, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", [{"__key__": "a", "jpg": encode(image), "txt": b"a", "tar": b""}])
    with pytest.raises(UserError, match="input=.*: holds pictures and .tar files; input='.*/\\*.tar' takes the .tar"):
        run_pack(source, tmp_path / "output")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match="input=.*: is neither a folder nor .csv, .tsv, .jsonl, .parquet or .tar"):
        run_pack(tmp_path / "table.xlsx", tmp_path / "output")
