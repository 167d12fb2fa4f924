"""The interface between reranking and models that score: `Scorer`, its inputs, and the use of its scores.

A new model is one class with three members; `mm_retriever.rerank.registry` gives it a name, and
`mm_retriever.rerank.reranker.ScorerRerank` makes it a node postprocessor of LlamaIndex. In a reranking, nodes become
`Candidate`s, scores become an order, and both together become new nodes.

An image is read by `opened_image` under an `ImagePolicy`, from the first of the node's places (`node_images`) that can
be read, as the embedding reads it; ``resolve_image``, which would download any URL, is never called. Knows no model.
"""

from __future__ import annotations

import copy
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any, Protocol

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from PIL import Image, ImageDraw, ImageFont

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.images import ImagePolicy, ImageSource, first_readable, opened_image
from mm_retriever.request import node_images
from mm_retriever.threads import in_threads


@dataclass(frozen=True)
class Query:
    """A text, an image, or both."""

    text: str
    image: Image.Image | None


@dataclass(frozen=True)
class Usage:
    """The cost of a reranking.

    Attributes:
        prefilled: tokens of prompts that were computed.
        generated: tokens that the model chose.
        passes: runs of the model or requests to the server.
        images: images that went through the vision tower.
        images_kept: images whose features were still in memory.
        seconds: wall clock.
    """

    prefilled: int = 0
    generated: int = 0
    passes: int = 0
    images: int = 0
    images_kept: int = 0
    seconds: float = 0.0


class Meter:
    """Counts the cost of one reranking, and limits its time."""

    def __init__(self, budget_s: float | None) -> None:
        self.prefilled = self.generated = self.passes = self.images = self.images_kept = 0
        self._started = time.monotonic()
        self._budget = budget_s

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return self.left() == 0

    def left(self) -> float | None:
        """The seconds left of the budget; None: no limit."""
        return None if self._budget is None else max(0.0, self._budget - (time.monotonic() - self._started))

    def stop(self) -> None:
        """End the ranking as if its time were up; callable from any thread."""
        self._budget = 0.0

    def usage(self) -> Usage:
        """The figures so far."""
        seconds = time.monotonic() - self._started
        return Usage(self.prefilled, self.generated, self.passes, self.images, self.images_kept, seconds)


class Scorer(Protocol):
    """A model that says how well each candidate fits a query."""

    @property
    def name(self) -> str:
        """The name in messages, events and reports."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether a score means the same in every list, from 0 (does not fit) to 1 (fits).

        Calibrated scores become the nodes' scores as they are; others only order a list and become softmax shares.
        """
        ...

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        """A score for each candidate, higher is better; None for one that was not judged.

        Args:
            query: has a text, an image, or both.
            candidates: at least one, in the order of retrieval; each has an image, or else a text.
            meter: counts tokens and passes; stop early, with None for the rest, when it is `out_of_time`.
        """
        ...


# ------------------------------------------------------------------------------------------ candidates

RETRIEVAL_SCORE = "retrieval_score"
RETRIEVAL_RANK = "retrieval_rank"
RERANK_RANK = "rerank_rank"
RERANK_MODEL_SCORE = "rerank_model_score"
RERANK_REASON = "rerank_reason"
RERANK_CAPTION = "rerank_caption"
RERANK_WANTED = "rerank_wanted"
RERANK_NOTE = "rerank_note"
RERANK_REPAIRS = "rerank_repairs"
METADATA_KEYS = (
    RETRIEVAL_SCORE,
    RETRIEVAL_RANK,
    RERANK_RANK,
    RERANK_MODEL_SCORE,
    RERANK_REASON,
    RERANK_CAPTION,
    RERANK_WANTED,
    RERANK_NOTE,
    RERANK_REPAIRS,
)

LONGEST_SIDE = 1344  # pixels that Phi-3 Vision sees at most (four crops): fifty large photographs must fit in memory
LONGEST_TEXT = 600  # characters of a text node that are shown
_CARD = 300  # pixels


@dataclass(frozen=True)
class Candidate:
    """A retrieved node as a model sees it: an image, else a text, else nothing, with a note that says why."""

    node: NodeWithScore
    image: Image.Image | None = None
    text: str = ""
    note: str = ""

    @property
    def missing(self) -> bool:
        """Whether there is nothing to show."""
        return self.image is None and not self.text

    def tile(self) -> Image.Image | None:
        """The candidate as an image for a sheet: a text becomes a card; None if there is nothing to show."""
        return self.image if self.image is not None or self.missing else text_card(self.text)


@dataclass(frozen=True)
class Ranking:
    """Candidates in their new order.

    Args:
        order: positions of all candidates as retrieved, best first.
        scores: one for each position; higher is better.
        model_scores: the model's own scores, by position.
        caption: the model's caption of the query image.
        wanted: the model's understanding of the query.
        reasons: why candidates fit, by position.
        notes: why candidates are last or were not judged, by position.
        repairs: what had to be repaired in the model's answer; empty if nothing.
    """

    order: Sequence[int]
    scores: Sequence[float | None]
    model_scores: dict[int, float] = field(default_factory=dict)
    caption: str = ""
    wanted: str = ""
    reasons: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    repairs: str = ""


def read_candidates(
    nodes: Sequence[NodeWithScore], policy: ImagePolicy, left: Callable[[], float | None] | None = None
) -> list[Candidate]:
    """Return the candidate of each node; one whose image cannot be read is missing, and no error is raised.

    Args:
        nodes: as retrieved.
        policy: which images may be read.
        left: returns the seconds left, or None without a limit.

    Raises:
        TimeoutError: the time was up before all images were read.
    """

    def read(node: NodeWithScore) -> Candidate:
        seconds = None if left is None else left()
        if seconds is None:
            return _read(node, policy)
        if seconds <= 0:
            raise TimeoutError
        return _read(node, replace(policy, url_timeout=min(policy.url_timeout, seconds)))

    return in_threads(read, nodes)


def ranked_nodes(candidates: Sequence[Candidate], ranking: Ranking, top_n: int) -> list[NodeWithScore]:
    """Return the best `top_n` as new nodes, with scores, ranks, reasons and notes in the metadata (`METADATA_KEYS`)."""
    nodes: list[NodeWithScore] = []
    for rank, position in enumerate(ranking.order[:top_n], start=1):
        given = candidates[position].node
        facts = {
            RETRIEVAL_SCORE: given.score,
            RETRIEVAL_RANK: position + 1,
            RERANK_RANK: rank,
            RERANK_MODEL_SCORE: ranking.model_scores.get(position),
            RERANK_REASON: ranking.reasons.get(position),
            RERANK_CAPTION: ranking.caption or None,
            RERANK_WANTED: ranking.wanted or None,
            RERANK_NOTE: candidates[position].note or ranking.notes.get(position),
            RERANK_REPAIRS: ranking.repairs or None,
        }
        nodes.append(NodeWithScore(node=_with_facts(given.node, facts), score=ranking.scores[position]))
    return nodes


def text_card(text: str, side: int = _CARD) -> Image.Image:
    """A text as an image, for sheets that show images."""
    card = Image.new("RGB", (side, side), "white")
    size = side // 15
    lines = textwrap.wrap(" ".join(text.split()), width=round(side / size * 1.7), max_lines=11, placeholder=" ...")
    # the number in the corner needs the first line's place
    at = (side // 20, side // 5)
    ImageDraw.Draw(card).multiline_text(at, "\n".join(lines), fill="black", font=ImageFont.load_default(size))
    return card


def _read(node: NodeWithScore, policy: ImagePolicy) -> Candidate:
    images = [image for image in node_images(node.node) if policy.allow_urls or "://" not in str(image)[:40]]
    if images:
        try:
            return Candidate(node, image=first_readable(images, partial(_small, policy=policy)))
        except ImageLoadError as error:
            return Candidate(node, note=one_line(error, 500))
    text = node.node.get_content(MetadataMode.NONE).strip()
    if not text:
        return Candidate(node, note=_nothing_to_show(node.node))
    return Candidate(node, text=text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ...")


def _nothing_to_show(node: BaseNode) -> str:
    if node_images(node):  # URLs, all of them
        return "its image is a URL, and fetching URLs is off; ImagePolicy(allow_urls=True) turns it on"
    return "it has neither an image nor a text"


def _small(source: ImageSource, policy: ImagePolicy) -> Image.Image:
    with opened_image(source, policy=policy) as image:
        return _shrunk(image)


def _shrunk(image: Image.Image) -> Image.Image:
    """A copy of the image, no larger than a model sees it."""
    if max(image.size) <= LONGEST_SIDE:
        return image.copy()
    scale = LONGEST_SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)


def _with_facts(node: BaseNode, facts: dict[str, Any]) -> BaseNode:
    """A copy whose metadata has the facts that are not None, hidden from embeddings and prompts."""
    metadata = {key: value for key, value in copy.deepcopy(node.metadata).items() if key not in METADATA_KEYS}
    metadata |= {key: value for key, value in facts.items() if value is not None}
    hidden = [key for key in METADATA_KEYS if key in metadata]
    return node.model_copy(
        update={
            "metadata": metadata,
            "relationships": dict(node.relationships),
            "excluded_embed_metadata_keys": list(dict.fromkeys([*node.excluded_embed_metadata_keys, *hidden])),
            "excluded_llm_metadata_keys": list(dict.fromkeys([*node.excluded_llm_metadata_keys, *hidden])),
        }
    )


# ------------------------------------------------------------------------------------------ orders and scores

RANK_CONSTANT = 60  # of reciprocal ranks, as in Cormack et al., SIGIR 2009
_LIMIT = 1e30


def windows(count: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of overlapping windows over a list of `count`, from its end to its beginning.

    Windows are `stride` apart: the best `size - stride` of each are in the next one too, so that the best of all reach
    the front. Source: RankGPT, arXiv:2304.09542.
    """
    end = count
    while True:
        start = max(0, end - size)
        yield start, end
        if start == 0:
            return
        end -= stride


def rank_scores(order: Sequence[int]) -> dict[int, float]:
    """Return the log of the reciprocal rank, 1 / (60 + rank), of each position in an order."""
    return {position: -math.log(RANK_CONSTANT + rank) for rank, position in enumerate(order, start=1)}


def fuse(model: Sequence[float], retrieval: Sequence[float | None], weight: float) -> list[float]:
    """Return model score + `weight` times retrieval score, each with mean 0 and deviation 1 over the list.

    Args:
        model: any numbers; see `finite`.
        retrieval: None and numbers that are not finite count as the lowest score.
        weight: of the retrieval score.
    """
    known = [score for score in retrieval if score is not None and math.isfinite(score)]
    least = min(known, default=0.0)
    prior = [finite(score if score is not None and math.isfinite(score) else least) for score in retrieval]
    own = _normalised([finite(value) for value in model])
    return [a + weight * b for a, b in zip(own, _normalised(prior), strict=True)]


def _normalised(values: Sequence[float]) -> list[float]:
    centre, scale = (fmean(values), pstdev(values)) if values else (0.0, 0.0)
    return [(value - centre) / scale if scale > 0 else 0.0 for value in values]


def best_first(values: Sequence[float | None], last: Sequence[bool]) -> list[int]:
    """Return all positions: by value, higher first; then those without a value; then those that `last` marks.

    Positions with equal values keep their order.
    """

    def key(position: int) -> tuple[bool, bool, float]:
        value = values[position]
        return last[position], value is None, -(value or 0.0)

    return sorted(range(len(values)), key=key)


def shares(values: Sequence[float | None], last: Sequence[bool]) -> list[float]:
    """Return the softmax of the values, together 1; 0 for positions without a value and those that `last` marks."""
    judged = [value for value, out in zip(values, last, strict=True) if value is not None and not out]
    top = max(judged, default=0.0)
    total = sum(math.exp(value - top) for value in judged) or 1.0
    return [
        0.0 if value is None or out else math.exp(value - top) / total for value, out in zip(values, last, strict=True)
    ]


def finite(value: float) -> float:
    """Return the value as a finite number; NaN becomes a very small one, so that it cannot break an order."""
    return -_LIMIT if math.isnan(value) else min(max(value, -_LIMIT), _LIMIT)
