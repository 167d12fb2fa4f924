"""What people see while the weights of the model are downloaded: a page with a banner that says how far it is."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from mcp_server_mm_retriever.http import BACKLOG
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from tqdm import tqdm

from mm_retriever.downloads import Tell
from web_mm_retriever.admission import Access, Admission
from web_mm_retriever.app import FOLDER, page_response
from web_mm_retriever.endpoints import problem

SECONDS = 5
"""After which a program should ask again."""


@contextmanager
def waiting_page(listener: socket.socket, access: Access, model: str) -> Iterator[Tell]:
    """Give a function that is told how far a download is: from its first call on, the listener answers with a page.

    Every other request is refused until then. After the block the listener answers nothing, and keeps who asks: the
    server that takes it over answers them.

    Args:
        listener: bound to its address.
        access: who may ask.
        model: its name, for people.
    """
    far = [0, 0]
    starting = threading.Lock()
    running: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def tell(here: int, of: int) -> None:
        far[:] = here, of
        with starting:
            if not running:
                running.append(_start(listener, access, model, far))

    try:
        yield tell
    finally:
        for server, thread, copy in running:
            server.should_exit = True
            thread.join()
            copy.close()


def _start(
    listener: socket.socket, access: Access, model: str, far: list[int]
) -> tuple[uvicorn.Server, threading.Thread, socket.socket]:
    async def page(request: Request) -> Response:
        here, of = (count // 10**6 for count in far)
        facts: dict[str, str | int] = {"model": model, "here": here, "of": of}
        return _later(page_response("waiting.html.j2", request, admitted=True, status=503, **facts))

    async def refused(request: Request) -> Response:
        here, of = (count // 10**6 for count in far)
        return _later(problem(503, f"the weights of {model} are being downloaded, {here} of {of} MB: ask again later"))

    static = Mount("/static", StaticFiles(directory=FOLDER / "static"))
    methods = ["GET", "POST", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/", page), static, Route("/{path:path}", refused, methods=methods)])
    copy = listener.dup()  # the server closes what it was given
    config = uvicorn.Config(
        Admission(app, app, access), log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [copy]}, name="waiting page")
    listener.listen(BACKLOG)
    thread.start()
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    tqdm.write(f"downloading {model}; how far it is: {address}", file=sys.stderr)  # between the hub's own bars
    return server, thread, copy


def _later(answer: Response) -> Response:
    answer.headers["retry-after"] = str(SECONDS)
    return answer
