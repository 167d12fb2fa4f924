"""The node that is stored for one item, and how a change of the item is noticed.

Metadata come in layers: from the caller's node, from a sidecar, and from the EXIF block of the file. A layer is
replaced by the next one of its kind, and stays if a run brings none: absence is not deletion.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from llama_index.core.schema import BaseNode, ImageNode, TextNode

from mm_retriever.errors import ImageLoadError, NodeError
from mm_retriever.ingest.sidecar_columns import SidecarRow, within_bounds
from mm_retriever.ingest.sources import Item
from mm_retriever.ingest.vectors import Vector
from mm_retriever.own_keys import (
    BOOKKEEPING_KEYS,
    FILE_STAMP,
    ITEM_KEY,
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
"""The sources of metadata; "earlier" is for rows of versions that did not note the source. Later kinds win."""

_KINDS: tuple[Kind, ...] = ("earlier", "exif", "node", "sidecar")

SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use: FAT's."""


@dataclass(frozen=True)
class Layer:
    """Text and metadata from one source, and the digest of both as they were given, "" if not computed yet."""

    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.columns)

    @property
    def identity(self) -> str:
        """Equal for equal layers; "" for an empty one."""
        return self.digest or (_digest_of(self.text, self.columns)[:16] if self else "")


Layers: TypeAlias = Mapping[Kind, Layer]


@dataclass(frozen=True)
class Task:
    """An item that is new, or may have changed."""

    item: Item
    given: Layers  # what this run says about it
    stamp: Mapping[str, Any]
    stored: Mapping[str, Any] | None  # the bookkeeping columns of its row, if there is one
    kept: Layers = field(default_factory=dict)  # what the row has and this run says nothing about
    size: tuple[int, int] = (0, 0)  # width and height that are stored
    drop: tuple[Kind, ...] = ()  # what the row loses if this run says nothing about it
    moved_from: str = ""  # id of the row that this one takes the place of

    @property
    def same(self) -> bool:
        """Whether the row is certainly up to date; otherwise the file has to be read."""
        return self.same_stamp and (self.item.path is None or FILE_STAMP in self.stamp)

    @property
    def same_stamp(self) -> bool:
        """Whether the row has the current stamp, apart from the device number, which may change."""
        stored = self.stored
        return stored is not None and all(
            _without_device(key, value) == _without_device(key, own_value(stored, key))
            for key, value in self.stamp.items()
        )

    @property
    def same_metadata(self) -> bool:
        """Whether the row has the metadata that it would get from this run."""
        stored = self.stored
        if stored is None or self.label != _stored_label(stored):
            return False
        if OLD_LAYERS_KEY in stored and LAYERS_KEY not in stored:
            given = any(self.given.values()) or "earlier" in self.drop
            return not given or stored[OLD_LAYERS_KEY] == self._old_digest()
        known = {kind: digest for kind, (digest, _, _) in _account(stored).items()}
        if any(kind in self.drop and kind not in self.given for kind in known):
            return False
        return all(known.get(kind, "") == layer.identity for kind, layer in self.given.items())

    @property
    def known_digest(self) -> str:
        """The digest of the file that the row was made from, "" without one."""
        return str(own_value(self.stored, "digest") or "") if self.stored is not None else ""

    @property
    def label(self) -> str:
        """The folders that the image lies in, below the topmost folder that it was ever indexed from."""
        stored = _stored_label(self.stored) if self.stored is not None else ""
        label = self.item.label
        if stored and stored != label and (not label or not f"/{label}".endswith(f"/{stored}")):
            return stored
        return label

    @property
    def layers(self) -> dict[Kind, Layer]:
        """All metadata of the row to be written, except those from the file itself."""
        return {**self.kept, **self.given}

    def keeping(self, node: BaseNode | None) -> Task:
        """Return the task with the layers of its stored node that this run does not give."""
        if self.stored is None or node is None:
            return self
        width, height = (int(own_value(node.metadata, side) or 0) for side in ("width", "height"))
        return replace(self, item=self._item_of(node), kept=self._kept_of(node), size=(width, height))

    def moved(self, node: BaseNode) -> Task:
        """Return the task of a new item that replaces another row, with the layers of that row's node."""
        return replace(self, item=self._item_of(node), kept=self._kept_of(node), moved_from=node.node_id)

    def _item_of(self, node: BaseNode) -> Item:
        """The item with what the stored node has and this run says nothing about, metadata apart."""
        item = self.item
        embed, llm = (
            given or tuple(key for key in stored if key not in BOOKKEEPING_KEYS)
            for given, stored in (
                (item.embed_excluded, node.excluded_embed_metadata_keys),
                (item.llm_excluded, node.excluded_llm_metadata_keys),
            )
        )
        relationships = item.relationships or dict(node.relationships)
        return replace(item, relationships=relationships, embed_excluded=embed, llm_excluded=llm)

    def _kept_of(self, node: BaseNode) -> Layers:
        return {kind: layer for kind, layer in _stored_layers(node).items() if kind not in (*self.given, *self.drop)}

    def _old_digest(self) -> str:
        """The digest that earlier versions stored of the same metadata."""
        node, sidecar = self.given.get("node", Layer()), self.given.get("sidecar", Layer())
        columns = {**node.columns, **sidecar.columns}
        return _digest_of(node.text, columns) if node.text or columns else ""


def given_layers(item: Item, row: SidecarRow | None) -> tuple[dict[Kind, Layer], list[str]]:
    """Return the layers that a run gives to an item, and the keys left out as too long or reserved."""
    if row is None and not item.text and not item.metadata:
        return {}, []
    reserved = [key for key in item.metadata if key in RESERVED_KEYS]
    columns, too_long = within_bounds({key: item.metadata[key] for key in item.metadata if key not in RESERVED_KEYS})
    node = Layer(item.text if item.is_image else "", columns)
    layers: dict[Kind, Layer] = {"node": node} if node else {}
    if row is not None:
        reserved += [key for key in row.columns if key in RESERVED_KEYS]
        layers["sidecar"] = Layer(row.text, {key: row.columns[key] for key in row.columns if key not in RESERVED_KEYS})
    return layers, [*reserved, *too_long]


def with_items(layers: Layers, column: str) -> tuple[dict[Kind, Layer], str]:
    """Return the layers with the values of a column as the item, and a remark for the report, or ""."""
    named = {kind: layer.columns[column] for kind, layer in layers.items() if column in layer.columns}
    changed = dict(layers)
    remark = "" if named else f"images have no column {column!r} to name their item"
    for kind, name in named.items():
        if layers[kind].columns.get(ITEM_KEY, name) != name:
            remark = f"images have another value in their column {ITEM_KEY!r} than in {column!r}, which replaces it"
        changed[kind] = Layer(layers[kind].text, {**layers[kind].columns, ITEM_KEY: name})
    return changed, remark


def image_node(
    task: Task, digest: str, size: tuple[int, int], vector: Vector, exif: Mapping[str, Any] | None = None
) -> ImageNode:
    """Return the node of an image under its vector; `digest` is that of the file, `exif` None if it was not read."""
    item = task.item
    own = {
        "label": task.label,
        "file_path": item.path,
        "file_name": item.file_name,
        "width": size[0],
        "height": size[1],
    }
    layers = task.layers
    if exif is not None:
        layers["exif"] = Layer(columns=exif)
    text, fields = _fields(task, layers, {**own, **task.stamp, "digest": digest}, vector)
    return ImageNode(text=text, image_path=item.path, image_url=item.url, **fields)


def text_node(task: Task, vector: Vector) -> TextNode:
    """Return the node of a text."""
    return TextNode(text=task.item.text, **_fields(task, task.layers, task.stamp, vector)[1])


def lost_columns(task: Task) -> list[str]:
    """Return the columns that the row loses because this run replaces or drops their layers."""
    if task.stored is None:
        return []
    now = {key for layer in task.layers.values() for key in layer.columns}
    account = _account(task.stored)
    return sorted({key for kind, (_, _, keys) in account.items() if kind != "exif" for key in keys} - now)


def has_columns(stored: Mapping[str, Any] | None) -> bool:
    """Whether a row has metadata from a node or a sidecar."""
    return stored is not None and (bool(stored.get(OLD_LAYERS_KEY)) or any(k != "exif" for k in _account(stored)))


def write_each(
    nodes: Sequence[tuple[Task, Any]],
    write: Callable[[Sequence[tuple[Task, Any]]], None],
    refuse: Callable[[Task, str], None],
) -> None:
    """Write nodes together; if Milvus cannot hold one of them, write each by itself, and refuse the bad ones."""
    try:
        write(nodes)
    except NodeError as error:
        if len(nodes) == 1:
            refuse(nodes[0][0], str(error))
        else:
            for node in nodes:
                write_each([node], write, refuse)


def _fields(task: Task, layers: Layers, own: Mapping[str, Any], vector: Vector) -> tuple[str, dict[str, Any]]:
    """The text of the layers, and the fields common to image nodes and text nodes."""
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
    bookkeeping = [key for key in BOOKKEEPING_KEYS if key in metadata and key not in columns]
    return text, {
        "id_": task.item.id,
        "metadata": metadata,
        "excluded_embed_metadata_keys": list(dict.fromkeys((*bookkeeping, *task.item.embed_excluded))),
        "excluded_llm_metadata_keys": list(dict.fromkeys((*bookkeeping, *task.item.llm_excluded))),
        "relationships": task.item.relationships,
        "embedding": vector.tolist(),
    }


def _stored_layers(node: BaseNode) -> dict[Kind, Layer]:
    text = node.get_content() if isinstance(node, ImageNode) else ""
    if LAYERS_KEY not in node.metadata:
        if not node.metadata.get(OLD_LAYERS_KEY):
            return {}
        columns = {key: value for key, value in node.metadata.items() if key not in (*OWN_KEYS, *BOOKKEEPING_KEYS)}
        layer = Layer(text, columns)
        return {"earlier": layer} if layer else {}
    return {
        kind: _known(
            text if has_text else "", {key: node.metadata[key] for key in keys if key in node.metadata}, digest
        )
        for kind, (digest, has_text, keys) in _account(node.metadata).items()
    }


def _known(text: str, columns: Mapping[str, Any], digest: str) -> Layer:
    """A stored layer; where a later one hid a part of it, which is gone, without the digest of the whole.

    So the next run that says the same about the image restores that part.
    """
    return Layer(text, columns, digest if _digest_of(text, columns)[:16] == digest else "")


def _account(stored: Mapping[str, Any]) -> dict[Kind, tuple[str, bool, Sequence[str]]]:
    """Digest, ownership of the text, and keys of each stored layer; {} if another program damaged the account."""
    if not stored.get(LAYERS_KEY):
        return {}
    try:
        account = json.loads(stored[LAYERS_KEY])
        return {
            kind: (str(account[kind][0]), bool(account[kind][1]), list(map(str, account[kind][2])))
            for kind in _KINDS
            if kind in account
        }
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}


def _stored_label(stored: Mapping[str, Any]) -> str:
    return str(own_value(stored, "label") or "")


# ------------------------------------------------------------------------------------------ stamps


def current_stamp(item: Item) -> Mapping[str, Any]:
    """Return the stamp of an item, by which a change is noticed; a URL is taken to be constant.

    Raises:
        ImageLoadError: the file cannot be accessed.
    """
    if item.path is not None:
        try:
            return file_stamp(item.path)
        except (OSError, ValueError) as error:
            raise ImageLoadError(str(getattr(error, "strerror", None) or error).lower()) from error
    if item.stamp or item.url is not None:
        return item.stamp
    return {"digest": hashlib.sha256(item.text.encode("utf-8", "surrogatepass")).hexdigest()}


def file_stamp(path: str) -> dict[str, int | str]:
    """Return size, time and, for a file at rest, ctime and inode of a regular file: equal stamps, equal contents.

    `cp -p`, `rsync -t`, `exiftool -P` and renaming keep size and time, but change ctime. A file that changed a moment
    ago may change again within the same tick of the clock, so its stamp has no ctime yet.
    """
    status = os.stat(path)  # noqa: PTH116 - ten times Path's speed
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("a folder, not a file: give it as the source by itself")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    stamp: dict[str, int | str] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    now = time.time_ns()
    if min(abs(now - status.st_mtime_ns), abs(now - status.st_ctime_ns)) > SETTLED_NS:
        stamp[FILE_STAMP] = f"{status.st_ctime_ns}-{status.st_ino}-{status.st_dev}"
    return stamp


def _without_device(key: str, value: object) -> object:
    return str(value or "").rpartition("-")[0] if key == FILE_STAMP else value


def _digest_of(text: str, columns: Mapping[str, Any]) -> str:
    content = json.dumps([text, columns], default=str, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
