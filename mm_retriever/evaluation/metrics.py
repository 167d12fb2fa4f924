"""Measures of rankings: recall, mAP, nDCG and others, with intervals, and differences of two runs.

    before = evaluate(run, wanted, ["Recall@1", "mAP@5"], references=references)
    after = evaluate(reranked, wanted, ["Recall@1", "mAP@5"], references=references)
    print(after.figures["Recall@1"], difference(before, after, "Recall@1"))

The values of each query come from ir-measures (`pip install "mm-retriever[evaluate]"`). Documents with equal scores are
ranked in the order of the run, and `Evaluation.tied` counts the queries with such scores.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mm_retriever.errors import QueryError, one_line

Run: TypeAlias = Mapping[str, Mapping[str, float]]
"""Scores of the documents that were found, by query; higher is better."""

Wanted: TypeAlias = Mapping[str, Mapping[str, int]]
"""Gains of the right documents, whole numbers above 0, by query. Only nDCG distinguishes gains."""

KEPT, REMOVED = "query image in the ranking", "query image removed"
"""The two ways of a ranking."""

RESAMPLES = 2_000
_MEASURES = {"Recall": "R", "Hit": "Success", "nDCG": "nDCG", "mAP": "AP", "R_subset": "R"}
_NAME = re.compile(r"(?P<kind>Recall|Hit|nDCG|mAP|R_subset)@(?P<depth>[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Figure:
    """A mean over queries, or a difference of two.

    Args:
        mean: over queries.
        low: lower end of the 95% bootstrap interval over queries, or over groups of them.
        high: its upper end.
        queries: their number.
    """

    mean: float
    low: float
    high: float
    queries: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Evaluation:
    """The measures of one run.

    Args:
        figures: by measure; "Recall@1" has the query image in the ranking, "Recall@1, query image removed" has not.
        values: (Q,) of each query, by measure.
        queries: their names, in that order.
        groups: the group of each query; queries of one group are drawn together.
        tied: queries with equal scores in their ranking.
    """

    figures: Mapping[str, Figure]
    values: Mapping[str, NDArray[np.float64]]
    queries: tuple[str, ...]
    groups: tuple[Hashable, ...]
    tied: int


def evaluate(
    run: Run,
    wanted: Wanted,
    measures: Sequence[str],
    *,
    references: Mapping[str, str] | None = None,
    subsets: Mapping[str, Collection[str]] | None = None,
    groups: Mapping[str, Hashable] | None = None,
) -> Evaluation:
    """Return the measures of a run.

    Args:
        run: scores of every query in `wanted`; {} for a query without results.
        wanted: the right documents, at least one for each query.
        measures: "Recall@k"; "Hit@k" (any right one among k); "mAP@k" (divided by the right ones or k, whichever is
            less, as CIRCO does it); "nDCG@k" (linear gains); "MRR"; "R_subset@k" (recall among the members of a subset
            alone, without the reference, as CIRR does it).
        references: the query image of each query that is itself a document. Every measure is then taken twice: with it
            in the ranking, and with it removed.
        subsets: members of the subset of each query, for "R_subset@k".
        groups: the group of each query, for queries that depend on each other, such as those for one product;
            intervals then draw groups.

    Raises:
        QueryError: an unknown measure, queries that do not match, no right document, or a score that is not a number.
    """
    _check(run, wanted)
    names = tuple(wanted)
    rankings = {query: ranked(run[query]) for query in names}
    ways: dict[str, Mapping[str, Sequence[str]]] = {"": rankings}
    if references is not None:
        _cover(names, references, "references")
        ways[f", {REMOVED}"] = _without(rankings, references, wanted)
    values: dict[str, NDArray[np.float64]] = {}
    for measure in measures:
        if measure.startswith("R_subset@"):
            _cover(names, subsets, "subsets")
            _cover(names, references, "references, which R_subset leaves out")
            values[measure] = query_values(_within(rankings, subsets or {}, references or {}), wanted, measure)
            continue
        for way, ranking in ways.items():
            values[measure + way] = query_values(ranking, wanted, measure)
    if groups is not None:
        _cover(names, groups, "groups")
    belongs = names if groups is None else tuple(groups[query] for query in names)
    figures = {measure: figure((value, belongs)) for measure, value in values.items()}
    return Evaluation(figures, values, names, belongs, tied=sum(_has_ties(run[query]) for query in names))


def difference(before: Evaluation, after: Evaluation, measure: str) -> Figure:
    """Return the mean gain of `after` over `before`, paired by query; its interval shows whether it may be chance.

    Raises:
        QueryError: the two were not evaluated on the same queries, or not by this measure.
    """
    if before.queries != after.queries or before.groups != after.groups:
        raise QueryError("the two runs were evaluated on different queries or groups: there are no pairs to compare")
    for evaluation in (before, after):
        if measure not in evaluation.values:
            raise QueryError(f"measure {measure!r} was not taken; there are {', '.join(evaluation.values)}")
    return figure((after.values[measure] - before.values[measure], after.groups))


def figure(*parts: tuple[NDArray[np.floating[Any]], Sequence[Hashable]], resamples: int = RESAMPLES) -> Figure:
    """Return the mean of values and its 95% interval, by a percentile bootstrap over groups (fixed seed).

    Args:
        parts: (Q,) values and the group of each; the mean of several parts is that of their means, and the same groups
            are drawn for all of them.
        resamples: number of draws.

    Raises:
        QueryError: there are no values, or not a group for each.
    """
    if not parts or any(not len(values) or len(values) != len(groups) for values, groups in parts):
        raise QueryError("give values, and the group of each: there are none, or not as many")
    names = sorted({group for _, groups in parts for group in groups}, key=lambda group: (str(type(group)), group))
    place = {group: number for number, group in enumerate(names)}
    drawn = np.random.default_rng(0).integers(len(names), size=(resamples, len(names)))
    resampled, mean = np.zeros(resamples), 0.0
    for values, groups in parts:
        rows = np.array([place[group] for group in groups])
        totals = np.bincount(rows, weights=values, minlength=len(names))
        counts = np.bincount(rows, minlength=len(names))
        with np.errstate(invalid="ignore"):  # a draw without any group of one part says nothing and is left out below
            resampled += totals[drawn].sum(1) / counts[drawn].sum(1) / len(parts)
        mean += float(totals.sum() / counts.sum()) / len(parts)
    low, high = np.nanpercentile(resampled, (2.5, 97.5))
    return Figure(mean, float(low), float(high), sum(len(values) for values, _ in parts))


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Return the documents best first, those with equal scores in the given order."""
    return sorted(scores, key=lambda document: -scores[document])


# ------------------------------------------------------------------------------------------ values


def query_values(rankings: Mapping[str, Sequence[str]], wanted: Wanted, measure: str) -> NDArray[np.float64]:
    """Return (Q,): one measure of each query in `wanted`.

    Args:
        rankings: documents of each query, best first; for "R_subset@k" those of its subset alone.
        wanted: the right documents of each query.
        measure: as of `evaluate`.

    Raises:
        QueryError: another measure, or ir-measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise QueryError('measures need ir-measures: pip install "mm-retriever[evaluate]"') from error

    match = _NAME.fullmatch(measure)
    if match is None and measure != "MRR":
        raise QueryError(f"measure {measure!r}: give Recall@k, Hit@k, mAP@k, nDCG@k, R_subset@k or MRR")
    name = "RR" if match is None else f"{_MEASURES[match['kind']]}@{match['depth']}"
    parsed = ir_measures.parse_measure(name)
    # ranks as scores, since trec_eval sorts equal scores by name; numbers as names, since it ends the process for a
    # name that is not valid Unicode, as a file may have
    numbers: defaultdict[str, str] = defaultdict(lambda: str(len(numbers)))
    scores = {
        numbers[query]: {numbers[document]: float(-rank) for rank, document in enumerate(ranking)}
        for query, ranking in rankings.items()
    }
    qrels = {
        numbers[query]: {numbers[document]: int(gain) for document, gain in gains.items()}
        for query, gains in wanted.items()
    }
    computed = {metric.query_id: float(metric.value) for metric in ir_measures.iter_calc([parsed], qrels, scores)}
    values = np.array([computed.get(numbers[query], 0.0) for query in wanted])  # a query without results is not in it
    if match is not None and match["kind"] == "mAP":
        right = np.array([len(gains) for gains in wanted.values()])
        values = values * right / np.minimum(right, int(match["depth"]))
    return values


def _without(
    rankings: Mapping[str, Sequence[str]], references: Mapping[str, str], wanted: Wanted
) -> dict[str, list[str]]:
    if both := [query for query in wanted if references[query] in wanted[query]]:
        raise QueryError(f"the reference of {_first(both)} is one of its right documents and cannot be removed")
    return {query: [name for name in ranking if name != references[query]] for query, ranking in rankings.items()}


def _within(
    rankings: Mapping[str, Sequence[str]], subsets: Mapping[str, Collection[str]], references: Mapping[str, str]
) -> dict[str, list[str]]:
    members = {query: set(subsets[query]) - {references.get(query)} for query in rankings}
    return {query: [name for name in ranking if name in members[query]] for query, ranking in rankings.items()}


def _has_ties(scores: Mapping[str, float]) -> bool:
    return len(set(scores.values())) < len(scores)


# ------------------------------------------------------------------------------------------ what is refused


def _check(run: Run, wanted: Wanted) -> None:
    if not wanted:
        raise QueryError("no queries: there is nothing to evaluate")
    _cover(wanted, run, "the run")
    if unknown := [query for query in run if query not in wanted]:
        raise QueryError(f"the run has {len(unknown)} queries without right documents, such as {_first(unknown)}")
    for query, gains in wanted.items():
        if not gains or any(isinstance(gain, bool) or int(gain) != gain or gain < 1 for gain in gains.values()):
            raise QueryError(f"query {_first([query])}: give right documents, each with a whole number above 0")
        if not all(math.isfinite(score) for score in run[query].values()):
            raise QueryError(f"query {_first([query])}: a score is NaN or infinite")


def _cover(queries: Iterable[str], given: Mapping[str, Any] | None, what: str) -> None:
    if missing := [query for query in queries if given is None or query not in given]:
        raise QueryError(f"{what}: {len(missing)} queries are missing, such as {_first(missing)}")


def _first(queries: Sequence[str]) -> str:
    return repr(one_line(queries[0], 80))
