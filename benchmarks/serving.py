"""Many users at `mm-retriever serve`: errors, wrong answers, waiting time, memory, and what batching brings.

    python benchmarks/serving.py                                   # 50 users for 10 minutes, 200 drawn products
    python benchmarks/serving.py --users 8 --seconds 20 --json serving.json
    python benchmarks/serving.py --vectors 100000                  # the same over 100,000 rows, most of random vectors

A server of its own is started on loopback over a collection that is drawn for it. Each user sends one search after
another over a connection that stays open: words, an image, or both. The answer of each is known: it is what the library
finds in this process before the server starts; results whose scores differ by less than 1e-5 may stand in any order.
"Besides the model" is the time that a user waits, less what the answer's Server-Timing header says of the model: its
passes and the wait for them. In the same run one user alone, before the many and after them, gives the rate of calls
one by one. Memory is the median of the first and of the last sixth of the run. The `search` command is timed as a whole
process, with the server running and without any.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import record
from rich.console import Console
from rich.table import Table

TOP_K = 9
TIE = 1e-5  # the vectors of one query in two batch sizes differ by less
ALONE_SECONDS = 10.0
COMMAND = (sys.executable, "-m", "mm_retriever.cli")


@dataclass(frozen=True)
class Asked:
    """A search, and what it finds."""

    body: bytes
    scores: dict[str, float]  # of the nearest 2 * TOP_K, best first


@dataclass
class Tally:
    """What one user or all of them saw."""

    waits: list[float] = field(default_factory=list)  # seconds
    besides: list[float] = field(default_factory=list)  # seconds, without those of the model
    errors: list[str] = field(default_factory=list)
    wrong: int = 0

    def add(self, other: Tally) -> None:
        """Count what another saw too."""
        self.waits += other.waits
        self.besides += other.besides
        self.errors += other.errors
        self.wrong += other.wrong


def main() -> None:
    """Parse, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--images", type=int, default=200, help="how many are drawn")
    parser.add_argument("--vectors", type=int, default=0, help="rows with random vectors besides")
    parser.add_argument("--commands", type=int, default=9, help="how often `search` is timed; 0: not at all")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    print_table(figures)
    record.write(options.json, figures, threads=os.cpu_count() or 1)


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    db = work / "serving.db"
    asked = prepare(work, db, options)
    figures: dict[str, Any] = {"model": options.model, "users": options.users, "rows": options.images + options.vectors}
    without = [command_seconds(db) for _ in range(options.commands)]
    with served(db, work) as (url, process):
        under_load(url, asked, 2, 2.0)  # what is loaded with the first requests
        alone = min(ALONE_SECONDS, options.seconds)
        one, before = under_load(url, asked, 1, alone)
        under_load(url, asked, options.users, min(5.0, options.seconds))
        with memory_mb(process.pid) as held:
            many, seconds = under_load(url, asked, options.users, options.seconds)
        one_again, after = under_load(url, asked, 1, alone)
        one.add(one_again)
        with_server = [command_seconds(db) for _ in range(options.commands)]
    sixth = max(1, len(held) // 6)
    figures |= {"memory_start_mb": float(np.median(held[:sixth])), "memory_end_mb": float(np.median(held[-sixth:]))}
    alone, together = len(one.waits) / (before + after), len(many.waits) / seconds
    figures |= {"seconds": seconds, "requests": len(many.waits), "per_second": together, "per_second_alone": alone}
    figures |= {"errors": len(many.errors) + len(one.errors), "wrong": many.wrong + one.wrong}
    figures |= {"first_errors": (one.errors + many.errors)[:3]}
    for name, times in (("wait", many.waits), ("besides_model", many.besides), ("alone", one.waits)):
        median, late = np.percentile(times or [0.0], [50, 95]) * 1e3
        figures |= {f"{name}_p50_ms": float(median), f"{name}_p95_ms": float(late)}
    if options.commands:
        figures |= {"search_with_server_s": float(np.median(with_server)), "search_alone_s": float(np.median(without))}
    return figures


# ---------------------------------------------------------------------------------------------- what is asked


def prepare(work: Path, db: Path, options: argparse.Namespace) -> list[Asked]:
    """Index a drawn catalogue; returns searches with their answers, by the library alone."""
    from mm_retriever import VisualizedBGEEmbedding, ingest_images, open_store
    from mm_retriever.demo.catalogue import catalogue, write_catalogue

    drawn = write_catalogue(work / "drawn", count=options.images)
    texts = [product.description for product in catalogue(options.images)[:40]]
    images = [path.read_bytes() for path in sorted(drawn.themes.glob("*.jpg"))]
    model = VisualizedBGEEmbedding(options.model)
    with open_store(db, model) as store:
        ingest_images(drawn.products, store, model, show_progress=False)
        add_random(store, model.dimension, options.vectors)
        queries: list[tuple[str, bytes | None]] = [(text, None) for text in texts]
        queries += [("", image) for image in images]
        kinds = ("phone case", "mug", "umbrella", "dress")
        queries += [(f"{kind} with this", image) for kind in kinds for image in images]
        return [answered(store, model, *query) for query in queries]


def answered(store: Any, model: Any, text: str, image: bytes | None) -> Asked:
    """One search with its answer."""
    from mm_retriever import ComposedRetriever

    body: dict[str, Any] = {"text": text, "top_k": TOP_K}
    if image is not None:
        body["image"] = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    retriever = ComposedRetriever(store, model, top_k=2 * TOP_K, unique=True)
    found = retriever.retrieve(model.get_query_bundle(text, image))
    return Asked(json.dumps(body).encode(), {hit.node.node_id: float(hit.score or 0.0) for hit in found})


def add_random(store: Any, dimension: int, count: int) -> None:
    """Rows whose vectors are random, and which a facet can count."""
    from llama_index.core.schema import ImageNode

    generator = np.random.default_rng(0)
    for begin in range(0, count, 1_000):
        vectors = generator.normal(size=(min(1_000, count - begin), dimension))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        names = range(begin, begin + len(vectors))
        metadata = [{"file_name": f"{name}.jpg", "label": f"kind {name % 12}", "price": name % 100} for name in names]
        rows = zip(names, vectors, metadata, strict=True)
        store.add(
            [
                ImageNode(
                    id_=f"{name:08d}", image_path=f"/photos/{name}.jpg", metadata=facts, embedding=vector.tolist()
                )
                for name, vector, facts in rows
            ]
        )


def is_right(asked: Asked, ids: Sequence[str]) -> bool:
    """Whether an answer is the known one, up to the order of results that score the same."""
    expected = list(asked.scores.items())
    if len(ids) != min(TOP_K, len(expected)) or len(set(ids)) != len(ids):
        return False
    pairs = zip(ids, expected, strict=False)
    return all(name in asked.scores and abs(asked.scores[name] - score) < TIE for name, (_, score) in pairs)


# ---------------------------------------------------------------------------------------------- the server


@contextmanager
def served(db: Path, work: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of a server that is ready."""
    command = [*COMMAND, "serve", "--db", str(db), "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    log = work / "server.log"
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            while (ready := re.search(r"serving on (http://\S+)", log.read_text(encoding="utf-8"))) is None:
                if process.poll() is not None:
                    raise SystemExit(log.read_text(encoding="utf-8"))
                time.sleep(0.05)
            yield ready[1], process
        finally:
            process.terminate()
            process.wait(60)


def under_load(url: str, asked: Sequence[Asked], users: int, seconds: float) -> tuple[Tally, float]:
    """What as many users saw together, and for how many seconds."""
    tallies = [Tally() for _ in range(users)]
    started = time.perf_counter()
    threads = [
        threading.Thread(target=one_user, args=(url, asked, number, started + seconds, tally))
        for number, tally in enumerate(tallies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    every = Tally()
    for tally in tallies:
        every.add(tally)
    return every, took


def one_user(url: str, asked: Sequence[Asked], number: int, until: float, tally: Tally) -> None:
    """Send one search after another."""
    chance = random.Random(number)
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    while time.perf_counter() < until:
        search = chance.choice(asked)
        started = time.perf_counter()
        try:
            connection.request("POST", "/v1/search", search.body, headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
            connection.close()
            continue
        waited = time.perf_counter() - started
        if response.status != 200:
            tally.errors.append(f"{response.status}: {data[:200]!r}")
            continue
        timing = re.search(r"model;dur=([\d.]+)", response.headers.get("Server-Timing", ""))
        tally.waits.append(waited)
        tally.besides.append(waited - float(timing[1]) / 1e3 if timing else waited)
        tally.wrong += not is_right(search, [one["id"] for one in json.loads(data)["results"]])
    connection.close()


@contextmanager
def memory_mb(pid: int) -> Iterator[list[float]]:
    """What a process holds, once a second."""
    held: list[float] = []
    process, is_over = psutil.Process(pid), threading.Event()

    def watch() -> None:
        held.append(process.memory_info().rss / 2**20)
        while not is_over.wait(1.0):
            held.append(process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield held
    finally:
        is_over.set()
        watcher.join()


def command_seconds(db: Path) -> float:
    """How long a whole `search` takes, from its start to its end."""
    command = [*COMMAND, "search", "--json", "--db", str(db), "--text", "a red mug"]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert len(json.loads(done.stdout)) == TOP_K, done
    return seconds


def print_table(figures: dict[str, Any]) -> None:
    """One row for each figure."""
    table = Table(title=f"`mm-retriever serve`, {figures['model']}, {figures['rows']:,} rows, {os.cpu_count()} cores")
    table.add_column("")
    table.add_column(f"{figures['users']} users, {figures['seconds']:.0f} s", justify="right")
    per_second, alone = figures["per_second"], figures["per_second_alone"]
    besides = [figures[f"besides_model_p{part}_ms"] for part in (50, 95)]
    rows = {
        "requests": f"{figures['requests']:,}",
        "errors / wrong answers": f"{figures['errors']} / {figures['wrong']}",
        "wait, p50 / p95": f"{figures['wait_p50_ms']:.0f} / {figures['wait_p95_ms']:.0f} ms",
        "besides the model, p50 / p95": f"{besides[0]:.0f} / {besides[1]:.0f} ms",
        "one user alone, p50 / p95": f"{figures['alone_p50_ms']:.0f} / {figures['alone_p95_ms']:.0f} ms",
        "per second / one by one": f"{per_second:.0f} / {alone:.0f} ({per_second / max(alone, 1e-9):.1f} times)",
        "memory, start / end": f"{figures['memory_start_mb']:.0f} / {figures['memory_end_mb']:.0f} MB",
    }
    if "search_alone_s" in figures:
        seconds = f"{figures['search_with_server_s']:.2f} / {figures['search_alone_s']:.2f} s"
        rows["`search`, with / without a server"] = seconds
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    for error in figures["first_errors"]:
        print(error)


if __name__ == "__main__":
    main()
