"""Servers on the loopback that shards are fetched from: one that misbehaves on demand, and an S3."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

CHUNKS = 16


class Server:
    """Serves a directory over HTTP; each GET of a path does what is first in its list of faults.

    `refuse` (503), `forbid` (403), `half` (the connection ends in the middle), `short` (half a file as if it were all),
    `html` (a page with status 200), `stall` (nothing more comes after a part), `slow` (a second for a file).
    A directory's index.html lists it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.stopped = threading.Event()
        self.has_lengths = True
        self.has_etags = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                server.answer(self, has_body=False)

            def do_GET(self) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):
                    server.answer(self, has_body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, has_body: bool) -> None:
        name = request.path.lstrip("/").split("?")[0]
        path = self.directory / name
        path = path / "index.html" if path.is_dir() else path
        fault = ""
        if has_body:
            self.requests[name] += 1
            fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        data = path.read_bytes() if path.is_file() else b""
        if fault in ("refuse", "forbid") or not path.is_file():
            request.send_response({"refuse": 503, "forbid": 403}.get(fault, 404))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = {"html": b"<html>sign in first</html>", "short": data[: len(data) // 2]}.get(fault, data)
        request.send_response(200)
        if self.has_lengths:
            request.send_header("Content-Length", str(len(data)))
            changed = path.stat().st_mtime_ns
            name, value = ("ETag", f'"{changed}"') if self.has_etags else ("Last-Modified", formatdate(changed / 1e9))
            request.send_header(name, value)
        else:
            request.send_header("Connection", "close")
        request.end_headers()
        if has_body:
            self.send(request, data, fault)
        request.close_connection = not self.has_lengths or fault != ""

    def send(self, request: BaseHTTPRequestHandler, data: bytes, fault: str) -> None:
        size = -(-len(data) // CHUNKS)
        for number in range(CHUNKS):
            if fault in ("half", "stall") and number == CHUNKS // 2:
                if fault == "stall":
                    self.stopped.wait()
                return
            request.wfile.write(data[number * size : (number + 1) * size])
            if fault == "slow":
                time.sleep(1 / CHUNKS)

    def stop(self) -> None:
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()


class S3:
    """moto's S3 server in a process of its own, on a port that stays the same when it is stopped and started again.

    What it holds is in its memory: `pause` and `go_on` make an outage without losing that.
    """

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

    def pause(self) -> None:
        """Answer nothing from now on."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.go_on()
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def serve(directory: Path) -> Iterator[Server]:
    """Serve a directory for a while."""
    server = Server(directory)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3, and the credentials that it takes."""
    pytest.importorskip("moto.server")
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        server = S3(tmp_path_factory.mktemp("s3") / "s3.log")
        yield server
        server.stop()


def upload(server: S3, directory: Path, place: str = "bucket") -> None:
    """Put shards into a new bucket, or below it."""
    file_system = fsspec.filesystem("s3", endpoint_url=server.url)
    file_system.mkdir(place.partition("/")[0])
    for path in directory.glob("*.tar"):
        file_system.put_file(str(path), f"{place}/{path.name}")
