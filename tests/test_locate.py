"""Which shards a pattern names, and what is said of one that names none."""

import gzip
import os
import shutil
from pathlib import Path

import pytest
from conftest import make_cache, read_sample, write_tar
from servers import serve

from clipmini.data.index import PairFormat, Shard
from clipmini.data.locate import base_name, beside, describe, locate, parent
from clipmini.data.manifest import read_manifest
from clipmini.errors import UserError


def find(shards: object, tmp_path: Path, **options: object) -> list[Shard]:
    remote = make_cache(tmp_path / "cache").remote
    return locate(shards, "data.train", remote, **{"allow_pipe": False, **options})  # type: ignore[arg-type]


FORMS = {
    "directory": "{root}",
    "file url": "file://{root}",
    "glob": "{root}/*.tar",
    "brace": "{root}/{{a..c}}.tar",
    "joined": "{root}/a.tar::{root}/{{b,c}}.tar",
    "list": ["{root}/a.tar", "{root}/[bc].tar"],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_local_shards(form: str | list[str], shards: Path, tmp_path: Path) -> None:
    form = form.format(root=shards) if isinstance(form, str) else [part.format(root=shards) for part in form]
    found = find(form, tmp_path)
    assert [Path(shard.path).name for shard in found] == ["a.tar", "b.tar", "c.tar"]
    for shard in found:
        status = os.stat(shard.path)
        assert (shard.size, shard.version) == (status.st_size, str(status.st_mtime_ns))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{root}/nowhere", "data.train=.*nowhere: no shards found, .*nowhere does not exist"),
        ("{root}/*.tgz", "data.train=.*: no shards found"),
        ("{root}/{{a..d}}.tar", r"no shards found, .*/d\.tar does not exist \(of 4 shards\)"),
        ([], r"data.train=\[\]: no shards"),
        ("", "data.train='': no shards"),
        ("{root}/{{a,b.tar", "data.train=.*: Unbalanced braces"),
        ("gs://bucket/a.tar", r"gs://bucket/a.tar: .*gcsfs.*: pip install 'clipmini\[gs\]'"),
        ("nothing://bucket/a.tar", "nothing://bucket/a.tar: cannot be read .*Protocol not known: nothing"),
        ("pipe:cat a.tar", "data.train=pipe:cat a.tar: would run a command .*data.allow_pipe=true allows that"),
        (["{root}/a.tar", "pipe:cat a.tar"], "would run a command"),
        ("{root}/a.tar::pipe:cat a.tar", "would run a command"),
    ],
)
def test_patterns_that_name_nothing(form: str | list[str], message: str, shards: Path, tmp_path: Path) -> None:
    form = form.format(root=shards) if isinstance(form, str) else [part.format(root=shards) for part in form]
    with pytest.raises(UserError, match=message) as caught:
        find(form, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "hint"), [("allow_pipe", "; allow_pipe=true allows that"), (None, ", which is not done here")]
)
def test_what_allows_commands_is_told_if_anything_does(key: str | None, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"would run a command in a shell for every shard{hint}$"):
        find(["pipe:cat a.tar"], tmp_path, pipe_key=key)


def test_directory_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards found, the directory has no .tar files"):
        find(str(tmp_path), tmp_path)


@pytest.mark.parametrize("form", ["{root}", "{root}/*", "{root}/x.tar.gz", "file://{root}/x.tar.gz"])
def test_compressed_shards_are_refused_and_not_passed_over(form: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/a.tar", read_sample("train/noto-00000.tar", 1))
    (tmp_path / "shards/x.tar.gz").write_bytes(gzip.compress((tmp_path / "shards/a.tar").read_bytes()))
    with pytest.raises(UserError, match=r"x\.tar\.gz is compressed: samples are read at random, .* decompress it once"):
        find(form.format(root=tmp_path / "shards"), tmp_path)


def test_missing_shards_are_kept_when_asked(shards: Path, tmp_path: Path) -> None:
    found = find(f"{shards}/{{a,x}}.tar", tmp_path, keep_missing=True)
    assert [(Path(shard.path).name, shard.version == "") for shard in found] == [("a.tar", False), ("x.tar", True)]


def test_pipes_when_allowed(tmp_path: Path) -> None:
    found = find("pipe:cat {0..2}.tar", tmp_path, allow_pipe=True)
    assert [shard.path for shard in found] == ["pipe:cat 0.tar", "pipe:cat 1.tar", "pipe:cat 2.tar"]


def test_a_file_whose_name_is_a_command_is_a_file(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch ran; cat c.tar #.tar"
    Path(name).write_bytes((shards / "c.tar").read_bytes())
    (shard,) = find("*.tar", tmp_path)
    assert shard.path == f"./{name}" and shard.size == Path(name).stat().st_size
    assert read_manifest("*.tar", PairFormat(), make_cache(tmp_path / "cache")).num_samples == 14
    assert not Path("ran").exists()


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_tar(folder / "a.tar", read_sample("train/noto-00000.tar", 1))
    (folder / "b.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no shards found, .*/b\.tar does not exist \(of 2 shards\)"):
        find(str(folder), tmp_path)
    (folder / "b.tar").unlink()
    os.mkfifo(folder / "b.tar")
    for form in (str(folder), f"{folder}/*.tar", f"{folder}/b.tar"):
        with pytest.raises(UserError, match=r"data.train=.*: .*/b\.tar is not a file"):
            find(form, tmp_path)
    (folder / "b.tar").unlink()
    (folder / "b.tar").mkdir()
    with pytest.raises(UserError, match=r"data.train=.*: .*/b\.tar is not a file"):
        find(str(folder), tmp_path)


def test_shards_of_a_web_server(shards: Path, tmp_path: Path) -> None:
    with serve(shards) as server:
        found = find(f"{server.url}/{{a..c}}.tar?token=1", tmp_path)
        assert [shard.path for shard in found] == [f"{server.url}/{name}.tar?token=1" for name in "abc"]
        assert [shard.size for shard in found] == [(shards / f"{name}.tar").stat().st_size for name in "abc"]
        assert all(shard.version for shard in found)
        with pytest.raises(UserError, match=r"/d\.tar does not exist \(of 4 shards\)"):
            find(f"{server.url}/{{a..d}}.tar", tmp_path)
        kept = find(f"{server.url}/{{c..d}}.tar", tmp_path, keep_missing=True)
        assert [shard.version == "" for shard in kept] == [False, True]


def test_a_glob_of_a_web_server_tells_as_much_as_names(shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(shards, tmp_path / "www"))
    (root / "index.html").write_text("".join(f'<a href="{name}.tar">{name}</a>' for name in "abc"))
    with serve(root) as server:
        assert find(f"{server.url}/*.tar", tmp_path) == find(f"{server.url}/{{a..c}}.tar", tmp_path)


@pytest.mark.parametrize("name", ["blob_id", "xet_hash"])
def test_versions_of_hugging_face(name: str) -> None:
    entry = {"name": "datasets/a/b/a.tar", "size": 10240, "type": "file", "last_commit": None, name: "0123"}
    assert describe("hf://datasets/a/b/a.tar", entry) == Shard("hf://datasets/a/b/a.tar", -1, 10240, "0123")


def test_server_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    remote = make_cache(tmp_path, fetch_timeout=1.0).remote
    message = r"^data\.train=http://127.0.0.1:9/a\.tar: .*tried \d times \(data.cache.fetch_timeout=1 seconds\)"
    with pytest.raises(UserError, match=message):
        locate("http://127.0.0.1:9/a.tar", "data.train", remote, allow_pipe=False)


def test_parts_of_paths() -> None:
    assert parent("s3://b/dir/a.tar") == "s3://b/dir" and parent("/x/a.tar") == "/x" and parent("a.tar") == "."
    assert parent("https://h/dir/a.tar?sig=/x/y") == "https://h/dir"
    assert base_name("http://h/dir/a.tar?sig=/x/y") == "a.tar" and base_name("/x/a?b.tar") == "a?b.tar"
    assert beside("https://h/dir/a.tar?sig=/x/y", "sizes.json") == "https://h/dir/sizes.json?sig=/x/y"
    assert beside("s3://b/dir/a.tar", "sizes.json") == "s3://b/dir/sizes.json" and beside("a.tar", "b") == "./b"
