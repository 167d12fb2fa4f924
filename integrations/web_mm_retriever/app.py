"""The ASGI app: the page at /, the JSON API at /v1, its document at /openapi.json, MCP at /mcp.

It may be mounted anywhere in another app: every address on the page is relative, and what MCP keeps running is started
with the first request where the other app passes on no lifespan events.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcp_server_mm_retriever import http_app, image_search
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_retriever import __version__
from mm_retriever.embedders.batching import BatchedEmbedder
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.rerank.registry import load_reranker
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.search_tools import ImageSearch, SearchLimits
from mm_retriever.search_tools.thumbnails import Thumbnails
from mm_retriever.store import ImageStore
from web_mm_retriever.admission import Access, Admission
from web_mm_retriever.api import Api
from web_mm_retriever.endpoints import Handler
from web_mm_retriever.indexing import Indexing
from web_mm_retriever.models import MOST_RERANKED, MOST_RESULTS, PAGE
from web_mm_retriever.review import Review

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "de")


class WebApp:
    """An ASGI app over one store; made by `web_app`.

    Attributes:
        access: makes links that sign a browser in.
    """

    def __init__(self, app: ASGIApp, mcp: ASGIApp, access: Access, indexing: Indexing | None = None) -> None:
        self.access = access
        self._mcp = _Running(mcp)
        self._app = Admission(app, self._mcp, access)
        self._indexing = indexing

    def close(self) -> None:
        """End what runs besides requests, before the store is closed."""
        if self._indexing is not None:
            self._indexing.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await _lifespan(self._mcp, receive, send, self.close)
        else:
            await self._app(scope, receive, send)


def web_app(
    store: ImageStore,
    embed_model: ComposedEmbedding,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    roots: Sequence[Path] | None = None,
    allow_urls: bool = False,
    thumbnails: Path | None = None,
    ratings: Path | None = None,
    index_roots: Sequence[Path] = (),
    review: Path | None = None,
    rerank: str | Reranker | None = None,
    rerank_server: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> WebApp:
    """Return the app that `mm-retriever serve` runs, for a server of your own.

    Args:
        store: from `open_store`.
        embed_model: the model that the store was opened for. The queries of all users go through it together.
        host: what the server listens on: other than loopback only with a token.
        token: what clients send as "Authorization: Bearer TOKEN", and people give to the page once.
        roots: folders that images may be read from. Default: where the store says, of a file of this machine.
        allow_urls: whether images may be named by URL.
        thumbnails: a private folder that keeps them; default: under the user's cache folder.
        ratings: the file that keeps thumbs up and down as an evaluation set; images that people upload and rate results
            for are kept in a folder beside it. None: ratings are not kept.
        index_roots: folders that people may index from the page, with all below them.
        review: a `queries.jsonl` whose drafts people review on the page.
        rerank: ranks results when somebody asks for it: a name of `load_reranker`, or a reranker, whose own
            `image_policy` then says what it may read. None: nobody can ask for it.
        rerank_server: `base_url`, `api` and `api_key` of `load_reranker`, for a model that runs on a server.
        device: of a reranker on this machine.

    Raises:
        QueryError: a token is missing, empty, too short, or too easy to guess; or there is no such file to review.
    """
    access = Access(host, token)
    shared = gathered(embed_model)
    if roots is not None or (index_roots and not str(store.uri).endswith(".db")):
        roots = [*(roots or ()), *index_roots]  # what was indexed is shown
    tools = image_search(store, shared, roots=roots, allow_urls=allow_urls)
    limits = SearchLimits(top_k=PAGE, max_top_k=MOST_RESULTS, thumbnails=0)
    search = ImageSearch(
        store, shared, image_policy=tools.image_policy, stored_policy=tools.stored_policy, limits=limits
    )
    kept = Thumbnails(default_cache() / "thumbnails" if thumbnails is None else thumbnails)
    if isinstance(rerank, str):
        options: dict[str, Any] = {"device": None if rerank_server else device, **(rerank_server or {})}
        rerank = load_reranker(rerank, top_n=MOST_RERANKED, image_policy=tools.stored_policy, **options)
    indexing = Indexing(index_roots, store, embed_model) if index_roots else None
    api = Api(
        search,
        store,
        shared,
        model=embed_model.model_name,
        thumbnails=kept,
        access=access,
        reranker=rerank,
        ratings=ratings,
        indexing=indexing,
        review=None if review is None else Review(review),
    )

    def page(template: str) -> Handler:
        async def show(request: Request) -> Response:
            admitted = access.admits(request.scope)
            return page_response(template, request, admitted=admitted, status=200 if admitted else 401)

        return show

    routes = [
        Route("/", page("page.html.j2")),
        *([Route("/indexing", page("indexing.html.j2"))] if indexing else []),
        *([Route("/review", page("review.html.j2"))] if review is not None else []),
        *api.routes(),
        Route("/enter", api.enter, methods=["GET", "POST"]),
        Route("/openapi.json", api.openapi),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    return WebApp(Starlette(routes=routes), http_app(tools, host=host, token=token), access, indexing)


def gathered(embed_model: ComposedEmbedding) -> ComposedEmbedding:
    """The model, for the calls of many threads; the caller's stays as it is."""
    return ComposedEmbedding(
        BatchedEmbedder(embed_model.embedder),
        image_policy=embed_model.image_policy,
        cache_dir=embed_model.cache_dir,
        cache_bytes=embed_model.cache_bytes,
    )


def default_cache() -> Path:
    """The user's folder for what can be made again."""
    place = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(place) if Path(place).is_absolute() else Path.home() / ".cache") / "mm_retriever"


# ------------------------------------------------------------------------------------------ the page


@functools.cache
def strings() -> dict[str, dict[str, str]]:
    """The words of the page, by language."""
    words: dict[str, dict[str, str]] = json.loads((FOLDER / "static" / "strings.json").read_text(encoding="utf-8"))
    return words


@functools.cache
def _template(name: str) -> Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def page_response(template: str, request: Request, *, admitted: bool, status: int, **more: str | int) -> Response:
    """A page in the language of its reader; `more` is what its template says."""
    language = _language(request)
    facts = {"languages": LANGUAGES, "admitted": admitted, "version": __version__, **more}
    body = _template(template).render(say=strings()[language], lang=language, **facts)
    headers = {"cache-control": "no-store", "vary": "accept-language, cookie"}
    return Response(body, status, headers, "text/html")


def _language(request: Request) -> str:
    """The language that the address asks for, or else the browser."""
    languages = [request.query_params.get("lang", "")]
    languages += [part.partition(";")[0].strip()[:2] for part in request.headers.get("accept-language", "").split(",")]
    return next((language for language in languages if language in LANGUAGES), LANGUAGES[0])


# ------------------------------------------------------------------------------------------ lifespans


class _Running:
    """An ASGI app whose lifespan starts with its first request, if nobody started it before."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._events: asyncio.Queue[Message] | None = None
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.start()
        await self._app(scope, receive, send)

    async def start(self) -> None:
        """Start it, once."""
        if self._started is None:
            self._started, self._events = asyncio.Event(), asyncio.Queue()
            self._task = asyncio.create_task(self._live())
            await self._events.put({"type": "lifespan.startup"})
        await self._started.wait()

    async def stop(self) -> None:
        """End what was started."""
        if self._events is not None and self._task is not None:
            await self._events.put({"type": "lifespan.shutdown"})
            await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self) -> None:
        assert self._events is not None
        assert self._started is not None
        started = self._started

        async def send(message: Message) -> None:
            started.set()

        try:
            await self._app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, self._events.get, send)
        finally:
            started.set()


async def _lifespan(running: _Running, receive: Receive, send: Send, close: Callable[[], None]) -> None:
    await receive()
    await running.start()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await running.stop()
    await asyncio.to_thread(close)
    await send({"type": "lifespan.shutdown.complete"})
