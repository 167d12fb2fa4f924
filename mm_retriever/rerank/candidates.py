"""Nodes in, nodes out: what a reranker sees of a node, and the node that comes back.

An image is read by `opened_image` under an `ImagePolicy`, from the first of the node's places (`node_images`) that can
be read, as the embedding reads it; ``resolve_image``, which would download any URL, is never called. Nodes that come
back are copies. Knows nothing of models and of ranking.
"""

from __future__ import annotations

import copy
import os
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from PIL import Image, ImageDraw, ImageFont

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.images import ImagePolicy, ImageSource, first_readable, opened_image
from mm_retriever.request import node_images

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
_READERS = min(4, os.cpu_count() or 1)  # threads that decode images; the decoders release the GIL


@dataclass(frozen=True)
class Candidate:
    """A retrieved node as a model sees it: an image, or else a text, or else missing, with a note that says why."""

    node: NodeWithScore
    image: Image.Image | None = None
    text: str = ""
    note: str = ""

    @property
    def missing(self) -> bool:
        """Whether there is nothing to show."""
        return self.image is None and not self.text

    def tile(self) -> Image.Image | None:
        """What stands for the candidate on a sheet of images: text is written on a card."""
        return self.image if self.image is not None or self.missing else text_card(self.text)


@dataclass(frozen=True)
class Ranking:
    """Candidates in their new order.

    Args:
        order: positions of all candidates as retrieved, best first.
        scores: of every position; higher is better.
        model_scores: what the model alone gave each position, where it did.
        caption: what the model sees in the query image.
        wanted: what it takes the query to want.
        reasons: by position.
        notes: by position: why one is last or was not judged.
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
    """What can be seen of each node. Nothing is raised for an image that cannot be read: the candidate is missing.

    Args:
        nodes: as retrieved.
        policy: which images may be read.
        left: how many seconds are left, None for as many as it takes; when there are none, reading ends.

    Raises:
        TimeoutError: there was no time for all of them.
    """

    def read(node: NodeWithScore) -> Candidate:
        seconds = None if left is None else left()
        if seconds is None:
            return _read(node, policy)
        if seconds <= 0:
            raise TimeoutError
        return _read(node, replace(policy, url_timeout=min(policy.url_timeout, seconds)))

    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-image") as readers:
        return list(readers.map(read, nodes))


def ranked_nodes(candidates: Sequence[Candidate], ranking: Ranking, top_n: int) -> list[NodeWithScore]:
    """The best `top_n` as new nodes; scores, ranks, reasons and notes are in their metadata under `METADATA_KEYS`."""
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
    """The image, no larger than a model sees it."""
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
