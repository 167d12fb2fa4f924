"""A warm process that forks runs of ingestion or of `reindex` and lets them die: many kills, one import and one model.

    python -m tests.support.mortal BYTES [reindexing]   # after so many bytes Milvus Lite writes a segment

Requests come and answers go as one line of JSON each.

A request is [place, by, at]; the run dies, if it does not end before,

- by "time": of SIGKILL, so many seconds after it began;
- by "operation": of SIGKILL, before it makes, renames or removes its so-manieth file or folder;
- by "rename": of SIGKILL, before it renames a collection for the so-manieth time;
- by "drop": of SIGKILL, before it removes the so-manieth collection;
- by "byte": in the middle of a write, where a file would grow beyond so many bytes (those before are written).

An answer has "step" (where the run was last), "killed", "seconds" and, from a run that ended, "operations".
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "sqlite3.connect")
"""Audit events of Python, besides opening for writing."""


def run(place: Path, step) -> None:
    """All that a run touches: a cache of vectors, images with columns and prune, a report, text nodes."""
    from llama_index.core.schema import TextNode

    from mm_retriever.embedding import ComposedEmbedding
    from mm_retriever.ingest import ingest_images
    from mm_retriever.store import open_store

    step("load")
    model = ComposedEmbedding(TINY, cache_dir=place / "cache")
    step("open")
    with open_store(place / "a.db", model) as store:
        options = {"batch_size": 4, "show_progress": False}
        step("images")
        sidecar, report = place / "sidecar.json", place / "report.json"
        pruned = {"prune": True, "force": True}  # the photos change a great deal between two runs
        ingest_images(place / "photos", store, model, sidecar=sidecar, report_path=report, **pruned, **options)
        step("texts")
        notes = json.loads((place / "notes.json").read_text())
        ingest_images([TextNode(id_=name, text=text) for name, text in notes.items()], store, model, **options)
        step("close")


def reindexing(place: Path, step) -> None:
    """The collection of `a.db`, or of the server that the file `uri` names, goes to the model in the file `target`."""
    from mm_retriever.embedding import ComposedEmbedding
    from mm_retriever.ingest import reindex
    from tests.support.mean_colour import MeanColour

    step("load")
    target, uri = (place / "target").read_text(), place / "uri"
    model = ComposedEmbedding(TINY if target == "tiny" else MeanColour())
    step("reindex")
    where = uri.read_text() if uri.exists() else place / "a.db"
    reindex(where, model, collection="photos", batch_size=4, show_progress=False)
    step("close")


def mortal(place: Path, by: str, at: float, told: int) -> None:
    """In the fork: run, and die at the moment that was asked for."""
    operations = 0
    collections = Counter()

    def heard(event: str, arguments: tuple) -> None:
        nonlocal operations
        kind = {"os.rename": "rename", "shutil.rmtree": "drop"}.get(event)
        if kind is not None and Path(arguments[0]).parent == place / "a.db" / "collections":
            collections[kind] += 1
            if by == kind and collections[kind] == at:
                os.kill(os.getpid(), signal.SIGKILL)
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in OPERATIONS) and str(arguments[0]).startswith(str(place)):
            operations += 1
            if by == "operation" and operations == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    if by == "byte":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(at), resource.RLIM_INFINITY))
    RUNS[sys.argv[2] if len(sys.argv) > 2 else "run"](place, lambda name: os.write(told, f"{name}\n".encode()))
    os.write(told, f"{operations}\n".encode())


RUNS = {"run": run, "reindexing": reindexing}


def answer(place: str, by: str, at: float) -> dict[str, object]:
    heard, told = os.pipe()
    start = time.monotonic()
    process = os.fork()
    if not process:
        code = 1
        try:
            mortal(Path(place), by, at, told)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(told)
    if by == "time":
        time.sleep(at)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with os.fdopen(heard) as steps:
        *_, last = ["start", *steps.read().split()]
    ended = {"operations": int(last), "step": "end"} if last.isdigit() else {"step": last}
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status):
        ended["step"] = f"error after {ended['step']}"
    return {**ended, "killed": killed, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    os.environ["MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES"] = sys.argv[1]  # read when it is imported

    import milvus_lite.adapter.grpc.server
    import milvus_lite.server_manager  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    import mm_retriever.embedders.visualized_bge.encoder
    import mm_retriever.ingest
    import mm_retriever.store  # noqa: F401
    from mm_retriever.embedders.registry import load_embedder

    TINY = load_embedder("tiny", device="cpu")  # once: a run that is killed while it reads weights shows nothing
    for request in sys.stdin:
        print(json.dumps(answer(*json.loads(request))), flush=True)
