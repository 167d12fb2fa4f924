"""What an image argument may name, and the bytes of what it names.

Owns the order in which a name is understood, and the refusal of a file that is not the one that was indexed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from llama_index.core.schema import BaseNode

from mm_retriever.errors import ImageLoadError, QueryError, one_line
from mm_retriever.images import ImagePolicy, ImageSource, first_readable, is_image_path, read_image_bytes, source_name
from mm_retriever.own_keys import own_value
from mm_retriever.request import node_images
from mm_retriever.search_tools.arguments import read_result_number
from mm_retriever.search_tools.conversation import Conversation

T = TypeVar("T")
ONLY_NAMED = ImagePolicy(roots=(), max_bytes=20 * 2**20, max_pixels=25_000_000)
"""What arguments may name by default: no path and no URL; ids, results, attachments and data URIs remain.

25 megapixels: an untrusted caller can send a hundred in a few kilobytes, and many at once.
"""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class NamedImage:
    """What an image argument names, unread.

    Attributes:
        name: for people.
        images: its places; none for a text.
        policy: what may be read there.
        node: its node, if it is indexed.
        must_be_known: whether a file without a digest in the store is refused.
    """

    name: str
    images: tuple[ImageSource, ...]
    policy: ImagePolicy
    node: BaseNode | None = None
    must_be_known: bool = False

    def read(self, use: Callable[[bytes], T]) -> T:
        """What `use` makes of the first place that can be read."""
        return first_readable(self.images, lambda source: use(self._bytes(source)))

    def _bytes(self, source: ImageSource) -> bytes:
        """The bytes of an image; of an indexed one only if they are those that were indexed.

        A file may have been changed, or swapped for a link to one that nobody indexed.
        """
        data = read_image_bytes(source, policy=self.policy)
        digest = None if self.node is None else own_value(self.node.metadata, "digest")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):  # what somebody else calls a digest
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
    """Return what an image argument names: an attachment goes before an id, an id before the number of a result.

    Args:
        image: as a model gave it.
        conversation: what it may refer to.
        stored: the node of an id, None if there is none.
        image_policy: what data URIs, paths and URLs may be read.
        stored_policy: what may be read of what the store names.

    Raises:
        QueryError: nothing that is known; the message says what is.
    """
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
    if "://" not in image and not (is_image_path(image) and image_policy.roots != ()):
        raise QueryError(f"no image is known as {one_line(image, 80)!r}; {_known(conversation)}")
    return NamedImage(one_line(source_name(image), 200), (image,), image_policy)


def _known(conversation: Conversation | None) -> str:
    """What could have been named, for an error that a model reads."""
    ways = 'give an id of an earlier result, "result 3" of the last search, an attachment, or a data: URI'
    names = conversation.attachments if conversation else ()
    if not names:
        return f"{ways}; this conversation has no attachments"
    return f"{ways}; attached are {', '.join(map(repr, names[-10:]))}"
