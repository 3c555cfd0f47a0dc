"""`clipmini embed`: the files of clip-retrieval, the same bytes however they are made, nothing cut or lost silently."""

import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pyarrow.parquet
import pytest
import torch
from conftest import in_processes, read_sample, write_tar
from forked import run_forked
from PIL import Image
from test_model import make_model

from clipmini import distributed
from clipmini.data.picture import to_rgb
from clipmini.errors import UserError
from clipmini.export.open_clip_directory import export_open_clip
from clipmini.search import embed, layout
from clipmini.search.layout import make_parquet
from clipmini.shards.packed import lock
from clipmini.shards.tables import ParquetPart, open_table


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 150 pictures with captions, of which one picture and one caption cannot be used."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, sample in enumerate(read_sample("train/noto-00000.tar", 150)):
        (folder / f"{number:03}.webp").write_bytes(sample["webp"])
        (folder / f"{number:03}.txt").write_bytes(sample["txt"])
    (folder / "070.webp").write_bytes(b"RIFFnothing")
    (folder / "080.txt").write_text("  ")
    return folder


def read_files(directory: Path) -> dict[str, bytes]:
    """Return all files of an index but its record."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "index.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def given(model: Path, source: Path | str, output: Path, *overrides: str) -> list[str]:
    return ["embed", f"model={model}", f"input={source}", f"output={output}", "device=cpu", *overrides]


def test_is_what_open_clip_makes_in_clip_retrievals_files(
    tiny_export: Path, pictures: Path, tmp_path: Path, run_here: Callable
) -> None:
    result = run_here(
        *given(tiny_export, pictures, tmp_path / "index", "caption_key=txt", "long_texts=cut", "rows_per_partition=60")
    )
    assert result.returncode == 0, result.stderr
    names = {f"{folder}/{folder}_{number}" for folder in ("img_emb", "text_emb", "metadata") for number in range(3)}
    assert {name.partition(".")[0] for name in read_files(tmp_path / "index")} == names | {"rejected/rejected_1"}
    assert "left out 2: 1 x picture, 1 x caption" in result.stdout and "embedded 148" in result.stdout

    table = pyarrow.parquet.read_table(tmp_path / "index/metadata/metadata_0.parquet").to_pylist()
    image, text = (np.load(tmp_path / f"index/{kind}_emb/{kind}_emb_0.npy") for kind in ("img", "text"))
    assert image.dtype == text.dtype == np.float16 and len(table) == len(image) == len(text) == 60
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_export}")
    loaded.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_export}")
    for row in (0, 17, 59):
        assert table[row]["caption"] == (pictures / table[row]["image_path"]).with_suffix(".txt").read_text().strip()
        with torch.no_grad():
            expected = loaded.encode_text(tokenizer([table[row]["caption"]]), normalize=True)[0].numpy()
            picture = preprocess(to_rgb(Image.open(pictures / table[row]["image_path"])))
            expected_image = loaded.encode_image(picture[None], normalize=True)[0].numpy()
        np.testing.assert_allclose(text[row], expected, atol=2e-3)
        np.testing.assert_allclose(image[row], expected_image, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(image.astype(np.float32), axis=1), 1, atol=2e-3)


def test_same_bytes_for_any_workers_and_processes_killed_or_not(
    tiny_export: Path, pictures: Path, tmp_path: Path, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("caption_key=txt", "long_texts=cut", "rows_per_partition=40")
    for name, workers in (("alone", 0), ("workers", 2)):
        result = run_here(*given(tiny_export, pictures, tmp_path / name, *more, f"num_workers={workers}"))
        assert result.returncode == 0, result.stderr
    two = run_forked(given(tiny_export, pictures, tmp_path / "two", *more, "num_workers=1"), tmp_path, processes=2)
    assert two.returncode == 0, two.stderr
    expected = read_files(tmp_path / "alone")
    assert read_files(tmp_path / "workers") == expected and read_files(tmp_path / "two") == expected

    real = embed.Embedder.embed
    monkeypatch.setattr(embed.Embedder, "embed", lambda self, part: real(self, part) if budget.pop() else 1 / 0)
    budget = [0, 1, 1]  # two partitions, and then its end
    with pytest.raises(ZeroDivisionError):
        run_here(*given(tiny_export, pictures, tmp_path / "stopped", *more))
    monkeypatch.undo()
    (tmp_path / "stopped/img_emb/.img_emb_2.npy.0123abcd.tmp").write_bytes(b"half")
    before = (tmp_path / "stopped/img_emb/img_emb_1.npy").stat().st_mtime_ns
    result = run_here(*given(tiny_export, pictures, tmp_path / "stopped", *more))
    assert "going on: 2 of 4 partitions are there" in result.stdout
    assert read_files(tmp_path / "stopped") == expected
    assert (tmp_path / "stopped/img_emb/img_emb_1.npy").stat().st_mtime_ns == before


def test_shards_tables_texts_and_sets(
    tiny_export: Path, shards: Path, classification_set: Path, tmp_path: Path, run_here: Callable
) -> None:
    assert (
        run_here(*given(tiny_export, shards, tmp_path / "shards", "caption_key=txt", "long_texts=cut")).returncode == 0
    )
    found = [np.load(tmp_path / f"shards/img_emb/img_emb_{number}.npy") for number in range(3)]
    assert [len(part) for part in found] == [30, 20, 14]  # a partition each
    row = pyarrow.parquet.read_table(tmp_path / "shards/metadata/metadata_1.parquet").to_pylist()[0]
    assert row["image_path"].startswith(f"{shards}/b.tar/") and row["caption"]

    rows = [{"text": f"a picture of thing {number}", "about": number, "source": "a book"} for number in range(5)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = given(tiny_export, tmp_path / "texts.jsonl", tmp_path / "texts", "image_key=null", "caption_key=text")
    result = run_here(*texts)
    assert result.returncode == 0, result.stderr
    table = pyarrow.parquet.read_table(tmp_path / "texts/metadata/metadata_0.parquet").to_pylist()
    assert [(row["caption"], row["about"]) for row in table] == [(row["text"], row["about"]) for row in rows]
    assert table[0]["source"] == "texts.jsonl row 1" and table[0]["source_"] == "a book"
    assert not (tmp_path / "texts/img_emb").exists()

    assert run_here(*given(tiny_export, classification_set, tmp_path / "set")).returncode == 0
    table = pyarrow.parquet.read_table(tmp_path / "set/metadata/metadata_0.parquet").to_pylist()
    assert [row["caption"] for row in table[:8]] == [f"thing {number % 7}" for number in range(8)]


def test_metadata_of_shards(tiny_export: Path, tmp_path: Path, run_here: Callable) -> None:
    samples = read_sample("train/noto-00000.tar", 4)
    for number, sample in enumerate(samples):
        values = {"url": f"http://x/{number}", "width": number if number else "unknown", "tags": ["a", {"b": 1}]}
        sample["txt"] = b"a face"
        values |= {"caption": "a face", "table_row": 5}
        sample["json"] = json.dumps(values).encode()
    write_tar(tmp_path / "shards/0.tar", samples)
    assert (
        run_here(
            *given(tiny_export, tmp_path / "shards", tmp_path / "index", "metadata=true", "caption_key=txt")
        ).returncode
        == 0
    )
    table = pyarrow.parquet.read_table(tmp_path / "index/metadata/metadata_0.parquet").to_pylist()
    assert [row["url"] for row in table] == [f"http://x/{number}" for number in range(4)]
    assert [row["width"] for row in table] == ['"unknown"', "1", "2", "3"]
    assert json.loads(table[0]["tags"]) == ["a", {"b": 1}]
    assert {"caption", "table_row_"} <= table[0].keys() and not {"caption_", "table_row"} & table[0].keys()


def test_texts_that_are_too_long_are_said_and_not_cut(tiny_export: Path, tmp_path: Path, run_here: Callable) -> None:
    lines = ["a short one"] * 100 + ["word " * 40]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = given(tiny_export, tmp_path / "texts.jsonl", tmp_path / "index", "image_key=null", "caption_key=text")
    arguments.append("rows_per_partition=50")
    result = run_here(*arguments)
    assert result.returncode == 2
    assert "texts.jsonl row 101: its text has 42 tokens and the model takes 24" in result.stderr
    assert "with long_texts=cut the same command goes on" in result.stderr
    assert np.load(tmp_path / "index/text_emb/text_emb_1.npy").shape == (50, 32)  # what was done stays
    result = run_here(*arguments, "long_texts=cut")
    assert result.returncode == 0 and "1 texts were cut" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rows_per_partition=0"], "rows_per_partition=0: must be 1 or more"),
        (["num_workers=-1"], "num_workers=-1: must be 0 or more"),
        (["precision=int8"], "precision=int8: is one of fp32, bf16, fp16"),
        (["long_texts=drop"], "long_texts=drop: is one of refuse, cut"),
        (["caption_key=title"], r"caption_key=title: of a folder of pictures it is txt or folder"),
        (["captions_key=txt"], r"unknown key captions_key \(did you mean 'caption_key'"),
        (["pictures"], "pictures: what is it\\?; there are model, architecture"),
        (["input=pipe:cat a.tar"], "input=pipe:cat a.tar: would run a command .* every shard, which is not done here"),
        (["model=nothing"], "model=nothing: neither a file nor a directory"),
    ],
)
def test_bad_values(
    overrides: list[str], message: str, tiny_export: Path, pictures: Path, tmp_path: Path, run_here: Callable
) -> None:
    result = run_here(*given(tiny_export, pictures, tmp_path / "index", *overrides))
    assert result.returncode == 2 and re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "index").exists()


def test_bad_input(
    tiny_export: Path, pictures: Path, classification_set: Path, tmp_path: Path, run_here: Callable
) -> None:
    def refused(source: Path, *overrides: str, output: Path = tmp_path / "index") -> str:
        result = run_here(*given(tiny_export, source, output, *overrides))
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        return result.stderr

    (tmp_path / "empty").mkdir()
    assert "no pictures (.jpg, .jpeg, .png, .webp)" in refused(tmp_path / "empty")
    (tmp_path / "table.jsonl").write_text('{"text": "a"}\n')
    assert "image_key=image" in refused(tmp_path / "table.jsonl") and not (tmp_path / "index").exists()
    nothing = refused(tmp_path / "table.jsonl", "image_key=null")
    assert "image_key=null and caption_key=null: one of them must say" in nothing
    assert "is an evaluation set, of which only pictures" in refused(classification_set, "caption_key=txt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.jpg").write_bytes(b"no picture")
    assert "not one of 1 pictures can be used: 1 x picture (1.jpg: not a JPEG" in refused(tmp_path / "broken")
    inside = refused(pictures, output=pictures / "index")
    assert "is in input=" in inside and not (pictures / "index").exists()
    assert "once that is mended, the same command goes on" in refused(pictures, output=Path("/dev/null/index"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    assert f"output={full}: is not empty, and holds no index" in refused(pictures, output=full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_another_index_is_not_gone_on_with(
    tiny_export: Path, pictures: Path, tiny_json: Path, tmp_path: Path, run_here: Callable
) -> None:
    own = tmp_path / "pictures"
    own.mkdir()
    for path in sorted(pictures.iterdir())[:6]:
        shutil.copy(path, own)
    assert run_here(*given(tiny_export, own, tmp_path / "index")).returncode == 0
    other = make_model(str(tiny_json))
    with torch.no_grad():
        other.visual.proj[0, 0] += 1
    export_open_clip(other, tmp_path / "other/tiny")
    result = run_here(*given(tmp_path / "other/tiny", own, tmp_path / "index"))
    assert result.returncode == 2 and "was begun with other model=" in result.stderr and "weights=" in result.stderr
    Image.new("RGB", (40, 40)).save(own / "new.png")
    result = run_here(*given(tiny_export, own, tmp_path / "index"))
    assert result.returncode == 2 and "files of the input: their names, sizes or times have changed" in result.stderr


def test_rows_of_parquet() -> None:
    def read(rows: list[dict]) -> list[dict]:
        return pyarrow.parquet.read_table(io.BytesIO(make_parquet(rows))).to_pylist()

    assert read([{"image_path": "a\udc80b"}]) == [{"image_path": "a?b"}]  # the name of a file that is not UTF-8
    assert read([{"a": 1, "b": 2**70}, {"a": "x"}]) == [{"a": "1", "b": str(2**70)}, {"a": '"x"', "b": None}]
    assert read([]) == []
    assert read([{"exif": {}, "\ud800": [1]}]) == [{"exif": "{}", "?": "[1]"}]


def test_a_process_killed_between_the_files_of_a_partition(
    tiny_export: Path, pictures: Path, tmp_path: Path, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(tiny_export, pictures, tmp_path / "index", "caption_key=txt", "long_texts=cut")
    assert run_here(*given(tiny_export, pictures, tmp_path / "whole", *arguments[5:])).returncode == 0
    real = layout.write_atomically

    def die(path: Path, content: bytes) -> None:
        if path.name == names[-1]:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(layout, "write_atomically", die)
    names = ["metadata_0.parquet", "rejected_0.jsonl", "text_emb_0.npy", "img_emb_0.npy"]
    while names:
        assert run_here(*arguments).returncode == 130
        names.pop()
        assert not (tmp_path / "index/metadata/metadata_0.parquet").exists()
    monkeypatch.undo()
    assert run_here(*arguments).returncode == 0
    assert read_files(tmp_path / "index") == read_files(tmp_path / "whole")


def test_a_shard_that_is_gone_stops_it(tiny_export: Path, shards: Path, tmp_path: Path, run_here: Callable) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    arguments = given(tiny_export, tmp_path / "shards", tmp_path / "index", "num_workers=1")
    real = embed.open_input

    def open_then_lose(*request: object) -> object:
        found = real(*request)
        (tmp_path / "shards/b.tar").unlink()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "open_input", open_then_lose)
        result = run_here(*arguments)
    assert (
        result.returncode == 2 and "b.tar/0: not found; once that" in result.stderr and "Traceback" not in result.stderr
    )
    assert (tmp_path / "index/metadata/metadata_0.parquet").exists()  # what came before it stays
    shutil.copy2(shards / "b.tar", tmp_path / "shards/b.tar")
    assert run_here(*arguments).returncode == 0


def test_two_commands_do_not_write_into_one_output(tiny_export: Path, tmp_path: Path, run_here: Callable) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures/1.png")
    output = tmp_path / "index"
    assert run_here(*given(tiny_export, tmp_path / "pictures", output)).returncode == 0
    (output / "metadata/metadata_0.parquet").unlink()
    with lock(output):
        half = output / "img_emb/.img_emb_0.npy.0123abcd.tmp"  # which the other command is writing
        half.write_bytes(b"half")
        result = run_here(*given(tiny_export, tmp_path / "pictures", output))
        assert result.returncode == 2 and half.exists()
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"output={output}: another command writes into it ({who}): wait for its end" in result.stderr
    assert run_here(*given(tiny_export, tmp_path / "pictures", output)).returncode == 0
    assert not half.exists() and not (output / ".lock").exists()


def hold(output: Path) -> bool:
    """Say whether other commands are kept out when this process is still at it and the first one is done."""
    with embed.held(output):
        if distributed.rank() == 0:
            (output / "done").touch()
            return True
        deadline = time.monotonic() + 60
        while not (output / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(UserError, match="another command writes into it"), lock(output):
            pass
    return True


def test_the_first_process_keeps_others_out_until_all_are_done(tmp_path: Path) -> None:
    assert in_processes(2, hold, tmp_path, tmp_path / "index") == [True, True]
    with lock(tmp_path / "index"):
        pass


def test_messages_name_the_keys_of_this_command(
    tiny_export: Path, shards: Path, tmp_path: Path, run_here: Callable
) -> None:
    for override, message in (
        ("max_member_bytes=10", r"\(.*a.tar/noto_1f600: .jpg has \d+, max_member_bytes=10\)"),
        ("caption_key=cls.txt", r"input: no picture-caption pairs .* \(caption_key\), found: .jpg, .json, .txt"),
        ("cache.max_bytes=0", r"clipmini: cache.max_bytes=0: must be above 0"),
        ("cache.fetch_timeout=0.5", r"input=.*tried \d times \(cache.fetch_timeout=0.5 seconds\)"),
    ):
        source = "http://127.0.0.1:9/a.tar" if "fetch" in override else shards
        result = run_here(*given(tiny_export, source, tmp_path / "index", override))
        assert result.returncode == 2 and re.search(message, result.stderr), result.stderr
        assert "data." not in result.stderr
        shutil.rmtree(tmp_path / "index", ignore_errors=True)


def test_a_row_group_is_read_by_the_workers_that_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number}" for number in range(500)]
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=128)
    part = open_table(str(path), None, "text", 1000).parts[0]
    read: list[int] = []
    real = ParquetPart.group_rows

    def look(self: ParquetPart, file: object, group: int, *rest: int) -> Iterator:
        read.append(group)
        return real(self, file, group, *rest)

    monkeypatch.setattr(ParquetPart, "group_rows", look)
    for workers in (1, 4, 3, 20):
        blocks, of_workers = [], []
        for number in range(workers):
            worker = SimpleNamespace(id=number, num_workers=workers)
            monkeypatch.setattr(embed, "get_worker_info", lambda worker=worker: worker)
            read.clear()
            blocks += list(embed.BlockDataset(part, None, with_texts=True))
            of_workers.append(list(read))
        assert [block.number for block in blocks] == list(range(8))
        assert [text for block in blocks for text in block.texts] == texts
        assert blocks[3].rows[0]["source"] == "texts.parquet row 193"
        if workers == 4:
            assert of_workers == [[0], [1], [2], [3]]
