"""Ranking by the server's reranker when somebody asks for it: what it will take, how far it is, and how it is stopped.

An answer is JSON lines, sent as things happen. One ranking runs at a time; a client that goes away stops its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mm_retriever.errors import MMRetrieverError, one_line
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.rerank.scorer import Meter
from mm_retriever.search_tools import ImageSearch, without_folders
from mm_retriever.search_tools.reranking import RerankedResult, rerank_results
from mm_retriever.store import ImageStore
from web_mm_retriever import models
from web_mm_retriever.endpoints import Endpoint, read_body
from web_mm_retriever.uploads import Uploads

TELL_SECONDS = 0.5


class Reranking:
    """The reranker of a server.

    Args:
        search: whose results are ranked.
        store: of the search.
        reranker: the model, loaded once.
        uploads: images that queries may name.
    """

    def __init__(self, search: ImageSearch, store: ImageStore, reranker: Reranker, uploads: Uploads) -> None:
        self._search, self._store, self._reranker, self._uploads = search, store, reranker, uploads
        self.name = reranker.model_name
        self.seconds_each: float | None = None
        self._turn = anyio.CapacityLimiter(1)
        self.endpoints = (
            Endpoint(
                "POST",
                "/v1/rerank",
                self.rerank,
                "Rank results; the answer is JSON lines, the last of which is done or failed",
                models.RerankRequest,
                models.RerankEvent,
                media_type="application/x-ndjson",
            ),
        )

    async def rerank(self, request: Request) -> Response:
        """Rank results, and tell how far it is."""
        body = await read_body(request, models.RerankRequest)
        image = body.image and self._uploads.named(body.image)
        meter = Meter(self._reranker.time_budget_s)

        def work() -> list[RerankedResult]:
            started = time.monotonic()
            ranked = rerank_results(
                self._search,
                self._store,
                self._reranker,
                body.ids,
                body.scores,
                text=body.text,
                image=image,
                meter=meter,
            )
            if meter.left() != 0:  # one that was stopped says nothing of the next
                self.seconds_each = (time.monotonic() - started) / len(body.ids)
            return ranked

        expected = None if self.seconds_each is None else round(self.seconds_each * len(body.ids), 2)
        return _Ranking(work, meter, self._turn, expected)


class _Ranking(Response):
    """The lines of one ranking, from its beginning to its end or to that of the connection."""

    media_type = "application/x-ndjson"

    def __init__(
        self,
        work: Callable[[], list[RerankedResult]],
        meter: Meter,
        turn: anyio.CapacityLimiter,
        expected: float | None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._work, self._meter, self._turn, self._expected = work, meter, turn, expected
        self._started: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last: list[models.RerankEvent] = []
        finished = anyio.Event()

        async def rank() -> None:
            last.append(await self._ranked())
            finished.set()

        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                self._meter.stop()  # before the thread is waited for
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            tasks.start_soon(rank)
            while not finished.is_set():
                await _send_line(send, self._event("waiting" if self._started is None else "running"))
                with anyio.move_on_after(TELL_SECONDS):
                    await finished.wait()
            tasks.cancel_scope.cancel()
        for event in last:
            await _send_line(send, event)
        await send({"type": "http.response.body", "body": b""})

    async def _ranked(self) -> models.RerankEvent:
        """The event that ends it."""

        def work() -> list[RerankedResult]:
            self._started = time.monotonic()
            return self._work()

        try:
            ranked = await anyio.to_thread.run_sync(work, limiter=self._turn)
        except MMRetrieverError as error:
            return self._event("failed", error=without_folders(one_line(error, 1_000)))
        return self._event("done", results=[models.RerankedResult(**asdict(result)) for result in ranked])

    def _event(self, event: str, **facts: object) -> models.RerankEvent:
        seconds = 0 if self._started is None else round(time.monotonic() - self._started, 2)
        known = {"expected_seconds": self._expected, "seconds": seconds, "passes": self._meter.passes}
        return models.RerankEvent.model_validate({"event": event, **known, **facts})


async def _send_line(send: Send, event: models.RerankEvent) -> None:
    body = event.model_dump_json().encode() + b"\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
