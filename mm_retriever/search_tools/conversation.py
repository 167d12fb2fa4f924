"""What one conversation can refer to: the images attached to it, and the results of its searches.

Owns their names and how many are kept. One object per conversation, never shared between two: "result 3" means the
third of the last search of this one. Knows nothing of stores and models.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cachetools import FIFOCache

from mm_retriever.errors import QueryError
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, ImageSource, lossless_bytes, opened_image
from mm_retriever.search_tools.arguments import read_result_number
from mm_retriever.threads import ForkLock

MAX_ATTACHMENTS = 64
MAX_ATTACHED_BYTES = 256 * 2**20
MAX_SEARCHES = 32
_LONGEST_NAME = 200
_LATEST = frozenset({"attachment", "the attachment", "attached picture", "attached image", "attached photo"})


@dataclass(frozen=True)
class Attachment:
    """An image that the host attached: the bytes of its file, and the policy it was read under."""

    name: str
    data: bytes = field(repr=False)
    policy: ImagePolicy


class Conversation:
    """The attachments and results of one conversation; may be used by several threads at once.

    The oldest attachments and searches are forgotten when there are very many.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._attachments = FIFOCache[str, Attachment](MAX_ATTACHED_BYTES, getsizeof=_weight)
        self._searches = FIFOCache[int, tuple[str, ...]](MAX_SEARCHES)  # ids: nodes would take megabytes
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, for a pickle or a copy."""
        with self._lock:
            kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
            return kept | {name: copy.deepcopy(kept[name]) for name in ("_attachments", "_searches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=ForkLock())

    def attach(self, name: str, image: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY) -> str:
        """Let the model refer to an image by a name, and return the name. Another of that name is replaced.

        The host calls this, so a path is read from anywhere unless `policy` says otherwise. The image is read now:
        the file may be gone afterwards.

        Raises:
            QueryError: a name that could be taken for something else ("result 3", a number, a URL) or is too long.
            ImageLoadError: the image cannot or must not be read.
        """
        name = _checked_name(name)
        data = lossless_bytes(image, policy=policy)
        with opened_image(data, policy=policy):
            pass  # refused now, by its host, rather than later, by a tool
        attached = Attachment(name, data, policy)
        with self._lock:
            self._attachments.pop(name.casefold(), None)
            self._attachments[name.casefold()] = attached
        return name

    @property
    def attachments(self) -> tuple[str, ...]:
        """The names of the attachments, the latest last."""
        with self._lock:
            return tuple(attached.name for attached in self._attachments.values())

    def attachment(self, name: str) -> Attachment | None:
        """The attachment of that name, in capitals or not; None if there is none."""
        with self._lock:
            return self._attachments.get(name.strip().casefold())

    def latest(self, text: str) -> Attachment | None:
        """The attachment that came last, if the text says no more than "attachment"; else None."""
        with self._lock:
            if text.strip().casefold() not in _LATEST or not self._attachments:
                return None
            return list(self._attachments.values())[-1]

    def remember(self, node_ids: Sequence[str]) -> int:
        """Keep the ids of what a search found, best first, and return the number of the search."""
        with self._lock:
            self._count += 1
            self._searches[self._count] = tuple(node_ids)
            return self._count

    def has_result(self, rank: int, search: int | None = None) -> bool:
        """Whether `result` would return one."""
        try:
            return self.result(rank, search) is not None
        except QueryError:
            return False

    def result(self, rank: int, search: int | None = None) -> str:
        """The id of a result of the last search that found anything, or of the search of that number.

        Raises:
            QueryError: there was no such search, or it has no such result.
        """
        with self._lock:
            if search is None:
                search = max((number for number, ids in self._searches.items() if ids), default=None)
                if search is None:
                    raise QueryError(
                        f"there is no result {rank}: nothing was found yet in this conversation; search first"
                    )
            ids, known = self._searches.get(search), sorted(self._searches)
        if ids is None:
            which = f"searches {known[0]} to {known[-1]} are known" if known else "nothing was searched yet"
            raise QueryError(f"there is no search {search} in this conversation: {which}")
        if not 1 <= rank <= len(ids):
            raise QueryError(f"there is no result {rank}: search {search} found {len(ids)}, numbered from 1")
        return ids[rank - 1]


def _weight(attached: Attachment) -> int:
    """Its bytes; at least a share that bounds the number of attachments, and at most all, so that the latest stays."""
    return min(max(len(attached.data), MAX_ATTACHED_BYTES // MAX_ATTACHMENTS), MAX_ATTACHED_BYTES)


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise QueryError(f"attachment name {str(name)[:60]!r}: give up to {_LONGEST_NAME} printable characters")
    name = name.strip()
    if read_result_number(name) is not None or name[:5].lower() == "data:" or "://" in name:
        raise QueryError(f"attachment name {name!r} could be taken for a result, a data URI or a URL; choose another")
    return name
