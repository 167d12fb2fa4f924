"""LlamaIndex's side of reranking: options, events, prompts, and the handling of errors.

`ScorerRerank` ranks by any `Scorer`; other subclasses of `Reranker` rank candidates themselves. A ranking has every
candidate exactly once; the best `top_n` come back as new nodes, and the caller's nodes stay as they were. Knows nothing
of models.
"""

from __future__ import annotations

import logging
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.mixin import PromptDictType, PromptMixin
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from PIL import Image
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from mm_retriever.errors import ImageLoadError, MMRetrieverError, QueryError, RerankError, one_line, shown
from mm_retriever.images import ImagePolicy, ImageSource, is_place, load_image, source_name
from mm_retriever.notebook import show
from mm_retriever.rebuild import Rebuilt, field_arguments, wrong_options
from mm_retriever.rerank.scorer import (
    Candidate,
    Meter,
    Query,
    Ranking,
    Scorer,
    Usage,
    best_first,
    finite,
    fuse,
    ranked_nodes,
    read_candidates,
    shares,
)

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

NO_TIME = "not judged: the time budget was spent; after those that were"
NO_TIME_TO_READ = "the time budget was spent before all images were read"


@dataclass(frozen=True)
class Reranking:
    """The result of `rerank`.

    Args:
        nodes: the best `top_n`, new nodes with facts in their metadata.
        order: positions of all given nodes, best first; always a permutation.
        caption: the model's caption of the query image.
        wanted: the model's understanding of the query.
        repairs: what had to be repaired in the model's answer.
        usage: tokens, passes, images and time.
        error: why the order of retrieval was kept, with ``on_error="keep_order"``.
    """

    nodes: list[NodeWithScore]
    order: tuple[int, ...]
    caption: str = ""
    wanted: str = ""
    repairs: str = ""
    usage: Usage = field(default_factory=Usage)
    error: str = ""

    def _repr_html_(self) -> str:
        facts = (("it sees", self.caption), ("wanted", self.wanted), ("repaired", self.repairs), ("error", self.error))
        lines = tuple((name, one_line(fact)) for name, fact in facts if fact)
        return replace(show(self.nodes), facts=lines)._repr_html_()


REMOVED = {
    "fusion": ("zscore", 'scores are fused as "zscore" did it: fusion_weight says how much the retrieval counts'),
    "passes": (1, "nothing showed that shuffled passes rank better: raise window to judge more candidates together"),
    "seed": (0, "it shuffled the passes, which are gone as well"),
}
"""Options of earlier versions: the value that is still accepted, and what to do in place of any other."""


class Reranker(Rebuilt, BaseNodePostprocessor, PromptMixin):
    """The superclass of all rerankers in this package: the part that does not depend on the model.

    Options are keywords, and can be changed later as attributes; None stands for the default. A pickle holds the
    options and prompts, and loads the model again; a copy shares it.

    Raises:
        QueryError: an unknown option, or a value that an option does not accept.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)
    default_prompts: ClassVar[Mapping[str, str]] = {}

    model_name: str
    top_n: int = Field(default=9, ge=1)
    """How many nodes are kept."""
    on_error: Literal["raise", "keep_order"] = "raise"
    """"keep_order" keeps the order of retrieval where ranking fails, with a note and a warning in the log."""
    fusion_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Final value = the model's + weight * retrieval score, both with mean 0 and deviation 1 over the list; None: the
    model's value alone."""
    time_budget_s: float | None = Field(default=None, gt=0)
    """Candidates that are not judged by then follow the others, in the order of retrieval."""
    image_policy: ImagePolicy = Field(default_factory=ImagePolicy, exclude=True)
    """Which images may be read, the query's and the candidates', and how large."""

    _prompts: dict[str, BasePromptTemplate] = PrivateAttr(default_factory=dict)
    _last_usage: Usage | None = PrivateAttr(default=None)

    def __init__(self, **options: Any) -> None:
        for name, (same, instead) in REMOVED.items():
            if options.pop(name, same) != same:
                raise QueryError(f"{type(self).__name__} has no {name!r} any more; {instead}")
        try:
            super().__init__(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            raise QueryError(wrong_options(type(self), error)) from None
        self._prompts = {name: PromptTemplate(text) for name, text in self.default_prompts.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise QueryError(wrong_options(type(self), error)) from None

    @property
    def llm(self) -> LLM | None:
        """The model as an LLM that answers questions about images; None if it only ranks."""
        return None

    @abstractmethod
    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        """Return all candidates, of which there is at least one, in their new order."""

    @property
    def last_usage(self) -> Usage | None:
        """The usage of the reranking that finished last; with several threads, read `Reranking.usage` instead."""
        return self._last_usage

    # ------------------------------------------------------------------ ranking

    def rerank(
        self,
        nodes: Sequence[NodeWithScore],
        query: str | QueryBundle | None = None,
        *,
        query_image: ImageSource | None = None,
        meter: Meter | None = None,
    ) -> Reranking:
        """Return the nodes in their new order, with the model's words and its usage.

        Args:
            nodes: as retrieved, best first; they are not changed.
            query: a text, or a bundle with a text, an ``image_path`` (a path or a data URI), or both.
            query_image: the query image in any form that `load_image` takes; default: the bundle's.
            meter: counts the usage, for a caller who watches or stops the ranking; default: one with `time_budget_s`.

        Raises:
            QueryError: neither a text nor an image.
            ImageLoadError: the query image cannot or must not be read.
            RerankError: no ranking could be obtained; with ``on_error="keep_order"`` the order stays as it is.
        """
        nodes = list(nodes)  # read several times below
        bundle = QueryBundle(query) if isinstance(query, str) else query or QueryBundle("")
        source: ImageSource | None = bundle.image_path if query_image is None else query_image
        if isinstance(source, str) and not source:
            source = None
        text = (bundle.query_str or "").strip()
        if not text and source is None:
            raise QueryError(
                "nothing to rerank by: give a text, QueryBundle(query_str, image_path=...), or query_image"
            )
        described = replace(bundle, image_path=None if source is None else _place_or_name(source))
        dispatcher.event(
            ReRankStartEvent(query=described, nodes=list(nodes), top_n=self.top_n, model_name=self.model_name)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: list(nodes),
            EventPayload.MODEL_NAME: self.model_name,
            EventPayload.QUERY_STR: text,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            result = self._reranking(nodes, text, source, meter or Meter(self.time_budget_s))
            event.on_end(payload={EventPayload.NODES: result.nodes})
        dispatcher.event(ReRankEndEvent(nodes=result.nodes))
        self._last_usage = result.usage
        return result

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self.rerank(nodes, query_bundle).nodes

    def _reranking(self, nodes: list[NodeWithScore], text: str, source: ImageSource | None, meter: Meter) -> Reranking:
        if not nodes:
            return Reranking([], ())
        candidates: list[Candidate] = []
        try:
            try:
                image = self._query_image(source, meter)
                candidates = read_candidates(nodes, self.image_policy, meter.left)
            except TimeoutError:
                return self._kept(nodes, [], meter, NO_TIME_TO_READ)
            ranking = self._rank(Query(text, image), candidates, meter)
        except Exception as error:
            if self.on_error == "raise":
                if isinstance(error, RerankError | ImageLoadError):
                    raise
                raise RerankError(f"{self.model_name!r} gave no ranking: {_explained(error)}") from error
            logger.warning("%s gave no ranking, the order stays as retrieved: %s", self.model_name, _explained(error))
            return self._kept(nodes, candidates, meter, _explained(error))
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
            return load_image(source, policy=self.image_policy)
        if left <= 0:
            raise TimeoutError
        policy = replace(self.image_policy, url_timeout=min(self.image_policy.url_timeout, left))
        return load_image(source, policy=policy)

    def _kept(self, nodes: list[NodeWithScore], candidates: list[Candidate], meter: Meter, reason: str) -> Reranking:
        """The order of retrieval, with a note."""
        order = tuple(range(len(nodes)))
        note = f"not reranked: {reason}"
        ranking = Ranking(order, [node.score for node in nodes], notes=dict.fromkeys(order, note))
        judged = candidates or [Candidate(node) for node in nodes]
        return Reranking(ranked_nodes(judged, ranking, self.top_n), order, usage=meter.usage(), error=reason)

    def _settle(
        self,
        candidates: Sequence[Candidate],
        model_scores: Sequence[float | None],
        *,
        calibrated: bool = False,
        unjudged: str = NO_TIME,
    ) -> Ranking:
        """The ranking by the model's scores, fused with those of the retrieval on request; missing candidates are last.

        If the model judged no candidate, the order of retrieval stays.

        Args:
            candidates: in the order of retrieval.
            model_scores: one for each candidate; None: not judged.
            calibrated: whether the scores are kept as they are, unless they are fused.
            unjudged: the note for candidates that were not judged.
        """
        known = {i: value for i, value in enumerate(model_scores) if value is not None}
        notes = {i: unjudged for i, value in enumerate(model_scores) if value is None}
        missing = [candidate.missing for candidate in candidates]
        values = [None if value is None else finite(value) for value in model_scores]
        judged = [i for i, value in enumerate(values) if value is not None and not missing[i]]
        if not judged:
            values = [None] * len(candidates)
            retrieved = [candidate.node.score for candidate in candidates]
            return Ranking(best_first(values, missing), retrieved, known, notes=notes)
        if self.fusion_weight is not None:
            own = [value for i in judged if (value := values[i]) is not None]
            fused = fuse(own, [candidates[i].node.score for i in judged], self.fusion_weight)
            for i, value in zip(judged, fused, strict=True):
                values[i] = value
        if calibrated and self.fusion_weight is None:
            scores = [0.0 if value is None or out else value for value, out in zip(values, missing, strict=True)]
        else:
            scores = shares(values, missing)
        return Ranking(best_first(values, missing), scores, known, notes=notes)

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
        rich = [name for name, prompt in self._prompts.items() if isinstance(prompt, RichPromptTemplate)]
        return {**super().to_dict(**kwargs), "prompts": prompts, **({"rich_prompts": rich} if rich else {})}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The reranker that `to_dict` described, with its model loaded again; see `Rebuilt.from_dict`."""
        made = super().from_dict(data, **{name: data[name] for name in REMOVED if name in data} | kwargs)
        rich = data.get("rich_prompts", ())  # whose blanks are written {{ query }}
        for name, text in data.get("prompts", {}).items():
            made._prompts[name] = RichPromptTemplate(text) if name in rich else PromptTemplate(text)
        return made

    # ------------------------------------------------------------------ prompts

    def _say(self, prompt: str, **values: Any) -> str:
        """A prompt with its placeholders filled in; braces inside the values are plain characters."""
        return self._prompts[prompt].format(**values)

    def _get_prompts(self) -> PromptDictType:
        return dict(self._prompts)

    def _update_prompts(self, prompts: PromptDictType) -> None:
        unknown = sorted(set(prompts) - set(self._prompts))
        if unknown:
            raise QueryError(f"no prompts {unknown}; there are {', '.join(sorted(self._prompts))}")
        self._prompts |= prompts


class ScorerRerank(Reranker):
    """Ranks by any `Scorer`.

    Calibrated scores become the nodes' scores as they are; others, and all that are fused with the retrieval score,
    become softmax shares of the list: from 0 to 1, together 1. The scorer's own score is in `rerank_model_score`.
    """

    _scorer: Scorer = PrivateAttr()

    def __init__(self, scorer: Scorer, **options: Any) -> None:
        super().__init__(**options | {"model_name": scorer.name})
        self._scorer = scorer

    @property
    def scorer(self) -> Scorer:
        """The model that scores."""
        return self._scorer

    def _made_of(self) -> dict[str, Any]:
        return field_arguments(self) | {"scorer": self._scorer}

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        visible = [i for i, candidate in enumerate(candidates) if not candidate.missing]
        scorer = self.scorer
        given = _listed(scorer.score(query, [candidates[i] for i in visible], meter), scorer.name) if visible else []
        if len(given) != len(visible):
            raise RerankError(f"{self.model_name!r} gave {len(given)} scores for {len(visible)} candidates")
        calibrated = scorer.calibrated
        for score in given:
            number = _number(score)
            if score is not None and not (0 <= number <= 1 if calibrated else math.isfinite(number)):
                expected = (
                    "calibrated scores go from 0 to 1; calibrated=False takes others"
                    if calibrated
                    else "a score is a finite number or None"
                )
                raise RerankError(f"{self.model_name!r} gave the score {score!r}; {expected}")
        scores: list[float | None] = [None] * len(candidates)
        for i, score in zip(visible, given, strict=True):
            scores[i] = None if score is None else float(score)
        unjudged = NO_TIME if meter.out_of_time() else f"not judged by {self.model_name!r}; after those that were"
        return self._settle(candidates, scores, calibrated=calibrated, unjudged=unjudged)


def _listed(scores: Any, name: str) -> list[Any]:
    """The scores of a scorer; a mapping would count as its keys, a text as its letters."""
    if isinstance(scores, str | bytes | Mapping | Set) or not isinstance(scores, Iterable):
        raise RerankError(f"{name!r} gave {shown(scores)}; a scorer gives a list with a score for each candidate")
    return list(scores)


def _number(score: Any) -> float:
    """A number of Python, numpy or torch; NaN for anything else."""
    try:
        return math.nan if isinstance(score, str | bytes) else float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _place_or_name(source: ImageSource) -> str:
    """The place or name of the query image, for events: the image itself may have many megabytes."""
    return os.fsdecode(source) if is_place(source) else source_name(source)


def _explained(error: Exception) -> str:
    text = one_line(error, 500)
    return text if isinstance(error, MMRetrieverError) else f"{type(error).__name__}: {text}" if text else repr(error)
