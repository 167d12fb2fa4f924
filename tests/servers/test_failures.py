"""Answers of a remote server that never end, or hold more than memory does."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from mm_retriever.servers.failures import MAX_ANSWER_BYTES, AnswerTooLargeError, bounded_client


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_an_answer_that_drips_ends_with_the_timeout():
    """Each byte comes well within httpx' own timeout, which is for one read."""
    stop = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.end_headers()
        while not stop.wait(0.05):
            handler.wfile.write(b" ")

    started = time.monotonic()
    with server(drip) as url, bounded_client(0.5) as client, pytest.raises(httpx.ReadTimeout):
        client.get(url)
    stop.set()
    assert time.monotonic() - started < 10


def test_an_answer_without_end_is_refused_at_the_limit():
    sent = 0

    def flood(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.end_headers()
        try:
            while sent < 10 * MAX_ANSWER_BYTES:
                sent += handler.wfile.write(b"x" * 65_536)
        except OSError:
            pass

    with server(flood) as url, bounded_client(30) as client, pytest.raises(AnswerTooLargeError, match="larger than"):
        client.get(url)
    assert sent < 3 * MAX_ANSWER_BYTES


def test_a_compressed_answer_is_refused_before_it_is_unpacked():
    bomb = gzip.compress(b" " * (64 * 2**20))

    def packed(handler: BaseHTTPRequestHandler) -> None:
        handler.send_header("content-encoding", "gzip")
        handler.send_header("content-length", str(len(bomb)))
        handler.end_headers()
        handler.wfile.write(bomb)

    with server(packed) as url, bounded_client(30) as client, pytest.raises(AnswerTooLargeError, match="compressed"):
        client.get(url, headers={"accept-encoding": "gzip"})
