"""The JSON API: what each address takes and gives, and the OpenAPI document of it."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp_server_mm_retriever.http import LOOPBACK
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mm_retriever import __version__
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ImageLoadError, MMRetrieverError, QueryError, one_line
from mm_retriever.images import image_thumbnail
from mm_retriever.refinement import Refinement
from mm_retriever.retriever import COPIES
from mm_retriever.search_tools import ImageSearch, SearchResult, read_filters, without_folders
from mm_retriever.search_tools.facets import count_facets
from mm_retriever.search_tools.results import ImageResult
from mm_retriever.search_tools.rows import RowsQuery, find_rows, result_rows
from mm_retriever.search_tools.thumbnails import SIDES, Thumbnails
from mm_retriever.store import ImageStore
from web_mm_retriever import models
from web_mm_retriever.admission import COOKIE, OWNER, SESSION_SECONDS, Access, BodyTooLargeError
from web_mm_retriever.uploads import PREFIX, Uploads

SEARCHES_AT_ONCE = 32
THUMBNAILS_AT_ONCE = 8
DAY = 86_400

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One address of the API."""

    method: str
    path: str
    handler: Handler
    summary: str
    takes: type[BaseModel] | None = None
    gives: type[BaseModel] | str = ""
    query: tuple[str, ...] = ()
    owner: bool = False


class Api:
    """The handlers, over one search that all requests share.

    Args:
        search: what is asked.
        store: its store.
        embed_model: its model.
        model: its name, for people.
        thumbnails: where small copies are kept.
        access: for signing in.
        rerank: the name of the model that ranks results, for people.
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
        rerank: str | None = None,
    ) -> None:
        self._search, self._store, self._model, self._name = search, store, embed_model, model
        self._thumbnails, self._access, self._rerank = thumbnails, access, rerank
        self._uploads = Uploads(search.image_policy)
        self._turns = anyio.CapacityLimiter(SEARCHES_AT_ONCE)
        self._reads = anyio.CapacityLimiter(THUMBNAILS_AT_ONCE)
        self.endpoints = (
            Endpoint("GET", "/v1/info", self.info, "What this server has and can do", gives=models.Info),
            Endpoint("POST", "/v1/search", self.search, "Search", models.SearchRequest, models.SearchAnswer),
            Endpoint("POST", "/v1/facets", self.facets, "Count values", models.FacetsRequest, models.FacetsAnswer),
            Endpoint("POST", "/v1/uploads", self.upload, "Keep an image, the body, for searches", gives=models.Upload),
            Endpoint("GET", "/v1/thumbnail", self.thumbnail, "A small JPEG", gives="image/jpeg", query=("id", "side")),
            Endpoint("GET", "/v1/original", self.original, "The file", gives="image/*", query=("id", "download")),
            Endpoint(
                "POST",
                "/v1/rows",
                self.rows,
                "The search of the command line, for the user who runs the server",
                models.RowsRequest,
                models.RowsAnswer,
                owner=True,
            ),
        )

    def routes(self) -> list[Route]:
        """The endpoints as Starlette's routes."""
        return [Route(one.path, _said(one.handler), methods=[one.method]) for one in self.endpoints]

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
                rerank=self._rerank,
                urls=self._search.image_policy.allow_urls,
                draws_only=self._name == "tiny",
            )

        return _json(await self._in_thread(request, read))

    async def search(self, request: Request) -> Response:
        """Search, as the page does it."""
        asked = await _body(request, models.SearchRequest)
        started = time.perf_counter()

        def work() -> SearchResult:
            refinement = Refinement(
                images=tuple(map(self._uploads.named, asked.images)),
                balance=asked.balance,
                avoid=tuple(asked.avoid),
                liked=tuple(asked.liked),
                disliked=tuple(asked.disliked),
            )
            return self._search.search(
                asked.text,
                asked.image and self._uploads.named(asked.image),
                asked.filters,
                asked.top_k,
                skip=asked.skip,
                unique=asked.unique,
                hybrid=asked.hybrid,
                exclude=asked.exclude_image,
                refinement=None if refinement.is_empty else refinement,
                progress=_until_cancelled,
            )

        found = await self._in_thread(request, work)
        more = len(found.results) == asked.top_k and asked.skip + asked.top_k < models.DEEPEST
        return _json(
            models.SearchAnswer(
                query=found.query,
                results=[_result(one) for one in found.results],
                hint=found.hint,
                note=found.note,
                next=asked.skip + asked.top_k if more else None,
                seconds=round(time.perf_counter() - started, 4),
            )
        )

    async def rows(self, request: Request) -> Response:
        """Search, as the command line does it."""
        if not request.scope.get(OWNER):
            return _problem(403, "only the user who runs the server may see where files lie: ask /v1/search")
        asked = await _body(request, models.RowsRequest)
        query = RowsQuery(**{**asked.model_dump(), "where": tuple(asked.where)})
        found = await self._in_thread(request, lambda: find_rows(self._store, self._model, query))
        return _json(models.RowsAnswer(rows=result_rows(found.nodes), notes=list(found.notes)))

    async def facets(self, request: Request) -> Response:
        """Count the values of columns."""
        asked = await _body(request, models.FacetsRequest)
        found = await self._in_thread(request, lambda: count_facets(self._store, read_filters(asked.filters)))
        facets = [
            models.Facet(
                key=facet.key,
                values=[models.FacetValue(value=value, count=count) for value, count in facet.values],
                least=facet.least,
                most=facet.most,
                count=facet.count,
            )
            for facet in found.facets
        ]
        return _json(models.FacetsAnswer(facets=facets, rows=found.rows, complete=found.complete))

    # ------------------------------------------------------------------------------------------ images

    async def upload(self, request: Request) -> Response:
        """Keep an image for searches; its media type is image/..., which no other page may send unasked."""
        if not request.headers.get("content-type", "").startswith("image/"):
            return _problem(415, "send the bytes of an image, with its media type (image/jpeg) as Content-Type")
        data = await request.body()
        image, (width, height) = await self._in_thread(request, lambda: self._uploads.add(data), limiter=self._reads)
        return _json(models.Upload(image=image, width=width, height=height))

    async def thumbnail(self, request: Request) -> Response:
        """A small copy of an indexed image or of an upload."""
        id_, side = request.query_params.get("id", ""), request.query_params.get("side", str(SIDES[0]))
        if side not in map(str, SIDES):
            raise QueryError(f"side {one_line(side, 20)!r}: give one of {', '.join(map(str, SIDES))}")

        def read() -> bytes:
            if id_.startswith(PREFIX):
                return image_thumbnail(self._uploads.data(id_), int(side), policy=self._search.image_policy)
            return self._thumbnails.of(self._search.indexed(id_), int(side), self._search.stored_policy)

        data = await self._in_thread(request, read, limiter=self._reads)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {"cache-control": f"private, max-age={DAY}", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/jpeg", headers=headers)

    async def original(self, request: Request) -> Response:
        """The file of an indexed image, if it still is the one that was indexed."""
        id_ = request.query_params.get("id", "")
        found = await self._in_thread(request, lambda: self._search.original(id_), limiter=self._reads)
        headers = {"cache-control": "private, no-cache", "content-security-policy": "default-src 'none'; sandbox"}
        if request.query_params.get("download"):
            headers["content-disposition"] = f"attachment; filename*=UTF-8''{quote(found.name, safe='')}"
        return Response(found.data, media_type=found.media_type, headers=headers)

    # ------------------------------------------------------------------------------------------ signing in

    async def enter(self, request: Request) -> Response:
        """Sign a page in, by a link that works once or by the token."""
        if request.method == "GET":
            session = self._access.sign_in(key=request.query_params.get("key", ""))
            answer = Response(status_code=303, headers={"location": "./"})
        else:
            session = self._access.sign_in(token=(await _body(request, models.SignIn)).token)
            answer = _problem(403, "this is not the token of the server")
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

    async def _in_thread(
        self, request: Request, work: Callable[[], T], *, limiter: anyio.CapacityLimiter | None = None
    ) -> T:
        """What `work` returns; a client that goes away frees its place before the next step."""
        result: list[T] = []
        failed: list[Exception] = []
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                result.append(await anyio.to_thread.run_sync(work, limiter=limiter or self._turns))
            except Exception as error:  # which the group would wrap
                failed.append(error)
            tasks.cancel_scope.cancel()
        if failed:
            raise failed[0]
        if not result:
            raise ClientDisconnect
        return result[0]


def openapi_document(endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the API."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}

    def schema(model: type[BaseModel]) -> dict[str, Any]:
        described = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(described.pop("$defs", {}))
        schemas[model.__name__] = described
        return {"$ref": f"#/components/schemas/{model.__name__}"}

    problem = {"description": "Refused", "content": {"application/json": {"schema": schema(models.Problem)}}}
    for one in endpoints:
        if isinstance(one.gives, str):
            content: dict[str, Any] = {one.gives: {"schema": {"type": "string", "format": "binary"}}}
        else:
            content = {"application/json": {"schema": schema(one.gives)}}
        described: dict[str, Any] = {
            "summary": one.summary,
            "operationId": one.path.rpartition("/")[2],
            "responses": {"200": {"description": "Done", "content": content}, "4XX": problem},
            "parameters": [
                {"name": name, "in": "query", "required": name == "id", "schema": {"type": "string"}}
                for name in one.query
            ],
        }
        if one.takes is not None:
            body = {"application/json": {"schema": schema(one.takes)}}
            described["requestBody"] = {"required": True, "content": body}
        elif one.method == "POST":
            binary = {"schema": {"type": "string", "format": "binary"}}
            described["requestBody"] = {"required": True, "content": {"image/*": binary}}
        paths.setdefault(one.path, {})[one.method.lower()] = described
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mm-retriever", "version": __version__, "description": "Image search; paths are versioned."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": bearer}},
        "security": [{"token": []}, {}],
    }


def _result(one: ImageResult) -> models.Result:
    metadata = dict(one.metadata)
    copies = metadata.pop(COPIES, 0)
    address = quote(one.id, safe="")
    return models.Result(
        rank=one.rank,
        id=one.id,
        score=one.score,
        label=one.label,
        text=one.text,
        reason=one.reason,
        note=one.note,
        copies=copies if isinstance(copies, int) else 0,
        metadata=metadata,
        thumbnail=f"v1/thumbnail?id={address}",
        original=f"v1/original?id={address}",
    )


def _until_cancelled(done: int, steps: int, doing: str) -> None:
    anyio.from_thread.check_cancelled()


async def _body(request: Request, model: type[T]) -> T:
    """The JSON body of a request; a form, which any page could send, is refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise WrongMediaTypeError("send JSON, with Content-Type: application/json")
    try:
        given = json.loads(await request.body() or b"{}")
        return model(**given) if isinstance(given, dict) else model.model_validate(given)  # type: ignore[attr-defined]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise QueryError(f"{one_line(place, 80)}: {one_line(first['msg'], 200)}") from None
    except (ValueError, RecursionError) as error:
        raise QueryError(f"the body is not JSON: {one_line(error, 200)}") from None


class WrongMediaTypeError(QueryError):
    """A body that is not JSON."""


def _said(handler: Handler) -> Handler:
    """A handler whose errors are answers: a status, and a line that tells nothing about folders."""

    @functools.wraps(handler)
    async def saying(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:  # nobody reads the answer
            return Response(status_code=499)
        except MMRetrieverError as error:
            kinds = {WrongMediaTypeError: 415, BodyTooLargeError: 413, ImageLoadError: 422, QueryError: 400}
            status = next((status for kind, status in kinds.items() if isinstance(error, kind)), 400)
            owner = bool(request.scope.get(OWNER))
            text = one_line(error, 1_000)
            return _problem(status, text if owner else without_folders(text))

    return saying


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json", headers={"cache-control": "no-store"})


def _problem(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)
