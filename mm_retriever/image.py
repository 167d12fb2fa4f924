"""Pictures in: path, URL, data URI, base64, bytes, file object or PIL picture to a safe, upright RGB picture.

Owns what may be read, from where, how large, and how every kind of pixel becomes 8-bit RGB. Knows nothing of models,
stores or LlamaIndex. Colour profiles are not applied and no metadata survives: what a picture shows is its pixels.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import importlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageFile

from mm_retriever.errors import ImageLoadError
from mm_retriever.image_format import FORMATS, describe_bytes, read_header, sniff_format

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image
"""A path, an http(s) URL, a data URI or base64 text; the bytes of a file; an open binary file; a PIL picture."""

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif",
})
# fmt: on

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_READERS = {
    "JPEG": "JpegImagePlugin.JpegImageFile",
    "PNG": "PngImagePlugin.PngImageFile",
    "WEBP": "WebPImagePlugin.WebPImageFile",
    "GIF": "GifImagePlugin.GifImageFile",
    "TIFF": "TiffImagePlugin.TiffImageFile",
    "BMP": "BmpImagePlugin.BmpImageFile",
    "PPM": "PpmImagePlugin.PpmImageFile",
    "AVIF": "AvifImagePlugin.AvifImageFile",
}
_LONGEST_PATH = 4096
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
        max_bytes: size of the encoded picture (a file, a download, decoded base64).
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
            object.__setattr__(self, "roots", tuple(Path(root) for root in roots))


DEFAULT_POLICY = ImagePolicy()


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix is that of a picture format which `load_image` reads (the file itself is not touched)."""
    return os.path.splitext(os.fspath(path))[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - ten times Path's speed


def load_image(source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY, keep_mode: bool = False) -> Image.Image:
    """Return an upright 8-bit RGB picture without metadata; the first frame of an animation.

    A PIL picture that needs no change is returned as it is, not copied.

    Args:
        source: see `ImageSource`. A file object is read from its beginning and stays open.
        policy: limits, folders, network.
        keep_mode: leave greyscale (L) and CMYK pictures as they are, for preprocessing that resizes before converting.

    Raises:
        ImageLoadError: the picture cannot or must not be read; the message names the source and the reason.
    """
    with _errors_name(source):
        if isinstance(source, Image.Image):
            _check_size(source.size, policy)
            source.load()
            return _normalised(source, rawmode="", keep_mode=keep_mode)
        return _decode(_read(source, policy), policy, keep_mode)


def read_image_bytes(source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY) -> bytes:
    """Return the encoded bytes under the same rules as `load_image`, to hash and decode from a single read.

    Raises:
        ImageLoadError: the source must not be read, is too large, or is a PIL picture, which has no file bytes.
    """
    with _errors_name(source):
        return _read(source, policy)


def source_name(source: ImageSource) -> str:
    """Return a short printable name of a source for messages: a path in quotes, never the contents."""
    if isinstance(source, Image.Image):
        return f"<{source.mode} picture of {source.width}x{source.height}>"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if isinstance(text, str) and (url := _URL.match(text)):  # without what may be secret: password, query
            return repr(url["scheme"] + url["host"] + url["path"])[:200]
        if isinstance(text, str) and (text[:5].lower() == "data:" or len(text) > 300):
            return f"{text[:40]!r}... ({len(text)} characters)"
        return repr(text)
    name = getattr(source, "name", None)
    return repr(name)[:300] if isinstance(name, str) else f"<{type(source).__name__}>"


def pixel_digest(image: Image.Image) -> str:
    """Return the SHA-256 (hex) of mode, size and pixels: equal pictures, equal digests, whatever file they came in."""
    if image.mode in ("P", "PA"):  # palette numbers alone say nothing
        image = image.convert("RGBA")
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def encode_thumbnail(image: Image.Image, max_side: int = 256, *, quality: int = 82) -> bytes:
    """Return a JPEG of the picture, shrunk (never enlarged) until no side is longer than `max_side`."""
    small = image if image.mode == "RGB" else _normalised(image, rawmode="", keep_mode=False)
    if max(small.size) > max_side:
        scale = max_side / max(small.size)
        size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
        small = small.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def thumbnail_data_uri(image: Image.Image, max_side: int = 256, *, quality: int = 82) -> str:
    """Return `encode_thumbnail` as a `data:image/jpeg;base64,...` URI, for HTML pages and chat messages."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_thumbnail(image, max_side, quality=quality)).decode()


# ---------------------------------------------------------------------------------------------- source to bytes


@contextmanager
def _errors_name(source: ImageSource) -> Iterator[None]:
    """Turn whatever goes wrong inside into one ImageLoadError that names the source."""
    try:
        yield
    except Exception as error:  # on broken files decoders raise what they like
        reason = str(error) if isinstance(error, ImageLoadError) else _reason(error)
        cause = error.__cause__ if isinstance(error, ImageLoadError) else error
        raise ImageLoadError(f"cannot load {source_name(source)}: {reason}") from cause


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() if error.errno else error.strerror
    text = " ".join(str(error).split())[:300]
    if "truncated" in text.lower():
        return f"truncated ({text})"
    return f"damaged ({text or type(error).__name__})"


def _read(source: ImageSource, policy: ImagePolicy) -> bytes:
    """Bytes of the encoded picture, at most `policy.max_bytes` of them."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _limited(bytes(source), policy)
    if isinstance(source, str):
        return _read_text(source, policy)
    if isinstance(source, os.PathLike):
        return _read_file(os.fspath(source), policy)
    if isinstance(source, Image.Image):
        raise ImageLoadError("a PIL picture has no file bytes")
    if callable(getattr(source, "read", None)):
        if getattr(source, "seekable", lambda: False)():
            source.seek(0)
        return _limited(_read_stream(source.read, policy.max_bytes), policy)
    raise ImageLoadError(
        f"{type(source).__name__} is no picture; give a path, URL, data URI, base64, bytes, binary file or PIL picture"
    )


def _limited(data: bytes, policy: ImagePolicy) -> bytes:
    if len(data) > policy.max_bytes:
        raise ImageLoadError(f"larger than the limit of {policy.max_bytes} bytes (ImagePolicy.max_bytes)")
    return data


def _read_stream(read: Callable[[int], Any], max_bytes: int, expected: int = _READ_BYTES) -> bytes:
    """Everything up to one byte above the limit; a short read is no end, an empty one is."""
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
    """A string is a data URI, a URL, base64 of a picture, or a path: in that order, without looking at any disk."""
    if match := _DATA_URI.match(text):
        return _read_data_uri(text, match, policy)
    scheme = _SCHEME.match(text)
    if scheme and (text.startswith("//", scheme.end()) or scheme["scheme"].lower() in ("file", "data")):
        if scheme["scheme"].lower() not in ("http", "https"):
            raise ImageLoadError(f"{scheme['scheme']}: is not a scheme that is read; give a path, or an http(s) URL")
        if not policy.allow_urls:
            raise ImageLoadError("fetching URLs is off; ImagePolicy(allow_urls=True) turns it on")
        from mm_retriever.image_url import fetch_image  # loads http and ssl, which few need

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
        raise ImageLoadError("neither a path nor base64 of a supported picture")
    return _read_file(text, policy)


def _read_data_uri(text: str, match: re.Match[str], policy: ImagePolicy) -> bytes:
    media_type = match["type"].strip().lower()
    if media_type and not media_type.startswith("image/") and media_type != "application/octet-stream":
        raise ImageLoadError(f"the data URI declares {media_type[:60]!r}, not a picture")
    body = text[match.end() :]
    if "base64" in (option.strip().lower() for option in match["options"].split(";")):
        return _decode_base64(unquote_to_bytes(body).decode("latin-1") if "%" in body else body, policy)
    if len(body) > 3 * policy.max_bytes:  # percent-encoding takes at most three characters a byte
        raise ImageLoadError(f"larger than the limit of {policy.max_bytes} bytes (ImagePolicy.max_bytes)")
    return _limited(unquote_to_bytes(body), policy)


def _looks_like_base64(text: str) -> bool:
    """Whether the text can only be base64: long, no dot, and its first bytes are those of a picture."""
    head = "".join(text[:64].split())
    if len(text) < 64 or not _BASE64.fullmatch(head):
        return False
    try:
        return sniff_format(_from_base64(head[: len(head) // 4 * 4])) is not None
    except (ValueError, binascii.Error):
        return False


def _decode_base64(text: str, policy: ImagePolicy) -> bytes:
    text = "".join(text.split())
    if len(text) // 4 * 3 > policy.max_bytes + 2:
        raise ImageLoadError(f"larger than the limit of {policy.max_bytes} bytes (ImagePolicy.max_bytes)")
    try:
        return _limited(_from_base64(text + "=" * (-len(text) % 4)), policy)
    except (ValueError, binascii.Error) as error:
        raise ImageLoadError(f"not base64 ({error})") from error


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text.replace("-", "+").replace("_", "/").encode("ascii"), validate=True)


# ---------------------------------------------------------------------------------------------- files


def _read_file(path: str, policy: ImagePolicy) -> bytes:
    """The bytes of a regular file inside the roots, opened so that nothing can be swapped between check and read."""
    if "\0" in path:
        raise ImageLoadError("a path holds no NUL byte")
    if not path:
        raise ImageLoadError("the path is empty")
    descriptor = _open_anywhere(path) if policy.roots is None else _open_inside(path, policy.roots)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
        status = os.fstat(descriptor)
        _check_regular(status)
        if status.st_size > policy.max_bytes:
            raise ImageLoadError(
                f"{status.st_size} bytes, more than the limit of {policy.max_bytes} (ImagePolicy.max_bytes)"
            )
        return _limited(_read_stream(file.read, policy.max_bytes, status.st_size + 1), policy)


# O_NONBLOCK: opening a pipe that nobody writes to returns at once. O_NOCTTY: opening a terminal never adopts it.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageLoadError("a folder, not a picture")
    if not stat.S_ISREG(status.st_mode):
        raise ImageLoadError("a device, pipe or socket, not a file")


def _open_anywhere(path: str) -> int:
    _check_regular(os.stat(path))  # noqa: PTH116 - opening a device can already do something: look first
    return os.open(path, _OPEN_FLAGS)


def _open_inside(path: str, roots: tuple[Path, ...]) -> int:
    """Open a file below one of the roots, or say that there is none."""
    if ".." in Path(path).parts:
        raise ImageLoadError("'..' is not allowed when reading is limited to given folders")
    places = [os.path.abspath(path)] + [os.path.join(root, path) for root in roots if not os.path.isabs(path)]  # noqa: PTH100,PTH117,PTH118
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
    raise ImageLoadError(f"outside the folders that may be read ({', '.join(map(str, roots)) or 'none'})")


def _open_beneath(root: str, relative: str) -> int:
    """Open one folder after the other without following links: a link put there after the check cannot lead out."""
    if os.open not in os.supports_dir_fd:  # Windows
        return _open_anywhere(os.path.join(root, relative))  # noqa: PTH118
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


# ---------------------------------------------------------------------------------------------- bytes to pixels


def _decode(data: bytes, policy: ImagePolicy, keep_mode: bool) -> Image.Image:
    if not data:
        raise ImageLoadError("zero bytes")
    header = read_header(data, max_frames=policy.max_frames)
    if header is None:
        raise ImageLoadError(f"not a picture in a supported format ({', '.join(FORMATS)}): {describe_bytes(data)}")
    if header.size:
        _check_size(header.size, policy)
    # The reader itself, not Image.open: that would try every format, and warn about large pictures before we can look.
    with _reader(header.format)(io.BytesIO(data), "") as image:
        _check_size(image.size, policy)
        frames = header.frames if header.frames is not None else int(getattr(image, "n_frames", 1))
        if frames > policy.max_frames:
            raise ImageLoadError(f"more than {policy.max_frames} frames (ImagePolicy.max_frames)")
        rawmode = _rawmode(image)
        image.load()
        return _normalised(image, rawmode=rawmode, keep_mode=keep_mode)


@cache
def _reader(format_name: str) -> type[ImageFile.ImageFile]:
    module, name = _READERS[format_name].split(".")
    reader: type[ImageFile.ImageFile] = getattr(importlib.import_module(f"PIL.{module}"), name)
    return reader


def _check_size(size: tuple[int, int], policy: ImagePolicy) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageLoadError(f"no pixels ({width}x{height})")
    if width * height > policy.max_pixels:
        raise ImageLoadError(
            f"{width}x{height} pixels, more than the limit of {policy.max_pixels} (ImagePolicy.max_pixels)"
        )


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How samples lie in the file ("I;12", "L;4", "RGB;16B"), which the mode of the picture does not always say."""
    arguments = image.tile[0].args if image.tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _normalised(image: Image.Image, *, rawmode: str, keep_mode: bool) -> Image.Image:
    """Upright, opaque, 8-bit, RGB (or L and CMYK with `keep_mode`), without metadata."""
    orientation = _orientation(image)
    if image.mode == "RGB" and orientation == 1 and not image.info and type(image) is Image.Image:
        return image
    pixels = _opaque(_eight_bit(image, rawmode))
    if pixels.mode != "RGB" and not (keep_mode and pixels.mode in ("L", "CMYK")):
        pixels = pixels.convert("RGB")
    if orientation != 1:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    if pixels is image:
        pixels = image.copy()
    pixels.info = {}
    return pixels


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it cannot be understood: no reason to refuse the pixels."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a parser of hostile bytes
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _eight_bit(image: Image.Image, rawmode: str) -> Image.Image:
    """Pixels of more than 8 bits scaled to 8 (not clipped, as Pillow's own conversion does), others as they are."""
    if image.mode.startswith("I"):
        samples = image.convert("I")
        low, high = cast("tuple[int, int]", samples.getextrema())
        if low < 0 or high > 0xFFFF:
            return _float_to_grey(samples)
        table = _grey_table(0xFFF if rawmode == "I;12" else 0xFFFF)
        grey = samples.point(table, "L")
        key = image.info.get("transparency")
        if not isinstance(key, int):
            return grey
        opaque = [255] * 0x10000
        opaque[key & 0xFFFF] = 0
        return Image.merge("LA", (grey, samples.point(opaque, "L")))
    if image.mode == "F":
        return _float_to_grey(image)
    return image


@cache
def _grey_table(white: int) -> list[int]:
    return [(min(value, white) * 510 + white) // (2 * white) for value in range(0x10000)]


def _float_to_grey(image: Image.Image) -> Image.Image:
    """0..1 and 0..255 keep their meaning; any other range has no agreed white and is stretched from black to white."""
    import numpy as np  # only pictures of floats need it

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    elif high <= 1:
        values = values * 255
    return Image.fromarray((values + 0.5).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """The picture on white paper where it has any transparency; else as it is."""
    if not image.has_transparency_data:
        return image
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    return paper
