"""Indexing from the page: folders below the allowed ones, one run at a time, watched, paused, stopped.

What is indexed, skipped, ignored and removed is `ingest_images`'s; where files lie is told below the allowed folders
only.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import MMRetrieverError, QueryError, one_line, reason_of
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import IngestReport, ingest_images
from mm_retriever.search_tools import without_folders
from mm_retriever.store import ImageStore
from web_mm_retriever import models
from web_mm_retriever.endpoints import Endpoint, as_json, in_thread, problem, read_body

BATCH = 8
"""Images that are embedded together: a search waits for one such pass at most."""

_MOST_FOLDERS = 1_000
_MOST_SKIPPED = 200
_RATE_SECONDS = 30
_COUNTS = ("indexed", "replaced", "moved", "reused", "updated", "unchanged", "removed", "kept")


class Indexing:
    """The runs of one server.

    Args:
        roots: folders that may be indexed, with all below them.
        store: where images go.
        embed_model: its model.

    Raises:
        QueryError: there is no such folder.
    """

    def __init__(self, roots: Sequence[Path], store: ImageStore, embed_model: ComposedEmbedding) -> None:
        self._store, self._model = store, embed_model
        self._roots = [root.expanduser().resolve() for root in roots]
        if missing := [str(root) for root in self._roots if not root.is_dir()]:
            raise QueryError(f"there is no folder {missing[0]!r} to index")
        self._run = _Run("", Path(), lambda progress: None)
        self._lock = threading.Lock()
        self._turns = anyio.CapacityLimiter(4)
        state = models.IndexingState
        self.endpoints = (
            Endpoint("GET", "/v1/folders", self.folders, "Folders to index", gives=models.FolderNames, query=("at",)),
            Endpoint("GET", "/v1/indexing", self.look, "How far indexing is, or what it did", gives=state),
            Endpoint("POST", "/v1/indexing/start", self.start, "Index a folder", models.IndexRequest, state),
            Endpoint("POST", "/v1/indexing/pause", self.pause, "Pause after the images at hand", models.Nothing, state),
            Endpoint("POST", "/v1/indexing/resume", self.resume, "Go on", models.Nothing, state),
            Endpoint("POST", "/v1/indexing/stop", self.stop, "End early; a later run goes on", models.Nothing, state),
        )

    async def folders(self, request: Request) -> Response:
        """The folders in a folder."""
        at = request.query_params.get("at", "")
        return as_json(await in_thread(request, lambda: self._folders(at), self._turns))

    async def look(self, request: Request) -> Response:
        """How far it is."""
        return as_json(self._run.state())

    async def start(self, request: Request) -> Response:
        """Begin a run, if none is under way."""
        body = await read_body(request, models.IndexRequest)
        if body.force and not body.prune:
            raise QueryError("force goes with prune: it says that many rows may go")
        folder, name = await in_thread(request, lambda: self._place(body.folder), self._turns)

        def work(progress: Callable[[int, int | None], bool]) -> IngestReport:
            return ingest_images(
                folder,
                self._store,
                self._model,
                batch_size=BATCH,
                prune=body.prune,
                force=body.force,
                show_progress=False,
                progress=progress,
                image_policy=ImagePolicy(roots=tuple(self._roots)),
            )

        with self._lock:
            if self._run.is_alive:
                return problem(409, "indexing is under way: wait for its end, or stop it")
            self._run = _Run(name, folder, work)
            self._run.start()
        return as_json(self._run.state())

    async def pause(self, request: Request) -> Response:
        """Wait after the images at hand."""
        await read_body(request, models.Nothing)
        self._run.pause()
        return as_json(self._run.state())

    async def resume(self, request: Request) -> Response:
        """Go on after a pause."""
        await read_body(request, models.Nothing)
        self._run.resume()
        return as_json(self._run.state())

    async def stop(self, request: Request) -> Response:
        """End the run after the images at hand."""
        await read_body(request, models.Nothing)
        self._run.stop()
        return as_json(self._run.state())

    def close(self) -> None:
        """Stop the run that is under way and wait for its end: the store is about to be closed."""
        self._run.stop()
        self._run.join()

    # ------------------------------------------------------------------------------------------ folders

    def _place(self, at: str) -> tuple[Path, str]:
        """The folder that a name of `folders` means, and what it is called.

        Raises:
            QueryError: it is not there, or leads out of the folders that may be indexed.
        """
        number, _, below = at.partition("/")
        if not number.isdecimal() or int(number[:6]) >= len(self._roots):
            raise QueryError(f"folder {one_line(at, 80)!r}: give one of /v1/folders")
        root = self._roots[int(number)]
        try:
            folder = (root / below).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            folder = None
        if folder is None or not folder.is_dir() or not folder.is_relative_to(root):
            raise QueryError(f"folder {one_line(at, 80)!r} is not there, or not below a folder that may be indexed")
        return folder, "/".join(filter(None, (root.name or str(root), below)))

    def _folders(self, at: str) -> models.FolderNames:
        if not at:
            named = [
                models.FolderName(at=str(number), name=root.name or str(root))
                for number, root in enumerate(self._roots)
            ]
            return models.FolderNames(folders=named)
        folder, name = self._place(at)
        try:
            with os.scandir(folder) as listing:
                below = [entry.name for entry in listing if not entry.name.startswith(".") and entry.is_dir()]
        except OSError as error:
            raise QueryError(f"the folder {name!r} cannot be read: {error.strerror}") from error
        names = sorted(name for name in below if _is_text(name))
        return models.FolderNames(
            at=at,
            name=name,
            above=at.rpartition("/")[0],
            folders=[models.FolderName(at=f"{at}/{name}", name=name) for name in names[:_MOST_FOLDERS]],
            left_out=max(0, len(names) - _MOST_FOLDERS) + len(below) - len(names),
        )


class _Run:
    """One run in a thread of its own."""

    def __init__(
        self, name: str, folder: Path, work: Callable[[Callable[[int, int | None], bool]], IngestReport | None]
    ) -> None:
        self._name, self._folder, self._work = name, folder, work
        self._thread = threading.Thread(target=self._live, name="indexing", daemon=True)
        self._goes = threading.Event()
        self._goes.set()
        self._stops = self._is_stopped = self._is_over = False
        self._done = 0
        self._total: int | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=1_000)
        self._started = time.monotonic()
        self._seconds = 0.0
        self._report: IngestReport | None = None
        self._error = ""

    @property
    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._thread.is_alive() and not self._is_over

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pause(self) -> None:
        """Wait at the next image."""
        self._goes.clear()

    def resume(self) -> None:
        """Go on; the rate is measured anew."""
        self._samples.clear()
        self._goes.set()

    def stop(self) -> None:
        """End at the next image."""
        self._stops = True
        self._goes.set()

    def join(self) -> None:
        """Wait for its end."""
        if self._thread.is_alive():
            self._thread.join()

    def _live(self) -> None:
        try:
            self._report = self._work(self._tell)
        except MMRetrieverError as error:
            self._error = one_line(error, 1_000)
        except Exception as error:  # whatever a model raises: it is shown, and the server goes on
            self._error = f"indexing failed: {reason_of(error)}"
        finally:
            self._seconds = time.monotonic() - self._started
            self._is_over = True

    def _tell(self, done: int, total: int | None) -> bool:
        self._done, self._total = done, total
        self._goes.wait()
        self._samples.append((time.monotonic(), done))
        self._is_stopped = self._stops
        return not self._stops

    def state(self) -> models.IndexingState:
        """How far it is."""
        report, rate = self._report, self._rate()
        left = None if not rate or self._total is None else (self._total - self._done) / rate
        known = models.IndexingState(
            state=self._state(),
            folder=self._name,
            done=self._done,
            total=self._total,
            images_per_second=rate,
            seconds_left=left if self.is_alive else None,
            seconds=self._seconds if self._is_over else time.monotonic() - self._started,
            error=_on_the_page(self._error),
        )
        if report is None:
            return known
        counts = {name: count for name in _COUNTS if (count := getattr(report, name))}
        return known.model_copy(
            update={
                "counts": counts | ({"skipped": len(report.skipped)} if report.skipped else {}),
                "skipped": [self._skipped(item.path, item.reason) for item in report.skipped[:_MOST_SKIPPED]],
                "ignored": [
                    models.IgnoredFiles(kind=item.kind, count=item.count, reason=item.reason) for item in report.ignored
                ],
                "notes": [_on_the_page(note) for note in report.notes],
                "images_per_second": report.images_per_second or None,
                "done": self._done if self._is_stopped else self._total or self._done,
            }
        )

    def _state(self) -> models.RunState:
        if not self._is_over:
            if not self._thread.is_alive():
                return "idle"
            return "stopping" if self._stops else "running" if self._goes.is_set() else "paused"
        return "failed" if self._error else "stopped" if self._is_stopped else "done"

    def _rate(self) -> float | None:
        """Images in a second, of the last half minute."""
        samples = [sample for sample in list(self._samples) if sample[0] > time.monotonic() - _RATE_SECONDS]
        if len(samples) < 2 or samples[-1][0] - samples[0][0] < 1:
            return None
        return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])

    def _skipped(self, path: str, reason: str) -> models.SkippedImage:
        below = path.removeprefix(f"{self._folder}{os.sep}")
        return models.SkippedImage(
            path=one_line(without_folders(below), 300), reason=one_line(without_folders(reason), 300)
        )


def _on_the_page(text: str) -> str:
    """A message of ingestion in the words of the page, which has no options of a command."""
    wording = text.replace("--force (force=True in Python)", "the box for that ticked").replace("prune=True: ", "")
    return without_folders(one_line(wording, 1_000))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
