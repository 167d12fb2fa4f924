"""`RemoteRerank`: a reranking model on a server, over the protocol of Cohere, Jina and vLLM, which takes images.

Owns the requests to ``/rerank`` and ``/score`` and the reading of answers; `load` returns a reranker of any kind for a
name with a base_url.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, PrivateAttr

from mm_retriever.checkpoint import Models
from mm_retriever.errors import ModelServerError, QueryError, shown
from mm_retriever.images import thumbnail_data_uri
from mm_retriever.rebuild import Secret, field_arguments
from mm_retriever.rerank.reranker import Reranker, ScorerRerank
from mm_retriever.rerank.scorer import Candidate, Meter, Query
from mm_retriever.servers.json_server import JSONServer

logger = logging.getLogger(__name__)

API = Literal["chat", "rerank", "score"]
CHAT_TEMPLATE = Path(__file__).parent / "qwen3_vl_reranker.jinja"
"""The chat template that vLLM needs to serve Qwen3-VL-Reranker; without it every score is about 0.5."""
MODELS: Models = {}
_LIKE_CHANCE = 0.02  # largest distance from 0.5 of the scores of a model without its template


def recognises(name: str, config: Mapping[str, Any], base_url: str | None) -> bool:
    """Whether a server serves the model."""
    return base_url is not None


def load(name: str, *, base_url: str, api: API = "chat", **options: Any) -> Reranker:
    """Return the reranker of a model that a server serves under `name`.

    Args:
        name: of the model.
        base_url: of the server.
        api: "chat" for a vision LLM, "rerank" or "score" for a reranking model.
        options: of `VisionLLMRerank` or `RemoteRerank`.

    Raises:
        QueryError: another api.
    """
    if api == "chat":
        from mm_retriever.rerank.vision_llm import VisionLLMRerank

        return VisionLLMRerank(base_url=base_url, model=name, **options)
    if api not in ("rerank", "score"):
        raise QueryError(f"api={shown(api)}: there are 'chat', 'rerank' and 'score'")
    return RemoteRerank(base_url, name, api=api, **options)


class RemoteScorer:
    """A reranking model on a server as a `Scorer`; the arguments are those of `RemoteRerank`."""

    def __init__(
        self,
        server: JSONServer,
        *,
        api: Literal["rerank", "score"] = "rerank",
        calibrated: bool = True,
        instruction: str = "",
        batch_size: int = 8,
        image_side: int = 1024,
        timeout_s: float = 60.0,
        attempts: int = 3,
        retry_wait_s: float = 1.0,
    ) -> None:
        self.name = server.model
        self.calibrated = calibrated
        self._server, self._api, self._instruction = server, api, instruction
        self._batch_size, self._image_side = batch_size, image_side
        self._asking: dict[str, Any] = {"timeout_s": timeout_s, "attempts": attempts, "retry_wait_s": retry_wait_s}

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        """Return the server's score of each candidate; None where the time was up.

        Raises:
            ModelServerError: no answer, or one without a score for each candidate.
        """
        query_content = self._content(query.text, query.image)
        scores: list[float | None] = []
        for start in range(0, len(candidates), self._batch_size):
            if meter.out_of_time():
                break
            batch = candidates[start : start + self._batch_size]
            try:
                scores += self._scores(query_content, batch, meter)
            except ModelServerError:
                if not meter.out_of_time():
                    raise
                break
        if len(scores) > 1 and self.calibrated and all(abs((score or 0) - 0.5) < _LIKE_CHANCE for score in scores):
            logger.warning(
                "%r gave every candidate a score of about 0.5, as a model does that is served without its chat "
                "template: vllm serve ... --chat-template %s",
                self.name,
                CHAT_TEMPLATE,
            )
        return scores + [None] * (len(candidates) - len(scores))

    def _scores(self, query: Any, batch: Sequence[Candidate], meter: Meter) -> list[float | None]:
        documents = [
            self._content("" if candidate.image is not None else candidate.node.node.get_content(), candidate.image)
            for candidate in batch
        ]
        body: dict[str, Any] = {"model": self.name, "documents": documents}
        if self._api == "rerank":
            body |= {"query": query, "top_n": len(documents), "return_documents": False}
        else:
            body |= {"queries": query}
        if self._instruction:
            body["instruction"] = self._instruction

        def count() -> None:
            meter.passes += 1

        answer = self._server.post(self._api, body, left=meter.left, asked=count, **self._asking)
        meter.images += sum(candidate.image is not None for candidate in batch)
        meter.prefilled += _tokens(answer)
        try:
            return read_scores(answer, len(batch))
        except ValueError as error:
            raise ModelServerError(f"{self.name!r} gave no scores: {error}") from None

    def _content(self, text: str, image: Image.Image | None) -> Any:
        """A text as it is, which every such server takes; an image, and its text, as parts of a message."""
        if image is None:
            return text
        uri = thumbnail_data_uri(image, self._image_side, quality=95)
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri}}]
        return {"content": parts + ([{"type": "text", "text": text}] if text else [])}


class RemoteRerank(ScorerRerank):
    """Ranks by a reranking model on a server: Qwen3-VL-Reranker or jina-reranker-m0 on vLLM, Cohere's and Jina's own.

    Images are sent as JPEG in parts of a message, which vLLM takes; texts as they are, which all servers take.

    Args:
        base_url: of the server, e.g. "http://gpu:8000/v1".
        model: the name under which it serves the model.
        api_key: if the server needs one.
        options: the fields below, and those of `Reranker`.
    """

    api: Literal["rerank", "score"] = "rerank"
    """The endpoint: "rerank" of Cohere, Jina and vLLM, or "score" of vLLM."""
    calibrated: bool = True
    """Whether the server's scores lie from 0 to 1, as those of all models above do. False: they are logits, which order
    a list and become softmax shares."""
    instruction: str = ""
    """The instruction to the model, if the server's template has a place for it; default: the template's own."""
    batch_size: int = Field(default=8, ge=1)
    """Candidates of one request."""
    image_side: int = Field(default=1024, ge=32)
    """Longest side in pixels of images that are sent."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Limit for one request, from sending to the last byte."""
    attempts: int = Field(default=3, ge=1)
    """Limit for one request, where the server is unreachable, overloaded or too slow."""
    retry_wait_s: float = Field(default=1.0, ge=0)
    """Wait before the second attempt; doubles with each, up to a minute. Retry-After is obeyed up to a minute."""

    _server: JSONServer = PrivateAttr()

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, **options: Any) -> None:
        server = JSONServer(base_url, model, api_key=api_key)
        super().__init__(RemoteScorer(server), **options)
        self._server = server

    @property
    def scorer(self) -> RemoteScorer:
        """The model on the server, with the current values of the fields."""
        names = RemoteRerank.model_fields.keys() - ScorerRerank.model_fields.keys()
        return RemoteScorer(self._server, **{name: getattr(self, name) for name in names})

    def _made_of(self) -> dict[str, Any]:
        self._server.portable()
        return self._described()

    def _described(self) -> dict[str, Any]:
        key = {"api_key": Secret()} if self._server.has_key else {}
        return field_arguments(self) | {"base_url": self._server.base_url, "model": self._server.model} | key


def read_scores(answer: Any, count: int) -> list[float | None]:
    """Return the score of each document, in the order they were sent.

    Args:
        answer: JSON of a server: Cohere's and Jina's ``results``, vLLM's ``data``, or a plain list.
        count: documents that were sent.

    Raises:
        ValueError: the answer has another form, or a document has no score or two.
    """
    results = answer
    if isinstance(answer, dict):
        results = answer.get("results", answer.get("data"))
    if not isinstance(results, list) or len(results) != count:
        count_given = len(results) if isinstance(results, list) else "no"
        raise ValueError(f"{count_given} scores in the answer for {count} candidates")
    scores: list[float | None] = [None] * count
    for result in results:
        fields = result if isinstance(result, dict) else {}
        index = fields.get("index")
        if type(index) is not int or not 0 <= index < count or scores[index] is not None:
            raise ValueError(f"an index {shown(index)} among {count} candidates: each from 0 must come once")
        score = fields.get("relevance_score", fields.get("score"))
        if not isinstance(score, int | float) or isinstance(score, bool) or not -1e300 < score < 1e300:
            raise ValueError(f"a score is a finite number, not {shown(score)}")
        scores[index] = float(score)
    return scores


def _tokens(answer: Any) -> int:
    """The number of tokens that the server read, 0 if it does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else 0
    return count if type(count) is int and count >= 0 else 0
