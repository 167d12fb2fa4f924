"""`EmbedderAside`: a model in a separate process, which imports torch while this process imports the rest.

A command that answers one query spends nearly all of its time in imports, and a process runs one import at a time. This
module loads nothing itself, so that the other process starts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context
from typing import TYPE_CHECKING, Any

from mm_retriever.errors import CheckpointError, MMRetrieverError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from mm_retriever.embedders.embedder import Content, Pixels


@contextmanager
def model_aside() -> Iterator[EmbedderAside | None]:
    """Start a process for a model and end it on exit; yields None if it would gain nothing, or cannot be forked."""
    is_young = "torch" not in sys.modules and threading.active_count() == 1
    if not is_young or (os.cpu_count() or 1) < 2 or "fork" not in get_all_start_methods():
        yield None
        return
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours), name="mm_retriever-model", daemon=True)
    process.start()
    theirs.close()
    try:
        with ours:
            yield EmbedderAside(ours)
    finally:
        process.terminate()
        process.join()


class EmbedderAside:
    """An `Embedder` in the process of `model_aside`, once `load` has been called."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._turn = threading.Lock()
        self.name, self.space, self.note, self.remark = "", "", "", ""
        self.dimension = 0
        self.device: str | None = None
        self.cache_identity: str | None = None

    def load(self, name: str, **options: Any) -> EmbedderAside:
        """Load a model by name and return self; arguments and errors are those of `load_embedder`."""
        self.__dict__.update(self._ask("load", name, **options))
        return self

    def prepare(self, image: Image.Image) -> Pixels:
        """See `Embedder`."""
        pixels: Pixels = self._ask("prepare", image)
        return pixels

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """See `Embedder`."""
        vectors: NDArray[np.float32] = self._ask("encode", contents, query=query)
        return vectors

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            with self._turn:
                self._connection.send((method, arguments, options))
                answer, error = self._connection.recv()
        except (EOFError, OSError) as lost:
            raise CheckpointError("the process that computes the model has ended: was it killed for memory?") from lost
        if error is not None:
            raise error
        return answer


def _serve(connection: Any, other: Any) -> None:
    """In the process of the model: answer requests until the other process ends."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself handles Ctrl-C
    with suppress(ImportError):  # loading reports it
        import mm_retriever.embedders.visualized_bge.encoder  # noqa: F401 - imports torch before the first request
    embedder: Any = None
    while True:
        try:
            method, arguments, options = connection.recv()
        except (EOFError, OSError):
            return
        answer: Any = None
        failure: Exception | None = None
        try:
            if method == "load":
                embedder, answer = _loaded(*arguments, **options)
            else:
                answer = getattr(embedder, method)(*arguments, **options)
        except MMRetrieverError as error:
            failure = error
        except Exception as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        connection.send((answer, failure))


def _loaded(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and the attributes of its `EmbedderAside`."""
    from mm_retriever.embedders.registry import load_embedder

    embedder: Any = load_embedder(name, **options)
    facts = {fact: getattr(embedder, fact) for fact in ("name", "space", "note", "dimension")}
    facts |= {fact: getattr(embedder, fact, None) for fact in ("device", "cache_identity")}
    return embedder, {**facts, "remark": getattr(embedder, "remark", "")}
