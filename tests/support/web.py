"""What tests of the web app share: addresses, a token, servers, and a model that waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from pydantic import PrivateAttr

from mm_retriever.embedding import VisualizedBGEEmbedding
from tests.support.processes import free_port

HOME = "http://127.0.0.1:8765"
TOKEN = "a-token-that-nobody-guesses"


@contextmanager
def served(app: Any, listener: socket.socket | None = None) -> Iterator[str]:
    """The address of an ASGI app on a port of this machine, or on a socket that is bound to one."""
    port = free_port() if listener is None else listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": None if listener is None else [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


class HeldModel(VisualizedBGEEmbedding):
    """A model that embeds images for ingestion only when its test lets it."""

    _released: threading.Event = PrivateAttr(default_factory=threading.Event)

    @property
    def released(self) -> threading.Event:
        return self._released

    def embed_images(self, prepared: Any) -> Any:
        self._released.wait()
        return super().embed_images(prepared)


def violations(page: Any, axe: str) -> list[tuple[str, str]]:
    """What the accessibility checker objects to on a page."""
    page.evaluate(axe)
    found = page.evaluate("axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'] })")
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]]
