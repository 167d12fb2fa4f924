"""What is stored of one item, whichever way it goes into the store: its node, and what tells that it changed.

Metadata come in layers: from the caller's node, from a sidecar, and from the EXIF block of the file. A layer is
replaced by the next one of its kind, and stays where a run brings none: absence is not deletion. Knows nothing of
models; an item, what reading it gave, and a vector make a node.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from llama_index.core.schema import BaseNode, ImageNode, TextNode

from mm_retriever.ingest.sidecar import SidecarRow, within_bounds
from mm_retriever.ingest.sources import Item
from mm_retriever.ingest.vectors import Vector
from mm_retriever.own_keys import (
    BOOKKEEPING_KEYS,
    FILE_STAMP,
    LAYERS_KEY,
    OLD_LAYERS_KEY,
    OWN_KEYS,
    RESERVED_KEYS,
    STAMP_KEYS,
    own_columns,
    own_value,
    with_own,
)

BOOKKEEPING = [*own_columns(*STAMP_KEYS, "label"), OLD_LAYERS_KEY, LAYERS_KEY]
"""The columns of a row that tell whether anything changed."""

Kind: TypeAlias = Literal["earlier", "exif", "node", "sidecar"]
"""Where metadata come from; "earlier" is what a version stored that did not note it. The later kind counts."""

_KINDS: tuple[Kind, ...] = ("earlier", "exif", "node", "sidecar")


@dataclass(frozen=True)
class Layer:
    """Metadata from one place.

    Attributes:
        text: for the node; "" if it says none.
        columns: by key.
        digest: of both, as they were given; computed if it is "".
    """

    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.columns)

    @property
    def identity(self) -> str:
        """Equal for equal layers; "" for an empty one."""
        if self.digest or not self:
            return self.digest
        return text_digest(json.dumps([self.text, self.columns], default=str, sort_keys=True))[:16]


_SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use: FAT's."""


@dataclass(frozen=True)
class Task:
    """An item that is new, or may have changed.

    Attributes:
        given: what this run says about it, by where that comes from.
        stamp: what says that the thing itself is the same: size and time of a file, the digest of a text.
        stored: the row's own account of the same; None if there is no row.
        kept: what the row has and this run says nothing about; see `keeping`.
        size: width and height that are stored.
        drop: kinds of metadata that the row loses if this run says nothing about them.
        moved_from: id of the row that this one takes the place of; "" where nothing moved.
    """

    item: Item
    given: Mapping[Kind, Layer]
    stamp: dict[str, Any]
    stored: Mapping[str, Any] | None
    kept: Mapping[Kind, Layer] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    drop: tuple[Kind, ...] = ()
    moved_from: str = ""

    @property
    def same(self) -> bool:
        """Whether the row is of the thing as it is now; for certain, or else the file has to be read."""
        if self.item.path is not None and FILE_STAMP not in self.stamp:
            return False
        return self.same_stamp

    @property
    def same_stamp(self) -> bool:
        """Whether the row has the stamp that it would have now; the device of a file may have got another number."""
        if self.stored is None:
            return False
        now, then = {**self.stamp}, {key: own_value(self.stored, key) for key in self.stamp}
        if FILE_STAMP in now:
            now[FILE_STAMP], then[FILE_STAMP] = map(_without_device, (now[FILE_STAMP], then[FILE_STAMP]))
        return now == then

    @property
    def same_metadata(self) -> bool:
        """Whether the row has the metadata that it would have now."""
        stored = self.stored
        if stored is None or self.label != _stored_label(stored):
            return False
        if OLD_LAYERS_KEY in stored and LAYERS_KEY not in stored:
            given = any(self.given.values()) or "earlier" in self.drop
            return stored[OLD_LAYERS_KEY] == self._old_digest() if given else True
        known = {kind: account[0] for kind, account in _account(stored).items()}
        if any(kind in self.drop and kind not in self.given for kind in known):
            return False
        return all(known.get(kind, "") == layer.identity for kind, layer in self.given.items())

    @property
    def known_digest(self) -> str:
        """Of the file that the row was made of; "" if there is none."""
        return str(own_value(self.stored, "digest") or "") if self.stored is not None else ""

    @property
    def label(self) -> str:
        """The folders it lies in, seen from the widest folder that it was indexed from: in whatever order that was."""
        stored = _stored_label(self.stored) if self.stored is not None else ""
        label = self.item.label
        if stored and stored != label and (not label or not f"/{label}".endswith(f"/{stored}")):
            return stored
        return label

    def keeping(self, node: BaseNode | None) -> Task:
        """Return the task with what its row has and this run says nothing about.

        Args:
            node: the row's.
        """
        if self.stored is None or node is None:
            return self
        width, height = own_value(node.metadata, "width"), own_value(node.metadata, "height")
        size = (int(width or 0), int(height or 0))
        return replace(self, kept=self._kept_of(node), size=size)

    def moved(self, node: BaseNode) -> Task:
        """Return the task of a new item that takes the place of another row, with what that row has.

        Args:
            node: the other row's.
        """
        item = replace(self.item, relationships=self.item.relationships or dict(node.relationships))
        return replace(self, item=item, kept=self._kept_of(node), moved_from=node.node_id)

    def _kept_of(self, node: BaseNode) -> dict[Kind, Layer]:
        silent = (*self.given, *self.drop)
        return {kind: layer for kind, layer in _layers(node).items() if kind not in silent}

    def _old_digest(self) -> str:
        """What earlier versions stored of the same metadata."""
        node, sidecar = self.given.get("node", Layer()), self.given.get("sidecar", Layer())
        caption, extra = node.text, {**node.columns, **sidecar.columns}
        return text_digest(json.dumps([caption, extra], default=str, sort_keys=True)) if caption or extra else ""


def given_layers(item: Item, row: SidecarRow | None) -> tuple[dict[Kind, Layer], list[str]]:
    """Return what a run says about an item, and the keys that are left out: too long, or names of our own accounts.

    Args:
        item: with what the caller's node says.
        row: the sidecar's; None if it does not name the item.
    """
    reserved = [key for key in item.metadata if key in RESERVED_KEYS]
    columns, too_long = within_bounds({key: item.metadata[key] for key in item.metadata if key not in RESERVED_KEYS})
    node = Layer(item.text if item.is_picture else "", columns)
    layers: dict[Kind, Layer] = {"node": node} if node else {}
    if row is not None:
        layers["sidecar"] = Layer(row.text, row.columns)
    return layers, [*reserved, *too_long]


def picture_node(
    task: Task, digest: str, size: tuple[int, int], vector: Vector, exif: Mapping[str, Any] | None = None
) -> ImageNode:
    """Return the node of an image of which the file has this digest, under the vector.

    Args:
        task: the item and its metadata.
        digest: of the file.
        size: width and height.
        vector: of its pixels.
        exif: columns from the file itself; None if it was not read.
    """
    item = task.item
    own = {
        "label": task.label,
        "file_path": item.path,
        "file_name": item.file_name,
        "width": size[0],
        "height": size[1],
        **task.stamp,
        "digest": digest,
    }
    layers: dict[Kind, Layer] = {**task.kept, **task.given}
    if exif is not None:
        layers["exif"] = Layer(columns=exif)
    text, metadata = _with_layers(layers, own)
    return ImageNode(
        id_=item.id,
        text=text,
        image_path=item.path,
        image_url=item.url,
        metadata=metadata,
        excluded_embed_metadata_keys=_bookkeeping(metadata, layers),
        excluded_llm_metadata_keys=_bookkeeping(metadata, layers),
        relationships=item.relationships,
        embedding=vector.tolist(),
    )


def text_node(task: Task, vector: Vector) -> TextNode:
    """Return the node of a text under the vector."""
    layers: dict[Kind, Layer] = {**task.kept, **task.given}
    _, metadata = _with_layers(layers, task.stamp)
    return TextNode(
        id_=task.item.id,
        text=task.item.text,
        metadata=metadata,
        excluded_embed_metadata_keys=_bookkeeping(metadata, layers),
        excluded_llm_metadata_keys=_bookkeeping(metadata, layers),
        relationships=task.item.relationships,
        embedding=vector.tolist(),
    )


def lost_columns(task: Task) -> list[str]:
    """Return the columns that the row had and will not have, since this run replaces or drops what held them."""
    if task.stored is None:
        return []
    now = {key for layer in (*task.kept.values(), *task.given.values()) for key in layer.columns}
    account = _account(task.stored)
    return sorted({key for kind, (_, _, keys) in account.items() if kind != "exif" for key in keys} - now)


def has_columns(stored: Mapping[str, Any] | None) -> bool:
    """Whether a row has metadata from a node or a sidecar."""
    return stored is not None and (bool(stored.get(OLD_LAYERS_KEY)) or any(k != "exif" for k in _account(stored)))


def _with_layers(layers: Mapping[Kind, Layer], own: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text and metadata of all layers, with what ingestion stores beside them."""
    text = ""
    columns: dict[str, Any] = {}
    owners: dict[str, Kind] = {}
    for kind in _KINDS:
        if layer := layers.get(kind):
            text = layer.text or text
            columns |= layer.columns
            owners |= dict.fromkeys(layer.columns, kind)
    metadata = with_own(columns, own)
    account = {
        kind: [layer.identity, int(bool(layer.text) and layer.text == text), [k for k in columns if owners[k] == kind]]
        for kind in _KINDS
        if (layer := layers.get(kind))
    }
    if account:
        metadata[LAYERS_KEY] = json.dumps(account, ensure_ascii=False)
    return text, metadata


def _layers(node: BaseNode) -> dict[Kind, Layer]:
    """The layers of a stored node."""
    text = node.get_content() if isinstance(node, ImageNode) else ""
    if LAYERS_KEY not in node.metadata:
        if not node.metadata.get(OLD_LAYERS_KEY):
            return {}
        columns = {key: value for key, value in node.metadata.items() if key not in (*OWN_KEYS, *BOOKKEEPING_KEYS)}
        layer = Layer(text, columns)
        return {"earlier": layer} if layer else {}
    return {
        kind: Layer(text if has_text else "", {key: node.metadata[key] for key in keys if key in node.metadata}, digest)
        for kind, (digest, has_text, keys) in _account(node.metadata).items()
    }


def _account(stored: Mapping[str, Any]) -> dict[Kind, tuple[str, bool, Sequence[str]]]:
    """Digest, whether the text is its own, and keys of each stored layer; what another program spoiled says nothing."""
    try:
        account = json.loads(stored.get(LAYERS_KEY) or "{}")
        return {
            kind: (str(account[kind][0]), bool(account[kind][1]), list(map(str, account[kind][2])))
            for kind in _KINDS
            if kind in account
        }
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}


def _stored_label(stored: Mapping[str, Any]) -> str:
    return str(own_value(stored, "label") or "")


def _bookkeeping(metadata: Mapping[str, Any], layers: Mapping[Kind, Layer]) -> list[str]:
    """The keys that hold our own accounts, and none that the caller has for something else."""
    given = {key for layer in layers.values() for key in layer.columns}
    return [key for key in BOOKKEEPING_KEYS if key in metadata and key not in given]


def stamp_of(path: str) -> dict[str, int | str]:
    """Size, time, and where there is certainty ctime and inode of a regular file: equal stamps, equal contents.

    ctime changes where size and time are kept: by `cp -p`, `rsync -t`, `exiftool -P`, and by renaming. A file that
    changed a moment ago may change again within the same tick of its clocks, so it gets no such stamp yet.
    """
    status = os.stat(path)  # noqa: PTH116 - ten times Path's speed
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    stamp: dict[str, int | str] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    now = time.time_ns()
    if min(abs(now - status.st_mtime_ns), abs(now - status.st_ctime_ns)) > _SETTLED_NS:
        stamp[FILE_STAMP] = f"{status.st_ctime_ns}-{status.st_ino}-{status.st_dev}"
    return stamp


def _without_device(stamp: object) -> str:
    return str(stamp or "").rpartition("-")[0]


def reason_of(error: OSError | ValueError) -> str:
    """Return why a file has no stamp, for a report."""
    return str(getattr(error, "strerror", None) or error).lower()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
