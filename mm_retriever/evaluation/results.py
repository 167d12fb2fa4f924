"""The results of an evaluation: figures, differences, costs, the worst queries; and submissions for test splits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.comparison import (
    Difference,
    Fusion,
    chosen_weight,
    differences,
    mean_figure,
    part_values,
    run_values,
)
from mm_retriever.evaluation.datasets import EvaluationQuery, EvaluationSet
from mm_retriever.evaluation.metrics import Figure
from mm_retriever.evaluation.runs import Run, main_way
from mm_retriever.files import write_atomically

SHOWN = 5
"""Images of each run that are listed for one of the worst queries."""


@dataclass(frozen=True)
class WorstQuery:
    """A query with a low mean over runs.

    Args:
        data: its part of the data set.
        query: the query.
        worth: the mean of its measure over runs.
        wanted: the right images, with their rank in each run; None: not found.
        found: the first images of each run, and whether they are right.
    """

    data: EvaluationSet
    query: EvaluationQuery
    worth: float
    wanted: tuple[tuple[str, dict[str, int | None]], ...]
    found: dict[str, tuple[tuple[str, bool], ...]]

    @property
    def answers(self) -> tuple[tuple[str, bool], ...]:
        """The right images, in the form of `found`."""
        return tuple((name, True) for name, _ in self.wanted)


@dataclass(frozen=True)
class Results:
    """The results of runs over a data set.

    Args:
        data: the parts of the data set.
        runs: of models alone, and of rerankers after them.
        figures: by way, run and measure; empty if the answers are not published.
        differences: between runs.
        fusions: the chosen weights.
        notes: on what was left out or failed.
    """

    data: Sequence[EvaluationSet]
    runs: Sequence[Run]
    figures: dict[str, dict[str, dict[str, Figure]]]
    differences: Sequence[Difference]
    fusions: Sequence[Fusion]
    notes: Sequence[str]

    @property
    def way(self) -> str:
        """The way of the data set's published figures."""
        return main_way(self.data)

    @property
    def measure(self) -> str:
        """The first measure of the data set."""
        return self.data[0].measures[0]

    def worst(self, count: int) -> list[WorstQuery]:
        """Return the queries with the lowest mean over runs of the first measure."""
        ranked: list[tuple[float, int, int]] = []
        for number in range(len(self.data)):
            values = np.mean([part_values(run.parts[number], self.way, self.measure) for run in self.runs], axis=0)
            ranked += [(float(value), number, row) for row, value in enumerate(values)]
        return [
            self._worst(number, self.data[number].queries[row], value) for value, number, row in sorted(ranked)[:count]
        ]

    def _worst(self, number: int, query: EvaluationQuery, value: float) -> WorstQuery:
        rankings = {run.name: run.parts[number].rankings[self.way][query.id] for run in self.runs}
        wanted = tuple(
            (name, {run: ranking.index(name) + 1 if name in ranking else None for run, ranking in rankings.items()})
            for name in query.targets
        )
        top = {
            run: tuple((name, name in query.targets) for name in ranking[:SHOWN]) for run, ranking in rankings.items()
        }
        return WorstQuery(self.data[number], query, value, wanted, top)

    def to_dict(self, worst: int = 12) -> dict[str, Any]:
        """Return the results as JSON takes them.

        Args:
            worst: number of worst queries.
        """
        parts = [
            {"name": part.name, "queries": len(part.queries), "images": len(part.gallery), "labelled": part.labelled}
            for part in self.data
        ]
        figures = {
            way: {run: {name: asdict(figure) for name, figure in measures.items()} for run, measures in by_run.items()}
            for way, by_run in self.figures.items()
        }
        gains = [asdict(gain) | {"verdict": gain.verdict, "text": str(gain)} for gain in self.differences]
        return {
            "data": parts,
            "figures": figures,
            "published_way": self.way,
            "differences": gains,
            "fusion_weights": [asdict(fusion) for fusion in self.fusions],
            "cost_per_query": {run.name: _cost(run) for run in self.runs},
            "worst": [
                {
                    "part": query.data.name,
                    "query": query.query.id,
                    "text": query.query.words["text"],
                    "image": query.query.image,
                    "value": query.worth,
                    "wanted": dict(query.wanted),
                    "found": {run: [name for name, _ in names] for run, names in query.found.items()},
                }
                for query in (self.worst(worst) if self.figures else ())
            ],
            "notes": list(self.notes),
        }


def results_of(runs: Sequence[Run], weights: Sequence[float] = ()) -> Results:
    """Return the figures of runs over one data set.

    Args:
        runs: first the models alone; a reranker's run after that of its model.
        weights: fusion weights to choose from for each reranker; (): none is chosen.

    Raises:
        QueryError: ir-measures is not installed.
    """
    data = [part.data for part in runs[0].parts]
    notes = [note for part in data for note in part.notes]
    notes += [note for run in runs for note in _notes(run)]
    if not all(part.labelled for part in data):
        return Results(data, runs, {}, (), (), [*notes, "the right answers are not published: there are no figures"])
    figures: dict[str, dict[str, dict[str, Figure]]] = {way: {} for way in runs[0].ways}
    for run in runs:
        for way in run.ways:
            figures[way][run.name] = {name: mean_figure(values) for name, values in run_values(run, way).items()}
    alone = {(run.model, run.prompt): run for run in runs if not run.rerank}
    fusions = [chosen_weight(run, alone[run.model, run.prompt], weights) for run in runs if run.rerank and len(weights)]
    return Results(data, runs, figures, differences(runs), fusions, notes)


def _notes(run: Run) -> list[str]:
    notes = []
    if not run.rerank and (tied := sum(part.tied for part in run.parts)):
        notes.append(
            f"{run.name}: {tied} queries found images of equal scores; the one that the gallery names first is first"
        )
    if failed := dict(run.failures):
        first, reason = next(iter(failed.items()))
        notes.append(
            f"{run.name}: no ranking for {len(failed)} queries, whose order is that of retrieval; {first}: {reason}"
        )
    return notes


def _cost(run: Run) -> dict[str, float]:
    cost = run.cost
    return {
        "seconds": round(cost.seconds, 6),
        "tokens": cost.tokens_a_query,
        "peak_mib": cost.peak_mib,
        "gpu_peak_mib": cost.gpu_peak_mib,
    }


_CIRR_DEPTHS = {"recall": 50, "recall_subset": 3}
_CIRCO_DEPTH = 50


def check_submission(data: EvaluationSet) -> None:
    """Refuse a data set that has no server.

    Raises:
        QueryError: names those that have one.
    """
    if data.layout not in ("cirr", "circo"):
        raise QueryError(f"{data.name}: only CIRR and CIRCO take submissions")


def write_submissions(run: Run, folder: Path) -> list[Path]:
    """Write the files of a run, named for the data set and the run, and return their paths.

    Args:
        run: on the test split of CIRR or CIRCO.
        folder: made if it is not there.
    """
    part = run.parts[0]
    rankings = part.rankings[main_way([part.data])]
    stem = f"{part.data.layout}-{re.sub(r'[^A-Za-z0-9.]+', '-', run.name).strip('-')[:100]}"
    if run.prompted:  # prompts may differ in nothing else than was left out
        stem += f"-{hashlib.sha256(run.name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"
    files: dict[str, dict[str, Any]] = {}
    if part.data.layout == "circo":
        files[f"{stem}.json"] = {id_: [int(name) for name in names[:_CIRCO_DEPTH]] for id_, names in rankings.items()}
    else:
        members = {query.id: set(query.subset) - {query.image} for query in part.data.queries}
        for metric, depth in _CIRR_DEPTHS.items():
            kept = {
                id_: [name for name in names if metric == "recall" or name in members[id_]][:depth]
                for id_, names in rankings.items()
            }
            files[f"{stem}-{metric}.json"] = {"version": "rc2", "metric": metric} | kept
    folder.mkdir(parents=True, exist_ok=True)
    return [write_atomically(folder / name, json.dumps(content).encode()) for name, content in files.items()]
