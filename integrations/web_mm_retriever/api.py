"""The JSON API: what each address takes and gives, and the OpenAPI document of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import anyio
import anyio.from_thread
from mcp_server_mm_retriever.http import LOOPBACK
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mm_retriever import __version__
from mm_retriever.embedders.batching import MOST_CONTENTS, model_seconds
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError, one_line
from mm_retriever.images import image_thumbnail
from mm_retriever.refinement import Refinement
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.retriever import COPIES
from mm_retriever.search_tools import ImageSearch, SearchResult, read_filters
from mm_retriever.search_tools.facets import KeptFacets
from mm_retriever.search_tools.results import ImageResult
from mm_retriever.search_tools.rows import RowsQuery, find_rows, result_rows, without_places
from mm_retriever.search_tools.thumbnails import SIDES, Thumbnails
from mm_retriever.store import ImageStore
from web_mm_retriever import models
from web_mm_retriever.admission import COOKIE, OWNER, SESSION_SECONDS, Access
from web_mm_retriever.endpoints import Endpoint, answering, as_json, in_thread, openapi_document, problem, read_body
from web_mm_retriever.folders import Folders, opener
from web_mm_retriever.indexing import Indexing
from web_mm_retriever.ratings import Ratings
from web_mm_retriever.reranking import Reranking
from web_mm_retriever.review import Review
from web_mm_retriever.uploads import PREFIX, Uploads

SEARCHES_AT_ONCE = MOST_CONTENTS  # of those that go through the model together, none waits elsewhere
THUMBNAILS_AT_ONCE = 8
DAY = 86_400

T = TypeVar("T")


class Api:
    """The handlers, over one search that all requests share.

    Args:
        search: what is asked.
        store: its store.
        embed_model: its model.
        model: its name, for people.
        thumbnails: where small copies are kept.
        access: for signing in.
        reranker: ranks results when it is asked to; None: there is none.
        ratings: the file that keeps ratings; None: they are not kept.
        indexing: for folders that may be indexed; None: there are none.
        review: of drafted queries; None: there are none.
    """

    def __init__(
        self,
        search: ImageSearch,
        store: ImageStore,
        embed_model: ComposedEmbedding,
        *,
        model: str,
        thumbnails: Thumbnails,
        access: Access,
        reranker: Reranker | None = None,
        ratings: Path | None = None,
        indexing: Indexing | None = None,
        review: Review | None = None,
    ) -> None:
        self._search, self._store, self._model, self._name = search, store, embed_model, model
        self._thumbnails, self._access = thumbnails, access
        self._uploads = Uploads(search.image_policy)
        self._facets = KeptFacets(store)
        self._reranking = None if reranker is None else Reranking(search, store, reranker, self._uploads)
        self._ratings = None
        if ratings is not None:
            self._ratings = Ratings(ratings, search, self._uploads, is_local=access.is_local)
        self._indexing, self._review = indexing, review
        self._folders = Folders(search) if access.is_local and opener() else None
        parts = (self._reranking, self._ratings, self._indexing, self._review, self._folders)
        self._turns = anyio.CapacityLimiter(SEARCHES_AT_ONCE)
        self._reads = anyio.CapacityLimiter(THUMBNAILS_AT_ONCE)
        self.endpoints: tuple[Endpoint, ...] = (
            Endpoint("GET", "/v1/info", self.info, "What this server has and can do", gives=models.Info),
            Endpoint("POST", "/v1/search", self.search, "Search", models.SearchRequest, models.SearchAnswer),
            Endpoint("POST", "/v1/facets", self.facets, "Count values", models.FacetsRequest, models.FacetsAnswer),
            Endpoint("POST", "/v1/uploads", self.upload, "Keep an image, the body, for searches", gives=models.Upload),
            Endpoint(
                "GET", "/v1/thumbnail", self.thumbnail, "A small JPEG", gives="image/jpeg", query=("id", "side", "v")
            ),
            Endpoint("GET", "/v1/original", self.original, "The file", gives="image/*", query=("id", "download")),
            Endpoint(
                "POST",
                "/v1/rows",
                self.rows,
                "The search of the command line; where files lie is told to the user who runs the server",
                models.RowsRequest,
                models.RowsAnswer,
            ),
            *(endpoint for part in parts if part is not None for endpoint in part.endpoints),
        )

    def routes(self) -> list[Route]:
        """The endpoints as Starlette's routes."""
        return [
            Route(endpoint.path, answering(endpoint.handler), methods=[endpoint.method]) for endpoint in self.endpoints
        ]

    # ------------------------------------------------------------------------------------------ searching

    async def info(self, request: Request) -> Response:
        """What this server has and can do."""

        def read() -> models.Info:
            return models.Info(
                version=__version__,
                model=self._name,
                dimension=self._model.dimension,
                rows=self._store.count(),
                hybrid=self._store.hybrid,
                rerank=self._reranking.name if self._reranking else None,
                rerank_seconds=self._reranking.seconds_each if self._reranking else None,
                ratings=self._ratings.state() if self._ratings else None,
                indexing=self._indexing is not None,
                review=self._review is not None,
                shows_folders=self._folders is not None,
                urls=self._search.image_policy.allow_urls,
                draws_only=self._name == "tiny",
            )

        return as_json(await self._in_turn(request, read))

    async def search(self, request: Request) -> Response:
        """Search, as the page does it."""
        body = await read_body(request, models.SearchRequest)
        started = time.perf_counter()

        def work() -> SearchResult:
            refinement = Refinement(
                images=tuple(map(self._uploads.named, body.images)),
                balance=body.balance,
                avoid=tuple(body.avoid),
                liked=tuple(body.liked),
                disliked=tuple(body.disliked),
            )
            return self._search.search(
                body.text,
                body.image and self._uploads.named(body.image),
                body.filters,
                body.top_k,
                skip=body.skip,
                unique=body.unique,
                hybrid=body.hybrid,
                exclude=body.exclude_image,
                refinement=None if refinement.is_empty else refinement,
                progress=_until_cancelled,
            )

        with model_seconds() as seconds:
            answer = await self._in_turn(request, work)
        more = len(answer.results) == body.top_k and body.skip + body.top_k < models.DEEPEST
        return as_json(
            models.SearchAnswer(
                query=answer.query,
                results=[_result(result) for result in answer.results],
                hint=answer.hint,
                note=answer.note,
                next=body.skip + body.top_k if more else None,
                seconds=round(time.perf_counter() - started, 4),
            ),
            timing=f"model;dur={1e3 * sum(seconds):.1f}, total;dur={1e3 * (time.perf_counter() - started):.1f}",
        )

    async def rows(self, request: Request) -> Response:
        """Search, as the command line does it."""
        body = await read_body(request, models.RowsRequest)
        given = {**body.model_dump(), "where": tuple(body.where), "images": tuple(body.images)}
        owner = bool(request.scope.get(OWNER))
        if not owner and body.top_k > models.MOST_RESULTS:
            raise QueryError(f"--top-k {body.top_k}: this server gives at most {models.MOST_RESULTS} to other users")
        policy = None if owner else self._search.image_policy
        query = RowsQuery(**given)
        answer = await self._in_turn(request, lambda: find_rows(self._store, self._model, query, image_policy=policy))
        rows = result_rows(answer.nodes)
        return as_json(models.RowsAnswer(rows=rows if owner else without_places(rows), notes=list(answer.notes)))

    async def facets(self, request: Request) -> Response:
        """Count the values of columns."""
        body = await read_body(request, models.FacetsRequest)
        counts = await self._in_turn(request, lambda: self._facets.count(read_filters(body.filters)))
        facets = [
            models.Facet(
                key=facet.key,
                values=[models.FacetValue(value=value, count=count) for value, count in facet.values],
                least=facet.least,
                most=facet.most,
                count=facet.count,
            )
            for facet in counts.facets
        ]
        return as_json(models.FacetsAnswer(facets=facets, rows=counts.rows, complete=counts.complete))

    # ------------------------------------------------------------------------------------------ images

    async def upload(self, request: Request) -> Response:
        """Keep an image for searches; its media type is image/..., which no other page may send unasked."""
        if not request.headers.get("content-type", "").lower().startswith("image/"):
            return problem(415, "send the bytes of an image, with its media type (image/jpeg) as Content-Type")
        data = await request.body()
        image, (width, height) = await self._in_turn(request, lambda: self._uploads.add(data), limiter=self._reads)
        return as_json(models.Upload(image=image, width=width, height=height))

    async def thumbnail(self, request: Request) -> Response:
        """A small copy of an indexed image or of an upload."""
        id_, side = request.query_params.get("id", ""), request.query_params.get("side", str(SIDES[0]))
        if side not in map(str, SIDES):
            raise QueryError(f"side {one_line(side, 20)!r}: give one of {', '.join(map(str, SIDES))}")

        def read() -> bytes:
            if id_.startswith(PREFIX):
                return image_thumbnail(self._uploads.data(id_), int(side), policy=self._search.image_policy)
            return self._thumbnails.of(self._search.indexed(id_), int(side), self._search.stored_policy)

        data = await self._in_turn(request, read, limiter=self._reads)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        lasting = "v" in request.query_params or id_.startswith(PREFIX)  # an id stays when its file is replaced
        headers = {"cache-control": f"private, max-age={DAY}" if lasting else "private, no-cache", "etag": tag}
        if tag in request.headers.get("if-none-match", ""):  # alone, in a list, or made weak by a proxy
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/jpeg", headers=headers)

    async def original(self, request: Request) -> Response:
        """The file of an indexed image, if it still is the one that was indexed."""
        id_ = request.query_params.get("id", "")
        original = await self._in_turn(request, lambda: self._search.original(id_), limiter=self._reads)
        headers = {"cache-control": "private, no-cache", "content-security-policy": "default-src 'none'; sandbox"}
        if request.query_params.get("download"):
            headers["content-disposition"] = f"attachment; filename*=UTF-8''{quote(original.name, safe='')}"
        return Response(original.data, media_type=original.media_type, headers=headers)

    # ------------------------------------------------------------------------------------------ signing in

    async def enter(self, request: Request) -> Response:
        """Sign a page in, by a link that works once or by the token."""
        if request.method == "GET":
            session = self._access.sign_in(key=request.query_params.get("key", ""))
            answer = Response(status_code=303, headers={"location": "./"})
        else:
            session = self._access.sign_in(token=(await read_body(request, models.SignIn)).token)
            answer = problem(403, "this is not the token of the server")
        if session is None:
            return answer
        if request.method == "POST":
            answer = Response(status_code=204)
        path = request.scope.get("root_path") or "/"
        is_local = request.url.hostname in LOOPBACK
        answer.set_cookie(
            COOKIE,
            session,
            max_age=SESSION_SECONDS,
            path=path,
            secure=request.url.scheme == "https" and not is_local,
            httponly=True,
            samesite="strict",
        )
        return answer

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(openapi_document(self.endpoints))

    async def _in_turn(
        self, request: Request, work: Callable[[], T], *, limiter: anyio.CapacityLimiter | None = None
    ) -> T:
        return await in_thread(request, work, limiter or self._turns)


def _result(result: ImageResult) -> models.Result:
    metadata = dict(result.metadata)
    copies = metadata.pop(COPIES, 0)
    address = quote(result.id, safe="")
    return models.Result(
        rank=result.rank,
        id=result.id,
        score=result.score,
        label=result.label,
        text=result.text,
        reason=result.reason,
        note=result.note,
        copies=copies if isinstance(copies, int) else 0,
        metadata=metadata,
        thumbnail=f"v1/thumbnail?id={address}" + (f"&v={result.version}" if result.version else ""),
        original=f"v1/original?id={address}",
    )


def _until_cancelled(done: int, steps: int, doing: str) -> None:
    anyio.from_thread.check_cancelled()
