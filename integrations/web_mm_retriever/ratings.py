"""Ratings of results as an evaluation set: `queries.jsonl`, which `mm-retriever evaluate` reads.

    {"image": "/photos/red mug.jpg", "text": "in blue", "targets": ["/photos/blue mug.jpg"], "negatives": []}

Owns the file, and the images of queries that are in no file of their own, which are kept in a folder beside it. A query
without a right result is no line of an evaluation set: it waits in memory.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from mm_retriever.errors import QueryError, one_line
from mm_retriever.files import write_atomically
from mm_retriever.images.header import sniff_format
from mm_retriever.own_keys import own_value
from mm_retriever.search_tools import ImageSearch
from mm_retriever.threads import ForkLock
from web_mm_retriever import models
from web_mm_retriever.admission import OWNER
from web_mm_retriever.endpoints import Endpoint, as_json, in_thread, problem, read_body
from web_mm_retriever.uploads import Uploads

_MOST_BYTES = 256 * 2**20
_MOST_WAITING = 10_000


class Ratings:
    """The ratings of one server.

    Args:
        file: in a folder that exists; made with the first rating.
        search: whose results are rated.
        uploads: images that queries may name.
        is_local: whether only people of this machine are answered, who may see where files lie.

    Raises:
        QueryError: there is something else in the file, or no folder for it.
    """

    def __init__(self, file: Path, search: ImageSearch, uploads: Uploads, *, is_local: bool) -> None:
        self._file = file.expanduser().absolute()
        self._search, self._uploads, self._is_local = search, uploads, is_local
        self._waiting: dict[tuple[str, str], dict[str, Any]] = {}
        self._lock = ForkLock()
        self._turns = anyio.CapacityLimiter(4)
        if not self._file.parent.is_dir():
            raise QueryError(f"ratings: there is no folder {str(self._file.parent)!r}")
        self._read()
        self.endpoints = (
            Endpoint(
                "POST", "/v1/rate", self.rate, "Keep a rating of a result", models.RateRequest, models.RatingsState
            ),
            Endpoint(
                "GET", "/v1/ratings", self.download, "The ratings, as queries.jsonl", gives="application/x-ndjson"
            ),
        )

    async def rate(self, request: Request) -> Response:
        """Keep or take back a rating."""
        body = await read_body(request, models.RateRequest)
        shows = self._is_local or bool(request.scope.get(OWNER))

        def work() -> models.RatingsState:
            self._rate(body)
            return self.state(shows=shows)

        return as_json(await in_thread(request, work, self._turns))

    async def download(self, request: Request) -> Response:
        """The file, for people of this machine."""
        if not (self._is_local or request.scope.get(OWNER)):
            return problem(403, "the ratings name where images lie: only people on the server's own machine get them")

        def work() -> bytes:
            with self._lock:
                return b"".join(_line(self._placed(query)) for query in self._read())

        data = await in_thread(request, work, self._turns)
        headers = {"content-disposition": 'attachment; filename="queries.jsonl"', "cache-control": "no-store"}
        return Response(data, media_type="application/x-ndjson", headers=headers)

    def state(self, *, shows: bool | None = None) -> models.RatingsState:
        """What is kept, and where.

        Args:
            shows: whether the whole path is told; default: where only people of this machine are answered.
        """
        shows = self._is_local if shows is None else shows
        with self._lock:
            place = str(self._file) if shows else self._file.name
            return models.RatingsState(
                queries=len(self._read()), waiting=len(self._waiting), place=place, download=shows
            )

    # ------------------------------------------------------------------------------------------ one rating

    def _rate(self, request: models.RateRequest) -> None:
        words = request.text.strip()
        if not words and not request.image:
            raise QueryError("a rating is kept for words, an image, or both: this query has neither")
        target = self._path_of(request.id)
        with self._lock:
            image = self._image_of(request.image) if request.image else ""
            if image and request.rating == "up" and _is_one_file(image, target):
                raise QueryError("this rating is not kept: the result is the query image itself, which finds itself")
            queries = self._read()
            kept = [query for query in queries if self._key(query) == (words, image)]
            query = kept[0] if kept else self._waiting.pop((words, image), None)
            if query is None:
                query = {**({"image": image} if image else {}), "text": words, "targets": [], "negatives": []}
            self._change(query, target, request.rating)
            if query["targets"]:
                self._write(queries if kept else [*queries, query])
                return
            if kept:
                self._write([other for other in queries if other is not query])
            if query["negatives"] and len(self._waiting) < _MOST_WAITING:
                self._waiting[words, image] = query

    def _change(self, query: dict[str, Any], target: str, rating: str) -> None:
        for name, wanted in (("targets", "up"), ("negatives", "down")):
            others = [path for path in query.get(name, []) if self._absolute(path) != target]
            query[name] = [*others, target] if rating == wanted else others

    def _path_of(self, id_: str) -> str:
        path = own_value(self._search.indexed(id_).metadata, "file_path")
        if not isinstance(path, str) or not Path(path).is_file():
            raise QueryError("this rating is not kept: the image is no file of the server's machine")
        return path

    def _image_of(self, image: str) -> str:
        """The path of a query image; one that is in no file is written into a folder beside the ratings."""
        named = self._search.named(self._uploads.named(image))
        if named.node is not None:
            return self._path_of(named.node.node_id)
        data = named.read(bytes)
        folder = self._file.with_suffix(".images")
        suffix = (sniff_format(data) or "image").lower()
        path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if not path.exists():
                write_atomically(path, data, mode=0o600)
        except OSError as error:
            raise self._not_kept(error) from error
        return str(path)

    # ------------------------------------------------------------------------------------------ the file

    def _key(self, query: dict[str, Any]) -> tuple[str, str]:
        image = query.get("image")
        return str(query.get("text") or "").strip(), self._absolute(image) if image else ""

    def _absolute(self, path: object) -> str:
        return os.path.normpath(self._file.parent / str(path))

    def _placed(self, query: dict[str, Any]) -> dict[str, Any]:
        """A query whose paths are absolute: the file may be read from another folder."""
        image = {"image": self._absolute(query["image"])} if query.get("image") else {}
        paths = {name: [self._absolute(path) for path in query.get(name, [])] for name in ("targets", "negatives")}
        return {**query, **image, **paths}

    def _read(self) -> list[dict[str, Any]]:
        """The queries of the file, read anew: another program may have written to it."""
        try:
            if self._file.stat().st_size > _MOST_BYTES:
                raise QueryError(f"{str(self._file)!r} has more than {_MOST_BYTES // 2**20} MiB: name another file")
            lines = self._file.read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise self._not_kept(error) from error
        queries = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                query = json.loads(line)
            except (ValueError, RecursionError):
                query = None
            lists = [query.get(name, []) for name in ("targets", "negatives")] if isinstance(query, dict) else [None]
            if not isinstance(query, dict) or not all(isinstance(paths, list) for paths in lists):
                raise QueryError(
                    f"{str(self._file)!r}, line {number}: no query of an evaluation set: repair it or name another file"
                )
            queries.append(query)
        return queries

    def _write(self, queries: list[dict[str, Any]]) -> None:
        try:
            write_atomically(self._file, b"".join(map(_line, queries)), mode=0o600)
        except OSError as error:
            raise self._not_kept(error) from error

    def _not_kept(self, error: Exception) -> QueryError:
        reason = getattr(error, "strerror", None) or one_line(error, 200)
        return QueryError(f"ratings are not kept: {str(self._file)!r}: {reason}")


def _is_one_file(image: str, target: str) -> bool:
    """Whether an image is its own target, which no evaluation takes: the same file, or a copy of it."""
    return image == target or filecmp.cmp(image, target, shallow=False)


def _line(query: dict[str, Any]) -> bytes:
    return json.dumps(query, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
