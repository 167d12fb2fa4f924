"""What is stored of one item, whichever way it goes into the store: its node, and what tells that it changed.

Knows nothing of stores and models: an item, what reading it gave, and a vector make a node.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_index.core.schema import ImageNode, TextNode

from mm_retriever.ingest.sources import Item
from mm_retriever.ingest.vectors import Vector

BOOKKEEPING = ["bytes", "mtime_ns", "digest", "metadata_digest"]
"""What ingestion needs to know of a row; no language model should have to read it."""


@dataclass(frozen=True)
class Task:
    """An item that is new, or may have changed.

    Attributes:
        extra: metadata from the caller's node and the sidecar.
        stamp: what says that the thing itself is the same: size and time of a file, the digest of a text.
        stored: the row's own account of the same; None if there is no row.
    """

    item: Item
    extra: dict[str, Any]
    stamp: dict[str, Any]
    stored: Mapping[str, Any] | None

    @property
    def same(self) -> bool:
        """Whether the row is of the thing as it is now."""
        return self.stored is not None and all(self.stored.get(key) == value for key, value in self.stamp.items())

    @property
    def same_metadata(self) -> bool:
        """Whether the row has the metadata that it would have now."""
        return self.stored is not None and self.stored.get("metadata_digest", "") == self.metadata_digest

    @property
    def known_digest(self) -> str:
        """Of the file that the row was made of; "" if there is none."""
        return str(self.stored.get("digest", "")) if self.stored is not None else ""

    @property
    def metadata_digest(self) -> str:
        """Digest of all that is stored beside the pixels; "" where there is nothing."""
        caption = self.item.text if self.item.is_picture else ""
        if not caption and not self.extra:
            return ""
        return text_digest(json.dumps([caption, self.extra], default=str, sort_keys=True))


def picture_node(task: Task, digest: str, size: tuple[int, int], vector: Vector) -> ImageNode:
    """Return the node of a picture of which the file has this digest, under the vector."""
    item = task.item
    metadata = {
        "label": item.label or None,
        **task.extra,
        "file_path": item.path,
        "file_name": os.path.basename(item.place),  # noqa: PTH119 - may be a URL
        "width": size[0],
        "height": size[1],
        **task.stamp,
        "digest": digest,
        "metadata_digest": task.metadata_digest,
    }
    return ImageNode(
        id_=item.id,
        text=item.text,
        image_path=item.path,
        image_url=item.url,
        metadata={key: value for key, value in metadata.items() if value not in (None, "")},
        excluded_embed_metadata_keys=BOOKKEEPING,
        excluded_llm_metadata_keys=BOOKKEEPING,
        relationships=item.relationships,
        embedding=vector.tolist(),
    )


def text_node(task: Task, vector: Vector) -> TextNode:
    """Return the node of a text under the vector."""
    return TextNode(
        id_=task.item.id,
        text=task.item.text,
        metadata={**task.extra, **task.stamp, "metadata_digest": task.metadata_digest},
        excluded_embed_metadata_keys=BOOKKEEPING,
        excluded_llm_metadata_keys=BOOKKEEPING,
        relationships=task.item.relationships,
        embedding=vector.tolist(),
    )


def stamp_of(path: str) -> dict[str, int]:
    """Size and time of a regular file: equal stamps, equal contents."""
    status = os.stat(path)  # noqa: PTH116 - ten times Path's speed
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def reason_of(error: OSError | ValueError) -> str:
    """Return why a file has no stamp, for a report."""
    return str(getattr(error, "strerror", None) or error).lower()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
