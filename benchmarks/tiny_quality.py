"""How often the bundled tiny embedder finds the right product: every figure of its model card, by one command.

    python benchmarks/tiny_quality.py                       # the bundled model
    python benchmarks/tiny_quality.py --model FOLDER --json quality.json

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm_retriever.demo.catalogue import PATTERNS, Looks, Product, catalogue, draw_product, draw_theme
from mm_retriever.demo.catalogue.drawing import SEED_BLOCK
from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEProcessor
from mm_retriever.embedders.visualized_bge.loading import load_visualized_bge
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE
from mm_retriever.evaluation.metrics import figure

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
class Recall:
    """Figures of one group of queries; intervals are (low, high)."""

    name: str
    queries: int
    products: int
    at_1: float
    at_1_interval: tuple[float, float]
    at_9: float
    at_9_interval: tuple[float, float]


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


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


class Embedder:
    """The model after its real preprocessing, on batches of queries and products."""

    def __init__(self, model: VisualizedBGE, processor: VisualizedBGEProcessor) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.inference_mode()
    def products(self, products: Sequence[Product], size: int) -> np.ndarray:
        """(N, D) vectors of images drawn at ``size`` pixels."""
        ordered = sorted(range(len(products)), key=lambda row: PATTERNS.index(products[row].pattern))
        vectors = np.zeros((len(products), self.model.config.dimension), np.float32)
        for rows in _batches(ordered):
            pixel_values = self.processor.pixel_values([products[row].draw(size) for row in rows])
            vectors[rows] = self.model.encode_image(pixel_values).float().numpy()
        return vectors

    @torch.inference_mode()
    def queries(self, queries: Sequence[Query], *, use: str = "both") -> np.ndarray:
        """(N, D) vectors; ``use`` is "both", "image", "text", or "sum" of the two vectors, to compare."""
        ordered = sorted(range(len(queries)), key=lambda row: PATTERNS.index(_pattern_of(queries[row])))
        vectors = np.zeros((len(queries), self.model.config.dimension), np.float32)
        for rows in _batches(ordered):
            some = [queries[row] for row in rows]
            images = [query.image() for query in some] if use != "text" else []
            values = self.processor.pixel_values([p for p in images if p is not None]) if any(images) else None
            texts = [query.text for query in some]
            vectors[rows] = self._encode(values, texts, use).float().numpy()
        return vectors

    def _encode(self, values: torch.Tensor | None, texts: list[str], use: str) -> torch.Tensor:
        if values is None:
            return self.model.encode_text(**self.processor.tokens(texts))
        if use == "image" or not any(texts):
            return self.model.encode_image(values)
        if use == "sum":
            return self.model.encode_image(values) + self.model.encode_text(**self.processor.tokens(texts))
        return self.model.encode_multimodal(values, **self.processor.tokens(texts, beside_image=True))


def _pattern_of(query: Query) -> str:
    return PATTERNS[0] if query.source is None else query.source.pattern


# ---------------------------------------------------------------------- figures


def ranks(vectors: np.ndarray, candidates: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """1-based rank of each query's right product; ties count against it."""
    scores = vectors @ candidates.T
    own = scores[np.arange(len(wanted)), list(wanted)]
    return (scores >= own[:, None]).sum(1)


def recall(name: str, *parts: tuple[np.ndarray, Sequence[int]]) -> Recall:
    """Recall of ranks and the products they are of; of several kinds of query the unweighted mean."""
    products = {product for _, wanted in parts for product in wanted}
    first, nine = (figure(*((rank <= top, wanted) for rank, wanted in parts)) for top in (1, 9))
    at_1, at_9 = (each.mean for each in (first, nine))
    return Recall(name, first.queries, len(products), at_1, (first.low, first.high), at_9, (nine.low, nine.high))


def measure(
    embedder: Embedder,
    *,
    only: str = "",
    count: int = 900,
    draws: int = 3,
    size: int = 320,
    report: Callable[[str], None] = print,
) -> dict[str, list[Recall]]:
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
    candidates = embedder.products(products, size)
    sections: dict[str, list[Recall]] = {}

    def section(title: str, groups: list[tuple[str, list[Query], str]], mean: str | None = None) -> None:
        if only not in ("", title):
            return
        parts = []
        sections[title] = []
        for name, queries, use in groups:
            wanted = [query.wanted for query in queries]
            rank = ranks(embedder.queries(queries, use=use), candidates, wanted)
            parts.append((rank, wanted))
            sections[title].append(recall(name, (rank, wanted)))
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


def table(title: str, rows: Sequence[Recall]) -> str:
    """A Markdown table."""
    lines = [f"\n**{title}**\n", "| query | n | R@1 | 95% | R@9 | 95% |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        spans = [f"{low:.3f}–{high:.3f}" for low, high in (row.at_1_interval, row.at_9_interval)]
        lines.append(f"| {row.name} | {row.queries} | {row.at_1:.3f} | {spans[0]} | {row.at_9:.3f} | {spans[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name that load_visualized_bge knows, or a folder")
    parser.add_argument("--draws", type=int, default=3, help="queries of each kind for every held-out product")
    parser.add_argument("--size", type=int, default=320, help="pixels at which the catalogue is drawn")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    model, processor = load_visualized_bge(arguments.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.model}: {parameters:,} parameters, {model.config.vision_shape.image_size} px")
    sections = measure(Embedder(model, processor), draws=arguments.draws, size=arguments.size)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if arguments.json:
        figures = {title: [asdict(row) for row in rows] for title, rows in sections.items()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
