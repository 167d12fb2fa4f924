"""`BatchedEmbedder`: computes the calls of many threads together.

The first call runs at once. Calls that arrive while the model works wait, and then form the next batch: no call waits
for others to arrive, and a busy model gets full batches.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.threads import ForkLock

MOST_CONTENTS = 64
"""Contents of one pass; the model itself splits batches that do not fit into memory."""


_SECONDS: ContextVar[list[float] | None] = ContextVar(
    "seconds that calls of a context spent with the model", default=None
)


@contextmanager
def model_seconds() -> Iterator[list[float]]:
    """Collect the seconds that each call of `encode` in this context takes: the wait for its pass, and the pass."""
    seconds: list[float] = []
    token = _SECONDS.set(seconds)
    try:
        yield seconds
    finally:
        _SECONDS.reset(token)


class BatchedEmbedder:
    """An `Embedder` around another, for one process that answers many users at once.

    The vectors are those of single calls, up to the rounding of another batch size. If a pass fails, each of its calls
    is tried alone, so that only the call at fault gets the error.

    Args:
        embedder: the model.
        most: contents of one pass; a larger call goes alone.
    """

    def __init__(self, embedder: Embedder, *, most: int = MOST_CONTENTS) -> None:
        self._embedder = embedder
        self._most = most
        self._arrival = ForkLock()
        self._waiting: list[_Call] = []
        self._is_led = False
        self._process = os.getpid()

    @property
    def name(self) -> str:
        """See `Embedder`; these attributes are the model's."""
        return self._embedder.name

    @property
    def space(self) -> str:
        """See `Embedder`."""
        return self._embedder.space

    @property
    def note(self) -> str:
        """See `Embedder`."""
        return self._embedder.note

    @property
    def dimension(self) -> int:
        """See `Embedder`."""
        return self._embedder.dimension

    @property
    def device(self) -> Any:
        """The model's device; None if it has no such attribute."""
        return getattr(self._embedder, "device", None)

    @property
    def cache_identity(self) -> Any:
        """The model's own, None without one."""
        return getattr(self._embedder, "cache_identity", None)

    @property
    def waiting(self) -> int:
        """The number of calls that wait, besides those in the current pass."""
        with self._arrival:
            return len(self._waiting)

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """See `Embedder`."""
        return self._embedder.prepare(image)

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """Return (B, D) vectors of the model; calls of other threads may share the pass.

        Raises:
            QueryError: the model cannot embed this kind of content.
        """
        started = time.perf_counter()
        call = _Call(contents, query)
        try:
            self._arrive(call)
            call.woken.wait()
            if call.leads:
                self._gather(call)
                self._run(call.batch)
        finally:
            self._leave(call)
            if (seconds := _SECONDS.get()) is not None:
                seconds.append(time.perf_counter() - started)
        return call.result()

    def _arrive(self, call: _Call) -> None:
        """Join the waiting calls, or lead the next pass if no call leads."""
        with self._arrival:
            if self._process != os.getpid():  # a forked child has no use for the parent's calls
                self._process, self._waiting, self._is_led = os.getpid(), [], False
            if self._is_led:
                self._waiting.append(call)
            else:
                self._is_led = True
                call.lead()

    def _leave(self, call: _Call) -> None:
        """End the call, also if it was interrupted; unfinished calls of its pass wait again."""
        with self._arrival:
            if call in self._waiting:
                self._waiting.remove(call)
            if not call.leads:
                return
            self._waiting[:0] = [other for other in call.batch if other is not call and not other.is_done]
            self._is_led = bool(self._waiting)
            if self._waiting:
                self._waiting.pop(0).lead()

    def _gather(self, first: _Call) -> None:
        """Add waiting calls that can share this pass to it, in the order of their arrival."""
        batch, size = [first], len(first.contents)
        with self._arrival:
            for call in self._waiting:
                if call.query == first.query and size + len(call.contents) <= self._most:
                    batch.append(call)
                    size += len(call.contents)
            first.batch = batch
            self._waiting = [call for call in self._waiting if call not in batch]

    def _run(self, batch: Sequence[_Call]) -> None:
        try:
            vectors = self._embedder.encode([item for call in batch for item in call.contents], query=batch[0].query)
        except Exception as error:
            if len(batch) == 1:
                batch[0].end(error=error)
                return
            for call in batch:
                self._run([call])
            return
        start = 0
        for call in batch:
            call.end(vectors[start : start + len(call.contents)])
            start += len(call.contents)


class _Call:
    """One call of `encode`, and its result.

    Each call has its own event: a lock for all would wake them one after another, with the model idle meanwhile.
    """

    def __init__(self, contents: Sequence[Content], query: bool) -> None:
        self.contents = list(contents)
        self.query = query
        self.leads = False
        self.batch: Sequence[_Call] = ()  # the calls of its pass, itself first
        self.woken = threading.Event()
        self._vectors: NDArray[np.float32] | None = None
        self._error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self._vectors is not None or self._error is not None

    def lead(self) -> None:
        self.leads = True
        self.woken.set()

    def end(self, vectors: NDArray[np.float32] | None = None, *, error: Exception | None = None) -> None:
        self._vectors, self._error = vectors, error
        self.woken.set()

    def result(self) -> NDArray[np.float32]:
        if self._error is not None:
            raise self._error
        assert self._vectors is not None
        return self._vectors
