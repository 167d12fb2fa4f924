"""What the addresses of the API share: reading bodies, writing answers, saying errors; and the OpenAPI document."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mm_retriever import __version__
from mm_retriever.errors import ImageLoadError, MMRetrieverError, QueryError, one_line
from mm_retriever.search_tools import without_folders
from web_mm_retriever import models
from web_mm_retriever.admission import OWNER, BodyTooLargeError

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
    media_type: str = "application/json"


async def read_body(request: Request, model: type[T]) -> T:
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


def answering(handler: Handler) -> Handler:
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
            return problem(status, text if owner else without_folders(text))

    return saying


def as_json(model: BaseModel, *, timing: str = "") -> Response:
    """An answer, and how long its parts took, as a Server-Timing header."""
    headers = {"cache-control": "no-store"} | ({"server-timing": timing} if timing else {})
    return Response(model.model_dump_json(), media_type="application/json", headers=headers)


def problem(status: int, reason: str) -> Response:
    """A refusal."""
    return JSONResponse({"error": reason}, status_code=status)


async def in_thread(request: Request, work: Callable[[], T], limiter: anyio.CapacityLimiter) -> T:
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
            result.append(await anyio.to_thread.run_sync(work, limiter=limiter))
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
    for endpoint in endpoints:
        if isinstance(endpoint.gives, str):
            content: dict[str, Any] = {endpoint.gives: {"schema": {"type": "string", "format": "binary"}}}
        else:
            content = {endpoint.media_type: {"schema": schema(endpoint.gives)}}
        described: dict[str, Any] = {
            "summary": endpoint.summary,
            "operationId": endpoint.path.rpartition("/")[2],
            "responses": {"200": {"description": "Done", "content": content}, "4XX": problem},
            "parameters": [
                {"name": name, "in": "query", "required": name == "id", "schema": {"type": "string"}}
                for name in endpoint.query
            ],
        }
        if endpoint.takes is not None:
            body = {"application/json": {"schema": schema(endpoint.takes)}}
            described["requestBody"] = {"required": True, "content": body}
        elif endpoint.method == "POST":
            binary = {"schema": {"type": "string", "format": "binary"}}
            described["requestBody"] = {"required": True, "content": {"image/*": binary}}
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = described
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mm-retriever", "version": __version__, "description": "Image search; paths are versioned."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": bearer}},
        "security": [{"token": []}, {}],
    }
