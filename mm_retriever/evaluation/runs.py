"""Runs over a data set: retrieval by a model, reranking, and the cost of an answer.

The search is exact: inner products with every image of the gallery. Each ranking is kept in both ways, with the query
image in it and with the query image removed; the two are never mixed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mm_retriever.errors import RerankError, one_line
from mm_retriever.evaluation.datasets import EvaluationQuery, EvaluationSet
from mm_retriever.evaluation.metrics import KEPT, REMOVED

if TYPE_CHECKING:
    from mm_retriever.embedding import ComposedEmbedding
    from mm_retriever.rerank.reranker import Reranker


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 2**20


@dataclass
class Cost:
    """The cost of the queries of a run.

    Attributes:
        embedding: seconds of each timed query, embedded alone and without a cache.
        searching: seconds of each part's search, divided by its number of queries.
        reranking: seconds of each query.
        tokens: tokens of each query that a reranker read and wrote.
        peak_mib: peak memory of this process; 0 if the system does not report it.
        gpu_peak_mib: peak memory of the GPU.
    """

    embedding: list[float] = field(default_factory=list)
    searching: list[float] = field(default_factory=list)
    reranking: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_mib: int = 0
    gpu_peak_mib: int = 0

    @property
    def seconds(self) -> float:
        """Seconds for one query: the sum of the medians of its steps."""
        return sum(median(step) for step in (self.embedding, self.searching, self.reranking) if step)

    @property
    def tokens_a_query(self) -> float:
        """The mean tokens of a query."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    @contextmanager
    def peak(self) -> Iterator[None]:
        """Record the peak memory of a block."""
        cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
        gpu = cuda is not None and cuda.is_available()
        with suppress(OSError):
            _RESET.write_text("5", encoding="ascii")  # resets the peak to the current memory
        if gpu:
            cuda.reset_peak_memory_stats()
        yield
        self.peak_mib = max(self.peak_mib, _peak_mib())
        if gpu:
            self.gpu_peak_mib = max(self.gpu_peak_mib, cuda.max_memory_allocated() // _MIB)


def _peak_mib() -> int:
    """The peak memory of this process, on Linux since the reset, elsewhere since its start."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) // 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    height = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return height // _MIB if sys.platform == "darwin" else height // 1024


DEPTH = 100
TIMED = 16  # queries that are embedded one by one for timing
_BLOCK = 256

Scores = dict[str, float]
"""Scores of the images that were found, best first."""


@dataclass
class PartRun:
    """The rankings of a run for one part of a data set.

    Attributes:
        data: the part.
        found: scores as retrieved, by way and query.
        rankings: images best first, by way and query.
        judged: a reranker's own scores, by way, query and image; None: not judged.
        tied: number of queries with equal scores among their images.
    """

    data: EvaluationSet
    found: dict[str, dict[str, Scores]]
    rankings: dict[str, dict[str, list[str]]]
    judged: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    tied: int = 0


@dataclass
class Run:
    """One model with one prompt, reranked or not.

    Attributes:
        model: its name.
        prompt: the template of the query's text, "{text}" for the words as they are.
        rerank: the name of the reranker; "" without one.
        parts: of the data set.
        cost: of its queries.
        failures: queries that a reranker left as retrieved, with its reason.
    """

    model: str
    prompt: str
    parts: list[PartRun]
    cost: Cost
    rerank: str = ""
    failures: list[tuple[str, str]] = field(default_factory=list)
    prompted: bool = False

    @property
    def name(self) -> str:
        """The name for tables."""
        prompt = f" {self.prompt!r}" if self.prompted else ""
        return f"{self.model}{prompt}" + (f" + {self.rerank}" if self.rerank else "")

    def follows(self, other: Run) -> bool:
        """Whether it is a reranking of the other run."""
        return bool(self.rerank) and (self.model, self.prompt) == (other.model, other.prompt)

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways of its rankings."""
        return tuple(self.parts[0].rankings)


def ways_of(data: Sequence[EvaluationSet]) -> tuple[str, ...]:
    """Return both ways if any query image lies in the gallery, else the first: the two would be the same."""
    galleries = [set(part.gallery) for part in data]
    both = any(
        query.image in (query.among or gallery)
        for part, gallery in zip(data, galleries, strict=True)
        for query in part.queries
        if query.image
    )
    return (KEPT, REMOVED) if both else (KEPT,)


def main_way(data: Sequence[EvaluationSet]) -> str:
    """Return the way of the data set's published figures."""
    return REMOVED if data[0].removed and REMOVED in ways_of(data) else KEPT


# ------------------------------------------------------------------------------------------ retrieval


def model_runs(
    model: ComposedEmbedding, data: Sequence[EvaluationSet], prompts: Sequence[str], *, show_progress: bool = False
) -> list[Run]:
    """Return the runs of a model, one for each prompt; the gallery is embedded once.

    Args:
        model: loaded; with a `cache_dir` every content is embedded once.
        data: the parts of a data set.
        prompts: as of `EvaluationQuery.asked`.
        show_progress: draw progress bars.

    Raises:
        ImageLoadError: names the first image that cannot be read.
    """
    galleries = [gallery_vectors(model, part, show_progress=show_progress) for part in data]
    runs: list[Run] = []
    for prompt in prompts:
        cost = Cost()
        parts: list[PartRun] = []
        with cost.peak():
            for part, gallery in zip(data, galleries, strict=True):
                queries = query_vectors(model, part, prompt, show_progress=show_progress)
                started = time.perf_counter()
                parts.append(retrieved(part, gallery, queries, ways_of(data)))
                cost.searching.append((time.perf_counter() - started) / len(part.queries))
            cost.embedding += _timed(model, data[0], prompt)
        runs.append(Run(model.model_name, prompt, parts, cost, prompted=len(prompts) > 1))
    return runs


def gallery_vectors(
    model: ComposedEmbedding, data: EvaluationSet, *, show_progress: bool = False
) -> NDArray[np.float32]:
    """Return (G, D): the vectors of the gallery."""
    return model.embed(images=[data.source(name) for name in data.gallery], show_progress=show_progress)


def query_vectors(
    model: ComposedEmbedding,
    data: EvaluationSet,
    prompt: str = "{text}",
    *,
    use: str = "both",
    show_progress: bool = False,
) -> NDArray[np.float32]:
    """Return (Q, D): the vectors of the queries.

    Args:
        model: loaded.
        data: a part of a data set.
        prompt: as of `EvaluationQuery.asked`.
        use: "both", "text" or "image": the part of a query with both that is used.
        show_progress: draw a progress bar.
    """
    pairs = [_parts_of(query, data, prompt, use) for query in data.queries]
    texts, images = zip(*pairs, strict=True)
    return model.embed(texts, images, query=True, show_progress=show_progress)


def _parts_of(query: EvaluationQuery, data: EvaluationSet, prompt: str, use: str) -> tuple[str | None, str | None]:
    words, image = query.words["text"], query.image
    text = query.asked(prompt) if words and (use != "image" or not image) else None
    return text, data.source(image) if image and (use != "text" or not words) else None


def _timed(model: ComposedEmbedding, data: EvaluationSet, prompt: str) -> list[float]:
    """The seconds of some queries as a user sees them: one by one, reading the image, without a cache."""
    from mm_retriever.embedding import Request

    seconds = []
    for query in data.queries[:TIMED]:
        request = Request(*_parts_of(query, data, prompt, "both"))
        started = time.perf_counter()
        content = request.content(model.prepare_image, model.image_policy)
        model.embedder.encode([content], query=True)
        seconds.append(time.perf_counter() - started)
    return seconds


def retrieved(
    data: EvaluationSet, gallery: NDArray[np.float32], queries: NDArray[np.float32], ways: Sequence[str]
) -> PartRun:
    """Return the nearest 100 images of each query, those with equal scores in the order of the gallery.

    The members of a query's subset follow, best first, so that they can be ranked among themselves.

    Args:
        data: a part of a data set.
        gallery: (G, D) of its gallery.
        queries: (Q, D) of its queries.
        ways: of `ways_of`.
    """
    by_way: dict[str, dict[str, Scores]] = {way: {} for way in ways}
    places, tied = {name: row for row, name in enumerate(data.gallery)}, 0
    for query, (scores, order) in zip(data.queries, ranked_rows(queries, gallery), strict=True):
        if query.among:
            order = order[np.isin(order, [places[name] for name in query.among])]
        best = {data.gallery[row]: float(scores[row]) for row in order[: DEPTH + 1]}
        members = sorted(set(query.subset) - best.keys(), key=lambda name: (-scores[places[name]], places[name]))
        for way in ways:
            kept = {name: score for name, score in best.items() if way == KEPT or name != query.image}
            kept = dict(list(kept.items())[:DEPTH])
            kept |= {name: float(scores[places[name]]) for name in members if way == KEPT or name != query.image}
            by_way[way][query.id] = kept
        tied += len(set(best.values())) < len(best)
    rankings = {way: {id_: list(scores) for id_, scores in by_query.items()} for way, by_query in by_way.items()}
    return PartRun(data, by_way, rankings, tied=tied)


def ranked_rows(
    queries: NDArray[np.float32], gallery: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.intp]]]:
    """Yield for each query its scores (G,) and the rows of the gallery, best first; of equal scores the first row.

    Scores are computed block by block, since all of them may not fit in memory.

    Args:
        queries: (Q, D).
        gallery: (G, D).
    """
    for start in range(0, len(queries), _BLOCK):
        for scores in queries[start : start + _BLOCK] @ gallery.T:
            yield scores, np.argsort(-scores, kind="stable")


# ------------------------------------------------------------------------------------------ reranking


def reranked(run: Run, ranker: Reranker, name: str, depth: int) -> Run:
    """Return the run with the first `depth` images of every ranking in the order of a reranker.

    If it fails, the order of retrieval stays, and `Run.failures` has the reason. A ranking with the same beginning in
    both ways is reranked once.

    Args:
        run: of a model alone.
        ranker: with a `top_n` of at least `depth`, and ``on_error="keep_order"``.
        name: of the reranker, for tables.
        depth: number of images of each ranking that are reranked.

    Raises:
        RerankError: it failed for every query.
    """
    done = Run(run.model, run.prompt, [], Cost(), name, prompted=run.prompted)
    done.cost.embedding, done.cost.searching = run.cost.embedding, run.cost.searching
    with done.cost.peak():
        for part in run.parts:
            done.parts.append(_reranked_part(part, run.prompt, ranker, depth, done))
    queries = sum(len(part.data.queries) for part in run.parts)
    if len({id_ for id_, _ in done.failures}) == queries:
        raise RerankError(f"{name!r} ranked for none of {queries} queries: {one_line(done.failures[0][1], 300)}")
    return done


def _reranked_part(part: PartRun, prompt: str, ranker: Reranker, depth: int, run: Run) -> PartRun:
    rankings: dict[str, dict[str, list[str]]] = {way: {} for way in part.rankings}
    judged: dict[str, dict[str, dict[str, float | None]]] = {way: {} for way in part.rankings}
    for query in part.data.queries:
        known: dict[tuple[str, ...], tuple[list[str], dict[str, float | None]]] = {}
        for way, by_query in part.rankings.items():
            ranking = by_query[query.id]
            first = tuple(ranking[:depth])
            if first not in known:
                known[first] = _ranked(query, part, first, part.found[way][query.id], prompt, ranker, run)
            order, judged[way][query.id] = known[first]
            rankings[way][query.id] = [*order, *ranking[len(first) :]]
    return PartRun(part.data, part.found, rankings, judged, part.tied)


def _ranked(
    query: EvaluationQuery,
    part: PartRun,
    names: Sequence[str],
    scores: Mapping[str, float],
    prompt: str,
    ranker: Reranker,
    run: Run,
) -> tuple[list[str], dict[str, float | None]]:
    from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle

    from mm_retriever.rerank.scorer import RERANK_MODEL_SCORE

    nodes = [
        NodeWithScore(node=ImageNode(id_=name, image_path=part.data.source(name)), score=scores[name]) for name in names
    ]
    text, image = _parts_of(query, part.data, prompt, "both")
    result = ranker.rerank(nodes, QueryBundle(text or "", image_path=image))
    run.cost.reranking.append(result.usage.seconds)
    run.cost.tokens.append(result.usage.prefilled + result.usage.generated)
    if result.error:
        run.failures.append((f"{part.data.name}, {query.id}", result.error))
        return list(names), {}
    own = {node.node.node_id: node.node.metadata.get(RERANK_MODEL_SCORE) for node in result.nodes}
    return [names[position] for position in result.order], {name: own.get(name) for name in names}
