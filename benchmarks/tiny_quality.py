"""How often the bundled tiny embedder finds the right product: every figure of its model card, by one command.

    python benchmarks/tiny_quality.py                       # the bundled model
    python benchmarks/tiny_quality.py --model FOLDER --json quality.json
    python benchmarks/tiny_quality.py --backend openvino --dtype int8 --only "Pairs held out of training"

A catalogue of 900 distinct products is drawn at 320 pixels and embedded through the public loading path and the real
preprocessing. Every query has exactly one right product; ``R@1`` counts it found first, ``R@9`` among the first nine.
Images come from seeds that training never used, query images from other seeds than the catalogue's. Intervals are
95% bootstrap intervals over wanted products, since queries for one product are not independent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mm_retriever.demo.catalogue import PATTERNS, Looks, Product, catalogue, draw_product, draw_theme
from mm_retriever.demo.catalogue.drawing import SEED_BLOCK
from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.evaluation.metrics import Figure, figure, query_values
from mm_retriever.evaluation.runs import ranked_rows

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "training"))
from phrases import MODES, Mode, Wording, compose_query, full_text

MODE_NAMES: dict[Mode, str] = {
    "theme": "theme image + product kind",
    "kind": "product + other kind",
    "colour": "product + colour",
    "pattern": "product + pattern",
}
BATCH = 64
QUERY_BLOCK = 500  # seeds of query images: block 500 up, away from catalogues (0 up) and training (1000 up)


@dataclass(frozen=True)
class Query:
    """An image to draw or a text or both, and the row of the right product."""

    text: str
    source: Looks | None
    seed: int
    wanted: int

    def image(self) -> Image.Image | None:
        """The query image, drawn at 320 pixels."""
        if self.source is None:
            return None
        kind, pattern, colour = self.source
        if kind is None:
            return draw_theme(pattern, colour, self.seed)
        return draw_product(kind, pattern, colour, self.seed)


@dataclass(frozen=True)
class Row:
    """Recall of one group of queries, of the first product and of the first nine."""

    name: str
    at_1: Figure
    at_9: Figure


def composed_queries(
    products: Sequence[Product],
    mode: Mode,
    *,
    held_out: bool,
    wording: Wording = "training",
    draws: int = 3,
    seed: int = 0,
) -> list[Query]:
    """``draws`` queries of one mode for every held-out (or every seen) product that such a query can ask for."""
    rng = np.random.default_rng([5, seed, MODES.index(mode), wording == "training"])
    queries = []
    for row, product in enumerate(products):
        for _ in range(draws if product.held_out == held_out else 0):
            query = compose_query(product.looks, mode, rng, wording=wording)
            if query is not None:
                image_seed = (QUERY_BLOCK + seed) * SEED_BLOCK + int(rng.integers(SEED_BLOCK))
                queries.append(Query(query.text, query.source, image_seed, row))
    return queries


def simple_queries(products: Sequence[Product], *, images: bool, held_out: bool, draws: int = 3) -> list[Query]:
    """Queries by text alone, or by another image of the same product alone."""
    rng = np.random.default_rng([6, images])
    rows = [row for row, product in enumerate(products) if product.held_out == held_out for _ in range(draws)]
    queries = []
    for row in rows:
        seed, looks = QUERY_BLOCK * SEED_BLOCK + int(rng.integers(SEED_BLOCK)), products[row].looks
        queries.append(Query("", looks, seed, row) if images else Query(full_text(looks, rng), None, 0, row))
    return queries


# ---------------------------------------------------------------------- embedding


def product_vectors(embedder: Embedder, products: Sequence[Product], size: int) -> np.ndarray:
    """(N, D) vectors of images drawn at ``size`` pixels."""

    def content(row: int) -> Content:
        return Content(image=embedder.prepare(products[row].draw(size)))

    return _in_pattern_order(embedder, [product.pattern for product in products], content)


def query_vectors(embedder: Embedder, queries: Sequence[Query], *, use: str = "both") -> np.ndarray:
    """(N, D) vectors; ``use`` is "both", "image", "text", or "sum" of the two vectors, to compare."""
    if use == "sum":
        return query_vectors(embedder, queries, use="image") + query_vectors(embedder, queries, use="text")

    def content(row: int) -> Content:
        image = None if use == "text" else queries[row].image()
        text = "" if use == "image" else queries[row].text
        return Content(text, None if image is None else embedder.prepare(image))

    return _in_pattern_order(embedder, [_pattern_of(query) for query in queries], content, query=True)


def _in_pattern_order(
    embedder: Embedder, patterns: Sequence[str], content: Callable[[int], Content], *, query: bool = False
) -> np.ndarray:
    """The vector of each row; each pattern map is drawn once and kept, so rows of one pattern follow one another."""
    ordered = sorted(range(len(patterns)), key=lambda row: PATTERNS.index(patterns[row]))
    vectors = np.zeros((len(patterns), embedder.dimension), np.float32)
    for start in range(0, len(ordered), BATCH):
        rows = ordered[start : start + BATCH]
        vectors[rows] = embedder.encode([content(row) for row in rows], query=query)
    return vectors


def _pattern_of(query: Query) -> str:
    return PATTERNS[0] if query.source is None else query.source.pattern


# ---------------------------------------------------------------------- figures


def found_at(vectors: np.ndarray, candidates: np.ndarray, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """(N,) for 1 and for 9: whether each query's right product is among the first so many."""
    rankings = {
        str(row): [str(product) for product in best[:9]]
        for row, (_, best) in enumerate(ranked_rows(vectors, candidates))
    }
    right = {str(row): {str(product): 1} for row, product in enumerate(wanted)}
    return {depth: query_values(rankings, right, f"Recall@{depth}") for depth in (1, 9)}


def recall(name: str, *parts: tuple[Mapping[int, np.ndarray], Sequence[int]]) -> Row:
    """Figures of `found_at` and the products they are of; of several kinds of query the unweighted mean."""
    first, nine = (figure(*((found[depth], wanted) for found, wanted in parts)) for depth in (1, 9))
    return Row(name, first, nine)


def measure(
    embedder: Embedder,
    *,
    only: str = "",
    count: int = 900,
    draws: int = 3,
    size: int = 320,
    report: Callable[[str], None] = print,
) -> dict[str, list[Row]]:
    """All figures, by section: held-out pairs, seen pairs, held-out wordings, and what does not compose.

    Args:
        embedder: the model.
        only: the title of the one section to measure; default: all of them.
        count: how many products are drawn.
        draws: queries of each kind for every held-out product.
        size: pixels at which products are drawn.
        report: called with each table.
    """
    products = catalogue(count)
    candidates = product_vectors(embedder, products, size)
    sections: dict[str, list[Row]] = {}

    def section(title: str, groups: list[tuple[str, list[Query], str]], mean: str | None = None) -> None:
        if only not in ("", title):
            return
        parts = []
        sections[title] = []
        for name, queries, use in groups:
            wanted = [query.wanted for query in queries]
            found = found_at(query_vectors(embedder, queries, use=use), candidates, wanted)
            parts.append((found, wanted))
            sections[title].append(recall(name, (found, wanted)))
        if mean:
            sections[title].append(recall(mean, *parts))
        report(table(title, sections[title]))

    def four(held_out: bool, times: int, wording: Wording = "training") -> list[tuple[str, list[Query], str]]:
        made = [composed_queries(products, m, held_out=held_out, wording=wording, draws=times) for m in MODES]
        return [(MODE_NAMES[mode], queries, "both") for mode, queries in zip(MODES, made, strict=True)]

    for held_out, title, times in ((True, "Pairs held out of training", draws), (False, "Pairs seen in training", 1)):
        section(title, four(held_out, times), "mean of the four")
        texts = simple_queries(products, images=False, held_out=held_out, draws=times)
        photos = simple_queries(products, images=True, held_out=held_out, draws=times)
        section(f"{title}, not composed", [("text only", texts, "text"), ("image only", photos, "image")])
    section("Held-out pairs, held-out wordings", four(True, draws, "held-out"), "mean of the four")
    themes = composed_queries(products, "theme", held_out=True, draws=draws)
    ways = {"image alone": "image", "text alone": "text", "sum of the two vectors": "sum", "both together": "both"}
    title = "Does it compose? Held-out pairs, theme image + product kind"
    section(title, [(name, themes, use) for name, use in ways.items()])
    return sections


def table(title: str, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [f"\n**{title}**\n", "| query | n | R@1 | 95% | R@9 | 95% |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [f"{one.mean:.3f} | {one.low:.3f}–{one.high:.3f}" for one in (row.at_1, row.at_9)]
        lines.append(f"| {row.name} | {row.at_1.queries} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name that load_embedder knows, or a folder")
    parser.add_argument("--backend", default="torch", help="what computes it, as load_embedder takes it")
    parser.add_argument("--dtype", help="the same")
    parser.add_argument("--only", default="", help="the title of the one table to measure; default: all")
    parser.add_argument("--draws", type=int, default=3, help="queries of each kind for every held-out product")
    parser.add_argument("--size", type=int, default=320, help="pixels at which the catalogue is drawn")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    embedder = load_embedder(arguments.model, backend=arguments.backend, dtype=arguments.dtype)
    print(f"{arguments.model}: {embedder.space}, {embedder.note}")
    sections = measure(embedder, only=arguments.only, draws=arguments.draws, size=arguments.size)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if arguments.json:
        figures = {title: [asdict(row) for row in rows] for title, rows in sections.items()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
