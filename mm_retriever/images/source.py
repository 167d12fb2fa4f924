"""Sources in, bytes out: what may be read, from where, and how much of it.

Owns `ImagePolicy` and every way by which the bytes of an image enter the package: files (inside given folders), data
URIs, base64, open files and, through `url.py`, the network. Knows nothing of pixels.
"""

from __future__ import annotations

import base64
import binascii
import errno
import inspect
import os
import re
import stat
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, TypeGuard
from urllib.parse import unquote_to_bytes

from PIL import Image

from mm_retriever.errors import ImageLoadError
from mm_retriever.images.header import sniff_format


class PixelArray(Protocol):
    """A numpy array of pixels: uint8 or bool, of shape (H, W), (H, W, 3) as RGB or (H, W, 4) as RGBA."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Where the pixels lie in memory."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, and channels where there are several."""
        ...


ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | PixelArray
"""A path, an http(s) URL, a data URI or base64 text; the bytes of a file; an open binary file or an upload of a web
framework; a PIL image; a numpy array."""

_LONGEST_PATH = 4096
_SHORTEST_BASE64 = 40  # a GIF of one pixel takes 48
_READ_BYTES = 1 << 20
_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):", re.IGNORECASE)
_URL = re.compile(r"(?P<scheme>https?://)(?:[^/?#]*@)?(?P<host>[^/?#@]*)(?P<path>[^?#]*)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")


@dataclass(frozen=True)
class ImagePolicy:
    """What `load_image` may read, and how much of it.

    Args:
        max_pixels: width times height, judged from the header before anything is decoded.
        max_bytes: size of the encoded image (a file, a download, decoded base64).
        max_frames: frames of an animation; only the first is ever decoded.
        roots: folders that files must lie in, symbolic links followed; None: anywhere. A relative path is looked for
            from the working directory, then from each root.
        allow_urls: whether http(s) URLs are fetched at all.
        allow_private_addresses: whether a URL may lead into a private network (for tests and intranets only).
        url_timeout: seconds for one URL, redirects and body included.
        max_redirects: redirects that one URL may take; each target is checked like the first.
    """

    max_pixels: int = 89_478_485
    max_bytes: int = 64 * 2**20
    max_frames: int = 1_000
    roots: tuple[Path, ...] | None = None
    allow_urls: bool = False
    allow_private_addresses: bool = False
    url_timeout: float = 20.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        """Check the limits and make the roots a tuple of paths."""
        for name in ("max_pixels", "max_bytes", "max_frames", "url_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ImagePolicy({name}={getattr(self, name)!r}): must be above 0")
        if self.max_redirects < 0:
            raise ValueError(f"ImagePolicy(max_redirects={self.max_redirects!r}): must be 0 or more")
        if self.roots is not None:
            roots = (self.roots,) if isinstance(self.roots, str | os.PathLike) else self.roots
            object.__setattr__(self, "roots", tuple(Path(os.path.expanduser(root)) for root in roots))  # noqa: PTH111


DEFAULT_POLICY = ImagePolicy()


class ImageDataURI(str):
    """A data URI that holds a whole image, and never shows it: its repr is short, for logs and events.

    It is a string in all other respects. Copies and pickles keep the attributes; JSON keeps the URI alone.

    Args:
        uri: the data URI.
        name: what messages call the image; by default the beginning of the URI.
        url: where the image was fetched from; "" if nowhere.

    Attributes:
        pixels: size and digest of the decoded image, for whoever would decode it again to compare it; None: not known.
    """

    name: str
    url: str
    pixels: tuple[tuple[int, int], str] | None = None

    def __new__(cls, uri: str, name: str = "", url: str = "") -> ImageDataURI:
        """Return the string with its attributes."""
        whole = super().__new__(cls, uri)
        whole.name, whole.url = name or _shortened(uri), url
        return whole

    def __repr__(self) -> str:
        """Return the name: the URI may have millions of characters."""
        return self.name


def source_name(source: ImageSource) -> str:
    """Return a short printable name of a source for messages: a path in quotes, never the contents."""
    if isinstance(source, ImageDataURI):
        return source.name
    if isinstance(source, Image.Image):
        return f"<{source.mode} image of {source.width}x{source.height}>"
    if is_pixel_array(source):
        return f"<array of shape {'x'.join(map(str, source.shape))}>"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if isinstance(text, str) and (url := _URL.match(text)):  # without what may be secret: password, query
            return repr(url["scheme"] + url["host"] + url["path"])[:200]
        if isinstance(text, str) and (text[:5].lower() == "data:" or len(text) > 300):
            return _shortened(text)
        return repr(text)
    for attribute in ("name", "filename"):  # of a file, of an upload
        name = getattr(source, attribute, None)
        if isinstance(name, str):
            return repr(name)[:300]
    return f"<{type(source).__name__}>"


def _shortened(text: str) -> str:
    return f"{text[:40]!r}... ({len(text)} characters)"


def is_pixel_array(source: object) -> TypeGuard[PixelArray]:
    """Whether it is a numpy array, or shares memory as one does; numpy is not loaded to find out."""
    return hasattr(source, "__array_interface__") and not isinstance(source, Image.Image)


def is_place(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether it says where an image is (a path or a URL) rather than being the image itself."""
    if not isinstance(source, str):
        return isinstance(source, os.PathLike)
    return len(source) <= _LONGEST_PATH and not _DATA_URI.match(source) and not _looks_like_base64(source)


def is_url(source: object) -> TypeGuard[str]:
    """Whether it is an http(s) URL."""
    return isinstance(source, str) and _URL.match(source) is not None


def read_source(source: ImageSource, policy: ImagePolicy) -> bytes:
    """Return the bytes of the encoded image, at most `policy.max_bytes` of them."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_bytes(source, policy)
    if isinstance(source, str):
        return _read_text(source, policy)
    if isinstance(source, os.PathLike):
        return _read_file(os.fsdecode(source), policy)
    if isinstance(source, Image.Image) or is_pixel_array(source):
        raise ImageLoadError("a PIL image or an array has no file bytes")
    if callable(getattr(source, "read", None)):
        return _limited(_read_open_file(source, policy), policy)
    raise ImageLoadError(
        f"{type(source).__name__} is not an image; give a path, URL, data URI, base64, bytes, binary file, PIL image "
        "or numpy array"
    )


def _read_open_file(source: Any, policy: ImagePolicy) -> bytes:
    """All of a file or an upload from its beginning; it stays open, and where it was, for who reads it next."""
    if inspect.iscoroutinefunction(source.read):  # Starlette's upload; the file it wraps can be read here
        source = getattr(source, "file", source)
        if inspect.iscoroutinefunction(getattr(source, "read", None)):
            raise ImageLoadError("its read() must be awaited; give the bytes: await file.read()")
    if not callable(getattr(source, "seek", None)) or not getattr(source, "seekable", lambda: True)():
        return _read_stream(source.read, policy.max_bytes)
    position = source.tell()
    source.seek(0)
    try:
        return _read_stream(source.read, policy.max_bytes)
    finally:
        source.seek(position)


def _read_bytes(source: bytes | bytearray | memoryview, policy: ImagePolicy) -> bytes:
    """The bytes of a file, or base64 of them (as LlamaIndex's image blocks hold an image)."""
    if memoryview(source).nbytes > policy.max_bytes // 3 * 4 + 4:
        raise _too_large(policy)
    data = bytes(source)
    if sniff_format(data) is None and _looks_like_base64(data[:64].decode("latin-1")):
        return _decode_base64(data.decode("latin-1"), policy)
    return _limited(data, policy)


def _too_large(policy: ImagePolicy) -> ImageLoadError:
    return ImageLoadError(f"larger than the limit of {policy.max_bytes} bytes (ImagePolicy.max_bytes)")


def _limited(data: bytes, policy: ImagePolicy) -> bytes:
    if len(data) > policy.max_bytes:
        raise _too_large(policy)
    return data


def _read_stream(read: Callable[[int], Any], max_bytes: int, expected: int = _READ_BYTES) -> bytes:
    """Everything up to one byte above the limit; a short read is not the end of the stream, an empty one is."""
    chunks: list[bytes] = []
    left = max_bytes + 1
    while left > 0:
        chunk = read(min(left, expected))
        if not chunk:
            break
        if not isinstance(chunk, bytes):
            raise ImageLoadError(f"the file gives {type(chunk).__name__}, not bytes: open it in binary mode")
        chunks.append(chunk)
        left -= len(chunk)
        expected = _READ_BYTES
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _read_text(text: str, policy: ImagePolicy) -> bytes:
    """A string is a data URI, a URL, base64 of an image, or a path: in that order, without looking at any disk."""
    if match := _DATA_URI.match(text):
        return _read_data_uri(text, match, policy)
    scheme = _SCHEME.match(text)
    if scheme and (text.startswith("//", scheme.end()) or scheme["scheme"].lower() in ("file", "data")):
        if scheme["scheme"].lower() not in ("http", "https"):
            raise ImageLoadError(f"{scheme['scheme']}: is not a scheme that is read; give a path, or an http(s) URL")
        if not policy.allow_urls:
            raise ImageLoadError("fetching URLs is off; ImagePolicy(allow_urls=True) turns it on")
        from mm_retriever.images.url import fetch_image  # loads http and ssl, which few need

        return fetch_image(
            text,
            max_bytes=policy.max_bytes,
            timeout=policy.url_timeout,
            max_redirects=policy.max_redirects,
            allow_private_addresses=policy.allow_private_addresses,
        )
    if _looks_like_base64(text):
        return _decode_base64(text, policy)
    if len(text) > _LONGEST_PATH:
        raise ImageLoadError("neither a path nor base64 of a supported image")
    return _read_file(text, policy)


def _read_data_uri(text: str, match: re.Match[str], policy: ImagePolicy) -> bytes:
    media_type = match["type"].strip().lower()
    if media_type and not media_type.startswith("image/") and media_type != "application/octet-stream":
        raise ImageLoadError(f"the data URI declares {media_type[:60]!r}, not an image")
    body = text[match.end() :]
    if "base64" in (option.strip().lower() for option in match["options"].split(";")):
        return _decode_base64(unquote_to_bytes(body).decode("latin-1") if "%" in body else body, policy)
    if len(body) > 3 * policy.max_bytes:  # percent-encoding takes at most three characters a byte
        raise _too_large(policy)
    return _limited(unquote_to_bytes(body), policy)


def _looks_like_base64(text: str) -> bool:
    """Whether the text can only be base64: long, no dot, and its first bytes are those of an image."""
    head = "".join(text[:64].split())
    if len(text) < _SHORTEST_BASE64 or not _BASE64.fullmatch(head):
        return False
    try:
        return sniff_format(_from_base64(head[: len(head) // 4 * 4])) is not None
    except (ValueError, binascii.Error):
        return False


def _decode_base64(text: str, policy: ImagePolicy) -> bytes:
    text = "".join(text.split())
    if len(text) // 4 * 3 > policy.max_bytes + 2:
        raise _too_large(policy)
    try:
        return _limited(_from_base64(text + "=" * (-len(text) % 4)), policy)
    except (ValueError, binascii.Error) as error:
        raise ImageLoadError(f"not base64 ({error})") from error


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text.replace("-", "+").replace("_", "/").encode("ascii"), validate=True)


def _read_file(path: str, policy: ImagePolicy) -> bytes:
    """The bytes of a regular file inside the roots, opened so that nothing can be swapped between check and read."""
    if "\0" in path:
        raise ImageLoadError("a path holds no NUL byte")
    if not path:
        raise ImageLoadError("the path is empty")
    descriptor = _opened(path, policy)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        _check_regular(status)
        if status.st_size > policy.max_bytes:
            raise ImageLoadError(
                f"{status.st_size} bytes, more than the limit of {policy.max_bytes} (ImagePolicy.max_bytes)"
            )
        return _limited(_read_stream(file.read, policy.max_bytes, status.st_size + 1), policy)


def spellings(path: str) -> list[str]:
    """Return a path as it was given, then with composed and with decomposed letters, as a disk may have it."""
    return list(dict.fromkeys([path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]))


def _opened(path: str, policy: ImagePolicy) -> int:
    """Open a file by the name that it was given, or that name in letters composed otherwise."""
    missing: FileNotFoundError | None = None
    for spelled in spellings(path):
        try:
            return _open_anywhere(spelled) if policy.roots is None else _open_inside(spelled, policy.roots)
        except FileNotFoundError as error:
            missing = missing or error
    assert missing is not None
    raise missing


# O_NONBLOCK: opening a pipe that nobody writes to returns at once. O_NOCTTY: opening a terminal never adopts it.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageLoadError("a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageLoadError("a device, pipe or socket, not a file")


def _open_anywhere(path: str) -> int:
    path = os.path.expanduser(path)  # noqa: PTH111 - Path's fails for an unknown user
    _check_regular(os.stat(path))  # noqa: PTH116 - opening a device can already do something: look first
    return os.open(path, _OPEN_FLAGS)


def _open_inside(path: str, roots: tuple[Path, ...]) -> int:
    """Open a file below one of the roots, or say that there is none."""
    if ".." in Path(path).parts:
        raise ImageLoadError("'..' is not allowed when reading is limited to given folders")
    places = [Path(path).absolute(), *(root / path for root in roots)]  # all the same for an absolute path
    missing: OSError | None = None
    for place in dict.fromkeys(places):
        real = os.path.realpath(place)
        for root in (os.path.realpath(root) for root in roots):
            if os.path.commonpath([root, real]) == root and real != root:
                try:
                    return _open_beneath(root, os.path.relpath(real, root))
                except FileNotFoundError as error:
                    missing = error
    if missing is not None:
        raise missing
    raise ImageLoadError(
        f"outside the folders that may be read ({', '.join(repr(str(root)) for root in roots) or 'none'})"
    )


def _open_beneath(root: str, relative: str) -> int:
    """Open one folder after the other without following links: a link put there after the check cannot lead out."""
    if os.open not in os.supports_dir_fd:  # Windows
        return _open_anywhere(str(Path(root, relative)))
    *folders, name = Path(relative).parts
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        _check_regular(os.stat(name, dir_fd=descriptor, follow_symlinks=False))
        return os.open(name, _OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ImageLoadError("changed while it was being opened") from error
        raise
    finally:
        os.close(descriptor)
