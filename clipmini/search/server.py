"""`clipmini serve INDEX`: a page on this machine to search an index with.

GET  /                    the page
GET  /api/about           what the index holds
GET  /api/search          query=TEXT, top_k=N
POST /api/search          the bytes of a picture, top_k=N
GET  /api/similar/ROW     what is nearest to a row of the index, top_k=N
GET  /api/picture/ROW     the picture of a row, as a small WebP
"""

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clipmini import config, launch
from clipmini.annotations import Limits
from clipmini.console import set_up_logging
from clipmini.data.health import Fault
from clipmini.data.picture import make_thumbnail
from clipmini.errors import UserError
from clipmini.files import tell_neighbours
from clipmini.search.index import Index, list_results, open_index
from clipmini.search.layout import TABLE_ROW
from clipmini.search.pictures import PictureReader, open_pictures
from clipmini.search.query import QueryEncoder, load_query_encoder

log = logging.getLogger(__name__)

HOST = "127.0.0.1"  # nobody else's: there is no password
PAGE = Path(__file__).with_name("page.html")
MAX_TOP_K = 200
MAX_DIGITS = 12  # of a number
READ_ON = 20  # times the limit that are read of an upload, so that its sender hears why it is refused
MAX_QUERY = 2000  # characters
PIXELS = 256  # of a picture on the page
WAITING = 512  # clients that need not come again
AT_ONCE = 4  # searches: each holds the scores of all rows
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Refused(Exception):
    """What is asked for cannot be done: a status from 400 on, and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Service:
    """Answers, in whatever thread it is asked."""

    def __init__(self, index: Index, encoder: QueryEncoder, pictures: PictureReader) -> None:
        self.index = index
        self.encoder = encoder
        self.pictures = pictures
        self.of_model = threading.Lock()  # its mode is changed and put back
        self.of_search = threading.Semaphore(AT_ONCE)

    def about(self) -> dict[str, Any]:
        """Say what the index holds."""
        record = self.index.record
        return {"rows": len(self.index), "kind": self.index.kind, "model": record.get("name", record["model"])}

    def search_text(self, query: str, top_k: int) -> dict[str, Any]:
        """Find what is nearest to a text, or to a sum of texts; paths are texts here.

        Raises:
            Refused: it cannot be read.
        """
        if len(query) > MAX_QUERY:
            raise Refused(400, f"query: has {len(query)} characters, more than {MAX_QUERY}")
        try:
            with self.of_model:
                embedding = self.encoder.encode(query, with_paths=False)
        except UserError as error:
            raise Refused(400, str(error)) from error
        return self.search(embedding, top_k)

    def search_picture(self, data: bytes, top_k: int) -> dict[str, Any]:
        """Find what is nearest to a picture.

        Raises:
            Refused: it is none.
        """
        try:
            with self.of_model:
                embedding = self.encoder.encode_picture(data, "picture")
        except UserError as error:
            raise Refused(415, str(error).removeprefix("query=")) from error
        return self.search(embedding, top_k)

    def search_similar(self, row: int, top_k: int) -> dict[str, Any]:
        """Find what is nearest to a row."""
        return self.search(self.index.embedding(self.check_row(row)), top_k)

    def search(self, embedding: Tensor, top_k: int) -> dict[str, Any]:
        with self.of_search:
            found = self.index.find(embedding[None], top_k)
        rows = list_results(self.index, *(values[0].tolist() for values in found))
        names = ("rank", "score", "percentile", "row", "caption", "image_path", "source")
        return {"results": [{name: row[name] for name in names if row.get(name) is not None} for row in rows]}

    def picture(self, row: int) -> bytes:
        """Return the picture of a row.

        Raises:
            Refused: there is none that may be shown.
        """
        (known,) = self.index.describe([self.check_row(row)])
        try:
            return make_thumbnail(self.pictures.read(known.get("image_path"), known.get(TABLE_ROW)), PIXELS)
        except Fault as fault:
            raise Refused(404, f"{fault.cause}: {fault.detail}") from fault

    def check_row(self, row: int) -> int:
        """Return a row that is there.

        Raises:
            Refused: it is not.
        """
        if not 0 <= row < len(self.index):
            raise Refused(404, f"row {row}: the index has {len(self.index)} rows")
        return row


def make_app(service: Service, max_upload: int, default_top_k: int) -> Any:
    """Return the application, for any ASGI server."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    def read_top_k(request: Request) -> int:
        text = request.query_params.get("top_k", str(default_top_k))
        if not text.isdecimal() or len(text) > MAX_DIGITS or not 1 <= int(text) <= MAX_TOP_K:
            raise Refused(400, f"top_k={text[:20]}: must be from 1 to {MAX_TOP_K}")
        return int(text)

    def read_row(request: Request) -> int:
        text = request.path_params["row"]
        if not text.isdecimal() or len(text) > MAX_DIGITS:
            raise Refused(404, f"row {text[:20]}: the index has {len(service.index)} rows")
        return int(text)

    async def answer(function: Callable[..., dict[str, Any]], *arguments: Any) -> Response:
        return JSONResponse(await run_in_threadpool(function, *arguments), headers=HEADERS)

    async def page(_: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)

    async def about(_: Request) -> Response:
        return await answer(service.about)

    async def search(request: Request) -> Response:
        top_k = read_top_k(request)
        if request.method == "POST":
            return await answer(service.search_picture, await read_body(request, max_upload), top_k)
        return await answer(service.search_text, request.query_params.get("query", ""), top_k)

    async def similar(request: Request) -> Response:
        return await answer(service.search_similar, read_row(request), read_top_k(request))

    async def picture(request: Request) -> Response:
        data = await run_in_threadpool(service.picture, read_row(request))
        return Response(data, media_type="image/webp", headers={**HEADERS, "Cache-Control": "max-age=3600"})

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": error.reason}, status_code=error.status, headers=HEADERS)

    routes = [
        Route("/", page),
        Route("/api/about", about),
        Route("/api/search", search, methods=["GET", "POST"]),
        Route("/api/similar/{row}", similar),
        Route("/api/picture/{row}", picture),
    ]
    # A page of another site that has a name led to this machine must not search in it.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={Refused: refuse})


async def read_body(request: Any, limit: int) -> bytes:
    """Read what is sent, up to a limit.

    Raises:
        Refused: it is more, or nothing.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > READ_ON * limit:
            break
    if size > limit:
        raise Refused(413, f"a picture of more than max_upload={limit} bytes")
    if not size:
        raise Refused(400, "no picture was sent")
    return b"".join(parts)


def run(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C.

    Returns:
        The exit code.

    Raises:
        UserError: no such index, another model, or a port in use.
    """
    options = config.read_options("serve", arguments)
    set_up_logging(None)
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("serve needs packages that are not installed: pip install 'clipmini[serve]'") from error
    check_options(options)
    index = open_index(Path(options["index"]), options["among"])
    with contextlib.closing(bind(options["port"])) as listening:
        device = launch.choose_device(options["device"], launch.read_launch())
        encoder = load_query_encoder(index.record, options["model"], device)
        service = Service(index, encoder, open_pictures(index.record, options["pictures"]))
        app = make_app(service, options["max_upload"], options["top_k"])
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False))
        log.info("http://%s:%d  %s; Ctrl-C ends it", HOST, listening.getsockname()[1], json.dumps(service.about()))
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            server.run(sockets=[listening])
    return 0


def check_options(options: dict[str, Any]) -> None:
    """See that the values can work.

    Raises:
        UserError: they cannot.
    """
    Limits(least=1, most=MAX_TOP_K).check("top_k", options["top_k"])
    pictures = options["pictures"]
    if pictures is not None and not os.path.isdir(pictures):
        raise UserError(f"pictures={pictures}: there is no such directory{tell_neighbours(pictures)}")


def bind(port: int) -> socket.socket:
    """Take a port of this machine; who comes before the server has begun waits for it.

    Raises:
        UserError: it is in use, or not ours.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(WAITING)
    except OSError as error:
        listening.close()
        raise UserError(f"port={port}: {error.strerror}: choose another, or port=0 for any free one") from error
    return listening
