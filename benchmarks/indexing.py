"""How fast a folder becomes a store, and whether memory grows with it by more than Milvus Lite needs for the vectors.

    python benchmarks/indexing.py                                  # the bundled model, 300 drawn products
    python benchmarks/indexing.py --photos DIR --model BAAI/bge-visualized-base-en-v1.5
    python benchmarks/indexing.py --memory --sizes 1000 20000      # four fresh processes, a few minutes

The rate is that of `ingest_images`, from files to rows, first run and second. For memory, each size is done twice, each
time in a fresh process: by `ingest_images` (files read, decoded, prepared, embedded, stored), and by Milvus Lite alone,
which is given the same rows in the same batches by its own client, from nothing but a random generator. What ingestion
grows by beyond that is its own. The model of the memory runs is a random projection to 768 numbers: a real model takes
the same memory for 1,000 images as for 20,000, and the vectors are of full size.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

BATCH = 32
DIMENSION = 768


class Projection:
    """A model that takes no time and no memory to speak of: 16 x 16 grey pixels, projected at random."""

    dimension = DIMENSION
    model_id = "projection"

    def __init__(self) -> None:
        self._matrix = np.random.default_rng(0).normal(size=(256, DIMENSION)).astype(np.float32)

    def prepare_image(self, image: Image.Image) -> NDArray[np.uint8]:
        """(224, 224, 3), as the real one keeps it."""
        return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))

    def embed_images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(B, 768) of length 1."""
        small = np.stack([image[::14, ::14, 0] for image in images]).reshape(len(images), 256).astype(np.float32)
        vectors = small @ self._matrix
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def get_text_embedding_batch(self, texts: list[str]) -> list[list[float]]:
        """There are no texts here."""
        raise NotImplementedError


def main() -> None:
    """Parse, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="of the rate")
    parser.add_argument("--photos", type=Path, help="a folder for the rate; default: drawn products")
    parser.add_argument("--images", type=int, default=300, help="how many are drawn")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of the rate")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 20_000], help="of the memory runs")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), int(options.child[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        figures = memory(work, options.sizes) if options.memory else rate(work, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- rate


def rate(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second of a first and of a second run."""
    from mm_retriever import VisualizedBGEEmbedding, ingest_images, open_store
    from mm_retriever.demo.catalogue import write_catalogue

    photos = options.photos or write_catalogue(work / "drawn", count=options.images).products
    model = VisualizedBGEEmbedding(options.model)
    figures = []
    with open_store(work / "rate.db", model) as store:
        for run in ("first run", "second run"):
            report = ingest_images(photos, store, model, batch_size=BATCH, show_progress=False)
            images = report.indexed + report.unchanged
            row = {"run": run, "images": images, "embedded": report.embedded, "seconds": report.seconds}
            figures.append({**row, "images_per_second": images / report.seconds})
    table = Table(title=f"Indexing, {options.model}, {model.dimension} numbers, {os.cpu_count()} cores")
    for column in ("", "images", "embedded", "seconds", "images/s"):
        table.add_column(column, justify="right" if column else "left")
    for row in figures:
        numbers = (str(row["images"]), str(row["embedded"]), f"{row['seconds']:.2f}")
        table.add_row(row["run"], *numbers, f"{row['images_per_second']:.1f}")
    Console().print(table)
    return figures


# ---------------------------------------------------------------------------------------------- memory


def memory(work: Path, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of fresh processes, with and without ingestion, for each size."""
    figures: list[dict[str, Any]] = []
    for size in sizes:
        for kind in ("ingestion", "Milvus Lite alone"):
            place = work / f"{size}-{kind.split()[0]}"
            place.mkdir()
            if kind == "ingestion":
                link_images(place / "photos", size)
            arguments = [sys.executable, __file__, "--child", kind, str(place), str(size)]
            done = subprocess.run(arguments, check=True, capture_output=True, text=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"Peak memory, {DIMENSION} numbers a vector, batches of {BATCH}")
    for column in ("", "rows", "seconds", "peak MB", f"above {sizes[0]} rows"):
        table.add_column(column, justify="right" if column else "left")
    for kind in ("ingestion", "Milvus Lite alone"):
        rows = [row for row in figures if row["kind"] == kind]
        for row in rows:
            above = f"{row['peak_mb'] - rows[0]['peak_mb']:+.0f} MB" if row is not rows[0] else ""
            table.add_row(kind, str(row["rows"]), f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f}", above)
    Console().print(table)
    return figures


def link_images(folder: Path, count: int) -> None:
    """Many files: 100 images of a camera's noise and detail, each under many names."""
    folder.mkdir()
    random = np.random.default_rng(0)
    originals = []
    for number in range(min(100, count)):
        coarse = random.integers(0, 255, size=(24, 24, 3), dtype=np.uint8)
        path = folder.parent / f"original-{number}.jpg"
        Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC).save(path, quality=85)
        originals.append(path)
    for number in range(count):
        os.link(originals[number % len(originals)], folder / f"{number:06d}.jpg")


def child(kind: str, place: Path, size: int) -> dict[str, Any]:
    """One measured run in this process."""
    from mm_retriever import ingest_images, open_store

    model = Projection()
    start = time.perf_counter()
    with open_store(place / "memory.db", model) as store:
        if kind == "ingestion":
            report = ingest_images(place / "photos", store, model, batch_size=BATCH, show_progress=False)
            assert report.indexed == size, report
        else:
            fill(store, size)
        rows = store.count()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"kind": kind, "rows": rows, "seconds": time.perf_counter() - start, "peak_mb": peak}


def fill(store: Any, size: int) -> None:
    """Give Milvus Lite's own client rows like those of ingestion."""
    from llama_index.core.schema import ImageNode

    from mm_retriever.store.rows import node_to_row

    random = np.random.default_rng(0)
    columns = {"file_name": "000000.jpg", "label": "", "width": 512, "height": 384, "bytes": 30_000}
    columns |= {"mtime_ns": 1_700_000_000_000_000_000, "digest": "0" * 64, "file_path": f"/{'x' * 60}/000000.jpg"}
    node = ImageNode(image_path=columns["file_path"], metadata=columns, embedding=[0.5] * DIMENSION)
    pattern = node_to_row(node, DIMENSION)
    for begin in range(0, size, BATCH):
        vectors = random.normal(size=(min(BATCH, size - begin), DIMENSION)).astype(np.float32)
        rows = [{**pattern, "id": f"{begin + n:036d}", "embedding": one} for n, one in enumerate(vectors)]
        store.client.insert(store.collection_name, rows)


if __name__ == "__main__":
    main()
