"""Figures of runs, differences between runs, and the best fusion weight of a reranker.

Every figure is a mean over queries with its 95% bootstrap interval; every difference is paired, query by query. For a
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
"""The least number of queries for choosing a weight on one half of them and measuring it on the other."""

Values = list[NDArray[np.float64]]
"""(Q,) of one measure, for each part."""


@dataclass(frozen=True)
class Difference:
    """The difference of two runs, for one way of ranking, by the first measure of the data set."""

    before: str
    after: str
    way: str
    measure: str
    figure: Figure

    @property
    def verdict(self) -> str:
        """Whether the interval excludes 0: "better", "worse", or else "no difference shown"."""
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
    """A fusion weight chosen on one half of the queries, and its figures on the other half.

    Args:
        run: the run of the reranker.
        way: of its rankings.
        measure: by which the weight was chosen.
        weight: the best one.
        chosen_on: number of queries in the first half.
        retrieval: the figure of retrieval alone.
        model: the figure of the reranker's scores alone, with weight 0.
        fused: the figure of both with the weight.
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
        measure: of `metrics.evaluate`; if a data set names a single target for recall, recall counts only that one.
        rankings: of the same queries; default: the part's own.
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
    """Return the mean over parts of the mean over their queries; queries of different parts are not paired."""
    return figure(*((part, [(number, row) for row in range(len(part))]) for number, part in enumerate(values)))


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Return the differences of each reranker from its retrieval, and of each model and prompt from the first."""
    alone = {(run.model, run.prompt): run for run in runs if not run.rerank}
    all_differences: list[Difference] = []
    for run in runs:
        before = alone[run.model, run.prompt] if run.rerank else runs[0]
        if before is not run:
            all_differences += [difference_of(before, run, way) for way in run.ways]
    return all_differences


def difference_of(before: Run, after: Run, way: str) -> Difference:
    """Return the gain of `after` over `before`, by the first measure of the data set."""
    measure = after.parts[0].data.measures[0]
    pairs = zip(before.parts, after.parts, strict=True)
    gains = [part_values(new, way, measure) - part_values(old, way, measure) for old, new in pairs]
    return Difference(before.name, after.name, way, measure, mean_figure(gains))


# ------------------------------------------------------------------------------------------ the fusion weight


def check_halves(data: Sequence[EvaluationSet]) -> None:
    """Refuse to choose a weight on too few queries.

    Raises:
        QueryError: there are fewer than `FEWEST`.
    """
    count = sum(len(part.queries) for part in data)
    if count < FEWEST:
        raise QueryError(f"fusion weights are chosen on one half of the queries: {count} are too few, give {FEWEST}")


def chosen_weight(run: Run, retrieval: Run, weights: Sequence[float]) -> Fusion:
    """Return the weight of the retrieval score that is best on one half, with its figures on the other.

    Queries are halved at random (fixed seed), part by part. Of equally good weights the smallest wins.

    Args:
        run: of a reranker.
        retrieval: the same run without the reranker.
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
    """Return the rankings of a reranker with this `fusion_weight`, computed from its stored scores."""
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
