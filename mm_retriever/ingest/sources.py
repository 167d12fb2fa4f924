"""What to ingest: a folder, paths and URLs, or LlamaIndex nodes, one item at a time in a fixed order.

Owns which files of a folder count, and the id that an image keeps from one run to the next. Opens only files whose
suffix says nothing, to see whether they begin like an image, and bytes that a node carries.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.schema import BaseNode, Document, ImageNode, NodeRelationship, RelatedNodeInfo, RelatedNodeType

from mm_retriever.embedding import node_images
from mm_retriever.errors import ImageLoadError, IngestError, NodeError, one_line
from mm_retriever.images import ImageSource, is_image_path, read_image_bytes
from mm_retriever.ingest.ignored import HIDDEN, LINKED, Ignore, not_counted, why_ignored
from mm_retriever.ingest.remote import RemoteFile, file_of_node, files_below
from mm_retriever.ingest.stable_url import stable_url, url_file_name
from mm_retriever.store import bytes_as_text, has_control_characters, storable_node

Entry: TypeAlias = str | os.PathLike[str] | BaseNode
Relationships: TypeAlias = dict[NodeRelationship, RelatedNodeType]
Source: TypeAlias = str | os.PathLike[str] | Iterable[Entry]

_URL = re.compile(r"https?://", re.IGNORECASE)
_OTHER_SCHEME = re.compile(r"(?!https?://)(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One thing to be stored.

    Attributes:
        id: of its row; the same in every run.
        name: path, URL or node id, for people.
        path: the picture file, absolute.
        url: where the picture is, if it is no file; without what is signed or secret.
        fetch_url: what to fetch it by, where that is more than the URL.
        data: bytes of a picture that is in no local file, or what reads them.
        stamp: what says that the thing is the same as before, where it is in no local file.
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
    fetch_url: str | None = None
    data: bytes | RemoteFile | None = None
    stamp: dict[str, Any] = field(default_factory=dict)
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
    def file_name(self) -> str:
        """What its file is called, with letters and accents composed; "" for a text."""
        name = url_file_name(self.url) if self.path is None and self.url else os.path.basename(self.place)  # noqa: PTH119
        return unicodedata.normalize("NFC", name)

    @property
    def is_picture(self) -> bool:
        """Whether there are pixels to embed."""
        return bool(self.place) or self.data is not None

    @property
    def source(self) -> ImageSource:
        """What the pixels are read from."""
        if self.data is not None:
            return self.data  # type: ignore[return-value]
        return self.path or self.fetch_url or self.url or ""


@dataclass(frozen=True)
class _Files:
    """Where paths lead: into a file system of fsspec, or else to this machine, and then perhaps into an open one."""

    given: Any | None = None
    search_open: bool = False

    def find(self, node: ImageNode, path: str) -> RemoteFile | None:
        """The file of a node, if it is not on this machine."""
        if self.given is not None:
            return RemoteFile(self.given, path)
        return file_of_node(node, path) if self.search_open and not self._is_here(node, path) else None

    def _is_here(self, node: ImageNode, path: str) -> bool:
        try:
            size = Path(path).stat().st_size
        except (OSError, ValueError):
            return False
        return node.metadata.get("file_size") in (None, size)


Skip: TypeAlias = Callable[[str, str], None]
"""Called with the name and the reason of what cannot be an item."""


def items(
    source: Source,
    skip: Skip,
    ignore: Ignore = not_counted,
    file_system: Any | None = None,
    *,
    search_open: bool = False,
) -> Iterator[Item]:
    """Yield the items of any source, lazily; what cannot be one goes to `skip`, other files to `ignore`.

    Args:
        source: see `Source`.
        skip: told what cannot be an item.
        ignore: told which files are none.
        file_system: of fsspec, in which paths are looked for; None: the local one.
        search_open: whether the file of a node that is not on this machine is looked for in the file systems of fsspec
            that are open in this process: where `SimpleDirectoryReader(..., fs=...)` has read it.
    """
    if file_system is not None:
        if isinstance(source, str | os.PathLike):
            source = files_below(file_system, os.fspath(source), ignore)
        for entry in source:
            yield from _guarded(entry, skip, files=_Files(file_system, search_open))
        return
    folder = source_folder(source)
    if folder is not None:
        for path in walk(folder, skip, ignore):
            yield from _guarded(path, skip, root=folder)
        return
    for entry in [source] if isinstance(source, str | os.PathLike) else source:
        yield from _guarded(entry, skip, files=_Files(None, search_open))


def source_folder(source: Source) -> str | None:
    """Return the folder that a source is, absolute and without symbolic links; None if it is something else."""
    if not isinstance(source, str | os.PathLike) or _URL.match(os.fspath(source)):
        return None
    if remote := _OTHER_SCHEME.match(os.fspath(source)):
        raise IngestError(f"{os.fspath(source)[:200]!r}: {_needs_file_system(remote['scheme'])}")
    path = existing_path(source)
    return str(path.resolve()) if path.is_dir() else None


def vanished_folder(source: Source) -> str | None:
    """Return where a folder was that is not there any more; None if the source is there, or is no path."""
    if not isinstance(source, str | os.PathLike) or is_url(os.fspath(source)):
        return None
    try:
        existing_path(source)
    except IngestError:
        try:
            os.stat(source)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return os.path.realpath(source)
        except (OSError, ValueError):
            return None
    return None


def existing_path(source: str | os.PathLike[str]) -> Path:
    """Return the path of a file or folder as the disk has it: composed and decomposed letters name the same.

    Raises:
        IngestError: there is none, or it cannot be looked at.
    """
    given = Path(source)
    names = dict.fromkeys([str(given), *(unicodedata.normalize(form, str(given)) for form in ("NFC", "NFD"))])
    for path in map(Path, names):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise IngestError(f"cannot look at {str(given)!r}: {getattr(error, 'strerror', None) or error}") from error
        return path
    raise IngestError(f"there is no file or folder {str(given)!r}")


def walk(folder: str, skip: Skip, ignore: Ignore = not_counted) -> Iterator[str]:
    """Yield the images below a folder, sorted by name, one folder's names in memory at a time.

    By suffix; a file whose suffix says nothing is taken if it begins like an image. Hidden files and folders are left
    out. Links to files are followed. Links to folders are followed once, after all that lies in the folder itself, so
    that a path does not depend on which links there are: what was walked already, and what contains the folder, is not
    walked again. A folder that cannot be read goes to `skip`, what is left out to `ignore`.
    """
    walked: set[tuple[int, int]] = set()
    links: list[str] = []
    yield from _walk_real(folder, walked, links, skip, ignore)
    above = {identity for place in Path(folder).parents if (identity := _folder_identity(str(place))) is not None}
    while links:
        links.sort(reverse=True)
        link = links.pop()
        if _folder_identity(link) in above:
            ignore(LINKED, "a link to a folder that contains this one", link)
        else:
            yield from _walk_real(link, walked, links, skip, ignore)


def _walk_real(
    folder: str, walked: set[tuple[int, int]], links: list[str], skip: Skip, ignore: Ignore
) -> Iterator[str]:
    open_folders = [(folder, _entries(folder, walked, skip, ignore))]
    while open_folders:
        place, entries = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
            continue
        name, kind = entry
        path = f"{place.rstrip(os.sep)}{os.sep}{name}"
        if kind == "folder":
            open_folders.append((path, _entries(path, walked, skip, ignore)))
        elif kind == "link":
            links.append(path)
        elif is_image_path(name):
            yield path
        elif (why := why_ignored(path)) is not None:
            ignore(*why, path)
        else:
            yield path


def _entries(folder: str, walked: set[tuple[int, int]], skip: Skip, ignore: Ignore) -> Iterator[tuple[str, str]]:
    """Names that are not hidden, sorted, each with "folder", "link" (to a folder) or "file"; nothing a second time."""
    identity = _folder_identity(folder)
    if identity in walked:
        ignore(LINKED, "walked already, under another name", folder)
        return iter(())
    if identity is not None:
        walked.add(identity)
    found = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if entry.name.startswith("."):
                    ignore(HIDDEN, "its name begins with a dot", entry.path)
                else:
                    found.append((entry.name, _entry_kind(entry)))
    except OSError as error:
        skip(folder, f"cannot read the folder: {error.strerror or error}")
        return iter(())
    return iter(sorted(found))


def _entry_kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "link" if entry.is_symlink() and entry.is_dir() else "file"
    except OSError:  # a stale mount: whoever looks at the file itself says so
        return "file"


def _folder_identity(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)  # noqa: PTH116 - ten times Path's speed
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def path_id(path: str) -> str:
    """Return the id of the row of a picture file: a name-based UUID of its absolute path."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"file://{Path(path).as_posix()}"))


def _guarded(entry: object, skip: Skip, root: str | None = None, files: _Files = _Files()) -> Iterator[Item]:
    try:
        if isinstance(entry, BaseNode):
            yield _node_item(entry, files)
        elif isinstance(entry, str) and _URL.match(entry):
            yield _url_item(entry)
        elif isinstance(entry, str | os.PathLike) and files.given is not None:
            yield _remote_item(RemoteFile(files.given, os.fspath(entry)))
        elif isinstance(entry, str) and (remote := _OTHER_SCHEME.match(entry)):
            skip(one_line(entry, 300), _needs_file_system(remote["scheme"]))
        elif isinstance(entry, str | os.PathLike):
            yield _path_item(os.fspath(entry), root=root)
        else:
            raise IngestError(
                f"a source holds paths, URLs and LlamaIndex nodes, not {type(entry).__name__}: "
                "what is stored leads back to a file, so save the picture first"
            )
    except (NodeError, ImageLoadError) as error:
        skip(one_line(getattr(entry, "node_id", entry), 300), str(error))
    except OSError as error:  # of a remote file system
        skip(one_line(getattr(entry, "node_id", entry), 300), str(error.strerror or error))
    except UnicodeEncodeError:
        skip(one_line(entry, 300), "its name is not Unicode text; rename the file")


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
        label=unicodedata.normalize("NFC", below.parent.as_posix()) if below.parent.parts else "",
    )


def is_url(place: str) -> bool:
    """Whether a source is a URL and no path."""
    return _URL.match(place) is not None


def url_id(url: str) -> str:
    """Return the id of the row of an image at a URL; the same under any signature."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, stable_url(url)))


def _url_item(url: str) -> Item:
    stable = stable_url(url)
    return Item(
        id=url_id(url),
        name=stable,
        url=stable,
        fetch_url=None if stable == url else url,
        sidecar_names=(url, stable, url.rsplit("/")[-1], url_file_name(url)),
    )


def _remote_item(file: RemoteFile) -> Item:
    return replace(_url_item(file.name), data=file, stamp=file.stamp())


def _node_item(node: BaseNode, files: _Files) -> Item:
    """A picture by its file, URL or bytes, anything else by its text.

    An id that someone chose is kept. The random one that LlamaIndex gives is replaced, or every run would store the
    same document anew.
    """
    plain = storable_node(node, drop_bytes=True)
    text = plain.get_content()
    carried = next((one for one in node_images(node) if str(one)[:5].lower() == "data:"), None)
    path, url = (plain.image_path, plain.image_url) if isinstance(plain, ImageNode) else (None, None)
    if isinstance(plain, ImageNode) and path and (carried is None or Path(path).exists()):
        place = _placed_item(plain, path, files)
    elif carried is not None:  # before the URL: what is here need not be fetched
        place = replace(_bytes_item(read_image_bytes(carried), str(node.metadata.get("file_path") or "")), url=url)
    elif url:
        place = _url_item(url)
    elif has_control_characters(text):
        raise NodeError(bytes_as_text(str(node.metadata.get("file_path") or "")))
    elif text.strip():
        content = hashlib.sha256(f"{node.metadata.get('file_path', '')}\0{text}".encode()).hexdigest()
        id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, f"text:{content}"))
        place = Item(id=id_, name=id_)
    else:
        raise NodeError("it has neither text nor a picture with a path or URL")
    id_ = place.id if _is_random(node.node_id) else node.node_id
    if not place.place:
        place = replace(place, name=id_)
    relationships = dict(node.relationships)
    if isinstance(node, Document):
        relationships.setdefault(NodeRelationship.SOURCE, RelatedNodeInfo(node_id=id_))
    metadata = plain.metadata
    if place.fetch_url:
        metadata = {key: place.url if value == place.fetch_url else value for key, value in metadata.items()}
    return replace(place, id=id_, text=text, metadata=metadata, relationships=relationships)


def _placed_item(node: ImageNode, path: str, files: _Files) -> Item:
    """An image in a file, of this machine or of another file system."""
    if files.given is None and (remote := _OTHER_SCHEME.match(path)):
        raise NodeError(_needs_file_system(remote["scheme"]))
    if (file := files.find(node, path)) is not None:
        return _remote_item(file)
    return _path_item(path, root=None)


def _bytes_item(data: bytes, name: str) -> Item:
    digest = hashlib.sha256(data).hexdigest()
    id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, f"image:{name}\0{digest}"))
    return Item(id=id_, name=id_, data=data, stamp={"digest": digest})


def _needs_file_system(scheme: str) -> str:
    return (
        f"{scheme}: is read through a file system of fsspec: give fs=fsspec.filesystem({scheme!r}), "
        "or documents of SimpleDirectoryReader(..., fs=...)"
    )


def _is_random(node_id: str) -> bool:
    try:
        return uuid.UUID(node_id).version == 4
    except ValueError:
        return False


def _absolute(path: str) -> str:
    folder, name = os.path.split(path)
    return f"{os.path.realpath(folder or os.curdir).rstrip(os.sep)}{os.sep}{name}"
