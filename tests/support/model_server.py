"""A real server of models on loopback, as vLLM speaks: the bundled embedder behind `/v1/embeddings`, a scorer behind
`/v1/rerank` and `/v1/score`.

It takes exactly the documented requests, and refuses others with 400, so that a client that sends something else fails.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.rerank import Candidate, Meter, Query

INSTRUCTED = " | "


class CosineScorer:
    """A scorer on this machine: the cosine of an embedder's vectors, from 0 to 1."""

    calibrated = True

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.embedder = "cosine", embedder

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        meter.passes += 1
        asked = self._content(query.text, query.image)
        texts = ["" if each.image else each.node.node.get_content() for each in candidates]
        return self.cosines(asked, [self._content(text, c.image) for text, c in zip(texts, candidates, strict=True)])

    def _content(self, text: str, image: Image.Image | None) -> Content:
        return Content(text, None if image is None else self.embedder.prepare(image))

    def cosines(self, query: Content, contents: Sequence[Content]) -> list[float | None]:
        cosines = self.embedder.encode(contents) @ self.embedder.encode([query], query=True)[0]
        return [float(value) for value in np.clip((1 + cosines) / 2, 0, 1)]


class ModelServer:
    """The routes, and the requests that came in."""

    def __init__(self, embedder: Embedder, name: str) -> None:
        self.embedder, self.name = embedder, name
        self.requests: list[dict[str, Any]] = []
        routes = {"embeddings": self.embeddings, "rerank": self.rerank, "score": self.score}
        self.app = Starlette(
            routes=[Route(f"/v1/{path}", self._route(answer), methods=["POST"]) for path, answer in routes.items()]
        )
        self.url = ""

    def _route(self, answer: Any) -> Any:
        async def endpoint(request: Request) -> JSONResponse:
            body = await request.json()
            self.requests.append(body)
            try:
                assert body["model"] == self.name, "no such model"
                return JSONResponse(answer(body))
            except (AssertionError, KeyError) as error:
                return JSONResponse({"error": {"message": f"{error}", "code": 400}}, status_code=400)

        return endpoint

    def content(self, parts: str | list[dict[str, Any]], instruction: str = "") -> Content:
        """What the model sees of the parts of a message, of which an image comes first."""
        if isinstance(parts, str):
            return Content(parts)
        image, text = None, instruction and instruction + INSTRUCTED
        for place, part in enumerate(parts):
            if part["type"] == "text":
                text += part["text"]
                continue
            assert (part["type"], place) == ("image_url", 0)
            head, data = part["image_url"]["url"].split(",", 1)
            assert head in ("data:image/png;base64", "data:image/jpeg;base64")
            opened = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert head.endswith(f"{opened.format};base64".lower())
            image = self.embedder.prepare(opened)
        return Content(text, image)

    def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["encoding_format"] == "float"
        if "input" in body:
            contents = [Content(text) for text in body["input"]]
        else:
            *system, user = body["messages"]
            assert body["add_generation_prompt"] is body["add_special_tokens"] is True
            assert user["role"] == "user"
            assert [message["role"] for message in system] in ([], ["system"])
            contents = [self.content(user["content"], system[0]["content"][0]["text"] if system else "")]
        vectors = self.embedder.encode(contents)[:, : body.get("dimensions")].astype(float)
        data = [{"object": "embedding", "index": i, "embedding": list(row)} for i, row in enumerate(vectors)]
        return {"object": "list", "model": self.name, "data": data[::-1], "usage": {"prompt_tokens": 7}}

    def _scores(self, query: Any, documents: list[Any]) -> list[float | None]:
        seen = [self.content(part if isinstance(part, str) else part["content"]) for part in (query, *documents)]
        return CosineScorer(self.embedder).cosines(seen[0], seen[1:])

    def rerank(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["top_n"] == len(body["documents"])
        scores = self._scores(body["query"], body["documents"])
        results = [
            {"index": i, "relevance_score": score, "document": {"text": None, "multi_modal": body["documents"][i]}}
            for i, score in enumerate(scores)
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        return {"id": "rerank-1", "model": self.name, "results": results, "usage": {"total_tokens": 70}}

    def score(self, body: dict[str, Any]) -> dict[str, Any]:
        scores = self._scores(body["queries"], body["documents"])
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        return {"id": "score-1", "object": "list", "data": data, "usage": {"prompt_tokens": 70, "total_tokens": 70}}


@contextmanager
def serving(embedder: Embedder, name: str = "served") -> Iterator[ModelServer]:
    """The server, at its `url` for as long as the block runs."""
    served = ModelServer(embedder, name)
    server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    served.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(10)
