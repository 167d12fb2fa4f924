"""What one process does for a long time, and how much it grows by that, as JSON.

    python -m tests.support.endurance queries|load|openings|runs COUNT FOLDER

Memory, files and threads are looked at in the second and in the last quarter of the calls, several times in each, and
the lowest of each are compared: an allocator gives memory back late, threads of a closed server end late. The first
quarter warms up: arenas, thread pools, the first of everything.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES"] = "200000"  # (128 MB), read when it is imported

import psutil
import torch
from llama_index.core import QueryBundle, VectorStoreIndex
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.ingest import ingest_images
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.search_tools import ImageSearch
from mm_retriever.store import ImageStore, open_store
from mm_retriever.tools import ImageSearchToolSpec
from tests.support.drawn_store import KINDS, draw_images, draw_leopard, drawn_store
from tests.test_load import draw_all, open_shop, under_load

COLOURS = ("red", "blue", "green", "yellow", "black")
KEPT_FILTERS = 256
"""Expressions that Milvus Lite keeps compiled."""

Calls = Iterator[Callable[[], object]]


def queries(folder: Path) -> Calls:
    """Texts that never come twice, images, both, vectors with filters that never come twice, an agent's tool."""
    model = VisualizedBGEEmbedding("tiny", device="cpu", cache_dir=folder / "cache")
    store = drawn_store(folder, model)
    leopard = str(draw_leopard(folder / "leopard.png"))
    images = sorted(map(str, (folder / "images").rglob("*.jpg")))
    retriever = ComposedRetriever(store, model, top_k=5)
    index = VectorStoreIndex.from_vector_store(store, model).as_retriever(similarity_top_k=5)
    tools = ImageSearchToolSpec(ImageSearch(store, model))
    pool = [model.get_query_embedding(f"{colour} {kind}") for colour in COLOURS for kind in KINDS]
    chance = random.Random(1)
    numbers = itertools.count()

    def words() -> str:
        return f"{chance.choice(COLOURS)} {chance.choice(KINDS)} {next(numbers)}"

    def filtered() -> object:
        filters = MetadataFilters(
            filters=[
                MetadataFilter(key="label", value=chance.choice(KINDS)),
                MetadataFilter(key="bytes", value=next(numbers), operator=FilterOperator.NE),
            ]
        )
        query = VectorStoreQuery(query_embedding=chance.choice(pool), similarity_top_k=5, filters=filters)
        return store.query(query).ids

    for _ in range(KEPT_FILTERS):
        filtered()
    while True:
        for _ in range(5):
            yield lambda: retriever.retrieve(words())
            yield lambda: retriever.retrieve(QueryBundle("", image_path=chance.choice(images)))
            yield lambda: retriever.retrieve(QueryBundle(words(), image_path=leopard))
            yield lambda: index.retrieve(words())
            yield lambda: retriever.retrieve(QueryBundle("", embedding=chance.choice(pool)))
            yield filtered
        yield lambda: asyncio.run(retriever.aretrieve(words()))  # an event loop of its own each time
        yield lambda: tools.search_images(words()).results


def load(folder: Path) -> Calls:
    """Thirty queries by threads and by tasks in two event loops, all at once, while two threads ingest."""
    model = VisualizedBGEEmbedding("tiny", device="cpu", cache_dir=folder / "cache")
    store = open_store(folder / "load.db", model)
    shop = open_shop(draw_all(folder), store, model, VisualizedBGEEmbedding("tiny", device="cpu"))
    while True:
        yield lambda: under_load(shop, threads=6, tasks=(6, 3), each=2, rounds=1)


def openings(folder: Path) -> Calls:
    """A store that is opened, asked and closed."""
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    drawn_store(folder, model).close()

    def opening() -> object:
        with open_store(folder / "drawn.db", model) as store:
            return store.count()

    while True:
        yield opening


def runs(folder: Path) -> Calls:
    """Ingestion that finds nothing to do."""
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    store: ImageStore = drawn_store(folder, model)
    images = draw_images(folder / "images")

    def run() -> object:
        report = ingest_images(
            images, store, model, prune=True, report_path=folder / "report.json", show_progress=False
        )
        assert report.unchanged == store.count()
        return report

    while True:
        yield run


def measured(calls: Calls, count: int) -> dict[str, float]:
    process = psutil.Process()

    def cost() -> dict[str, int]:
        for _ in range(20):  # a closed server ends its threads in its own time, and takes its memory with it
            gc.collect()
            threads = process.num_threads()
            time.sleep(0.1)
            if process.num_threads() == threads:
                break
        return {
            "blocks": sys.getallocatedblocks(),  # exact to the object, where a resident size moves by megabytes
            "kib": process.memory_info().rss // 1024,
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }

    start = time.monotonic()
    quarters: dict[int, list[dict[str, int]]] = {1: [], 3: []}
    step = max(count // 24, 1)  # six looks in each quarter
    for number, call in enumerate(itertools.islice(calls, count), start=1):
        if number == 1:
            gc.collect()
            gc.freeze()  # what has been imported: looking through it each time would take a third of a second
        assert call(), "an answer"
        quarter = 4 * (number - 1) // count
        if quarter in quarters and number % step == 0:
            quarters[quarter].append(cost())
    before, after = ({name: min(look[name] for look in looks) for name in looks[0]} for looks in quarters.values())
    grown = {name: after[name] - before[name] for name in after}
    return {
        "calls": count,
        "seconds": round(time.monotonic() - start, 1),
        "rss_mib": after["kib"] // 1024,
        "blocks_a_call": grown["blocks"] / (count / 2),
        "kib_a_call": grown["kib"] / (count / 2),
        "files": grown["files"],
        "threads": grown["threads"],
    }


if __name__ == "__main__":
    kind, count, place = sys.argv[1:]
    torch.set_num_threads(1)
    calls = {"queries": queries, "load": load, "openings": openings, "runs": runs}[kind]
    Path(place).mkdir(parents=True, exist_ok=True)
    print(json.dumps(measured(calls(Path(place)), int(count))))
