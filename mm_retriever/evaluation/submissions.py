"""Answers to test splits, in the files that the servers of CIRR and CIRCO take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import EvaluationSet
from mm_retriever.evaluation.runs import Run, main_way
from mm_retriever.files import write_atomically

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
    stem = f"{part.data.layout}-{re.sub(r'[^A-Za-z0-9.]+', '-', run.name).strip('-')}"
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
