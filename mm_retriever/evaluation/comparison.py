"""Figures of runs side by side, what one has over another, and the fusion weight that suits a reranker.

Every figure is a mean over queries with its 95% bootstrap interval; every difference is paired, query by query. Of a
data set of several parts it is the mean of their means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import EvaluationSet
from mm_retriever.evaluation.metrics import Figure, figure, query_values
from mm_retriever.evaluation.runs import PartRun, Run, main_way

FEWEST = 20
"""Queries that are needed to choose a weight on one half of them and to say something on the other."""

Values = list[NDArray[np.float64]]
"""(Q,) of one measure, for each part."""


@dataclass(frozen=True)
class Difference:
    """What one run has over another, in one way, by the first measure of the data set."""

    before: str
    after: str
    way: str
    measure: str
    figure: Figure

    @property
    def verdict(self) -> str:
        """Whether the interval leaves a doubt."""
        if self.figure.low > 0:
            return "better"
        return "worse" if self.figure.high < 0 else "no difference shown"

    def __str__(self) -> str:
        gain = self.figure
        words = {"better": "makes it better", "worse": "makes it worse"}.get(self.verdict, "shows no difference")
        span = f"{gain.mean:+.3f} (95% {gain.low:+.3f} to {gain.high:+.3f}, {gain.queries} queries)"
        return f"{self.after} {words} than {self.before}: {self.measure} {span}, {self.way}".replace(
            f"difference than {self.before}", f"difference from {self.before}"
        )


@dataclass(frozen=True)
class Fusion:
    """A fusion weight that was chosen on one half of the queries, and what it reaches on the other.

    Args:
        run: the run whose reranker it is for.
        way: of its rankings.
        measure: by which it was chosen.
        weight: the best one.
        chosen_on: queries that chose it.
        retrieval: the figure of retrieval alone on the other half.
        model: of the reranker's scores alone, weight 0.
        fused: of both with the weight.
        gain: of `fused` over `retrieval`.
    """

    run: str
    way: str
    measure: str
    weight: float
    chosen_on: int
    retrieval: Figure
    model: Figure
    fused: Figure
    gain: Figure

    def __str__(self) -> str:
        gain = self.gain
        return (
            f"{self.run}: fusion weight {self.weight:g}, chosen on {self.chosen_on} queries; on the other "
            f"{self.fused.queries}: {self.measure} {self.fused}, retrieval alone {self.retrieval}, reranker alone "
            f"{self.model}; gain {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), {self.way}"
        )


def run_values(run: Run, way: str) -> dict[str, Values]:
    """Return the values of every query by every measure of the data set."""
    measures = run.parts[0].data.measures
    return {measure: [part_values(part, way, measure) for part in run.parts] for measure in measures}


def part_values(
    part: PartRun, way: str, measure: str, rankings: Mapping[str, Sequence[str]] | None = None
) -> NDArray[np.float64]:
    """Return (Q,): one measure of the queries of a part.

    Args:
        part: of a run.
        way: of its rankings.
        measure: one that `metrics.evaluate` knows; of a data set with a single target that recall counts, recall is
            that target's.
        rankings: others than the part's own, of the same queries.
    """
    ranked: Mapping[str, Sequence[str]] = part.rankings[way] if rankings is None else rankings
    queries = part.data.queries
    if measure.startswith("R_subset@"):  # always without the query image, as CIRR has it
        members = {query.id: set(query.subset) - {query.image} for query in queries}
        ranked = {id_: [name for name in ranking if name in members[id_]] for id_, ranking in ranked.items()}
    wanted = {
        query.id: dict.fromkeys(
            (query.recall_target,) if query.recall_target and measure.startswith("Recall@") else query.targets, 1
        )
        for query in queries
    }
    return query_values(ranked, wanted, measure)


def mean_figure(values: Values) -> Figure:
    """Return the mean over queries of each part, and over parts; queries with the same number are no pairs."""
    return figure(*((part, [(number, row) for row in range(len(part))]) for number, part in enumerate(values)))


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Return what each reranker has over its own retrieval, and each other model and prompt over the first one."""
    alone = {(run.model, run.prompt): run for run in runs if not run.rerank}
    made: list[Difference] = []
    for run in runs:
        before = alone[run.model, run.prompt] if run.rerank else runs[0]
        if before is not run:
            made += [difference_of(before, run, way) for way in run.ways]
    return made


def difference_of(before: Run, after: Run, way: str) -> Difference:
    """Return what `after` has over `before`, by the first measure of the data set."""
    measure = after.parts[0].data.measures[0]
    pairs = zip(before.parts, after.parts, strict=True)
    gains = [part_values(new, way, measure) - part_values(old, way, measure) for old, new in pairs]
    return Difference(before.name, after.name, way, measure, mean_figure(gains))


# ------------------------------------------------------------------------------------------ the fusion weight


def check_halves(data: Sequence[EvaluationSet]) -> None:
    """Refuse to choose a weight on queries that are too few.

    Raises:
        QueryError: says how many there are.
    """
    count = sum(len(part.queries) for part in data)
    if count < FEWEST:
        raise QueryError(f"fusion weights are chosen on one half of the queries: {count} are too few, give {FEWEST}")


def chosen_weight(run: Run, retrieval: Run, weights: Sequence[float]) -> Fusion:
    """Return the weight of the retrieval score that is best on one half, with its figures on the other.

    Queries are halved by chance (fixed seed), part by part. Of weights that are equally good the smallest is taken.

    Args:
        run: of a reranker.
        retrieval: the same run before it.
        weights: at least one; 0 leaves the retrieval score out.
    """
    data = [part.data for part in run.parts]
    way, measure = main_way(data), data[0].measures[0]
    by_weight = {
        weight: [part_values(part, way, measure, fused_rankings(part, way, weight)) for part in run.parts]
        for weight in sorted({0.0, *weights})
    }
    first = [_first_half(len(part.queries)) for part in data]

    def worth(weight: float) -> float:
        halves = [values[half] for values, half in zip(by_weight[weight], first, strict=True)]
        return float(np.mean([half.mean() for half in halves if len(half)]))

    best = max(sorted(set(weights)), key=worth)

    def other(values: Values) -> Values:
        halves = [part[~half] for part, half in zip(values, first, strict=True)]
        return [half for half in halves if len(half)]

    before = other([part_values(part, way, measure) for part in retrieval.parts])
    after = other(by_weight[best])
    return Fusion(
        run=run.name,
        way=way,
        measure=measure,
        weight=best,
        chosen_on=int(sum(half.sum() for half in first)),
        retrieval=mean_figure(before),
        model=mean_figure(other(by_weight[0.0])),
        fused=mean_figure(after),
        gain=mean_figure([new - old for new, old in zip(after, before, strict=True)]),
    )


def fused_rankings(part: PartRun, way: str, weight: float) -> dict[str, list[str]]:
    """Return the rankings that a reranker with this `fusion_weight` would have made; it is not asked again."""
    from mm_retriever.rerank.scorer import best_first, fuse

    rankings = {}
    for id_, judged in part.judged[way].items():
        scores, ranking = part.found[way][id_], part.rankings[way][id_]
        names = [name for name in scores if name in judged]  # in the order of retrieval
        values: list[float | None] = [judged[name] for name in names]
        known = [place for place, value in enumerate(values) if value is not None]
        own = [value for value in values if value is not None]
        fused = fuse(own, [scores[names[place]] for place in known], weight)
        for place, value in zip(known, fused, strict=True):
            values[place] = value
        order = best_first(values, [False] * len(names))
        rankings[id_] = [*(names[place] for place in order), *(name for name in ranking if name not in judged)]
    return rankings


def _first_half(count: int) -> NDArray[np.bool_]:
    half = np.zeros(count, dtype=bool)
    half[np.random.default_rng(0).permutation(count)[: (count + 1) // 2]] = True
    return half
