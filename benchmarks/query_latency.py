"""How long a query takes and how much memory the store needs, for 1,000 to 100,000 vectors in Milvus Lite.

    python benchmarks/query_latency.py
    python benchmarks/query_latency.py --sizes 1000 --index HNSW --json latency.json

Vectors are random, of length 1 and 768 numbers; the time of a query does not depend on what they mean. Each size is
written by one fresh process and read by five others, one after the other, so that memory is that of searching alone.
Latency is that of `ImageStore.query` for nine results as whole nodes, without embedding the query: of each process the
median and the 95th percentile, of the five the median and the spread. The filter is `price < 5`, which half of the rows
satisfy. "Just stored" is the same in the process that wrote the rows, after the `flush` that ends an ingestion: the
first query, and the median of those that follow.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import record
from rich.console import Console
from rich.table import Table

DIMENSION = 768
TOP_K = 9
MODEL = SimpleNamespace(dimension=DIMENSION, model_id="random")


def main() -> None:
    """Parse, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--readers", type=int, default=5)
    parser.add_argument("--index", default="auto", help="auto (FLAT), HNSW")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step, place, index, number = options.child
        print(json.dumps({"write": write, "read": read}[step](Path(place), index, int(number))))
        return
    figures = [measured(size, options) for size in options.sizes]
    print_table(figures, options)
    record.write(options.json, {"index": options.index, "sizes": figures}, threads=os.cpu_count() or 1)


def measured(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latency.db"
        written = in_fresh_process("write", path, options.index, size)
        asked = ("read", path, options.index, options.queries)
        readers = [in_fresh_process(*asked) for _ in range(options.readers)]
    return {"rows": size, **written, **{name: record.spread([one[name] for one in readers]) for name in readers[0]}}


def in_fresh_process(step: str, path: Path, index: str, number: int) -> dict[str, Any]:
    """Run one step alone; returns its figures."""
    arguments = [sys.executable, __file__, "--child", step, str(path), index, str(number)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def write(path: Path, index: str, size: int) -> dict[str, float]:
    """Store as many random vectors."""
    from llama_index.core.schema import ImageNode

    from mm_retriever.store import open_store

    random = np.random.default_rng(0)
    start = time.perf_counter()
    with open_store(path, MODEL, index=index) as store:
        for begin in range(0, size, 1_000):
            vectors = random.normal(size=(min(1_000, size - begin), DIMENSION))
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            store.add(
                [
                    ImageNode(
                        id_=f"{begin + number:08d}",
                        image_path=f"/photos/{begin + number}.jpg",
                        metadata={"price": float((begin + number) % 10), "file_name": f"{begin + number}.jpg"},
                        embedding=vector.tolist(),
                    )
                    for number, vector in enumerate(vectors)
                ]
            )
        seconds = time.perf_counter() - start
        store.flush()
        just = {name: timed(store, filters, 6) for name, filters in filters_by_name().items()}
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    stored = {f"just_stored_{name}_first_ms": times[0] for name, times in just.items()}
    stored |= {f"just_stored_{name}_ms": float(np.median(times[1:])) for name, times in just.items()}
    return {"write_seconds": seconds, "disk_mb": disk / 2**20, **stored}


def filters_by_name() -> dict[str, Any]:
    """The two kinds of queries."""
    from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

    cheap = MetadataFilters(filters=[MetadataFilter(key="price", operator=FilterOperator.LT, value=5)])
    return {"plain": None, "filtered": cheap}


def timed(store: Any, filters: Any, queries: int) -> list[float]:
    """Milliseconds of each query."""
    from llama_index.core.vector_stores.types import VectorStoreQuery

    random = np.random.default_rng(1)
    times = []
    for _ in range(queries):
        vector = random.normal(size=DIMENSION)
        query = VectorStoreQuery(
            query_embedding=(vector / np.linalg.norm(vector)).tolist(), similarity_top_k=TOP_K, filters=filters
        )
        start = time.perf_counter()
        found = store.query(query)
        times.append(1e3 * (time.perf_counter() - start))
        assert len(found.ids or ()) == TOP_K
    return times


def read(path: Path, index: str, queries: int) -> dict[str, float]:
    """Open the store and ask it."""
    from mm_retriever.store import open_store

    start = time.perf_counter()
    store = open_store(path, MODEL, index=index)
    figures = {"open_seconds": time.perf_counter() - start}
    for name, filters in filters_by_name().items():
        times = timed(store, filters, queries + 1)
        figures[f"{name}_first_ms"] = times[0]
        figures[f"{name}_ms"], figures[f"{name}_p95_ms"] = np.percentile(times[1:], [50, 95]).tolist()
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    store.close()
    return figures


def print_table(figures: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """One row for each size."""
    medians = f"medians of {options.readers}"
    table = Table(title=f"Milvus Lite, {DIMENSION} numbers a vector, index {options.index}, top {TOP_K}; {medians}")
    for column in (
        *("vectors", "written in s", "on disk MB", "opened in s", "query ms (p95)", "filtered ms (p95)"),
        *("just stored ms (first)", "filtered", "MB"),
    ):
        table.add_column(column, justify="right")
    for row in figures:
        median = {name: value["median"] for name, value in row.items() if isinstance(value, dict)}
        table.add_row(
            f"{row['rows']:,}",
            f"{row['write_seconds']:.1f}",
            f"{row['disk_mb']:.0f}",
            f"{median['open_seconds']:.1f}",
            *(f"{median[f'{name}_ms']:.1f} ({median[f'{name}_p95_ms']:.1f})" for name in ("plain", "filtered")),
            *(
                f"{row[f'just_stored_{name}_ms']:.1f} ({row[f'just_stored_{name}_first_ms']:.0f})"
                for name in ("plain", "filtered")
            ),
            f"{median['peak_mb']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
