"""The images that a conversation can refer to: its attachments, and the results of its searches.

Owns their names and how many are kept, the order of lookup of an image's name, and the refusal of a file that is not
the one that was indexed. One object per conversation, never shared: "result 3" means the third of this conversation's
last search. Knows nothing of stores and models.
"""

from __future__ import annotations

import copy
import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cachetools import FIFOCache
from llama_index.core.schema import BaseNode

from mm_retriever.errors import ImageLoadError, QueryError, one_line
from mm_retriever.images import (
    DEFAULT_POLICY,
    ImagePolicy,
    ImageSource,
    first_readable,
    is_image_path,
    lossless_bytes,
    opened_image,
    read_image_bytes,
    source_name,
)
from mm_retriever.ingest.folder import local_path
from mm_retriever.own_keys import file_digest
from mm_retriever.request import node_images
from mm_retriever.search_tools.arguments import read_result_number
from mm_retriever.threads import ForkLock

MAX_ATTACHMENTS = 64
MAX_ATTACHED_BYTES = 256 * 2**20
MAX_SEARCHES = 32
_LONGEST_NAME = 200
_LATEST = frozenset({"attachment", "the attachment", "attached picture", "attached image", "attached photo"})


@dataclass(frozen=True)
class Attachment:
    """An image that the host attached: the bytes of its file, and the policy for reading it."""

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
        """Let the model refer to an image by a name, and return the name. An attachment of that name is replaced.

        The host calls this, so a path is read from anywhere unless `policy` says otherwise. The image is read now, so
        that its file may be removed afterwards.

        Raises:
            QueryError: the name could be read as something else ("result 3", a number, a URL), or is too long.
            ImageLoadError: the image cannot or must not be read.
        """
        name = _checked_name(name)
        data = lossless_bytes(image, policy=policy)
        with opened_image(data, policy=policy):
            pass  # a bad image is refused now, to the host, and not later by a tool
        attached = Attachment(name, data, policy)
        with self._lock:
            self._attachments.pop(_folded(name), None)
            self._attachments[_folded(name)] = attached
        return name

    @property
    def attachments(self) -> tuple[str, ...]:
        """The names of the attachments, the latest last."""
        with self._lock:
            return tuple(attached.name for attached in self._attachments.values())

    def attachment(self, name: str) -> Attachment | None:
        """Return the attachment of that name in any case; None if there is none."""
        with self._lock:
            return self._attachments.get(_folded(name.strip()))

    def latest(self, text: str) -> Attachment | None:
        """Return the latest attachment if the text is just "attachment" or the like; else None."""
        with self._lock:
            if text.strip().casefold() not in _LATEST or not self._attachments:
                return None
            return list(self._attachments.values())[-1]

    def remember(self, node_ids: Sequence[str]) -> int:
        """Keep the ids of a search's results, best first, and return the number of the search."""
        with self._lock:
            self._count += 1
            self._searches[self._count] = tuple(node_ids)
            return self._count

    def has_result(self, rank: int, search: int | None = None) -> bool:
        """Whether `result` would return an id."""
        try:
            return self.result(rank, search) is not None
        except QueryError:
            return False

    def result(self, rank: int, search: int | None = None) -> str:
        """Return the id of a result of search `search`, by default of the last search with results.

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


def _folded(name: str) -> str:
    """The name in one case and Unicode form; a Mac uploads names in decomposed letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _weight(attached: Attachment) -> int:
    """Its size in bytes, within limits that bound the number of attachments and always let the latest stay."""
    return min(max(len(attached.data), MAX_ATTACHED_BYTES // MAX_ATTACHMENTS), MAX_ATTACHED_BYTES)


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise QueryError(f"attachment name {str(name)[:60]!r}: give up to {_LONGEST_NAME} printable characters")
    name = name.strip()
    if read_result_number(name) is not None or name[:5].lower() == "data:" or "://" in name:
        raise QueryError(f"attachment name {name!r} could be taken for a result, a data URI or a URL; choose another")
    return name


T = TypeVar("T")
ONLY_NAMED = ImagePolicy(roots=(), max_bytes=20 * 2**20, max_pixels=25_000_000)
"""The default policy for image arguments: ids, results, attachments and data URIs, but no path and no URL.

25 megapixels, because an untrusted caller can send a hundred in a few kilobytes, and many at once.
"""


@dataclass(frozen=True)
class NamedImage:
    """The image that an argument names, not read yet.

    Attributes:
        name: for people.
        images: its places; none for a text.
        policy: for reading them.
        node: its node, if it is indexed.
        must_be_known: whether a file without a digest in the store is refused.
    """

    name: str
    images: tuple[ImageSource, ...]
    policy: ImagePolicy
    node: BaseNode | None = None
    must_be_known: bool = False

    def read(self, use: Callable[[bytes], T]) -> T:
        """Return the result of `use` on the bytes of the first place that can be read."""
        return first_readable(self.images, lambda source: use(self._bytes(source)))

    def _bytes(self, source: ImageSource) -> bytes:
        """The bytes of an image; for an indexed image only if they are those that were indexed.

        A file may have been changed, or replaced by a link to a file that was never indexed.
        """
        data = read_image_bytes(source, policy=self.policy)
        digest = None if self.node is None else file_digest(self.node.metadata)
        if digest is None:
            if not (self.must_be_known and isinstance(source, str)):  # a text source is a path or a URL
                return data
            reason = (
                "the store has no digest of it, so it may be another file than was indexed; ingest_images stores one"
            )
        elif hashlib.sha256(data).hexdigest() == digest:
            return data
        else:
            reason = "it is not the file that was indexed: index it again"
        refusal = ImageLoadError(f"cannot load {source_name(source)}: {reason}")
        refusal.reason = reason
        raise refusal


def named_image(
    image: object,
    conversation: Conversation | None,
    stored: Callable[[str], BaseNode | None],
    *,
    image_policy: ImagePolicy,
    stored_policy: ImagePolicy,
) -> NamedImage:
    """Return the image that an argument names: first by attachment, then by id, then by the number of a result.

    Args:
        image: as a model gave it.
        conversation: for attachments and results.
        stored: returns the node of an id, None if there is none.
        image_policy: for data URIs, paths and URLs.
        stored_policy: for the places in the store.

    Raises:
        QueryError: the image is unknown; the message lists what is known.
    """
    if isinstance(image, float) and image.is_integer():  # as some clients write numbers
        image = int(image)
    if isinstance(image, int) and not isinstance(image, bool):
        image = str(image)
    if not isinstance(image, str) or not image.strip():
        raise QueryError(f"image {one_line(repr(image), 80)}: give a name as text; {_known(conversation)}")
    image = image.strip()
    if image[:5].lower() == "data:":
        return NamedImage("the image given", (image,), image_policy)
    if conversation is not None and (attached := conversation.attachment(image) or conversation.latest(image)):
        return NamedImage(f"attachment {attached.name!r}", (attached.data,), attached.policy)
    number, node, name = read_result_number(image), stored(image), f"image {one_line(image, 80)!r}"
    if conversation is not None and number is not None and (node is None or conversation.has_result(*number)):
        node, name = stored(conversation.result(*number)), f"result {number[0]}"
        if node is None:
            raise QueryError(f"{name} is no longer in the store; search again")
    if node is not None:
        return NamedImage(name, node_images(node), stored_policy, node)
    if number is not None:
        raise QueryError(f"{one_line(image, 80)!r}: earlier results are not remembered here; give the id of one")
    image = local_path(image)  # clients name files by URL, too
    if "://" not in image and not (is_image_path(image) and image_policy.roots != ()):
        raise QueryError(f"no image is known as {one_line(image, 80)!r}; {_known(conversation)}")
    return NamedImage(one_line(source_name(image), 200), (image,), image_policy)


def _known(conversation: Conversation | None) -> str:
    """The images that can be named, for an error that a model reads."""
    ways = 'give an id of an earlier result, "result 3" of the last search, an attachment, or a data: URI'
    names = conversation.attachments if conversation else ()
    if not names:
        return f"{ways}; this conversation has no attachments"
    return f"{ways}; attached are {', '.join(map(repr, names[-10:]))}"
