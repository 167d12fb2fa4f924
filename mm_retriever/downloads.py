"""Downloads from the model hub, and how far one is, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

Tell: TypeAlias = Callable[[int, int], None]
"""Called with how many bytes are here, and of how many; from the threads that download."""

_TELL: ContextVar[Tell | None] = ContextVar("who is told how far a download is", default=None)


@contextmanager
def watched(tell: Tell) -> Iterator[None]:
    """Tell how far the downloads are that this context begins."""
    token = _TELL.set(tell)
    try:
        yield
    finally:
        _TELL.reset(token)


def progress_bar() -> Any:
    """The hub's class of progress bars, which also tells whoever watches; None, the hub's own, where nobody does."""
    tell = _TELL.get()
    return None if tell is None else _watched_bar(tell)


def _watched_bar(tell: Tell) -> Any:
    bar: Any = import_module("huggingface_hub.utils").tqdm

    class Watched(bar):  # type: ignore[misc, unused-ignore]
        """A bar that is not shown counts nothing: this one counts for itself."""

        def __init__(self, *given: Any, **options: Any) -> None:
            self.is_of_bytes, self.here = options.get("unit") == "B", 0
            super().__init__(*given, **options)

        def update(self, n: float | None = 1) -> Any:
            if self.is_of_bytes and n:
                self.here += int(n)
                self._say()
            return super().update(n)

        def refresh(self, *given: Any, **options: Any) -> Any:
            if self.is_of_bytes:  # a file has begun: more bytes are to come
                self._say()
            return super().refresh(*given, **options)

        def _say(self) -> None:
            tell(self.here, int(getattr(self, "total", 0) or 0))

    return Watched


def hub_files(repo: str, names: Sequence[str], revision: str | None = None, *, cached: bool = False) -> Path:
    """Local folder with those of the files, or patterns of names, that a hub repository has.

    Args:
        repo: of the hub.
        names: of files.
        revision: branch, tag or commit.
        cached: take what is on this machine already, and ask nobody.

    Raises:
        OSError: the hub is out of reach or refuses, or nothing of it is on this machine.
        ValueError: no repository can have this name.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "local_files_only": cached, "tqdm_class": progress_bar()}
    return Path(snapshot_download(repo, allow_patterns=list(names), **options))
