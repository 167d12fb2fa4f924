"""What the command line and an HTML page show of an evaluation, whose words may be untrusted: queries, answers."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.evaluation.datasets import EvaluationSet
from mm_retriever.evaluation.health import NEAR_DUPLICATE, NEIGHBOURS, Health
from mm_retriever.evaluation.results import Results
from mm_retriever.report import Thumbnails, render_page, write_page

_WORST = 5
_LISTED = 5


def print_results(results: Results, console: Console) -> None:
    """Print a table for each way, the costs, what makes it better or worse, and the worst queries."""
    for way, by_run in results.figures.items():
        title = way + (", as published" if way == results.way and len(results.figures) > 1 else "")
        table = Table(title=_words(title), title_justify="left", box=None)
        table.add_column("run", overflow="fold")
        for measure in results.data[0].measures:  # in a narrow terminal an interval folds at its spaces
            table.add_column(measure, justify="right", min_width=len(measure))
        for name, measures in by_run.items():
            cells = [f"{figure.mean:.3f}\n{figure.low:.3f} - {figure.high:.3f}" for figure in measures.values()]
            table.add_row(_words(name), *cells)
        console.print(table, crop=False)  # what is still too wide is folded by the terminal
    costs = Table("run", "s/query", "tokens/query", "peak MiB", title="cost", title_justify="left", box=None)
    for run in results.runs:
        tokens = f"{run.cost.tokens_a_query:.0f}" if run.rerank else "-"
        peak = f"{run.cost.peak_mib or '-'}" + (f" + GPU {run.cost.gpu_peak_mib}" if run.cost.gpu_peak_mib else "")
        costs.add_row(_words(run.name), f"{run.cost.seconds:.3f}", tokens, peak)
    console.print(costs)
    for difference in results.differences:
        console.print(_words(str(difference)))
    for fusion in results.fusions:
        console.print(_words(str(fusion)))
    for note in results.notes:
        console.print(_words(f"note: {note}"))
    worst = [query for query in (results.worst(_WORST) if results.figures else ()) if query.worth < 1]
    if worst:
        console.print(_words(f"worst queries by {results.measure} (--html shows them):"))
    for query in worst:
        words = " ".join(
            filter(None, (f"[{query.query.image}]" if query.query.image else "", query.query.words["text"]))
        )
        firsts = {run: names[0][0] if names else "nothing" for run, names in query.found.items()}
        first = "; ".join(f"{run}: {name}" for run, name in firsts.items())
        console.print(
            _words(f"  {query.worth:.3f} {query.query.id}: {words} -> {query.answers[0][0]}; first by {first}")
        )


def print_health(title: str, health: Health, console: Console) -> None:
    """Print the state of a collection."""
    console.print(_words(f"{title}: {health.images} images read, {len(health.dead)} unreadable"))
    for name, reason in health.dead[:_LISTED]:
        console.print(_words(f"  {name}: {reason}"))
    if len(health.dead) > _LISTED:
        console.print(_words(f"  and {len(health.dead) - _LISTED} more; --json lists them all"))
    console.print(_words(f"near duplicates (cosine {NEAR_DUPLICATE} or more): {health.near_duplicates} pairs"))
    for first, second, cosine in health.nearest_pairs[:_LISTED]:
        console.print(_words(f"  {cosine:.3f} {first} = {second}"))
    hubs = ", ".join(f"{name} ({times} times)" for name, times in health.hubs[:3])
    console.print(
        _words(
            f"hubness {health.hubness:.2f} (above 1: a few images are near everything); most often among the nearest "
            f"{NEIGHBOURS}: {hubs}; {health.never_found:.0%} of images never"
        )
    )
    for shortcut in health.shortcuts:
        reached = ""
        if shortcut.reached is not None:
            reached = f"; reaches {shortcut.reached} where the whole query reaches {shortcut.whole}"
        console.print(
            _words(f"{shortcut.use} alone finds the same first image for {shortcut.same_first:.0%} of queries{reached}")
        )


def _words(text: str) -> Text:
    return Text(one_line(text))


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
