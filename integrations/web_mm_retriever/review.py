"""Drafted queries, reviewed by a person: lines of a `queries.jsonl` that are kept, corrected or dropped.

    {"image": "red mug.jpg", "text": "in blue", "targets": ["blue mug.jpg"], "note": "drafted by MODEL; not reviewed"}

What nobody has reviewed has a note that ends so, as `mm-retriever evaluate --make` writes it. A verdict changes one
line and leaves all others as they are, byte for byte; the file is replaced in one step.
"""

from __future__ import annotations

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
from mm_retriever.images import image_thumbnail
from mm_retriever.threads import ForkLock
from web_mm_retriever import models
from web_mm_retriever.endpoints import Endpoint, as_json, in_thread, read_body

OPEN = "; not reviewed"
"""What the note of a draft ends with."""

_MOST_BYTES = 64 * 2**20
_SIDE = 640  # pixels of an image on the page


class Review:
    """The drafts of one file.

    Args:
        file: it exists.

    Raises:
        QueryError: it is missing, or something else is in it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.expanduser().absolute()
        self._lock = ForkLock()
        self._turns = anyio.CapacityLimiter(4)
        for line in self._lines():
            self._query(line)
        self.endpoints = (
            Endpoint(
                "GET", "/v1/review", self.next, "The draft to review next", gives=models.ReviewState, query=("after",)
            ),
            Endpoint(
                "POST", "/v1/review/verdict", self.judge, "Judge a draft", models.ReviewRequest, models.ReviewState
            ),
            Endpoint(
                "GET",
                "/v1/review/image",
                self.image,
                "An image of a draft: 0 is the query's, then its targets",
                gives="image/jpeg",
                query=("id", "place"),
            ),
        )

    async def next(self, request: Request) -> Response:
        """The first draft after those that were put off."""
        after = request.query_params.get("after", "")
        return as_json(await in_thread(request, lambda: self._state(after), self._turns))

    async def judge(self, request: Request) -> Response:
        """Keep, correct or drop a draft."""
        body = await read_body(request, models.ReviewRequest)

        def work() -> models.ReviewState:
            self._judge(body)
            return self._state(body.after)

        return as_json(await in_thread(request, work, self._turns))

    async def image(self, request: Request) -> Response:
        """A small copy of an image that a draft names."""
        id_, place = request.query_params.get("id", ""), request.query_params.get("place", "")

        def read() -> bytes:
            query = self._query(self._lines()[self._find(id_)])
            images = [query["image"], *query["targets"]]
            if not place.isdecimal() or int(place[:6]) >= len(images) or not images[int(place[:6])]:
                raise QueryError(f"place {one_line(place, 20)!r}: this draft has no such image")
            return image_thumbnail(os.path.normpath(self._file.parent / images[int(place[:6])]), _SIDE)

        data = await in_thread(request, read, self._turns)
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=600"})

    # ------------------------------------------------------------------------------------------ one draft

    def _state(self, after: str) -> models.ReviewState:
        lines = self._lines()
        drafts = [line for line in lines if _is_open(self._query(line))]
        ids = [_id(line) for line in drafts]
        place = (ids.index(after) + 1) % len(ids) if after in ids else 0
        draft = None
        if drafts:
            query = self._query(drafts[place])
            draft = models.Draft(
                id=ids[place],
                text=query["text"],
                note=query["note"].removesuffix(OPEN),
                image=bool(query["image"]),
                targets=len(query["targets"]),
            )
        return models.ReviewState(
            place=self._file.name, queries=len([line for line in lines if line.strip()]), left=len(drafts), draft=draft
        )

    def _judge(self, request: models.ReviewRequest) -> None:
        text = one_line(request.text)
        with self._lock:
            lines = self._lines()
            place = self._find(request.id, lines)
            query = self._query(lines[place])
            if request.verdict == "drop":
                del lines[place]
            elif not text and not query["image"]:
                raise QueryError("a query has words, an image, or both: this one would have neither")
            else:
                was = "; reviewed" if text == query["text"] else "; corrected by hand"
                given = json.loads(lines[place])
                given |= {"text": text, "note": query["note"].removesuffix(OPEN) + was}
                lines[place] = json.dumps(given, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._write(lines)

    def _find(self, id_: str, lines: list[bytes] | None = None) -> int:
        for place, line in enumerate(self._lines() if lines is None else lines):
            if line.strip() and _id(line) == id_ and _is_open(self._query(line)):
                return place
        raise QueryError("this draft is no longer in the file as it was shown: somebody else changed it")

    # ------------------------------------------------------------------------------------------ the file

    def _lines(self) -> list[bytes]:
        """The lines of the file, read anew: an editor may have written to it."""
        try:
            if self._file.stat().st_size > _MOST_BYTES:
                raise QueryError(f"{str(self._file)!r} has more than {_MOST_BYTES // 2**20} MiB: review it in parts")
            return self._file.read_bytes().split(b"\n")
        except OSError as error:
            raise QueryError(f"the queries to review, {str(self._file)!r}: {error.strerror}") from error

    def _query(self, line: bytes) -> dict[str, Any]:
        """What a line says: image, text, targets and note; an empty one says nothing."""
        try:
            given = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, dict):
            texts = {name: given.get(name) or "" for name in ("image", "text", "note")}
            targets = given.get("targets") or []
            if all(isinstance(text, str) for text in texts.values()) and isinstance(targets, list):
                return {**texts, "targets": [target for target in targets if isinstance(target, str)]}
        raise QueryError(
            f"{str(self._file)!r}: {one_line(line.decode('utf-8', 'replace'), 80)!r} is no query of an evaluation set"
        )

    def _write(self, lines: list[bytes]) -> None:
        try:
            write_atomically(self._file, b"\n".join(lines), mode=self._file.stat().st_mode & 0o777)
        except OSError as error:
            raise QueryError(f"the verdict is not kept: {str(self._file)!r}: {error.strerror}") from error


def _id(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:24]


def _is_open(query: dict[str, Any]) -> bool:
    return bool(query["note"].endswith(OPEN))
