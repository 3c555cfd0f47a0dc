"""`clipmini shards pack` as a whole: the same bytes however it gets there, and one message for what cannot be."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import make_cache, write_tar
from packing import OPTIONS, read_files, read_packed_samples, run_pack, write_folder

from clipmini import cli, config
from clipmini.data.index import PairFormat
from clipmini.data.manifest import read_manifest
from clipmini.data.store import ShardStore
from clipmini.errors import UserError
from clipmini.shards.pack import open_source, pack, pack_into
from clipmini.shards.writer import Settings

# What is written


def test_shards_hold_every_pair_in_order(packed: Path, samples: list[dict]) -> None:
    found = read_packed_samples(packed)
    assert list(found) == [f"{number // 10:05d}{number % 10:04d}" for number in range(25)] == sorted(found)
    for sample, members in zip(samples, found.values(), strict=True):
        assert members["webp"] == sample["webp"]
        assert members["txt"] == sample["txt"].strip()
        expected = {"source": f"{sample['__key__']}.webp", **json.loads(sample["json"])}
        assert json.loads(members["json"]) == expected


def test_counts_and_settings_are_written(packed: Path) -> None:
    assert sorted(read_files(packed)) == [
        *("00000.tar", "00001.tar", "00002.tar"),
        *("pack.json", "rejected.jsonl", "sizes.json"),
    ]
    assert json.loads((packed / "sizes.json").read_text()) == {"00000.tar": 10, "00001.tar": 10, "00002.tar": 5}
    assert (packed / "rejected.jsonl").read_bytes() == b""


def test_our_reader_reads_the_shards(packed: Path, samples: list[dict], tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    (source,) = read_manifest(str(packed), PairFormat(), cache).sources
    assert [shard.num_samples for shard in source.shards] == [10, 10, 5]
    store = ShardStore(PairFormat(), cache, max_member_bytes=10**6)
    assert store.read(source.shards[2], 4) == {"webp": samples[24]["webp"], "txt": samples[24]["txt"].strip()}


def test_webdataset_reads_the_shards(packed: Path, samples: list[dict]) -> None:
    found = list(webdataset.WebDataset(f"{packed}/{{00000..00002}}.tar", shardshuffle=False))
    assert [sample["webp"] for sample in found] == [sample["webp"] for sample in samples]
    assert {tuple(sorted(key for key in sample if key[0] != "_")) for sample in found} == {("json", "txt", "webp")}


def test_keys_grow_with_the_number_of_samples(pictures: Path, tmp_path: Path) -> None:
    run_pack(pictures, tmp_path / "output", samples_per_shard=200_000)
    assert list(read_packed_samples(tmp_path / "output"))[:2] == ["00000000000", "00000000001"]


def test_bytes_are_the_same_for_any_number_of_processes(pictures: Path, tmp_path: Path) -> None:
    for num_workers in (1, 3):
        options = {"resize": 40, "format": "jpg", "samples_per_shard": 4, "num_workers": num_workers}
        run_pack(pictures, tmp_path / str(num_workers), **options)
    assert read_files(tmp_path / "1") == read_files(tmp_path / "3")
    assert len(read_files(tmp_path / "1")) == 7 + 3


# What is refused

OTHER_SETTINGS = [
    ("caption_key", "folder", "txt"),
    ("image_key", "url", "image"),
    ("samples_per_shard", 5, 10),
    ("resize", 32, None),
    ("format", "png", None),
    ("quality", 80, 90),
    ("max_pixels", 10**6, 10**7),
]


@pytest.mark.parametrize(("key", "value", "before"), OTHER_SETTINGS)
def test_other_settings_are_refused(key: str, value: object, before: object, packed: Path, pictures: Path) -> None:
    content = read_files(packed)
    message = rf"output={packed}: was begun with other {key}={value} \(it was {before}\); choose another output"
    with pytest.raises(UserError, match=message):
        run_pack(pictures, packed, **{key: value})
    assert read_files(packed) == content


def test_another_input_is_refused(packed: Path, pictures: Path, tmp_path: Path) -> None:
    other = shutil.copytree(pictures, tmp_path / "other")
    with pytest.raises(UserError, match=rf"was begun with other input={other} \(it was {pictures}\)"):
        run_pack(other, packed)


@pytest.mark.parametrize("change", ["new", "gone", "content", "time"])
def test_a_changed_input_is_refused(change: str, samples: list[dict], tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", samples[:2])
    run_pack(source, tmp_path / "output")
    caption = source / f"{samples[1]['__key__']}.txt"
    if change == "new":
        shutil.copy(caption, source / "new.txt")
    elif change == "gone":
        caption.unlink()
    elif change == "content":
        caption.write_bytes(b"other")
    else:
        os.utime(caption, ns=(0, 0))
    with pytest.raises(UserError, match="was begun with other files of the input: their names, sizes or times"):
        run_pack(source, tmp_path / "output")


@pytest.mark.parametrize("name", ["notes.txt", "00000.tar", ".hidden", "sizes.json", ".pack/00000.json"])
def test_an_output_with_other_files_is_refused(name: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"output={tmp_path}: is not empty, and holds nothing packed by this command"):
        run_pack(pictures, tmp_path)
    assert read_files(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', "{", "[" * 100_000])
def test_settings_of_something_else_are_refused(content: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "pack.json").write_text(content)
    with pytest.raises(UserError, match=f"output={tmp_path}: .*pack.json.*choose another output"):
        run_pack(pictures, tmp_path)
    assert read_files(tmp_path) == {"pack.json": content.encode()}


@pytest.mark.parametrize("name", ["00001.tar", "rejected.jsonl"])
def test_files_taken_away_are_told(name: str, copy: Path, pictures: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"output={copy}: was packed, but 1 of its 4 files are gone, first {name}"):
        run_pack(pictures, copy)


def test_broken_counts_are_told(copy: Path, pictures: Path) -> None:
    (copy / "sizes.json").write_text("{")
    with pytest.raises(UserError, match=f"output={copy}: cannot read its sizes.json"):
        run_pack(pictures, copy)


def test_an_output_that_is_a_file_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"output={tmp_path}/file: is a file, not a directory"):
        run_pack(pictures, tmp_path / "file")


@pytest.mark.parametrize("name", ["file/output", "n" * 300])
def test_an_output_that_cannot_be_made_is_told(name: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"output={tmp_path}/{name}: .*(Not a directory|File name too long)"):
        run_pack(pictures, tmp_path / name)


@pytest.mark.parametrize("name", ["", "shards", "a/b"])
def test_an_output_inside_the_pictures_is_refused(name: str, pictures: Path) -> None:
    content = read_files(pictures)
    with pytest.raises(UserError, match=f"output={pictures / name}: (is in input={pictures}|is not empty)"):
        run_pack(pictures, pictures / name)
    assert read_files(pictures) == content


def test_nothing_stays_where_no_sample_can_be_used(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", [{"__key__": f"{number}", "jpg": b"x"} for number in range(12)])
    with pytest.raises(UserError, match=r"input=.*: not one sample can be used: 12 x caption \(0.jpg: 0.txt: No such"):
        run_pack(source, tmp_path / "output")
    assert not (tmp_path / "output").exists()


WRONG_VALUES = [
    ("samples_per_shard", 0, "samples_per_shard=0: expected a whole number above 0"),
    ("samples_per_shard", None, "samples_per_shard=None: expected a whole number above 0"),
    ("samples_per_shard", 1.5, "samples_per_shard=1.5: expected a whole number above 0"),
    ("samples_per_shard", True, "samples_per_shard=True: expected a whole number above 0"),
    ("resize", -1, "resize=-1: expected a whole number above 0 or null"),
    ("resize", "big", "resize=big: expected a whole number above 0 or null"),
    ("format", "jpeg", "format=jpeg: is one of jpg, png, webp, null (did you mean 'jpg'"),
    ("format", ["jpg"], "format=['jpg']: is one of jpg, png, webp, null"),
    ("quality", 0, "quality=0: expected a whole number from 1 to 100"),
    ("quality", 101, "quality=101: expected a whole number from 1 to 100"),
    ("max_pixels", 0, "max_pixels=0: expected a whole number above 0"),
    ("num_workers", 0, "num_workers=0: expected a whole number above 0 or null"),
    ("caption_key", "text", "caption_key=text: of a folder of pictures it is txt or folder (did you mean 'txt'?)"),
    ("caption_key", None, "caption_key=None: expected text; in quotes"),
    ("caption_key", {"txt": 1.0}, "caption_key={'txt': 1.0}: expected text; in quotes"),
    ("image_key", 1.5, "image_key=1.5: expected text; in quotes"),
    ("input", "", "input=: expected text"),
    ("input", ["a", "b"], "input=['a', 'b']: expected text"),
    ("input", "/nowhere", "input=/nowhere: does not exist"),
    ("input", "/nowhere/*.tar", "input=/nowhere/*.tar: no shards found"),
    ("input", "/nowhere/{0..3}.tar", "input=/nowhere/{0..3}.tar: no shards found"),
    ("input", "/nowhere/*.csv", "input=/nowhere/*.csv: does not exist; tables are packed one by one"),
    ("input", "s3://bucket/a.tar", "input=s3://bucket/a.tar: only local files can be packed"),
    ("input", "pipe:cat a.tar", "input=pipe:cat a.tar: only local files can be packed"),
    ("output", "", "output=: expected text"),
    ("output", None, "output=None: expected text"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_VALUES)
def test_wrong_values(key: str, value: object, message: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        pack(**{**OPTIONS, "input": str(pictures), "output": str(tmp_path / "output"), key: value})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()


def open_for_change(source: Path, output: Path) -> Any:
    """Open an input as `pack` does before it takes the lock."""
    settings = Settings(str(source), "txt", "image", 10, None, None, 90, 10**7)
    output.mkdir()
    return settings, open_source(settings, output, 1)


def test_an_input_that_loses_rows_while_it_is_packed_is_told(pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = [json.dumps({"image": str(path), "txt": "a"}) for path in sorted(pictures.glob("*.webp"))]
    table.write_text("\n".join(rows))
    settings, source = open_for_change(table, tmp_path / "output")
    table.write_text("\n".join(rows[:20]))
    with pytest.raises(UserError, match=f"input={table}: has changed while it was packed"):
        pack_into(tmp_path / "output", source, settings, 1)
    assert not (tmp_path / "output/sizes.json").exists()


@pytest.mark.parametrize("change", ["gone", "cut"])
def test_shards_that_go_while_they_are_packed_are_told(change: str, samples: list[dict], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "input.tar", samples)
    settings, source = open_for_change(tar, tmp_path / "output")
    if change == "gone":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"input={tar}: (cannot be read any more: .*No such file|has changed while)"):
        pack_into(tmp_path / "output", source, settings, 1)
    assert not (tmp_path / "output/sizes.json").exists()


# The command


def test_the_command_packs_and_says_so(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "output"
    arguments = [f"input={pictures}", f"output={output}", "samples_per_shard=20", "num_workers=1"]
    assert cli.main(["shards", "pack", *arguments]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"packing 25 pictures of {pictures}",
        f"packed 25 pairs in 2 shards in {output}",
    ]
    assert len(read_packed_samples(output)) == 25


def test_the_commands_in_the_yaml_can_be_typed(capsys: pytest.CaptureFixture) -> None:
    text = (config.config_file("pack")).read_text()
    commands = re.findall(r"^# clipmini (shards pack .*?)(?:   .*)?$", text, re.MULTILINE)
    for command in commands:
        assert cli.main(shlex.split(command)) == 2
        assert re.match(r"clipmini: input=/data/\S+ .*(does not exist|no shards found)", capsys.readouterr().err)
    assert len(commands) == 4


WRONG_OVERRIDES = [
    (["input=/nowhere"], "output has no value: give it one, as in output=..."),
    (["input=/nowhere", "output=o", "qualty=1"], "unknown key qualty (did you mean 'quality'?)"),
    (["input=/nowhere", "output=o"], "input=/nowhere: does not exist"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_OVERRIDES)
def test_wrong_overrides(overrides: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["shards", "pack", *overrides]) == 2
    assert capsys.readouterr().err == f"clipmini: {message}\n"
