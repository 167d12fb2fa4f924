"""The items to ingest, from a folder, paths and URLs, or LlamaIndex nodes, one at a time in a fixed order.

Owns the ids of rows, which are the same in every run. Decodes only image bytes that a node carries.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, unquote_plus, urlsplit, urlunsplit

from llama_index.core.schema import BaseNode, Document, ImageNode, NodeRelationship, RelatedNodeInfo, RelatedNodeType

from mm_retriever.errors import ImageLoadError, IngestError, NodeError, one_line, shown
from mm_retriever.images import ImageSource, read_image_bytes
from mm_retriever.images.source import is_url, spellings
from mm_retriever.ingest.folder import Ignore, Skip, existing_path, given_path, local_path, not_counted, walk
from mm_retriever.ingest.remote import RemoteFile, file_of_node, files_below
from mm_retriever.request import node_images
from mm_retriever.store import bytes_as_text, has_control_characters, storable_node

Entry: TypeAlias = str | os.PathLike[str] | BaseNode
Source: TypeAlias = str | os.PathLike[str] | Iterable[Entry]

_SOURCES = "give a folder, a file, a URL, or a list of files, URLs and LlamaIndex nodes"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One thing to be stored: an image, or a text."""

    id: str  # of its row; the same in every run
    name: str  # path, URL or node id, for people
    path: str | None = None  # of the image file, absolute
    url: str | None = None  # of an image that is in no local file; without signatures and secrets
    fetch_url: str | None = None  # the whole URL, where `url` lacks something
    data: bytes | RemoteFile | None = None  # of an image that is in no local file
    stamp: dict[str, Any] = field(default_factory=dict)  # equal as long as the thing is, where it is in no local file
    text: str = ""  # of the caller's node; the thing itself where there is no image
    sidecar_names: tuple[str, ...] = ()
    label: str = ""  # the folders it lies in
    metadata: dict[str, Any] = field(default_factory=dict)
    relationships: dict[NodeRelationship, RelatedNodeType] = field(default_factory=dict)
    embed_excluded: tuple[str, ...] = ()  # metadata that the caller's node keeps from embedding models
    llm_excluded: tuple[str, ...] = ()  # and from language models

    @property
    def place(self) -> str:
        """Path or URL of the image, "" for a text."""
        return self.path or self.url or ""

    @property
    def file_name(self) -> str:
        """Name of its file with letters and accents composed; "" for a text."""
        name = url_file_name(self.url) if self.path is None and self.url else os.path.basename(self.place)  # noqa: PTH119
        return unicodedata.normalize("NFC", name)

    @property
    def is_image(self) -> bool:
        """Whether there are pixels to embed."""
        return bool(self.place) or self.data is not None

    @property
    def content(self) -> tuple[object, ...]:
        """The item and its metadata, equal for the same item named twice."""
        return self.place, self.text, self.metadata, self.stamp

    @property
    def source(self) -> ImageSource:
        """Where the pixels are read from."""
        if self.data is not None:
            return self.data  # type: ignore[return-value]
        return self.path or self.fetch_url or self.url or ""


def items(
    source: Source,
    skip: Skip,
    ignore: Ignore = not_counted,
    file_system: Any | None = None,
    *,
    search_open: bool = False,
) -> Iterator[Item]:
    """Yield the items of a folder, path or URL, or of an iterable of paths, URLs and nodes, lazily.

    Paths are looked up in the given fsspec file system, or else on this machine. With `search_open`, the file of a node
    that is not found there is also looked up in the open file systems, where `SimpleDirectoryReader(..., fs=...)` may
    have read it.
    """
    root = source_folder(source) if file_system is None else None
    entries: Iterable[object]
    if root is not None:
        entries = walk(root, skip, ignore)
    elif not isinstance(source, str | os.PathLike):
        entries = source
    elif file_system is not None:
        entries = files_below(file_system, os.fspath(source), ignore)
    else:
        entries = [source]
    for entry in entries:
        try:
            yield _walked_item(str(entry), root) if root is not None else _item(entry, file_system, search_open)
        except (NodeError, ImageLoadError) as error:
            skip(_name(entry), str(error))
        except OSError as error:  # of a remote file system
            skip(_name(entry), str(error.strerror or error))
        except UnicodeEncodeError:
            skip(_name(entry), "its name is not Unicode text; rename the file")


def by_ids(window: Iterable[Item], under_way: Mapping[str, Item], remarks: Counter[str]) -> dict[str, Item]:
    """Return the items that are not under way yet, by id; of two with one id the later counts.

    `remarks` counts items with the id of another one and different content.
    """
    kept: dict[str, Item] = {}
    for item in window:
        other = under_way.get(item.id) or kept.get(item.id)
        if other is not None and other.content != item.content:
            remarks["nodes have the id of another one, or its text, and say other things: one is kept"] += 1
        if item.id not in under_way:
            kept[item.id] = item
    return kept


def source_folder(source: Source) -> str | None:
    """Return the folder that a source is, absolute and without symbolic links; None for any other source."""
    if not isinstance(source, Iterable | os.PathLike):
        raise IngestError(f"the source is {shown(source)}: {_SOURCES}")
    if not isinstance(source, str | os.PathLike) or is_url(os.fspath(source)):
        return None
    if not os.fspath(source).strip():  # the working directory, to Python
        raise IngestError(f"the source is {source!r}: {_SOURCES}; the folder that you are in is '.'")
    if scheme := scheme_of(os.fspath(source)):
        raise IngestError(f"{os.fspath(source)[:200]!r}: {_needs_file_system(scheme)}")
    path = existing_path(source)
    if path is None:
        raise IngestError(f"there is no file or folder {os.fspath(source)!r}")
    return str(path.resolve()) if path.is_dir() else None


def count_items(source: Source, folder: str | None) -> int | None:
    """Return the number of items of a source, None if unknown; a folder is walked to count."""
    if folder is not None:
        return sum(1 for _ in walk(folder, lambda name, reason: None))
    if isinstance(source, str | os.PathLike):
        return 1
    return len(source) if isinstance(source, Sized) else None


def missing_folder(source: Source) -> str | None:
    """Return the absolute path of a source that is a path to nothing; None for any other source."""
    if not isinstance(source, str | os.PathLike) or scheme_of(os.fspath(source)):
        return None
    try:
        return _real(source) if existing_path(source) is None else None
    except IngestError:  # nobody knows
        return None


def _real(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(given_path(path))


def path_id(path: str) -> str:
    """Return the id of an image file's row: a name-based UUID of its absolute path."""
    return _name_id(f"file://{path if _is_posix(path) else Path(path).as_posix()}")


def _is_posix(path: str) -> bool:
    """Whether `Path` would not change the path."""
    return os.sep == "/" and path[:1] == "/" and "//" not in path and "/." not in path and path[-1] != "/"


def url_id(url: str) -> str:
    """Return the id of the row of an image at a URL, whatever its signature."""
    return _name_id(stable_url(url))


def _name_id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def _name(entry: object) -> str:
    return one_line(getattr(entry, "node_id", entry), 300)


def scheme_of(place: str) -> str:
    """Return the scheme of a place outside this machine's file systems, "" for a path."""
    scheme = _SCHEME.match(local_path(place))
    return scheme[1].lower() if scheme else ""


def _needs_file_system(scheme: str) -> str:
    return (
        f"{scheme}: is read through a file system of fsspec: give fs=fsspec.filesystem({scheme!r}), "
        "or documents of SimpleDirectoryReader(..., fs=...)"
    )


def _item(entry: object, file_system: Any | None, search_open: bool) -> Item:
    if isinstance(entry, BaseNode):
        return _node_item(entry, file_system, search_open)
    if not isinstance(entry, str | os.PathLike):
        raise IngestError(
            f"a source holds paths, URLs and LlamaIndex nodes, not {type(entry).__name__}: "
            "what is stored leads back to a file, so save the image first"
        )
    place = os.fspath(entry)
    if isinstance(entry, str) and is_url(entry):
        return _url_item(entry)
    if file_system is not None:
        return _remote_item(RemoteFile(file_system, place))
    if isinstance(entry, str) and (scheme := scheme_of(entry)):
        raise NodeError(_needs_file_system(scheme))
    if not place.strip():
        raise NodeError("the path is empty")
    return _path_item(place)


def _path_item(path: str) -> Item:
    absolute = _absolute(path)
    id_ = path_id(absolute)  # first: it refuses names that are not Unicode
    posix = Path(absolute)
    names = (local_path(path), posix.name)
    return Item(id=id_, name=absolute, path=absolute, sidecar_names=names, label=posix.parent.name)


def _walked_item(path: str, root: str) -> Item:
    """The item of an image below `root`, the real path of the folder where a walk started."""
    id_ = path_id(path)
    below = path[len(root.rstrip(os.sep)) + 1 :].replace(os.sep, "/")
    folder, _, name = below.rpartition("/")
    return Item(id=id_, name=path, path=path, sidecar_names=(below, name), label=unicodedata.normalize("NFC", folder))


def _absolute(path: str) -> str:
    given = given_path(path)
    if not given.isascii():  # the disk may have its letters and accents apart, or together
        given = next(filter(os.path.lexists, spellings(given)), given)
    folder, name = os.path.split(given)
    return f"{os.path.realpath(folder or os.curdir).rstrip(os.sep)}{os.sep}{name}"


def _url_item(url: str) -> Item:
    stable = stable_url(url)
    return Item(
        id=_name_id(stable),
        name=stable,
        url=stable,
        fetch_url=None if stable == url else url,
        sidecar_names=(url, stable, url.rsplit("/")[-1], url_file_name(url)),
    )


def _remote_item(file: RemoteFile) -> Item:
    return replace(_url_item(file.name), data=file, stamp=file.stamp())


def _bytes_item(data: bytes, name: str) -> Item:
    digest = hashlib.sha256(data).hexdigest()
    id_ = _name_id(f"image:{name}\0{digest}")
    return Item(id=id_, name=id_, data=data, stamp={"digest": digest})


def _node_item(node: BaseNode, file_system: Any | None, search_open: bool) -> Item:
    """The item of a node: an image by its file, URL or bytes, any other node by its text.

    An id that someone chose is kept. A random id of LlamaIndex is replaced, because every run would otherwise store the
    same document anew.
    """
    plain = storable_node(node, drop_bytes=True)
    place = _node_place(node, plain, file_system, search_open)
    id_ = place.id if _is_random(node.node_id) else node.node_id
    if not place.place:
        place = replace(place, name=id_)
    relationships = dict(node.relationships)
    if isinstance(node, Document):
        relationships.setdefault(NodeRelationship.SOURCE, RelatedNodeInfo(node_id=id_))
    metadata = plain.metadata
    if place.fetch_url:
        metadata = {key: place.url if value == place.fetch_url else value for key, value in metadata.items()}
    return replace(
        place,
        id=id_,
        text=plain.get_content(),
        metadata=metadata,
        relationships=relationships,
        embed_excluded=tuple(plain.excluded_embed_metadata_keys),
        llm_excluded=tuple(plain.excluded_llm_metadata_keys),
    )


def _node_place(node: BaseNode, plain: BaseNode, file_system: Any | None, search_open: bool) -> Item:
    """The item of a node without the caller's metadata."""
    text, given_path = plain.get_content(), str(node.metadata.get("file_path") or "")
    carried = next((image for image in node_images(node) if str(image)[:5].lower() == "data:"), None)
    path, url = (plain.image_path, plain.image_url) if isinstance(plain, ImageNode) else (None, None)
    if isinstance(plain, ImageNode) and path and (carried is None or Path(path).exists()):
        if file_system is not None:
            return _remote_item(RemoteFile(file_system, path))
        if (scheme := scheme_of(path)) and not is_url(path):
            raise NodeError(_needs_file_system(scheme))
        file = file_of_node(plain, path) if search_open else None
        return _remote_item(file) if file is not None else _path_item(path)
    if carried is not None:  # before the URL: what is here need not be fetched
        return replace(_bytes_item(read_image_bytes(carried), given_path), url=url)
    if url:
        return _path_item(url) if local_path(url) != url else _url_item(url)
    if has_control_characters(text):
        raise NodeError(bytes_as_text(given_path))
    if not text.strip():
        raise NodeError("it has neither text nor an image with a path or URL")
    content = hashlib.sha256(f"{node.metadata.get('file_path', '')}\0{text}".encode()).hexdigest()
    return Item(id=(id_ := _name_id(f"text:{content}")), name=id_)


def _is_random(node_id: str) -> bool:
    try:
        return uuid.UUID(node_id).version == 4
    except ValueError:
        return False


# Parameters that never identify the object.
_SECRET = re.compile(
    r"x-(amz|goog|oss|cos|obs|bce|tos|qs|ms)-.*|q-(sign-.*|ak|signature|header-list|url-param-list)"
    r"|(aws|oss|google|obs)?access_?key_?id|googleaccessid|access-?key|security-?token|sign(ature)?|sig|hmac|jwt"
    r"|(access|auth|id|session|bearer)?[_-]?token|auth([_-]?key)?|authorization|api[_-]?key|secret|password|passwd"
    r"|key-pair-id|hdn(ts|tl|ea)|__token__|sas|wssecret|verify",
    re.IGNORECASE,
)
# Parameters that belong to a signature if there is one, and may identify the object otherwise.
_WITH_SIGNATURE = re.compile(
    r"e|expir(es?|y)|exp|policy|x-id|wstime|nonce|timestamp|ts|credential|algorithm|signedheaders"
    r"|s[terpvs]|srt|spr|sip?|sdd|skoid|sktid|sk[test]|skv|scid",
    re.IGNORECASE,
)
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_DISCORD = frozenset(("ex", "is", "hm"))


def stable_url(url: str) -> str:
    """Return a web URL without signature, credentials and fragment; any other URL unchanged.

    Scheme and host are in lower case, and the default port is left out: RFC 3986, section 6.2.
    """
    if not _HTTP.match(url):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    fields = parts.query.split("&") if parts.query else []
    names = [unquote_plus(field.partition("=")[0]).strip().lower() for field in fields]
    signed = any(map(_SECRET.fullmatch, names))
    drop = {name for name in names if _SECRET.fullmatch(name) or (signed and _WITH_SIGNATURE.fullmatch(name))}
    if names and set(names) >= _DISCORD:
        drop |= _DISCORD
    host = parts.netloc.rpartition("@")[2].lower()
    host = host.removesuffix(":80" if parts.scheme == "http" else ":443")
    if not drop and host == parts.netloc and url.startswith(f"{parts.scheme}:") and not parts.fragment:
        return url
    kept = "&".join(field for field, name in zip(fields, names, strict=True) if name not in drop and field)
    return urlunsplit((parts.scheme, host, parts.path, kept, ""))


def url_file_name(url: str) -> str:
    """Return the last part of a web URL's path, decoded, or its host; of other URLs the last part as it is."""
    if not _HTTP.match(url):
        return url.rstrip("/").rpartition("/")[2]
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.netloc.rpartition("@")[2]
