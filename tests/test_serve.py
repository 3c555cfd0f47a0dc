"""`clipmini serve` as a process of its own: its answers, what it refuses, and many clients at once."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from judging import write_table
from PIL import Image

from clipmini.data.health import Fault
from clipmini.data.picture import make_thumbnail
from clipmini.search.index import open_index
from clipmini.search.pictures import PictureReader, TablePictures, open_pictures
from clipmini.search.server import Refused, Service
from clipmini.shards.inputs import fingerprint


def make_png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (width, height)).save(content, "PNG")
    return content.getvalue()


LONG_PICTURE = make_png(100_000, 1)  # whose shorter side cannot be made that of the model


@contextlib.contextmanager
def serving(index: Path, *overrides: str) -> Iterator[tuple[str, Forked]]:
    """Start a server on a free port, and yield its address and its process."""
    words, deadline = ["serve", str(index), "port=0", "device=cpu", *overrides], time.monotonic() + 120
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        with Forked(words, Path(scratch), [(output, output)]) as process:
            found = None
            while not found:
                assert process.poll() is None and time.monotonic() < deadline, output.read_text()
                time.sleep(0.02)
                found = re.search(r"http://127\.0\.0\.1:\d+(?= )", output.read_text()) if output.exists() else None
            yield found[0], process


@pytest.fixture(scope="module")
def address(made_index: Path) -> Iterator[str]:
    with serving(made_index, "max_upload=200000") as (url, _):
        yield url


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Return status, content and headers of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            status, content, found = answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        status, content, found = error.code, error.read(), dict(error.headers)
    return status, json.loads(content) if found.get("content-type") == "application/json" else content, found


def test_answers(address: str, folder: Path) -> None:
    status, page, headers = ask(address)
    assert status == 200 and b"<title>clipmini search</title>" in page
    assert "default-src 'self'" in headers["content-security-policy"] and "http" not in page.decode().lower()
    assert ask(f"{address}/api/about")[1] == {"rows": 30, "kind": "image", "model": "tiny open_clip_model.safetensors"}

    results = ask(f"{address}/api/search?query={urllib.parse.quote('2*cat - dog')}&top_k=5")[1]["results"]
    assert [row["rank"] for row in results] == [1, 2, 3, 4, 5] and results[0]["caption"]
    assert all(first["score"] >= second["score"] for first, second in zip(results, results[1:], strict=False))

    found = ask(f"{address}/api/search?top_k=1", (folder / "017.webp").read_bytes())[1]["results"][0]
    assert found["row"] == 17 and found["score"] == pytest.approx(1, abs=1e-3)
    assert ask(f"{address}/api/similar/17?top_k=2")[1]["results"][0]["row"] == 17
    status, picture, headers = ask(f"{address}/api/picture/17")
    assert status == 200 and headers["content-type"] == "image/webp" and picture.startswith(b"RIFF")


@pytest.mark.parametrize(
    ("path", "data", "status", "reason"),
    [
        ("/api/search?query=", None, 400, "a part of it is empty"),
        ("/api/search?query=cat%20-%20", None, 400, "a part of it is empty"),
        (f"/api/search?query={'x%20' * 1500}", None, 400, "has 3000 characters, more than 2000"),
        (f"/api/search?query={'word%20' * 40}", None, 400, "has 42 tokens and the model takes 24"),
        ("/api/search?query=cat&top_k=0", None, 400, "top_k=0: must be from 1 to 200"),
        ("/api/search?query=cat&top_k=-1", None, 400, "top_k=-1"),
        ("/api/search?query=cat&top_k=00000000599999", None, 400, "top_k=00000000599999"),
        (f"/api/search?query=cat&top_k={'0' * 5000}5", None, 400, "top_k=0000"),
        (f"/api/similar/{'9' * 5000}", None, 404, "the index has 30 rows"),
        ("/api/search", b"", 400, "no picture was sent"),
        ("/api/search", b"no picture", 415, "not a JPEG, PNG or WebP"),
        ("/api/search", b"\xff\xd8\xff" + bytes(300_000), 413, "more than max_upload=200000 bytes"),
        ("/api/search", b"\xff\xd8\xff" + bytes(3_500_000), 413, "more than max_upload=200000 bytes"),
        ("/api/search", LONG_PICTURE, 415, "too_many_pixels: 100000 x 1 would be resized to"),
        ("/api/similar/30", None, 404, "row 30: the index has 30 rows"),
        ("/api/picture/99999999999999999999", None, 404, "the index has 30 rows"),
    ],
)
def test_refuses(path: str, data: bytes | None, status: int, reason: str, address: str) -> None:
    found, content, _ = ask(f"{address}{path}", data)
    assert found == status and reason in content["error"]


def test_reads_no_files_for_others(address: str, folder: Path) -> None:
    """A path is a text here, and there is none to a picture but by its row; other sites cannot ask at all."""
    with tempfile.NamedTemporaryFile(suffix=".webp", dir="/tmp") as file:  # a path of few tokens
        file.write((folder / "017.webp").read_bytes())
        file.flush()
        found = ask(f"{address}/api/search?query={urllib.parse.quote(file.name)}&top_k=1")[1]["results"][0]
    assert found["score"] < 0.99
    for path in (
        "/api/picture/..%2f..%2fetc%2fpasswd",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/picture/-1",
    ):
        assert ask(f"{address}{path}")[0] == 404, path
    assert ask(address, Host="evil.example")[0] == 400


def test_fifty_clients_at_once(address: str) -> None:
    alone = [ask(f"{address}/api/search?query=thing%20{number}&top_k=3")[1] for number in range(50)]

    def search(number: int) -> Any:
        return ask(f"{address}/api/search?query=thing%20{number}&top_k=3")[1], ask(
            f"{address}/api/picture/{number % 30}"
        )[0]

    with concurrent.futures.ThreadPoolExecutor(50) as threads:
        together = list(threads.map(search, range(50)))
    assert together == [(answer, 200) for answer in alone]


def test_ends_by_ctrl_c_and_says_that_a_port_is_in_use(made_index: Path, run_here: Callable) -> None:
    with serving(made_index) as (url, process):
        port = url.rpartition(":")[2]
        result = run_here("serve", str(made_index), f"port={port}")
        assert result.returncode == 2 and f"port={port}: Address already in use: choose another" in result.stderr
        os.kill(process.pids[0], signal.SIGINT)
        assert process.wait(timeout=20) == [0]
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", int(port)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["port=70000"], "port=70000: must be from 0"),
        (["top_k=500"], "top_k=500: must be from 1 to 200"),
        (["max_upload=0"], "max_upload=0: must be 1 or more"),
        (["pictures=nowhere"], "pictures=nowhere: there is no such directory"),
        (["model=nothing"], "model=nothing: neither a file nor a directory"),
        (["prot=1"], r"unknown key prot \(did you mean 'port'"),
    ],
)
def test_bad_values(overrides: list[str], message: str, made_index: Path, run_here: Callable) -> None:
    result = run_here("serve", str(made_index), *overrides)
    assert result.returncode == 2 and re.search(message, result.stderr), result.stderr


def test_pictures_outside_of_what_was_embedded_are_not_read(folder: Path, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for directory in (inside, outside):
        directory.mkdir()
        Image.new("RGB", (8, 8)).save(directory / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    shutil.copytree(inside, tmp_path / "inside-too")
    reader = PictureReader(str(inside), None)
    assert reader.read("a.png") == (inside / "a.png").read_bytes()
    for path in ("../outside/a.png", "link.png", str(outside / "a.png"), "../inside-too/a.png"):
        with pytest.raises(Fault, match="it is outside of"):
            reader.read(path)
    for pattern in (f"{inside}/*.tar", f"{inside}/{{0..3}}.tar", str(inside / "table.csv")):
        assert PictureReader(pattern, None).read("a.png") == (inside / "a.png").read_bytes()
    assert PictureReader(str(inside), str(tmp_path)).read("link.png") == (outside / "a.png").read_bytes()
    for path in (None, 3, "s3://bucket/a.tar/1"):
        with pytest.raises(Fault, match="in no file of this machine"):
            reader.read(path)
    with pytest.raises(Fault, match="no such|No such"):
        reader.read("b.png")


@pytest.mark.parametrize("name", ["a[1]", "a{0..3}", "a*?", "a::b"])
@pytest.mark.parametrize("below", ["", "*.tar", "{0..3}.tar", "table.csv"])
def test_signs_of_patterns_in_the_name_of_a_directory(name: str, below: str, tmp_path: Path) -> None:
    inside = tmp_path / name
    inside.mkdir()
    for directory, size in ((inside, 8), (tmp_path, 9)):
        (directory / "a.png").write_bytes(make_png(size, size))
    reader = PictureReader(str(inside / below), None)
    assert reader.read("a.png") == (inside / "a.png").read_bytes()
    with pytest.raises(Fault, match="it is outside of"):
        reader.read("../a.png")


@pytest.mark.parametrize("kind", ["bytes.parquet", "struct.parquet", "base64.jsonl", "path.csv"])
def test_shows_pictures_that_are_in_a_table(
    kind: str, folder: Path, tiny_export: Path, tmp_path: Path, run_here: Callable
) -> None:
    paths = sorted(folder.glob("*.webp"))[:6]
    (tmp_path / "secret.webp").write_bytes(paths[0].read_bytes())
    path = tmp_path / "tables" / kind
    path.parent.mkdir()
    make: dict[str, Callable[[Path], Any]] = {
        "bytes.parquet": Path.read_bytes,
        "struct.parquet": lambda one: {"bytes": one.read_bytes(), "path": "../secret.webp"},
        "base64.jsonl": lambda one: base64.b64encode(one.read_bytes()).decode(),
        "path.csv": lambda one: "../secret.webp" if one == paths[3] else shutil.copy(one, path.parent),
    }
    rows = [{"image": make[kind](one)} for one in paths]
    missing = {"path.csv": "missing.webp", "bytes.parquet": b"", "struct.parquet": {"bytes": b""}, "base64.jsonl": None}
    rows[1]["image"] = missing[kind]
    write_table(path, *rows)
    given = [f"model={tiny_export}", f"input={path}", f"output={tmp_path}/index", "rows_per_partition=4"]
    assert run_here("embed", *given, "device=cpu", "num_workers=0").returncode == 0
    index = open_index(tmp_path / "index")
    service = Service(index, None, open_pictures(index.record, None))  # type: ignore[arg-type]
    kept = [paths[0], *paths[2:]]
    for row, one in enumerate(kept):
        if kind == "path.csv" and one == paths[3]:
            with pytest.raises(Refused, match="it is outside of"):
                service.picture(row)
        else:
            assert service.picture(row) == make_thumbnail(one.read_bytes(), 256)
    if kind != "path.csv":
        assert [known["table_row"] for known in index.describe(range(5))] == [1, 3, 4, 5, 6]
        with pytest.raises(Fault, match=f"row 2 of {kind} holds no picture|it is missing"):
            open_pictures(index.record, None).read(None, 2)
        with pytest.raises(Fault, match=f"row 7 of {kind} holds no picture"):
            open_pictures(index.record, None).read(None, 7)
        with pytest.raises(Fault, match="it is outside of"):
            open_pictures(index.record, str(tmp_path / "index")).read(None, 1)
        os.utime(path, (1, 1))
        with pytest.raises(Refused, match=f"{kind} has changed since it was embedded"):
            service.picture(0)


def test_a_path_in_place_of_a_picture_in_a_table_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    shutil.copy(folder / "000.webp", tmp_path / "secret.webp")
    path = write_table(tmp_path / "tables/a.jsonl", {"image": "../secret.webp"})
    table = TablePictures(str(path), "image", fingerprint([("a.jsonl", path.stat())]))
    with pytest.raises(Fault, match="row 1 of a.jsonl holds no picture"):
        PictureReader(str(path), None, table).read("a.jsonl row 1", 1)
