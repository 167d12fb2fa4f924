"""What to ingest: a folder, paths and URLs, or LlamaIndex nodes, one item at a time in a fixed order.

Owns which files of a folder count, and the id that a picture keeps from one run to the next. Reads no file.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.schema import BaseNode, Document, ImageNode, NodeRelationship, RelatedNodeInfo, RelatedNodeType

from mm_retriever.errors import IngestError, NodeError
from mm_retriever.image import is_image_path
from mm_retriever.store import storable_node

Entry: TypeAlias = str | os.PathLike[str] | BaseNode
Relationships: TypeAlias = dict[NodeRelationship, RelatedNodeType]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Entry]

_URL = re.compile(r"https?://", re.IGNORECASE)
_BINARY = re.compile(r"\A%PDF-|[\x00-\x08\x0e-\x1a]")  # no text has these characters


@dataclass(frozen=True)
class Item:
    """One thing to be stored.

    Attributes:
        id: of its row; the same in every run.
        name: path, URL or node id, for people.
        path: the picture file, absolute.
        url: where the picture is, if it is no file.
        text: what the caller's node says; the thing itself where there is no picture.
        sidecar_names: what a sidecar may call it.
        label: the folders it lies in.
        metadata: what the caller's node carries.
        relationships: the caller's node's; a document is its own source, so that it can be deleted by its id.
    """

    id: str
    name: str
    path: str | None = None
    url: str | None = None
    text: str = ""
    sidecar_names: tuple[str, ...] = ()
    label: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    relationships: Relationships = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Path or URL of the picture, "" for a text."""
        return self.path or self.url or ""

    @property
    def is_picture(self) -> bool:
        """Whether there are pixels to embed."""
        return bool(self.place)


Skip: TypeAlias = Callable[[str, str], None]
"""Called with the name and the reason of what cannot be an item."""


def items(source: Source, skip: Skip) -> Iterator[Item]:
    """Yield the items of any source, lazily; what cannot be one goes to `skip`."""
    folder = source_folder(source)
    if folder is not None:
        for path in walk(folder, skip):
            yield from _guarded(path, skip, root=folder)
        return
    for entry in [source] if isinstance(source, str | os.PathLike) else source:
        yield from _guarded(entry, skip)


def source_folder(source: Source) -> str | None:
    """Return the folder that a source is, absolute and without symbolic links; None if it is something else."""
    if not isinstance(source, str | os.PathLike) or _URL.match(os.fspath(source)):
        return None
    path = Path(source)
    if not path.exists():
        raise IngestError(f"there is no file or folder {str(path)!r}")
    return str(path.resolve()) if path.is_dir() else None


def walk(folder: str, skip: Skip) -> Iterator[str]:
    """Yield the picture files below a folder, sorted by name, one folder's names in memory at a time.

    By suffix only. Hidden files and folders are left out; links to files are followed, links to folders are not, so
    that a loop of links cannot hold the walk up. A folder that cannot be read goes to `skip`.
    """
    open_folders = [(folder, iter(_listing(folder, skip)))]
    while open_folders:
        place, entries = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
            continue
        name, is_folder = entry
        path = f"{place.rstrip(os.sep)}{os.sep}{name}"
        if is_folder:
            open_folders.append((path, iter(_listing(path, skip))))
        elif is_image_path(name):
            yield path


def _listing(folder: str, skip: Skip) -> list[tuple[str, bool]]:
    """Names that are not hidden, sorted, and whether each is a folder."""
    try:
        with os.scandir(folder) as listing:
            visible = (entry for entry in listing if not entry.name.startswith("."))
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in visible)
    except OSError as error:
        skip(folder, f"cannot read the folder: {error.strerror or error}")
        return []


def path_id(path: str) -> str:
    """Return the id of the row of a picture file: a name-based UUID of its absolute path."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"file://{Path(path).as_posix()}"))


def _guarded(entry: object, skip: Skip, root: str | None = None) -> Iterator[Item]:
    try:
        if isinstance(entry, BaseNode):
            yield _node_item(entry)
        elif isinstance(entry, str) and _URL.match(entry):
            yield _url_item(entry)
        elif isinstance(entry, str | os.PathLike):
            yield _path_item(os.fspath(entry), root=root)
        else:
            raise IngestError(
                f"a source holds paths, URLs and LlamaIndex nodes, not {type(entry).__name__}: "
                "what is stored leads back to a file, so save the picture first"
            )
    except NodeError as error:
        skip(_printable(str(getattr(entry, "node_id", entry))), str(error))
    except UnicodeEncodeError:
        skip(_printable(str(entry)), "its name is not Unicode text; rename the file")


def _path_item(path: str, *, root: str | None) -> Item:
    absolute = _absolute(path) if root is None else path  # a walk starts from the real folder and follows no links
    id_ = path_id(absolute)  # first: it refuses names that are no Unicode
    posix = Path(absolute)
    if root is None:
        return Item(id=id_, name=absolute, path=absolute, sidecar_names=(path, posix.name), label=posix.parent.name)
    below = posix.relative_to(root)
    return Item(
        id=id_,
        name=absolute,
        path=absolute,
        sidecar_names=(below.as_posix(), posix.name),
        label=below.parent.as_posix() if below.parent.parts else "",
    )


def _url_item(url: str) -> Item:
    return Item(
        id=str(uuid.uuid5(uuid.NAMESPACE_URL, url)), name=url, url=url, sidecar_names=(url, url.rsplit("/")[-1])
    )


def _node_item(node: BaseNode) -> Item:
    """A picture by its file or URL, anything else by its text.

    An id that someone chose is kept. The random one that LlamaIndex gives is replaced, or every run would store the
    same document anew.
    """
    plain = _read_as_text(storable_node(node))
    text = plain.get_content()
    given = None if _is_random(node.node_id) else node.node_id
    if isinstance(plain, ImageNode) and (plain.image_path or plain.image_url):
        place = _path_item(plain.image_path, root=None) if plain.image_path else _url_item(plain.image_url or "")
        id_ = given or place.id
    elif text.strip():
        content = hashlib.sha256(f"{node.metadata.get('file_path', '')}\0{text}".encode()).hexdigest()
        id_ = given or str(uuid.uuid5(uuid.NAMESPACE_URL, f"text:{content}"))
        place = Item(id=id_, name=id_)
    else:
        raise NodeError("it has neither text nor a picture with a path or URL")
    relationships = dict(node.relationships)
    if isinstance(node, Document):
        relationships.setdefault(NodeRelationship.SOURCE, RelatedNodeInfo(node_id=id_))
    return replace(place, id=id_, text=text, metadata=dict(node.metadata), relationships=relationships)


def _read_as_text(node: BaseNode) -> BaseNode:
    """The picture whose bytes a node has for text: `SimpleDirectoryReader` without readers for files decodes anything.

    Raises:
        NodeError: the bytes are no picture's.
    """
    if isinstance(node, ImageNode) or not _BINARY.search(node.get_content()):
        return node
    path = str(node.metadata.get("file_path") or "")
    if not is_image_path(path):
        raise NodeError(
            f"its text is the bytes of a file ({path or 'of no known name'}): read that with a reader for its format, "
            'SimpleDirectoryReader(..., file_extractor={".pdf": ...}), or pip install llama-index-readers-file'
        )
    return ImageNode(id_=node.node_id, image_path=path, metadata=node.metadata)


def _is_random(node_id: str) -> bool:
    try:
        return uuid.UUID(node_id).version == 4
    except ValueError:
        return False


def _absolute(path: str) -> str:
    folder, name = os.path.split(path)
    return f"{os.path.realpath(folder or os.curdir).rstrip(os.sep)}{os.sep}{name}"


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")[:300] if _encodable(name) else repr(name)[:300]


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
