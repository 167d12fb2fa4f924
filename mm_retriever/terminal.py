"""What the command line shows: result tables, pages and sheets, the ends of an ingestion, progress of a download.

Owns the way from retrieved nodes to what a person reads, in which no untrusted text (a file name, a sidecar, a model's
reason, a collection's description) is a command to the terminal or markup. Knows no options, opens no store and loads
no model: the commands hand over what they found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mm_retriever.errors import one_line
from mm_retriever.images import ImageSource, is_place, source_name
from mm_retriever.own_keys import own_value
from mm_retriever.report import Hit, SearchReport, write_html, write_png

if TYPE_CHECKING:
    from llama_index.core.schema import NodeWithScore

    from mm_retriever.bulk import ShardReport
    from mm_retriever.ingest import IngestReport, SkippedImage
    from mm_retriever.rerank.reranker import Reranking

SKIPPED_SHOWN = 10
NOTES_SHOWN = 20
_NEVER_FOLDED = 100_000


def search_report(
    text: str | None,
    image: ImageSource | None,
    nodes: Sequence[NodeWithScore],
    *,
    title: str = "",
    reranking: Reranking | None = None,
) -> SearchReport:
    """One search as it is shown, from the nodes that were retrieved and what a reranker made of them."""
    report = SearchReport(query_text=text or "", query_image=image, hits=_hits(nodes), title=title)
    if reranking is None:
        return report
    hits = _hits(reranking.nodes)
    reason = hits[0].note if hits else ""
    facts = (("wanted", reranking.wanted),) if reranking.wanted else ()
    return replace(report, reranked=hits, caption=reranking.caption, reason=reason, facts=facts)


def rows_report(text: str | None, image: ImageSource | None, rows: Sequence[Mapping[str, Any]]) -> SearchReport:
    """One search as it is shown, from the rows of a server."""
    hits = [_hit(row["rank"], row["id"], row["score"], {**row, **row.get("metadata", {})}) for row in rows]
    return SearchReport(query_text=text or "", query_image=image, hits=tuple(hits))


def print_json(value: object) -> None:
    """The value as JSON that any terminal takes and any reader of JSON reads back whole."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):  # a terminal of few letters
        text = json.dumps(value, indent=2)
    # what cannot be seen, or commands a terminal, is escaped: both \u forms read back the same
    typer.echo("".join(sign if sign.isprintable() or sign == "\n" else json.dumps(sign)[1:-1] for sign in text))


def show_rows(
    rows: Sequence[Mapping[str, Any]],
    report: Callable[[], SearchReport],
    *,
    as_json: bool = False,
    paths: bool = False,
    null: bool = False,
    html: Path | None = None,
    png: Path | None = None,
) -> None:
    """The results in the form that was asked for, and as page and sheet where a path is given.

    Args:
        rows: best first, as ``--json`` prints them.
        report: makes the same for people.
        as_json: print the rows as JSON.
        paths: print the paths alone, one a line.
        null: print the paths alone, each ended by a NUL byte.
        html: file of the page.
        png: file of the sheet.
    """
    plain = as_json or paths or null
    if as_json:
        print_json(rows)
    elif plain:
        _print_paths(rows, end=b"\0" if null else b"\n")
    if not plain or html or png:
        made = report()
        if not plain:
            print_search(made)
        write_search(made, html=html, png=png, quiet=plain)


def _print_paths(rows: Sequence[Mapping[str, Any]], *, end: bytes) -> None:
    """Paths as they are, for other programs; a terminal gets nothing that commands it. What has none is counted."""
    known = [str(own_value({**row, **row.get("metadata", {})}, "file_path") or "") for row in rows]
    printed = [path for path in known if path and (end == b"\0" or "\n" not in path)]
    if sys.stdout.isatty():
        for path in printed:
            typer.echo(one_line(path, len(path) + 1))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(b"".join(os.fsencode(path) + end for path in printed))
        sys.stdout.buffer.flush()
    if lost := known.count(""):
        typer.echo(f"{lost} of the {len(rows)} results have no path and are not printed", err=True)
    if broken := len(known) - lost - len(printed):
        typer.echo(f"{broken} of the {len(rows)} results have a line break in their path: -0 prints them", err=True)


def screen() -> Console:
    """A console that folds lines at the width of a terminal, and nowhere else: what is piped is read by a program."""
    return Console() if sys.stdout.isatty() or os.environ.get("COLUMNS") else Console(width=_NEVER_FOLDED)


def print_search(report: SearchReport) -> None:
    """The results as a table; when they were reranked, as a second one with what the model said."""
    console = screen()
    for heading, hits in (("", report.hits), ("reranked", report.reranked)):
        if hits is None:
            continue
        table = Table("#", "score", "label", title=_words(heading or _asked(report)), title_justify="left", box=None)
        table.add_column("file", overflow="fold")
        for hit in hits:
            score = "" if hit.score is None else f"{hit.score:.3f}"
            table.add_row(str(hit.rank), score, _words(hit.label), _linked(hit))
        console.print(table)
    for name, words in (("it sees", report.caption), *report.facts, ("the first because", report.reason)):
        if words:
            console.print(_words(f"{name}: {words}"))
    if not report.hits:
        console.print("nothing found")


def write_search(report: SearchReport, *, html: Path | None, png: Path | None, quiet: bool = False) -> None:
    """The results as a page and as a sheet, where a path is given."""
    for path, write in ((html, write_html), (png, write_png)):
        if path is not None:
            write(path, report)
            if not quiet:
                typer.echo(f"wrote {path}")


def print_ingestion(report: IngestReport | ShardReport, *, rest: str = "--report FILE lists them all") -> None:
    """What an ingestion did and has to say, the first files that it skipped, and a table of what it did not take."""
    typer.echo(str(report))
    for note in report.notes[:NOTES_SHOWN]:
        typer.echo(one_line(f"  note: {note}"))
    if len(report.notes) > NOTES_SHOWN:
        typer.echo(f"  and {len(report.notes) - NOTES_SHOWN} more notes; {rest}")
    print_skipped(report.skipped, rest=rest)
    if report.ignored:
        typer.echo(f"not taken, because they are no images that are read; {rest}:")
    for files in report.ignored[:SKIPPED_SHOWN]:
        typer.echo(f"  {files.count:>7} {one_line(files.kind):<8} {one_line(files.reason)}")
    if len(report.ignored) > SKIPPED_SHOWN:
        others = report.ignored[SKIPPED_SHOWN:]
        typer.echo(f"  {sum(files.count for files in others):>7} of {len(others)} more types")


def print_skipped(images: Sequence[SkippedImage], *, rest: str) -> None:
    """The first of the images that could not be read, and why; `rest` says where all are listed."""
    for skipped in images[:SKIPPED_SHOWN]:
        typer.echo(one_line(f"  skipped {skipped.path}: {skipped.reason}"))
    if len(images) > SKIPPED_SHOWN:
        typer.echo(f"  and {len(images) - SKIPPED_SHOWN} more; {rest}")


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and what they are, in two columns; a line ends with its last word."""
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(_words(name), _words(fact))
    console = screen()
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def download_archive(target: Path) -> Path:
    """The published Amazon archive at `target`, with a progress bar."""
    from tqdm import tqdm

    from mm_retriever.demo import AMAZON_BYTES, download_amazon

    with tqdm(total=AMAZON_BYTES, unit="B", unit_scale=True, desc="Downloading") as bar:
        return download_amazon(target, progress=bar.update)


def _words(text: str) -> Text:
    """Untrusted text for rich: its brackets are no markup, and it holds no command."""
    return Text(one_line(text))


def _hits(nodes: Sequence[NodeWithScore]) -> tuple[Hit, ...]:
    return tuple(_hit(rank, node.node.node_id, node.score, node.node.metadata) for rank, node in enumerate(nodes, 1))


def _hit(rank: int, id_: str, score: float | None, facts: Mapping[str, Any]) -> Hit:
    label = str(facts.get("description") or facts.get("label") or "")
    note = str(facts.get("rerank_reason") or facts.get("rerank_note") or "")
    return Hit(rank, id_, score=score, path=str(own_value(facts, "file_path") or ""), label=label, note=note)


def _linked(hit: Hit) -> Text:
    """The path, which terminals that know OSC 8 make a link to the file; its URI is percent-encoded."""
    shown = _words(_shown(hit))
    with suppress(ValueError):  # no absolute path, or none that this machine could have
        shown.stylize(Style(link=Path(hit.path).as_uri()))
    return shown


def _shown(hit: Hit) -> str:
    near = os.path.relpath(hit.path) if hit.path else hit.id
    return hit.path if near.startswith("..") else near


def _asked(report: SearchReport) -> str:
    image = report.query_image
    name = "" if image is None else f"[{Path(image).name if is_place(image) else source_name(image)}]"
    query = " ".join(filter(None, (name, report.query_text)))
    return f"{report.title}: {query}" if report.title else query
