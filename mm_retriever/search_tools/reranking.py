"""Reranking of results that were shown already, for hosts that rank on request.

Owns which results may be ranked, and the facts about each. Every given result comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_index.core.schema import NodeWithScore

from mm_retriever.errors import QueryError, one_line
from mm_retriever.images import ImageSource
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.rerank.scorer import RERANK_MODEL_SCORE, RERANK_NOTE, RERANK_REASON, Meter
from mm_retriever.search_tools.arguments import read_text
from mm_retriever.search_tools.image_search import ImageSearch
from mm_retriever.search_tools.results import without_folders
from mm_retriever.store import ImageStore


@dataclass(frozen=True)
class RerankedResult:
    """One result at its new rank.

    Attributes:
        id: in the store.
        score: the model's; None: it was not judged, or the model gives no scores.
        reason: in the model's words; "" if it gives none.
        note: why it was not judged.
    """

    id: str
    score: float | None = None
    reason: str = ""
    note: str = ""


def rerank_results(
    search: ImageSearch,
    store: ImageStore,
    reranker: Reranker,
    ids: Sequence[str],
    scores: Sequence[float | None] = (),
    *,
    text: str = "",
    image: str | None = None,
    meter: Meter | None = None,
) -> list[RerankedResult]:
    """Return all given results of a search in the order of a reranker, best first.

    Args:
        search: reads the image argument, with its limits.
        store: of the search.
        reranker: the model; results beyond its `top_n` follow after the others.
        ids: of the results, each once, in their former order.
        scores: of the results, in that order, for a reranker that is fused with the retrieval; none: it ranks alone.
        text: of the query.
        image: of the query, an image argument of the search.
        meter: counts the usage, and can stop the reranker.

    Raises:
        QueryError: an id is not in the store or occurs twice, the numbers of scores and ids differ, or there is neither
            a text nor an image.
        ImageLoadError: the query image cannot or must not be read.
        RerankError: the model gave no ranking.
    """
    words = read_text(text, "text", most=search.limits.query_text)
    if not words and not image:
        raise QueryError("nothing to rank by: a reranker sees the words and the image of a query; give text or image")
    if len(set(ids)) < len(ids) or (scores and len(scores) != len(ids)):
        raise QueryError(f"{len(ids)} ids and {len(scores)} scores: give each id once, and no scores or one for each")
    query_image: ImageSource | None = search.named(image).read(bytes) if image else None
    stored = {node.node_id: node for node in store.get_nodes(list(ids))}
    if missing := [id_ for id_ in ids if id_ not in stored]:
        raise QueryError(f"there is no image of the id {one_line(missing[0], 80)!r} in the store: search again")
    before = scores or [None] * len(ids)
    nodes = [NodeWithScore(node=stored[id_], score=score) for id_, score in zip(ids, before, strict=True)]
    ranked = reranker.rerank(nodes, words, query_image=query_image, meter=meter)
    known = {scored.node.node_id: scored.node.metadata for scored in ranked.nodes}
    results = []
    for position in ranked.order:
        id_ = nodes[position].node.node_id
        facts = known.get(id_, {})
        score = facts.get(RERANK_MODEL_SCORE)
        results.append(
            RerankedResult(
                id_,
                score=score if isinstance(score, float) else None,
                reason=one_line(facts.get(RERANK_REASON, ""), search.limits.long_text),
                note=without_folders(one_line(facts.get(RERANK_NOTE) or ranked.error, 300)),
            )
        )
    return results
