"""Writes the table of figures from what the benchmarks measured, into the pages that have a place for it.

    python benchmarks/query_latency.py --json benchmarks/results/query-latency.json
    python benchmarks/report.py            # writes the tables
    python benchmarks/report.py --check    # only says which pages would change; 1 if any would

Reads every JSON file in `benchmarks/results/`. The whole table goes between the two markers in
`docs/explanation/measurements.md`, a short one of at most eight rows between the same markers in `README.md`, if it has
them. A figure is a median with the least and the most of its rounds. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "docs" / "explanation" / "measurements.md": False, ROOT / "README.md": True}  # True: the short table
BEGIN, END = "<!-- figures of benchmarks/report.py -->\n", "<!-- end of figures -->\n"
_BETWEEN = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
SHORT_ROWS = 8


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    what: str
    figure: str
    short: tuple[str, str] | None = None  # both in the words of the short table, if it is there too


def main() -> None:
    """Write the tables, or say where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page would change")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder of JSON files")
    options = parser.parse_args()
    records = read_records(options.results)
    differing = 0
    for page, short in PAGES.items():
        text = page.read_text(encoding="utf-8")
        if BEGIN not in text:
            print(f"{page.relative_to(ROOT)} has no place for the table: a line {BEGIN.strip()}, then {END.strip()}")
            continue
        if (wanted := with_table(text, records, short=short)) == text:
            continue
        differing += 1
        print(f"{page.relative_to(ROOT)} {'differs' if options.check else 'written'}")
        if not options.check:
            page.write_text(wanted, encoding="utf-8")
    raise SystemExit(int(options.check and differing > 0))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What the benchmarks wrote, in the order of `KINDS`, then of their files."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: list(KINDS).index(record["benchmark"]))


def with_table(page: str, records: Sequence[dict[str, Any]], *, short: bool) -> str:
    """The page with this table between its markers."""
    table = "".join(short_table(records) if short else whole_table(records))
    return _BETWEEN.sub(lambda _: f"{BEGIN}\n{table}\n{END}", page)


def whole_table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """All rows, below the machine that gave them."""
    for number, (where, of_machine) in enumerate(groupby(sorted(records, key=machine), key=machine)):
        yield "\n" * bool(number) + f"On {where}:\n\n| what | figure | command, commit |\n| --- | --- | --- |\n"
        for record in of_machine:
            how = f"`{record['command']}`, {record['commit'] or 'no commit'}"
            for row in rows(record):
                yield f"| {row.what} | {row.figure} | {how} |\n"
                how = "the same"
            if record["note"]:
                yield f"| | {record['note']} | |\n"


def short_table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows for a first page; machines are named below."""
    chosen = [(row, record) for record in records for row in rows(record) if row.short][:SHORT_ROWS]
    yield "| what | median (least–most) |\n| --- | --- |\n"
    for row, _ in chosen:
        yield "| {} | {} |\n".format(*row.short or ())
    machines = dict.fromkeys(processor(record) for _, record in chosen)
    yield f"\nOn {' and '.join(machines)}.\n"


def processor(record: dict[str, Any]) -> str:
    """The processor by name, its wide arithmetic and its cores."""
    facts = record["machine"]
    wide = ", ".join(facts["arithmetic"]) or "no wide arithmetic"
    cores = f"{facts['cores']} core{'s' * (facts['cores'] != 1)}"
    return f"{facts['processor']} with {wide}, {cores}"


def machine(record: dict[str, Any]) -> str:
    """As `processor`, with threads, memory and versions."""
    facts = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{processor(record)}, {facts['threads']} threads, {facts['memory_gb']} GB ({versions})"


def rows(record: dict[str, Any]) -> Iterator[Row]:
    """What one benchmark measured."""
    return KINDS[record["benchmark"]](record["figures"])


def spread(value: dict[str, float], digits: int = 1) -> str:
    """Median, least and most."""
    if value.get("of") == 1:
        return f"{value['median']:.{digits}f} (one round)"
    return f"{value['median']:.{digits}f} ({value['least']:.{digits}f}–{value['most']:.{digits}f})"


def _spread_of(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median": median, "least": ordered[0], "most": ordered[-1]}


# ---------------------------------------------------------------------------------------------- each benchmark


def of_throughput(figures: dict[str, Any]) -> Iterator[Row]:
    """`embedding_throughput.py`, with and without `--backends`."""
    if "backends" in figures:
        measured = figures["backends"]
        base = next(iter(measured["rates"].values()))
        for name, rates in measured["rates"].items():
            times = spread(_spread_of([rate / first for rate, first in zip(rates, base, strict=True)]), 2)
            what, rate = f"images/s, {measured['model']}, {name}; times one image a call", spread(_spread_of(rates), 2)
            one = f"{rate}; one image a call in float32: {spread(_spread_of(base), 2)}"
            short = (f"images/s, base size, {name}", one) if name == "openvino int8" else None
            yield Row(what, f"{rate}; {times}", short)
        for name, reason in measured["missing"].items():
            yield Row(f"{measured['model']}, {name}", reason)
        return
    for row in figures["rows"]:
        what = f"images/s, base size, {row['dtype']}, batch {row['batch']}; share of the machine's own matrix products"
        yield Row(what, f"{spread(row['images_per_second_spread'], 2)}; {row['percent']:.0f}%")


def of_latency(figures: dict[str, Any]) -> Iterator[Row]:
    """`query_latency.py`."""
    for size in figures["sizes"]:
        what = f"query on Milvus Lite, {size['rows']:,} vectors, index {figures['index']}"
        yield Row(
            f"{what}: ms without / with a filter",
            f"{spread(size['plain_ms'])} / {spread(size['filtered_ms'])}",
            (f"ms of a query besides the model, {size['rows']:,} images on Milvus Lite", spread(size["plain_ms"]))
            if size["rows"] >= 100_000
            else None,
        )
        first, stored = size["just_stored_plain_first_ms"], size["just_stored_plain_ms"]
        yield Row(f"{what}, just stored: ms of the first / of those after", f"{first:.1f} / {stored:.1f}")
        yield Row(f"{what}: s to open, MB", f"{spread(size['open_seconds'])}, {size['peak_mb']['median']:.0f}")


def of_indexing(figures: dict[str, Any]) -> Iterator[Row]:
    """`indexing.py`, by kind."""
    if figures["kind"] == "rate":
        for run in figures["runs"]:
            what = f"indexing {run['images']:,} images, `{figures['model']}`, {run['run']}: images/s"
            yield Row(what, f"{run['images_per_second']:,.0f}")
    elif figures["kind"] == "memory":
        for run in figures["runs"]:
            yield Row(f"peak memory, {run['kind']}, {run['rows']:,} rows: MB", f"{run['peak_mb']:,.0f}")
    elif figures["kind"] == "unchanged":
        for run in figures["runs"]:
            what = f"a second run over {run['rows']:,} unchanged images"
            opened = f", of which {run['opened']:.1f} to open the store" if "opened" in run else ""
            short = (f"s of `index` over {run['rows']:,} unchanged images", spread(run["seconds"]))
            yield Row(f"{what}: s", spread(run["seconds"]) + opened, short if run["rows"] >= 200_000 else None)
            peak = f"{run['peak_mb']['median']:,.0f} / {run['opened_mb']:,.0f}"
            yield Row(f"{what}: MB, with / without the run", peak)
    elif figures["kind"] == "reduced":
        yield reduced(figures["cosine"])
    else:
        what = f"photographs of 12 megapixels, base size, {figures['dtype']}"
        what += ", `exact_pixels=False`" * figures["reduced"]
        alone, whole, beside = figures["model_alone"]["median"], figures["indexed"], figures["beside_busy"]
        yield Row(f"{what}: images/s by the model alone", spread(figures["model_alone"], 2))
        share = f"{whole:.2f} ({whole / alone:.0%} of the model alone)"
        yield Row(f"{what}, from files to rows ({figures['images']} files): images/s", share)
        share = f"{beside:.2f} ({beside / whole:.0%} of undisturbed)"
        yield Row(f"{what}, beside a process that keeps one core busy: images/s", share)
        if "cosine" in figures:
            yield reduced(figures["cosine"])


def reduced(cosine: dict[str, float]) -> Row:
    """How near the vectors of reduced decoding are to those of exact pixels."""
    what = "`exact_pixels=False`: cosine to exact pixels, `tiny`, drawn products of 2.6 megapixels, least / mean"
    return Row(what, f"{cosine['least']:.6f} / {cosine['mean']:.6f}")


def of_reranking(figures: dict[str, Any]) -> Iterator[Row]:
    """`rerank_cost.py`."""
    for flow in figures["flows"]:
        totals = [sum(stage[name] for stage in flow["stages"]) for name in ("prefilled", "generated", "seconds")]
        default = flow["name"] == "published" or figures["crops"] is None
        name = flow["name"] if default else f"{flow['name']}, num_crops={figures['crops']}"
        what = f"rerank nine, {figures['size']} size, {figures['dtype']}, {name}: s, tokens read / written, GB"
        seconds = spread(flow["seconds"]) if "seconds" in flow else f"{totals[2]:.1f}"
        figure = f"{seconds}, {totals[0]:,.0f} / {totals[1]:,.0f}, {flow['peak_gigabytes']:.1f}"
        words = f"s to rerank nine, Phi-3 Vision's size, {figures['dtype']}, the default mode", seconds
        shown = (figures["size"], figures["dtype"], flow["name"]) == ("full", "bfloat16", "likelihood")
        yield Row(what, figure, words if shown else None)


def of_serving(figures: dict[str, Any]) -> Iterator[Row]:
    """`serving.py`."""
    what = f"`mm-retriever serve`, {figures['model']}, {figures['rows']:,} rows, {figures['users']} users"
    what = f"{what}, {figures['seconds']:.0f} s"
    for name, pair in {"waiting": "wait", "besides the model": "besides_model"}.items():
        middle, late = figures[f"{pair}_p50_ms"], figures[f"{pair}_p95_ms"]
        words = f"ms besides the model, {figures['users']} users at `serve`, p50 / p95", f"{middle:.0f} / {late:.0f}"
        shown = pair == "besides_model" and figures["seconds"] >= 600
        yield Row(f"{what}: ms {name}, p50 / p95", words[1], words if shown else None)
    rates = f"{figures['per_second']:.0f} / {figures['per_second_alone']:.0f}"
    yield Row(f"{what}: requests/s, against one user alone", rates)
    yield Row(f"{what}: errors / wrong answers of {figures['requests']:,}", f"{figures['errors']} / {figures['wrong']}")
    memory = f"{figures['memory_start_mb']:.0f} / {figures['memory_end_mb']:.0f}"
    yield Row(f"{what}: MB at the start / at the end", memory)
    if "search_alone_s" in figures:
        seconds = f"{figures['search_with_server_s']:.2f} / {figures['search_alone_s']:.2f}"
        yield Row("the `search` command: s with / without a server", seconds)


def of_gpu(figures: dict[str, Any]) -> Iterator[Row]:
    """`gpu.py`."""
    what = f"{figures['device']}, base size, {figures['dtype']}"
    done = [row for row in figures["batches"] if "images_per_second" in row]
    best = max(done, key=lambda row: row["images_per_second"])
    share = best["images_per_second"] * figures["gflop_per_image"] / figures["product_gflop_per_second"]
    rate = f"{best['images_per_second']:,.0f} ({figures['times_original']:.1f} times the original loop's, {share:.0%})"
    what_of_best = f"{what}, batch {best['batch']}: images/s; share of the card's own matrix products"
    yield Row(what_of_best, rate, (what_of_best, rate))
    for row in figures["batches"]:
        if "out_of_memory" in row:
            yield Row(f"{what}, batch {row['batch']}", f"out of memory: {row['out_of_memory']}")
    training = figures["training"]
    seconds = spread(training["seconds"], 2) if "seconds" in training else "out of memory"
    yield Row(f"{figures['device']}, a training step of {training['pairs']} pairs: s", seconds)
    for name, row in figures.get("reranking", {}).items():
        yield Row(f"{figures['device']}, rerank nine, {name}: s", f"{row['seconds']:.2f}")


KINDS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "rerank_cost": of_reranking,  # first in the short table: what costs most
    "embedding_throughput": of_throughput,
    "query_latency": of_latency,
    "indexing": of_indexing,
    "serving": of_serving,
    "gpu": of_gpu,
}


if __name__ == "__main__":
    main()
