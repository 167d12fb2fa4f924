"""What fine-tuning and a teacher are worth: the bundled tiny embedder on drawn products, by one command.

    python benchmarks/fine_tuning.py                       # under twenty minutes on two cores
    python benchmarks/fine_tuning.py --quick               # a small form, two minutes
    python benchmarks/fine_tuning.py --json fine-tuning.json

A customer's words are new to the model: half of the held-out templates of `phrases.py` are trained on, the other half
is tested. So are kinds in patterns that nothing was trained on (`HELD_OUT`), in images from other seeds. Queries rank
900 products. The control trains on the same triplets with their targets shuffled.

The teacher is the bundled reranker; the first stage is the bundled embedder with noise in its weights. No target is
used: the reranker judges what the weakened model finds. Intervals are 95% bootstrap intervals over wanted products.
"""

from __future__ import annotations

import argparse
import json
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

from mm_retriever import load_embedder, load_reranker
from mm_retriever.demo.catalogue import HELD_OUT, PATTERNS, Looks, all_looks, draw_product, draw_theme
from mm_retriever.demo.catalogue.drawing import SEED_BLOCK
from mm_retriever.embedders.embedder import Trainable
from mm_retriever.evaluation.datasets import LabelledQuery
from mm_retriever.evaluation.metrics import Figure, figure
from mm_retriever.training import Recipe, train
from mm_retriever.training.vectors import Vectors

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "training"))
import phrases
from phrases import MODES, Mode, compose_query

SIZE = 160  # pixels at which products are drawn
TOP_K = 9
SEEDS = {"train": 700 * SEED_BLOCK, "test": 710 * SEED_BLOCK, "catalogue": 720 * SEED_BLOCK}


@dataclass(frozen=True)
class Test:
    """Queries that rank products."""

    queries: Sequence[LabelledQuery]
    wanted: Sequence[int]
    products: Sequence[Path]

    def ranks(self, embedder: Any) -> tuple[np.ndarray, np.ndarray]:
        """1-based rank of each query's right product, ties counted against it; and all scores."""
        vectors = Vectors(embedder)
        scores = vectors.queries(self.queries) @ vectors.images(self.products).T
        own = scores[np.arange(len(self.wanted)), list(self.wanted)]
        return (scores >= own[:, None]).sum(1), scores


class Drawn:
    """Products, triplets and tests in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        (folder / "images").mkdir(parents=True)
        self.count = 0
        self.targets: dict[Looks, Path] = {}

    def draw(self, looks: Looks, seed: int) -> Path:
        """The image of a product, or of a theme where the kind is None."""
        kind, pattern, colour = looks
        image = draw_theme(pattern, colour, seed, SIZE) if kind is None else draw_product(*looks, seed, SIZE)
        self.count += 1
        path = self.folder / "images" / f"{self.count}.jpg"
        image.save(path, quality=92)
        return path

    def queries(
        self, wanted: Sequence[Looks], words: dict[Mode, tuple[str, ...]], block: int, *, most: int | None = None
    ) -> list[Any]:
        """A query for each product that one can be asked for, or the first of them: image, words, and product."""
        phrases._HELD_OUT = words  # the templates that this half of the benchmark may use
        made = []
        for number, looks in enumerate(wanted):
            mode = MODES[number % len(MODES)]
            never = HELD_OUT if block == SEEDS["train"] else frozenset()
            query = compose_query(looks, mode, self.rng, wording="held-out", never=never)
            if query is not None:
                made.append((query, block + number))
        by_pattern = sorted(
            made[:most], key=lambda one: PATTERNS.index(one[0].source.pattern)
        )  # each map is drawn once
        return [(self.draw(query.source, seed), query.text, query.wanted) for query, seed in by_pattern]

    def triplets(self, queries: Sequence[Any], *, shuffled: bool = False) -> Path:
        """A file of queries, each with an image of its own of the right product, or of that of another query."""
        targets = [looks for _, _, looks in queries]
        if shuffled:
            targets = [targets[place] for place in self.rng.permutation(len(targets))]
        drawn, wanted = self.targets, set(targets)
        for place, looks in enumerate(sorted(all_looks(), key=lambda one: PATTERNS.index(one.pattern))):
            if looks in wanted and looks not in drawn:
                drawn[looks] = self.draw(looks, SEEDS["train"] + 500_000 + place)
        lines = [
            {"image": str(image), "text": text, "targets": [str(drawn[looks])]}
            for (image, text, _), looks in zip(queries, targets, strict=True)
        ]
        path = self.folder / f"{'shuffled' if shuffled else 'queries'}-{self.count}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return path

    def test(self, count: int, words: dict[Mode, tuple[str, ...]], products: int) -> Test:
        """Queries for held-out pairs among so many products."""
        looks = all_looks()
        chosen = [looks[place] for place in self.rng.permutation(len(looks))[:products]]
        chosen.sort(key=lambda one: PATTERNS.index(one.pattern))
        paths = [self.draw(one, SEEDS["catalogue"] + place) for place, one in enumerate(chosen)]
        rows = {one: place for place, one in enumerate(chosen)}
        held_out = [one for one in chosen if (one.kind, one.pattern) in HELD_OUT]
        asked = [held_out[int(self.rng.integers(len(held_out)))] for _ in range(count)]
        queries = self.queries(asked, words, SEEDS["test"])
        labelled = [LabelledQuery(image, text, (paths[rows[one]],)) for image, text, one in queries]
        return Test(labelled, [rows[one] for _, _, one in queries], paths)


def gain(before: np.ndarray, after: np.ndarray, wanted: Sequence[int]) -> Figure:
    """How much more queries have their right product first."""
    return figure(((after == 1).astype(float) - (before == 1), wanted))


def first(ranks: np.ndarray, wanted: Sequence[int]) -> Figure:
    """Recall@1."""
    return figure(((ranks == 1).astype(float), wanted))


def fine_tuning(drawn: Drawn, test: Test, trained: Sequence[Any], recipe: Recipe) -> dict[str, Any]:
    """Before, after, and after training on shuffled targets."""
    before, _ = test.ranks(load_embedder("tiny", device="cpu"))
    results: dict[str, Any] = {"queries": len(test.queries), "before": asdict(first(before, test.wanted))}
    print(f"Recall@1 before, {len(test.queries)} queries: {first(before, test.wanted)}", flush=True)
    for name, shuffled in (("right targets", False), ("shuffled targets", True)):
        started = time.perf_counter()
        out = drawn.folder / f"model-{shuffled}"
        training = train(drawn.triplets(trained, shuffled=shuffled), "tiny", out, recipe=recipe, device="cpu", say=_say)
        after, _ = test.ranks(load_embedder(out, device="cpu"))
        difference = gain(before, after, test.wanted)
        seconds = time.perf_counter() - started
        print(
            f"{name}: {first(after, test.wanted)}, gain {difference}; step {training.kept} of {training.steps}, "
            f"{seconds:.0f} s",
            flush=True,
        )
        results[name] = {"after": asdict(first(after, test.wanted)), "gain": asdict(difference), "seconds": seconds}
    return results


def weakened(folder: Path, noise: float) -> Path:
    """The bundled embedder with noise in every matrix, so large as a share of the matrix's own deviation."""
    embedder = load_embedder("tiny", device="cpu")
    assert isinstance(embedder, Trainable)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in embedder.network.parameters():
            if parameter.dim() > 1:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    embedder.save(folder)
    return folder


def reranked_first(test: Test, scores: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Rank of the right product after the reranker has ordered the first nine; one after the last if not there."""
    reranker = load_reranker("tiny", top_n=TOP_K, device="cpu")
    ranks = []
    for place in places:
        query, found = test.queries[place], np.argsort(-scores[place], kind="stable")[:TOP_K]
        nodes = [
            NodeWithScore(
                node=ImageNode(id_=str(row), image_path=str(test.products[row])), score=float(scores[place, row])
            )
            for row in found
        ]
        result = reranker.rerank(nodes, QueryBundle(query.text, image_path=str(query.image)))
        order = [int(node.node.node_id) for node in result.nodes]
        wanted = test.wanted[place]
        ranks.append(order.index(wanted) + 1 if wanted in order else TOP_K + 1)
    return np.array(ranks)


def distillation(drawn: Drawn, test: Test, asked: Sequence[Any], recipe: Recipe, noise: float) -> dict[str, Any]:
    """The weakened first stage, the reranker after it, and the first stage that has learned from the reranker."""
    started = time.perf_counter()
    weak = weakened(drawn.folder / "weak", noise)
    before, scores = test.ranks(load_embedder(weak, device="cpu"))
    places = range(len(test.queries))
    reranked = reranked_first(test, scores, places)
    print(f"weakened: {first(before, test.wanted)}, R@9 {np.mean(before <= TOP_K):.3f}", flush=True)
    lift = gain(before, reranked, test.wanted)
    print(f"reranked: {first(reranked, test.wanted)}, lift {lift}; {time.perf_counter() - started:.0f} s", flush=True)
    out = drawn.folder / "distilled"
    train(drawn.triplets(asked), weak, out, recipe=recipe, teacher="tiny", device="cpu", say=_say)
    after, _ = test.ranks(load_embedder(out, device="cpu"))
    own = gain(before, after, test.wanted)
    part = own.mean / lift.mean if lift.mean else float("nan")
    seconds = time.perf_counter() - started
    print(
        f"distilled: {first(after, test.wanted)}, gain {own}: {part:.0%} of the reranker's lift; {seconds:.0f} s",
        flush=True,
    )
    return {
        "queries": len(test.queries),
        "weakened": asdict(first(before, test.wanted)),
        "lift": asdict(lift),
        "distilled": asdict(first(after, test.wanted)),
        "gain": asdict(own),
        "recovered": part,
        "seconds": seconds,
    }


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form")
    parser.add_argument("--only", choices=("fine-tuning", "teacher"), help="one of the two experiments")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--noise", type=float, default=0.9, help="in the weights of the first stage that is taught")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    known = phrases.templates("held-out")
    trained_words = {mode: known[mode][:3] for mode in MODES}
    tested_words = {mode: known[mode][3:] for mode in MODES}
    triplets, queries, judged, products = (300, 360, 300, 300) if arguments.quick else (2_000, 900, 600, 900)
    recipe = Recipe(epochs=2, negatives=2, learning_rate=arguments.learning_rate, bf16=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        drawn = Drawn(Path(temporary) / "drawn", seed=0)
        test = drawn.test(queries, tested_words, products)
        seen = [one for one in all_looks() if (one.kind, one.pattern) not in HELD_OUT]
        wanted = [seen[int(drawn.rng.integers(len(seen)))] for _ in range(2 * triplets)]
        trained = drawn.queries(wanted, trained_words, SEEDS["train"], most=triplets)
        trained = [trained[place] for place in drawn.rng.permutation(len(trained))]
        print(f"{len(trained)} triplets, {drawn.count} images; {time.perf_counter() - started:.0f} s", flush=True)
        if arguments.only != "teacher":
            results["fine-tuning"] = fine_tuning(drawn, test, trained, recipe)
        if arguments.only != "fine-tuning":
            part = Test(test.queries[::3], test.wanted[::3], test.products)
            taught = Recipe(epochs=2, batch_size=32, learning_rate=3e-4)
            results["teacher"] = distillation(drawn, part, trained[:judged], taught, arguments.noise)
    results["seconds"] = time.perf_counter() - started
    print(f"{results['seconds']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
