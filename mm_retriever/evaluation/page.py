"""The HTML page of an evaluation: its tables, and the worst queries with the images that were wanted and found."""

from __future__ import annotations

import os
from pathlib import Path

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.evaluation.datasets import EvaluationSet
from mm_retriever.evaluation.results import Results
from mm_retriever.report import Thumbnails, render_page, write_page

WORST = 12


def write_evaluation(path: str | os.PathLike[str], results: Results, *, worst: int = WORST) -> Path:
    """Write the page, and return its path. An existing file is replaced in one step.

    Args:
        path: folders above it are made.
        results: of runs.
        worst: how many of the worst queries are shown.
    """
    name = " and ".join(dict.fromkeys(part.name for part in results.data[:3]))
    page = render_page(
        "evaluation.html.j2",
        Thumbnails(),
        title=f"Evaluation: {name}",
        subtitle=f"{sum(len(part.queries) for part in results.data)} queries; "
        "means with 95% intervals over queries, paired differences",
        results=results,
        worst=results.worst(worst) if results.figures else [],
        source=_source,
    )
    return write_page(Path(path), page)


def _source(data: EvaluationSet, name: str) -> str:
    """Where an image is read from; one that cannot be read is shown as missing, by its name."""
    try:
        return data.source(name)
    except ImageLoadError as error:
        return one_line(error, 200)
