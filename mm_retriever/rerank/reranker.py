"""What every reranker of this package shares: LlamaIndex's interface, events, prompts, and what happens on an error.

A subclass says how candidates are ranked; whatever it does, every candidate comes back exactly once before the best
`top_n` are kept, as a new node, and the caller's nodes stay as they were. Knows nothing of models.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.mixin import PromptDictType, PromptMixin
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from PIL import Image
from pydantic import Field, PrivateAttr

from mm_retriever.errors import ImageLoadError, MMRetrieverError, QueryError, RerankError
from mm_retriever.images import ImagePolicy, ImageSource, is_place, load_image, source_name
from mm_retriever.rebuild import Rebuilt
from mm_retriever.rerank.candidates import Candidate, Ranking, ranked_nodes, read_candidates
from mm_retriever.rerank.order import Fusion, best_first, finite, fuse, shares

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

NO_TIME = "not judged: the time budget was spent; behind those that were"
NO_TIME_TO_READ = "the time budget was spent before all images were read"


@dataclass(frozen=True)
class Query:
    """What is asked: a text, a picture, or both."""

    text: str
    image: Image.Image | None


@dataclass(frozen=True)
class Usage:
    """What a reranking cost.

    ``prefilled``: tokens of prompts that were computed; ``generated``: tokens that the model chose; ``passes``: runs of
    the decoder or calls of the server; ``pictures``: pictures that went through the tower, and ``pictures_kept`` those
    whose features were still in memory.
    """

    prefilled: int = 0
    generated: int = 0
    passes: int = 0
    pictures: int = 0
    pictures_kept: int = 0
    seconds: float = 0.0


class Meter:
    """Counts what one reranking costs, and knows when its time is up."""

    def __init__(self, budget_s: float | None) -> None:
        self.prefilled = self.generated = self.passes = self.pictures = self.pictures_kept = 0
        self._started = time.monotonic()
        self._budget = budget_s

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return self._budget is not None and time.monotonic() - self._started >= self._budget

    def left(self) -> float | None:
        """Seconds that are left of the budget; None: as many as it takes."""
        return None if self._budget is None else max(0.0, self._budget - (time.monotonic() - self._started))

    def usage(self) -> Usage:
        """The figures so far."""
        seconds = time.monotonic() - self._started
        return Usage(self.prefilled, self.generated, self.passes, self.pictures, self.pictures_kept, seconds)


@dataclass(frozen=True)
class Reranking:
    """The result of `rerank`.

    Args:
        nodes: the best `top_n`, new nodes with facts in their metadata.
        order: positions of all nodes that were given, best first; always a permutation.
        caption: what the model sees in the query picture.
        wanted: what it takes the query to want.
        repairs: what had to be mended in its answer.
        usage: what it cost.
        error: why the order is that of retrieval, with ``on_error="keep_order"``.
    """

    nodes: list[NodeWithScore]
    order: tuple[int, ...]
    caption: str = ""
    wanted: str = ""
    repairs: str = ""
    usage: Usage = field(default_factory=Usage)
    error: str = ""


class Reranker(Rebuilt, BaseNodePostprocessor, PromptMixin):
    """The part of a reranker that does not depend on the model: the superclass of all in this package.

    A pickle holds the options and prompts, and loads the model again; a copy shares it.
    """

    model_name: str
    top_n: int = Field(default=9, ge=1)
    on_error: Literal["raise", "keep_order"] = "raise"
    fusion_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    fusion: Fusion = "zscore"
    time_budget_s: float | None = Field(default=None, gt=0)

    _image_policy: ImagePolicy = PrivateAttr(default_factory=ImagePolicy)
    _prompts: dict[str, BasePromptTemplate] = PrivateAttr(default_factory=dict)
    _last_usage: Usage | None = PrivateAttr(default=None)

    @abstractmethod
    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        """All candidates, at least one, in their new order."""

    @property
    def image_policy(self) -> ImagePolicy:
        """Which images may be read, the query's and the candidates'."""
        return self._image_policy

    @property
    def last_usage(self) -> Usage | None:
        """What the reranking that finished last cost; with several threads, read `Reranking.usage` instead."""
        return self._last_usage

    # ------------------------------------------------------------------ ranking

    def rerank(
        self,
        nodes: Sequence[NodeWithScore],
        query: str | QueryBundle | None = None,
        *,
        query_image: ImageSource | None = None,
    ) -> Reranking:
        """The nodes in their new order, with what the model said and what it cost.

        Args:
            nodes: as retrieved, best first; they are not changed.
            query: a text, or a bundle with a text, an ``image_path`` (a path or a data URI), or both.
            query_image: the query image in any form that `load_image` takes; it goes before the bundle's.

        Raises:
            QueryError: neither a text nor a picture.
            ImageLoadError: the query picture cannot or must not be read.
            RerankError: no ranking could be obtained; with ``on_error="keep_order"`` the order stays as it is.
        """
        bundle = QueryBundle(query) if isinstance(query, str) else query or QueryBundle("")
        source: ImageSource | None = bundle.image_path if query_image is None else query_image
        if isinstance(source, str) and not source:
            source = None
        text = (bundle.query_str or "").strip()
        if not text and source is None:
            raise QueryError(
                "nothing to rerank by: give a text, QueryBundle(query_str, image_path=...), or query_image"
            )
        told = replace(bundle, image_path=None if source is None else _place_or_name(source))
        dispatcher.event(ReRankStartEvent(query=told, nodes=list(nodes), top_n=self.top_n, model_name=self.model_name))
        payload: dict[str, Any] = {
            EventPayload.NODES: list(nodes),
            EventPayload.MODEL_NAME: self.model_name,
            EventPayload.QUERY_STR: text,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            result = self._reranking(list(nodes), text, source)
            event.on_end(payload={EventPayload.NODES: result.nodes})
        dispatcher.event(ReRankEndEvent(nodes=result.nodes))
        self._last_usage = result.usage
        return result

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self.rerank(nodes, query_bundle).nodes

    def _reranking(self, nodes: list[NodeWithScore], text: str, source: ImageSource | None) -> Reranking:
        if not nodes:
            return Reranking([], ())
        meter = Meter(self.time_budget_s)
        candidates: list[Candidate] = []
        try:
            try:
                image = self._query_image(source, meter)
                candidates = read_candidates(nodes, self._image_policy, meter.left)
            except TimeoutError:
                return self._kept(nodes, [], meter, NO_TIME_TO_READ)
            ranking = self._rank(Query(text, image), candidates, meter)
        except Exception as error:
            if self.on_error == "raise":
                if isinstance(error, RerankError | ImageLoadError):
                    raise
                raise RerankError(f"{self.model_name!r} gave no ranking: {_one_line(error)}") from error
            logger.warning("%s gave no ranking, the order stays as retrieved: %s", self.model_name, _one_line(error))
            return self._kept(nodes, candidates, meter, _one_line(error))
        return Reranking(
            nodes=ranked_nodes(candidates, ranking, self.top_n),
            order=tuple(ranking.order),
            caption=ranking.caption,
            wanted=ranking.wanted,
            repairs=ranking.repairs,
            usage=meter.usage(),
        )

    def _query_image(self, source: ImageSource | None, meter: Meter) -> Image.Image | None:
        if source is None:
            return None
        left = meter.left()
        if left is None:
            return load_image(source, policy=self._image_policy)
        if left <= 0:
            raise TimeoutError
        policy = replace(self._image_policy, url_timeout=min(self._image_policy.url_timeout, left))
        return load_image(source, policy=policy)

    def _kept(self, nodes: list[NodeWithScore], candidates: list[Candidate], meter: Meter, reason: str) -> Reranking:
        """The order of retrieval, with a note."""
        order = tuple(range(len(nodes)))
        note = f"not reranked: {reason}"
        ranking = Ranking(order, [node.score for node in nodes], notes=dict.fromkeys(order, note))
        found = candidates or [Candidate(node) for node in nodes]
        return Reranking(ranked_nodes(found, ranking, self.top_n), order, usage=meter.usage(), error=reason)

    def _settle(self, candidates: Sequence[Candidate], model_scores: Sequence[float | None]) -> Ranking:
        """The ranking by the model's scores, fused with the retrieval's if that is wanted; the missing come last.

        Where the model judged none at all, everything stays as it was retrieved.
        """
        known = {i: value for i, value in enumerate(model_scores) if value is not None}
        notes = {i: NO_TIME for i, value in enumerate(model_scores) if value is None}
        missing = [candidate.missing for candidate in candidates]
        values = [None if value is None else finite(value) for value in model_scores]
        judged = [i for i, value in enumerate(values) if value is not None and not missing[i]]
        if not judged:
            values = [None] * len(candidates)
            retrieved = [candidate.node.score for candidate in candidates]
            return Ranking(best_first(values, missing), retrieved, known, notes=notes)
        if self.fusion_weight is not None:
            own = [value for i in judged if (value := values[i]) is not None]
            fused = fuse(own, [candidates[i].node.score for i in judged], self.fusion_weight, self.fusion)
            for i, value in zip(judged, fused, strict=True):
                values[i] = value
        return Ranking(best_first(values, missing), shares(values, missing), known, notes=notes)

    # ------------------------------------------------------------------ pickles and copies

    def _changed_since(self) -> dict[str, Any]:
        return dict(self._prompts)

    def _change(self, changes: Mapping[str, Any]) -> None:
        self._prompts |= changes

    def _unshare(self) -> None:
        self._prompts = dict(self._prompts)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The options and the texts of the prompts, as JSON holds them; `from_dict` makes an equal reranker of them."""
        prompts = {name: prompt.get_template() for name, prompt in self._prompts.items()}
        return {**super().to_dict(**kwargs), "prompts": prompts}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The reranker that `to_dict` described, with its model loaded again; see `Rebuilt.from_dict`."""
        made = super().from_dict(data, **kwargs)
        made._prompts |= {name: PromptTemplate(text) for name, text in data.get("prompts", {}).items()}
        return made

    # ------------------------------------------------------------------ prompts

    def _say(self, prompt: str, **values: Any) -> str:
        """A prompt with its blanks filled in; braces inside the values are plain characters."""
        return self._prompts[prompt].format(**values)

    def _set_prompts(self, defaults: dict[str, str]) -> None:
        self._prompts = {name: PromptTemplate(text) for name, text in defaults.items()}

    def _get_prompts(self) -> PromptDictType:
        return dict(self._prompts)

    def _update_prompts(self, prompts: PromptDictType) -> None:
        unknown = sorted(set(prompts) - set(self._prompts))
        if unknown:
            raise QueryError(f"no prompts {unknown}; there are {', '.join(sorted(self._prompts))}")
        self._prompts |= prompts


def _place_or_name(source: ImageSource) -> str:
    """What events are told of the query image: where it is, never the image itself, which may have many megabytes."""
    return os.fsdecode(source) if is_place(source) else source_name(source)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, MMRetrieverError) else f"{type(error).__name__}: {text}" if text else repr(error)
