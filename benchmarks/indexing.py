"""How fast a folder becomes a store, what a second run costs, and whether memory grows with the number of images.

    python benchmarks/indexing.py                                  # the bundled model, 300 drawn products
    python benchmarks/indexing.py --photos DIR --model BAAI/bge-visualized-base-en-v1.5
    python benchmarks/indexing.py --memory --sizes 1000 100000     # fresh processes, some minutes
    python benchmarks/indexing.py --unchanged --sizes 20000 200000 # a first run, then a second over the same files
    python benchmarks/indexing.py --photographs 200 --dtype int8   # 12 megapixels, base size, against the model alone
    python benchmarks/indexing.py --reduced                        # what exact_pixels=False costs in cosine

The rate is that of `ingest_images`, from files to rows, first run and second. For memory, each size is done twice, each
time in a fresh process: by `ingest_images` (files read, decoded, prepared, embedded, stored), and by Milvus Lite alone,
which is given the same rows in the same batches by its own client, from nothing but a random generator. What ingestion
grows by beyond that is its own. The model of the memory runs is a random projection to 768 numbers: a real model takes
the same memory for 1,000 images as for 20,000, and the vectors are of full size.

`--unchanged` indexes JPEG files of 32 pixels, each with bytes of its own, by that projection, and then indexes the
folder again, five times, each in a fresh process: nothing has changed, so that nothing is read or embedded. Memory is
that of the second run and of a process that only opens the same store and counts its rows. With `--keep` files and
store stay, and where they are there already nothing is indexed first.

`--photographs` draws JPEG files of 4000 x 3000 pixels, each with bytes of its own, and indexes them by the base size
with random weights (speed does not depend on them): alone, and with a process that keeps one core busy. The model alone
is measured in the same run, before and after, on images that are prepared already. The rate is that of the whole run;
its spread is that of the batches. In float32 two cores take minutes for 200 images; the number is yours.

`--reduced`, alone or with `--photographs`, prints how near the vectors of `exact_pixels=False` are to those of exact
pixels: the bundled model on drawn products of 1600 x 1600 pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import record
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from mm_retriever.embedders.embedder import Content

BATCH = 32
ROUNDS = 5
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
    parser.add_argument("--unchanged", action="store_true", help="measure a second run in which nothing has changed")
    parser.add_argument("--photographs", type=int, default=0, help="measure so many photographs of 12 megapixels")
    parser.add_argument("--dtype", default="float32", help="of the photographs: float32, bfloat16, int8 (by OpenVINO)")
    parser.add_argument("--reduced", action="store_true", help="exact_pixels=False: its cosine, and the photographs'")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 20_000], help="of --memory and --unchanged")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="second runs of --unchanged")
    parser.add_argument("--keep", type=Path, help="of --unchanged: keep files and store there, and use what is there")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), int(options.child[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.photographs:
            figures = photographs(work, options)
        elif options.unchanged:
            figures = unchanged(options.keep or work, options.sizes, options.rounds)
        elif options.reduced:
            figures = {"kind": "reduced", "cosine": reduced_cosine()}
        else:
            figures = memory(work, options.sizes) if options.memory else rate(work, options)
    record.write(options.json, figures, threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


# ---------------------------------------------------------------------------------------------- rate


def rate(work: Path, options: argparse.Namespace) -> dict[str, Any]:
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
    return {"kind": "rate", "model": options.model, "runs": figures}


# ---------------------------------------------------------------------------------------------- memory


def memory(work: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Peak memory of fresh processes, with and without ingestion, for each size."""
    figures: list[dict[str, Any]] = []
    for size in sizes:
        for kind in ("ingestion", "Milvus Lite alone"):
            place = work / f"{size}-{kind.split()[0]}"
            place.mkdir()
            if kind == "ingestion":
                link_images(place / "photos", size)
            figures.append(in_fresh_process(kind, place, size))
    table = Table(title=f"Peak memory, {DIMENSION} numbers a vector, batches of {BATCH}")
    for column in ("", "rows", "seconds", "peak MB", f"above {sizes[0]} rows"):
        table.add_column(column, justify="right" if column else "left")
    for kind in ("ingestion", "Milvus Lite alone"):
        rows = [row for row in figures if row["kind"] == kind]
        for row in rows:
            above = f"{row['peak_mb'] - rows[0]['peak_mb']:+.0f} MB" if row is not rows[0] else ""
            table.add_row(kind, str(row["rows"]), f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f}", above)
    Console().print(table)
    return {"kind": "memory", "runs": figures}


def in_fresh_process(kind: str, place: Path, size: int) -> dict[str, Any]:
    """One measured run alone; returns its figures."""
    arguments = [sys.executable, __file__, "--child", kind, str(place), str(size)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
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
        if kind in ("ingestion", "second run"):
            report = ingest_images(place / "photos", store, model, batch_size=BATCH, show_progress=False)
            assert (report.indexed, report.unchanged) == ((size, 0) if kind == "ingestion" else (0, size)), report
        elif kind == "Milvus Lite alone":
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


# ---------------------------------------------------------------------------------------------- nothing has changed


def unchanged(work: Path, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds and memory of a second run over each number of files."""
    runs: list[dict[str, Any]] = []
    for size in sizes:
        place = work / str(size)
        first = None if (place / "memory.db").exists() else first_run(place, size)
        again = [in_fresh_process("second run", place, size) for _ in range(rounds)]
        opened = in_fresh_process("only opened", place, size)
        row = {"rows": size, "first_seconds": first, "opened_mb": opened["peak_mb"], "opened": opened["seconds"]}
        row |= {"seconds": record.spread([run["seconds"] for run in again])}
        runs.append({**row, "peak_mb": record.spread([run["peak_mb"] for run in again])})
    table = Table(title=f"A second run in which nothing has changed, medians of {rounds}")
    for column in (
        "rows",
        "first run, s",
        "second run, s",
        "of which opening",
        "peak MB",
        "of which the open store, MB",
    ):
        table.add_column(column, justify="right")
    for row in runs:
        took = "kept" if row["first_seconds"] is None else f"{row['first_seconds']:.0f}"
        seconds = (f"{row['seconds']['median']:.2f}", f"{row['opened']:.2f}")
        memory = (f"{row['peak_mb']['median']:.0f}", f"{row['opened_mb']:.0f}")
        table.add_row(f"{row['rows']:,}", took, *seconds, *memory)
    Console().print(table)
    return {"kind": "unchanged", "runs": runs}


def first_run(place: Path, size: int) -> float:
    """Make the files and index them; returns the seconds of indexing."""
    small = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(small, "JPEG")
    for number in range(size):
        folder = place / "photos" / f"{number // 1_000:03d}"
        if not number % 1_000:
            folder.mkdir(parents=True)
        (folder / f"{number:06d}.jpg").write_bytes(with_comment(small.getvalue(), number))
    seconds: float = in_fresh_process("ingestion", place, size)["seconds"]
    return seconds


def with_comment(jpeg: bytes, number: int) -> bytes:
    """The same image in a file with bytes of its own."""
    comment = f"{number:016d}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


# ---------------------------------------------------------------------------------------------- photographs


def photographs(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second from files to rows, of the model alone, and beside a busy process."""
    from embedding_throughput import base_size

    from mm_retriever import ComposedEmbedding, load_image

    os.environ["XDG_CACHE_HOME"] = str(work)  # nothing made here is used again
    count, photos = options.photographs, work / "photos"
    draw_photographs(photos, count)
    embedder = base_size(options.dtype)
    model = ComposedEmbedding(embedder)
    images = [Content(image=embedder.prepare(load_image(path))) for path in sorted(photos.iterdir())[: BATCH // 2]]
    embedder.encode(images)
    alone = [model_rate(embedder, images) for _ in range(3)]
    whole, parts = indexed(work / "alone.db", photos, model, options)
    alone += [model_rate(embedder, images) for _ in range(2)]
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            beside, beside_parts = indexed(work / "beside.db", photos, model, options)
        finally:
            busy.kill()
    figures = {
        "kind": "photographs", "images": count, "dtype": options.dtype, "reduced": options.reduced,
        "model_alone": record.spread(alone), "indexed": whole, "indexed_parts": record.spread(parts),
        "beside_busy": beside, "beside_busy_parts": record.spread(beside_parts),
    }  # fmt: skip
    if options.reduced:
        figures["cosine"] = reduced_cosine()
    table = Table(title=f"{count} photographs of 12 megapixels, base size, {options.dtype}")
    for column in ("", "images/s", "share"):
        table.add_column(column, justify="right" if column else "left")
    median = figures["model_alone"]["median"]
    table.add_row("the model alone", f"{median:.2f}", "")
    table.add_row("from files to rows", f"{whole:.2f}", f"{whole / median:.0%} of the model alone")
    table.add_row("beside a busy process", f"{beside:.2f}", f"{beside / whole:.0%} of the undisturbed rate")
    Console().print(table)
    return figures


def draw_photographs(folder: Path, count: int) -> None:
    """JPEG files as a camera writes them: detail of every size, noise, 4:2:0; no two of a batch alike."""
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.normal(128, 6, size=(3000, 4000, 3))
    for side in (6, 24, 96, 384):
        coarse = Image.fromarray(random.integers(0, 255, size=(side * 3 // 4, side, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC), dtype=np.float32) - 128) / 4
    photo = pixels.clip(0, 255).astype(np.uint8)
    originals = []
    for number in range(min(BATCH, count)):
        file = io.BytesIO()
        Image.fromarray(np.roll(photo, (97 * number, 61 * number), (0, 1))).save(file, "JPEG", quality=90)
        originals.append(file.getvalue())
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(with_comment(originals[number % len(originals)], number))


def reduced_cosine() -> dict[str, float]:
    """Of vectors of reduced and of exact pixels, by the bundled model."""
    from mm_retriever import load_embedder
    from mm_retriever.demo.catalogue import catalogue
    from mm_retriever.images import opened_image

    embedder = load_embedder("tiny", device="cpu")
    contents: list[Content] = []
    for product in catalogue()[:24]:
        file = io.BytesIO()
        product.draw(1600).save(file, "JPEG", quality=90)
        for least_side in (0, 2 * embedder.prepare(Image.new("RGB", (64, 64))).shape[0]):
            with opened_image(file.getvalue(), keep_mode=True, least_side=least_side) as image:
                contents.append(Content(image=embedder.prepare(image)))
    vectors = embedder.encode(contents)
    cosines = (vectors[::2] * vectors[1::2]).sum(axis=1)
    print(f"cosine to the vectors of exact pixels: least {cosines.min():.6f}, mean {cosines.mean():.6f}")
    return {"least": float(cosines.min()), "mean": float(cosines.mean())}


def model_rate(embedder: Any, images: Sequence[Content]) -> float:
    """Images per second of the model, which are prepared already."""
    start = time.perf_counter()
    embedder.encode(images)
    return len(images) / (time.perf_counter() - start)


def indexed(db: Path, photos: Path, model: Any, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Images per second of a whole first run, and of each of its batches."""
    from mm_retriever import ingest_images, open_store

    reduced = {"exact_pixels": False} if options.reduced else {}
    times: list[float] = []

    def watched(done: int, total: int | None) -> bool:
        times.append(time.perf_counter())
        return True

    with open_store(db, model) as store:
        report = ingest_images(photos, store, model, batch_size=BATCH, show_progress=False, progress=watched, **reduced)
    assert report.embedded == options.photographs, report
    spans = [later - earlier for earlier, later in pairwise(times[::BATCH])]
    return report.embedded / report.seconds, [BATCH / span for span in spans or [report.seconds]]


if __name__ == "__main__":
    main()
