"""How much the bundled tiny reranker adds to the bundled tiny embedder: every figure of its model card, by one command.

    python benchmarks/rerank_quality.py                       # 18 minutes of one core
    python benchmarks/rerank_quality.py --quick               # a tenth of the queries
    python benchmarks/rerank_quality.py --reranker FOLDER --json rerank.json
    python benchmarks/rerank_quality.py --reranker FOLDER --crops 1    # candidates with their crop, too
    python benchmarks/rerank_quality.py --write               # into the model card and docs/explanation/measurements.md

A catalogue of 900 distinct products is drawn into JPEG files of 320 pixels, and so are the query images, all from
seeds that training never used. ``VisualizedBGEEmbedding`` finds nine candidates (exact inner product, as a flat index
would), ``Phi3VisionRerank`` in its default mode ranks them. Queries are those of ``tiny_quality.py``; each has exactly
one right product. How much the retrieval score counts is chosen on seen compositions only, then applied to held-out
ones. Intervals are 95% bootstrap intervals over wanted products, since queries for one product are not independent.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle
from tiny_quality import MODE_NAMES, Query, composed_queries

from mm_retriever.demo.catalogue import PATTERNS, Looks, Product, caption, catalogue, write_catalogue
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.evaluation.metrics import figure
from mm_retriever.phi3_vision.load import load_phi3_vision
from mm_retriever.phi3_vision.model import Phi3Vision
from mm_retriever.phi3_vision.processor import Message, Phi3VisionProcessor, Slot
from mm_retriever.phi3_vision.prompts import DESCRIBE
from mm_retriever.rerank import Phi3VisionRerank
from mm_retriever.rerank.scorer import fuse

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "training"))
from phrases import MODES, Mode, Wording, reason

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "mm_retriever" / "phi3_vision" / "tiny" / "README.md"
MEASUREMENTS = ROOT / "docs" / "explanation" / "measurements.md"
HELD_OUT, REWORDED, SEEN, WEAKER = (
    "Pairs held out of training",
    "Held-out pairs, held-out wordings",
    "Pairs seen in training (the weight was chosen on these)",
    "Held-out pairs after a weaker retriever: the sum of image and text vectors",
)
TOP_K = 9
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
CAPTIONED_SEEDS = (0, 2, 3)  # catalogues whose held-out products are described; 1 watched the training


@dataclass(frozen=True)
class Judged:
    """One query after retrieval and reranking; scores and ``right`` are in the order of retrieval."""

    wanted_row: int
    mode: Mode
    retrieval: tuple[float, ...]
    model: tuple[float, ...]
    right: tuple[bool, ...]
    caption_right: bool
    wanted_right: bool
    reason_right: bool | None  # None: another product was first, so there is no one right reason

    def rank(self, weight: float) -> int:
        """1-based rank of the right product after reranking; one more than the last if it was not retrieved."""
        values = fuse(self.model, self.retrieval, weight)
        order = sorted(range(len(values)), key=lambda place: -values[place])
        return next((rank for rank, place in enumerate(order, start=1) if self.right[place]), len(order) + 1)

    @property
    def retrieved_rank(self) -> int:
        """The same before reranking."""
        return next((place + 1 for place, right in enumerate(self.right) if right), len(self.right) + 1)


class Bench:
    """Catalogue, index and reranker."""

    def __init__(self, folder: Path, embedder: str, reranker: str, crops: int | None = None) -> None:
        self.folder = folder
        self.products = catalogue()
        self.model, self.processor = load_phi3_vision(reranker, device="cpu")
        self.rerank = Phi3VisionRerank((self.model, self.processor), top_n=TOP_K, num_crops=crops)
        self.embed_model = VisualizedBGEEmbedding(embedder, device="cpu")
        if not (folder / "labels.json").exists():
            write_catalogue(folder)
        self.paths = [folder / "products" / product.file_name for product in self.products]
        self.vectors = np.array(self.embed_model.get_image_embedding_batch(self.paths), np.float32)

    def judged(self, queries: Sequence[tuple[Mode, Query]], *, composed: bool = True) -> list[Judged]:
        """Every query retrieved and reranked; ``composed=False``: retrieved by the sum of image and text vectors."""
        images = self._images([query for _, query in queries])
        texts = [query.text for _, query in queries]
        embed_model = self.embed_model
        if composed:
            vectors = np.array(embed_model.get_composed_embedding_batch(texts, images), np.float32)
        else:
            parts = (embed_model.get_text_embedding_batch(texts), embed_model.get_image_embedding_batch(images))
            vectors = np.array(parts, np.float32).sum(0) / 2
        return [
            self._judge(mode, query, image, scores)
            for (mode, query), image, scores in zip(queries, images, vectors @ self.vectors.T, strict=True)
        ]

    def _judge(self, mode: Mode, query: Query, image: Path, scores: np.ndarray) -> Judged:
        found = np.argsort(-scores, kind="stable")[:TOP_K]
        nodes = [
            NodeWithScore(node=ImageNode(id_=str(row), image_path=str(self.paths[row])), score=float(scores[row]))
            for row in found
        ]
        result = self.rerank.rerank(nodes, QueryBundle(query.text, image_path=str(image)))
        model = {int(node.node.node_id): node.node.metadata["rerank_model_score"] for node in result.nodes}
        first, source = int(result.nodes[0].node.node_id), query.source
        assert source is not None
        told = result.nodes[0].node.metadata.get("rerank_reason", "")
        looks = self.products[query.wanted].looks
        return Judged(
            wanted_row=query.wanted,
            mode=mode,
            retrieval=tuple(float(scores[row]) for row in found),
            model=tuple(float(model[row]) for row in found),
            right=tuple(bool(row == query.wanted) for row in found),
            caption_right=result.caption == caption(source),
            wanted_right=result.wanted == caption(looks),
            reason_right=told == reason(mode, looks) if first == query.wanted else None,
        )

    def _images(self, queries: Sequence[Query]) -> list[Path]:
        """Query images on disk, drawn pattern by pattern, since each pattern map is drawn once and kept."""
        (self.folder / "queries").mkdir(exist_ok=True)
        paths = [self.folder / "queries" / f"{_name(query.source)}-{query.seed}.jpg" for query in queries]
        for place in sorted(range(len(queries)), key=lambda place: _pattern(queries[place])):
            if not paths[place].exists():
                image = queries[place].image()
                assert image is not None
                image.save(paths[place], quality=90)
        return paths


def _name(looks: Looks | None) -> str:
    return "-".join(str(part).replace(" ", "_") for part in looks or ())


def _pattern(query: Query) -> int:
    return -1 if query.source is None else PATTERNS.index(query.source.pattern)


# ---------------------------------------------------------------------- captions


@torch.inference_mode()
def described(model: Phi3Vision, processor: Phi3VisionProcessor, products: Sequence[Product]) -> list[bool]:
    """Whether the greedy description of each product's image is exactly right, in batches of 64."""
    right: list[bool] = []
    ordered = sorted(products, key=lambda product: PATTERNS.index(product.pattern))
    for start in range(0, len(ordered), 64):
        some = ordered[start : start + 64]
        images = processor.image_inputs([product.draw() for product in some])
        ids = processor.encode_messages([Message("user", [DESCRIBE, Slot(images.token_counts[0])])])
        features = model.image_features(images.pixel_values, images.image_sizes)
        prefix = model.prefill(torch.tensor([ids] * len(some)), features)
        written = [prefix.logits.argmax(1)]
        for _ in range(15):
            prefix = model.extend(prefix, written[-1][:, None])
            written.append(prefix.logits.argmax(1))
        for row, product in zip(torch.stack(written, 1).tolist(), some, strict=True):
            end = next((place for place, token in enumerate(row) if token in processor.stop_ids), len(row))
            right.append(processor.decode(row[:end]) == product.description)
    return right


def caption_figures(bench: Bench, seeds: Sequence[int]) -> dict[str, tuple[int, float]]:
    """(images, share described exactly right) of held-out and of seen products."""
    held_out = [product for seed in seeds for product in catalogue(seed=seed) if product.held_out]
    seen = [product for product in catalogue(seed=seeds[0]) if not product.held_out][: 150 * len(seeds)]
    groups = {"held-out products": held_out, "seen products": seen}
    return {
        name: (len(some), float(np.mean(described(bench.model, bench.processor, some))))
        for name, some in groups.items()
    }


# ---------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Gain:
    """Recall@1 of one group of queries before and after; intervals are (low, high)."""

    name: str
    queries: int
    products: int
    retrieval: float
    retrieval_interval: tuple[float, float]
    retrieval_at_9: float
    model: float
    model_interval: tuple[float, float]
    fused: float
    fused_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


def gain(name: str, judged: Sequence[Judged], weight: float) -> Gain:
    """Figures of one group, paired: the same products are drawn for before and after."""
    wanted = [one.wanted_row for one in judged]
    ranks = {
        "retrieval": np.array([one.retrieved_rank for one in judged]),
        "model": np.array([one.rank(0.0) for one in judged]),
        "fused": np.array([one.rank(weight) for one in judged]),
    }
    first = {key: (rank == 1).astype(float) for key, rank in ranks.items()}
    retrieval, model, fused = (figure((values, wanted)) for values in first.values())
    change = figure((first["fused"] - first["retrieval"], wanted))
    return Gain(
        name=name,
        queries=len(judged),
        products=len(set(wanted)),
        retrieval=retrieval.mean,
        retrieval_interval=(retrieval.low, retrieval.high),
        retrieval_at_9=float((ranks["retrieval"] <= TOP_K).mean()),
        model=model.mean,
        model_interval=(model.low, model.high),
        fused=fused.mean,
        fused_interval=(fused.low, fused.high),
        gain=change.mean,
        gain_interval=(change.low, change.high),
    )


def best_weight(judged: Sequence[Judged]) -> float:
    """The weight of the retrieval score with the highest Recall@1, then the highest mean reciprocal rank."""

    def worth(weight: float) -> tuple[float, float]:
        ranks = np.array([one.rank(weight) for one in judged])
        return float((ranks == 1).mean()), float((1 / ranks).mean())

    return max(WEIGHTS, key=worth)


def queries_of(bench: Bench, *, held_out: bool, wording: Wording, draws: int, every: int) -> list[tuple[Mode, Query]]:
    """Queries of all four modes."""
    made = [
        (mode, query)
        for mode in MODES
        for query in composed_queries(bench.products, mode, held_out=held_out, wording=wording, draws=draws)
    ]
    return made[::every]


def table(title: str, rows: Sequence[Gain]) -> str:
    """A Markdown table."""
    lines = [
        f"\n**{title}**\n",
        "| query | n | retrieval R@1 | R@9 | likelihood alone | fused R@1 | 95% | gain | 95% |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spans = [f"{low:.3f}–{high:.3f}" for low, high in (row.fused_interval, row.gain_interval)]
        lines.append(
            f"| {row.name} | {row.queries} | {row.retrieval:.3f} | {row.retrieval_at_9:.3f} | {row.model:.3f} "
            f"| {row.fused:.3f} | {spans[0]} | {row.gain:+.3f} | {spans[1]} |"
        )
    return "\n".join(lines)


def sentences(judged: Sequence[Judged]) -> dict[str, float]:
    """How many of the sentences are exactly right."""
    reasons = [one.reason_right for one in judged if one.reason_right is not None]
    return {
        "query caption": float(np.mean([one.caption_right for one in judged])),
        "wanted description": float(np.mean([one.wanted_right for one in judged])),
        "reason, where the first is right": float(np.mean(reasons)),
    }


def sentences_line(shares: dict[str, float]) -> str:
    """The same as a line of text."""
    return "Exactly right: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


def measure(bench: Bench, *, quick: bool = False) -> dict[str, Any]:
    """All figures; the tables are printed as they come."""
    thin = 10 if quick else 1
    seen_queries = queries_of(bench, held_out=False, wording="training", draws=1, every=8 if quick else 3)
    held_out_queries = queries_of(bench, held_out=True, wording="training", draws=3, every=thin)
    seen = bench.judged(seen_queries)
    weight = best_weight(seen)
    print(f"weight of the retrieval score chosen on {len(seen)} seen compositions: {weight}")
    results: dict[str, Any] = {"fusion_weight": weight}

    def section(title: str, judged: Sequence[Judged], weight: float, modes: Sequence[Mode] = MODES) -> None:
        rows = [gain(MODE_NAMES[mode], [one for one in judged if one.mode == mode], weight) for mode in modes]
        rows.append(gain("all", judged, weight))
        shares = sentences(judged)
        print(table(title, rows), sentences_line(shares), sep="\n\n")
        results[title] = {"recall": [asdict(row) for row in rows], "sentences": shares}

    section(HELD_OUT, bench.judged(held_out_queries), weight)
    strange = queries_of(bench, held_out=True, wording="held-out", draws=1, every=thin)
    section(REWORDED, bench.judged(strange), weight)
    section(SEEN, seen, weight, ())
    weak_seen = bench.judged(seen_queries[::2], composed=False)
    weak = bench.judged(held_out_queries[::2], composed=False)
    section(WEAKER, weak, best_weight(weak_seen))
    captions = caption_figures(bench, CAPTIONED_SEEDS[:1] if quick else CAPTIONED_SEEDS)
    for name, (count, share) in captions.items():
        print(f"\ndescriptions of {count} {name} exactly right: {share:.3f}")
    results["captions"] = captions
    return results


# ---------------------------------------------------------------------- where the figures are published


def write(results: dict[str, Any]) -> None:
    """Put the figures in the place of the earlier ones in the model card and in the table of measurements."""
    card = CARD.read_text(encoding="utf-8")
    before, rest = card.split(f"**{HELD_OUT}**", 1)
    after = re.split(r"^Likelihood alone on all .*\n", rest, maxsplit=1, flags=re.MULTILINE)[1]
    CARD.write_text(f"{before.rstrip()}\n{figures_text(results)}\n{after}", encoding="utf-8")
    first, reworded, weaker = (last_row(results, title) for title in (HELD_OUT, REWORDED, WEAKER))
    (count, share), _ = results["captions"].values()
    reasons = list(results[HELD_OUT]["sentences"].values())[-1]
    rows = {
        "| `tiny` reranker on ": f"{first.queries:,} queries for compositions never trained on | Recall@1 "
        f"{short(first.retrieval)} retrieved, {short(first.fused)} ({span(first.fused_interval)}) reranked; "
        f"wordings never trained on {short(reworded.retrieval)}, {short(reworded.fused)}; after a weaker retriever "
        f"(sum of both vectors) {short(weaker.retrieval)}, {short(weaker.fused)} (gain {span(weaker.gain_interval)}) "
        "| `python benchmarks/rerank_quality.py` |",
        "| its captions of ": f"{count} held-out products exactly right / reasons right where the first is right "
        f"| {short(share)} / {short(reasons)} | the same |",
    }
    lines = MEASUREMENTS.read_text(encoding="utf-8").splitlines(keepends=True)
    for start, row in rows.items():
        (place,) = (place for place, line in enumerate(lines) if line.startswith(start))
        lines[place] = f"{start}{row}\n"
    MEASUREMENTS.write_text("".join(lines), encoding="utf-8")


def figures_text(results: dict[str, Any]) -> str:
    """Tables and sentences of the model card."""
    parts = []
    for title in (HELD_OUT, REWORDED, SEEN, WEAKER):
        rows = [Gain(**row) for row in results[title]["recall"]]
        parts.append(f"{table(title, rows)}\n\n{sentences_line(results[title]['sentences'])}\n")
    (held_out, share), (seen, seen_share) = results["captions"].values()
    parts.append(
        f"\nDescriptions of images exactly right: {share:.3f} of {held_out} held-out products, {seen_share:.3f} of "
        f"{seen} seen ones.\n"
    )
    row = last_row(results, HELD_OUT)
    low, high = row.model_interval
    parts.append(
        f"\nLikelihood alone on all {row.queries} held-out queries: {row.model:.3f}, 95% interval {low:.3f}–{high:.3f}"
        f"; retrieval {row.retrieval:.3f}, {row.retrieval_interval[0]:.3f}–{row.retrieval_interval[1]:.3f}."
    )
    return "".join(parts)


def last_row(results: dict[str, Any], title: str) -> Gain:
    """All queries of a section together."""
    return Gain(**results[title]["recall"][-1])


def short(share: float) -> str:
    """As the tables of the documentation write it: .976."""
    return f"{share:.3f}".removeprefix("0")


def span(interval: Sequence[float]) -> str:
    """Both ends of an interval: .969–.993."""
    return "–".join(map(short, interval))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reranker", default="tiny", help="a name that load_phi3_vision knows, or a folder")
    parser.add_argument("--embedder", default="tiny", help="a name that load_visualized_bge knows, or a folder")
    parser.add_argument("--crops", type=int, help="most crops of an image; default: the reranker's")
    parser.add_argument("--quick", action="store_true", help="a tenth of the queries")
    parser.add_argument("--images", type=Path, help="folder to keep the drawn images in; default: a temporary one")
    parser.add_argument("--write", action="store_true", help="update the model card and the table of measurements")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    if arguments.write and (arguments.quick or {arguments.reranker, arguments.embedder} != {"tiny"}):
        parser.error("--write is for all figures of the bundled models: leave out --quick, --reranker and --embedder")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.images or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, arguments.embedder, arguments.reranker, arguments.crops)
        results = measure(bench, quick=arguments.quick)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.write:
        write(results)


if __name__ == "__main__":
    main()
