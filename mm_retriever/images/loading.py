"""Any source to a safe, upright RGB image; and images as bytes, digests and thumbnails.

`source.py` decides what may be read, `url.py` fetches, `header.py` looks at the bytes before a decoder does, and
`pixels.py` turns every kind of pixel into 8-bit RGB. Knows nothing of models or stores.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from typing import TypeVar

from PIL import Image, ImageFile, features

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.images.header import (
    FORMATS,
    JPEG_END,
    ImageHeader,
    clean_png,
    describe_bytes,
    ends_in_last_scan,
    read_header,
    sniff_format,
)
from mm_retriever.images.memory import DECODING
from mm_retriever.images.pixels import MOST_MISSING, missing_share, normalised
from mm_retriever.images.source import (
    DEFAULT_POLICY,
    ImageDataURI,
    ImagePolicy,
    ImageSource,
    PixelArray,
    is_pixel_array,
    is_place,
    is_url,
    read_source,
    source_name,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif",
})
# fmt: on

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
_NO_READER = ImportError("no decoder")  # tells a reader that is missing from a file that is damaged
_BYTES_A_PIXEL = {"JPEG": 8, "PNG": 8, "BMP": 8, "WEBP": 20, "AVIF": 16, "HEIC": 16}
_STRIP = 2**20  # pixels that are hashed at a time
_LONGEST_SIDE = 1_000_000  # pixels; each row costs 8 bytes and more beside its pixels
_MEDIA_TYPES = {"PPM": "image/x-portable-anymap"}


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix is that of a format which `load_image` reads; the file is not touched."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()  # noqa: PTH122 - ten times Path's speed
    return suffix in IMAGE_SUFFIXES or _registered_reader(Image.EXTENSION.get(suffix, "")) is not None


def load_image(source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY, keep_mode: bool = False) -> Image.Image:
    """Return an upright 8-bit RGB image without metadata; the first frame of an animation.

    A PIL image that needs no change is returned as it is, not copied.

    Args:
        source: see `ImageSource`. A file object is read from its beginning and stays open.
        policy: limits, folders, network.
        keep_mode: leave greyscale (L) and CMYK as they are, for preprocessing that resizes before converting.

    Raises:
        ImageLoadError: the image cannot or must not be read; the message names the source and the reason.
    """
    with _errors_name(source), _opened(source, policy, keep_mode) as image:
        return image


@contextmanager
def opened_image(
    source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY, keep_mode: bool = False, least_side: int = 0
) -> Iterator[Image.Image]:
    """Give the image of `load_image` for as long as the block runs; its memory is counted, and given back at the end.

    For whoever makes something small of many images, or in many threads. A caller's own image stays open.

    Args:
        source: see `load_image`.
        policy: the same.
        keep_mode: the same.
        least_side: a JPEG of one scan may come smaller, by a half, a quarter or an eighth of each side, as long as no
            side has fewer pixels. Decoding it so is several times as fast. 0: every image at its own size.
    """
    with ExitStack() as memory:
        with _errors_name(source):
            image = memory.enter_context(_opened(source, policy, keep_mode, least_side))
        try:
            yield image
        finally:
            if not isinstance(source, Image.Image):
                image.close()


@contextmanager
def _opened(source: ImageSource, policy: ImagePolicy, keep_mode: bool, least_side: int = 0) -> Iterator[Image.Image]:
    """The image, and its share of the memory budget until the block ends."""
    if isinstance(source, Image.Image):
        _check_size(source.size, policy)
        source.load()
        yield normalised(source, rawmode="", keep_mode=keep_mode)
    elif is_pixel_array(source):
        yield normalised(_from_array(source, policy), rawmode="", keep_mode=keep_mode)
    else:
        with _decoded(read_source(source, policy), policy, keep_mode, source_name(source), least_side) as image:
            yield image


def file_size(data: bytes, image: Image.Image) -> tuple[int, int]:
    """Return the width and height of an image that was loaded from these bytes, upright, before any reduction."""
    header = read_header(data, max_frames=1)
    if header is None or header.size is None or max(header.size) <= max(image.size) or not header.reducible:
        return image.size
    width, height = header.size
    return (width, height) if (width >= height) == (image.width >= image.height) else (height, width)


def read_image_bytes(source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY) -> bytes:
    """Return the encoded bytes under the same rules as `load_image`, to hash and decode from a single read.

    Raises:
        ImageLoadError: the source must not be read, is too large, or is a PIL image or an array, which has no file
            bytes: `lossless_bytes` encodes it.
    """
    with _errors_name(source):
        return read_source(source, policy)


def lossless_bytes(source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY) -> bytes:
    """Return the encoded bytes as they are, or, of a PIL image or an array, a file with exactly its pixels.

    Raises:
        ImageLoadError: the source cannot or must not be read.
    """
    if not isinstance(source, Image.Image) and not is_pixel_array(source):
        return read_image_bytes(source, policy=policy)
    image = load_image(source, policy=policy, keep_mode=True)
    out = io.BytesIO()
    if image.mode == "CMYK":  # PNG has none
        image.save(out, "TIFF")
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def portable_image(source: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY) -> str:
    """Return an image as a text from which every later reader gets the same pixels.

    A path stays a path. All else is read here and now, once, and comes back as a data URI: the bytes of a URL, a file
    object or an upload as they are, a PIL image or an array as a lossless file.

    Raises:
        ImageLoadError: the source cannot or must not be read.
    """
    if is_place(source) and not is_url(source):
        return os.fsdecode(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return source if isinstance(source, ImageDataURI) else ImageDataURI(source)
    data = lossless_bytes(source, policy=policy)
    uri = f"data:{media_type(sniff_format(data) or 'unknown')};base64,{base64.b64encode(data).decode()}"
    return ImageDataURI(uri, source_name(source), source if is_url(source) else "")


def media_type(format_name: str) -> str:
    """Return the media type of a format as `sniff_format` names it: "image/jpeg" of "JPEG"."""
    return _MEDIA_TYPES.get(format_name, f"image/{format_name.lower()}")


def first_readable(sources: Iterable[ImageSource], read: Callable[[ImageSource], T]) -> T:
    """Return what `read` makes of the first of several places of one image that can be read.

    Raises:
        ImageLoadError: none can be read; the message has the reason of each.
    """
    errors: list[ImageLoadError] = []
    for source in sources:
        try:
            return read(source)
        except ImageLoadError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    refusal = ImageLoadError("; ".join(map(str, errors)) or "there is no image")
    refusal.reason = "; ".join(error.reason for error in errors)
    raise refusal


def pixel_digest(image: Image.Image) -> str:
    """Return the SHA-256 (hex) of mode, size and pixels: equal images, equal digests, whatever file they came in."""
    if image.mode in ("P", "PA"):  # palette numbers alone say nothing
        image = image.convert("RGBA")
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}\0".encode())
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):  # strip by strip: all bytes at once would double the memory
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.hexdigest()


def resized(image: Image.Image, longest_side: int) -> Image.Image:
    """Return the image smaller or larger, so that its longest side has so many pixels."""
    scale = longest_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def encode_thumbnail(image: Image.Image, max_side: int = 256, *, quality: int = 82) -> bytes:
    """Return a JPEG of an image, shrunk (never enlarged) until no side is longer than `max_side`."""
    small = image if image.mode == "RGB" else normalised(image, rawmode="", keep_mode=False)
    if max(small.size) > max_side:
        small = resized(small, max_side)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def image_thumbnail(
    source: ImageSource, max_side: int = 256, *, policy: ImagePolicy = DEFAULT_POLICY, quality: int = 82
) -> bytes:
    """Return `encode_thumbnail` of a source, which is in memory whole only meanwhile.

    Raises:
        ImageLoadError: the image cannot or must not be read.
    """
    with opened_image(source, policy=policy) as image:
        return encode_thumbnail(image, max_side, quality=quality)


def thumbnail_data_uri(image: Image.Image, max_side: int = 256, *, quality: int = 82) -> str:
    """Return `encode_thumbnail` as a `data:image/jpeg;base64,...` URI, for HTML pages and chat messages."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_thumbnail(image, max_side, quality=quality)).decode()


@contextmanager
def _errors_name(source: ImageSource) -> Iterator[None]:
    """Turn whatever goes wrong inside into one ImageLoadError that names the source."""
    try:
        yield
    except Exception as error:  # on broken files decoders raise what they like
        reason = str(error) if isinstance(error, ImageLoadError) else _reason(error)
        cause = error.__cause__ if isinstance(error, ImageLoadError) else error
        refusal = ImageLoadError(f"cannot load {source_name(source)}: {reason}")
        refusal.reason = reason
        raise refusal from cause


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() if error.errno else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = one_line(error, 300)
    if "truncated" in text.lower():
        return f"truncated ({text})"
    if "unknown" in text or "unsupported" in text:
        return f"a variant that is not supported ({text})"
    return f"damaged ({text or type(error).__name__})"


def _from_array(source: PixelArray, policy: ImagePolicy) -> Image.Image:
    import numpy as np  # whoever gives an array has loaded it

    pixels = np.asarray(source)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype not in (np.uint8, np.bool_) or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4) and pixels.dtype == np.uint8)
    ):
        raise ImageLoadError(
            f"an array of {pixels.dtype} and shape {pixels.shape}; give uint8 of shape (H, W), (H, W, 3) as RGB or "
            "(H, W, 4) as RGBA; numbers from 0 to 1: (255 * array).round().astype('uint8')"
        )
    _check_size((pixels.shape[1], pixels.shape[0]), policy)
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else pixels * np.uint8(255)))


@contextmanager
def _decoded(data: bytes, policy: ImagePolicy, keep_mode: bool, name: str, least_side: int) -> Iterator[Image.Image]:
    if not data:
        raise ImageLoadError("zero bytes")
    header = read_header(data, max_frames=policy.max_frames)
    reader = _reader(header.format) if header else _registered_reader_of(data)
    if reader is None:
        raise ImageLoadError(f"not an image in a supported format ({', '.join(FORMATS)}): {describe_bytes(data)}")
    header = header or ImageHeader(reader.format or "")
    reduced = header.reducible and _is_large(header, policy)
    if header.size and not reduced:
        _check_size(header.size, policy, header.format)
    profile = None
    if header.format == "PNG":
        data, profile = clean_png(data)
    with ExitStack() as memory:
        if header.format != "JPEG":  # whose reader decodes nothing before it knows at what size
            memory.enter_context(DECODING.hold(_memory(header.format, header.size or (0, 0))))
        for ending in (b"", JPEG_END):
            # the reader itself: Image.open would try every format, and warn of large images before we can look
            with closing(reader(io.BytesIO(data + ending), "")) as image:  # its pixels go before those of the result
                if reduced or (least_side and header.reducible):
                    width, height = (side // 2 if reduced else side for side in image.size)
                    image.draft(None, (min(width, least_side or width), min(height, least_side or height)))
                is_kept = header.format == "JPEG" and not header.reducible  # what the scans before the last one bring
                coefficients = 2 * len(image.getbands()) if is_kept else 0
                memory.enter_context(DECODING.hold(_memory(header.format, image.size, coefficients)))
                _check_size(image.size, policy)
                frames = header.frames if header.frames is not None else int(getattr(image, "n_frames", 1))
                if frames > policy.max_frames:
                    raise ImageLoadError(f"more than {policy.max_frames} frames (ImagePolicy.max_frames)")
                if profile:
                    image.info["icc_profile"] = profile
                rawmode = _rawmode(image)
                try:
                    image.load()
                except OSError as error:
                    is_cut = header.format == "JPEG" and "truncated" in str(error)
                    if ending or not is_cut or not ends_in_last_scan(data):
                        raise
                    continue
                if ending:
                    _accept_missing(image, name)
                pixels = normalised(image, rawmode=rawmode, keep_mode=keep_mode, is_ours=True)
            break
        yield pixels


def _accept_missing(image: Image.Image, name: str) -> None:
    """Accept a JPEG that lacks a few of its last blocks."""
    missing = missing_share(image)
    if missing > MOST_MISSING:
        raise ImageLoadError(f"truncated (the last {missing:.0%} of the image are missing)")
    logger.warning("%s ends early; %.1f%% of the image are missing, shown in grey", name, 100 * missing)


def _memory(format_name: str, size: tuple[int, int], coefficients: int = 0) -> int:
    """Bytes that decoding takes at its height, the result included.

    Args:
        format_name: as `sniff_format` names it.
        size: in pixels.
        coefficients: bytes a pixel that a JPEG decoder keeps beside the result until the last scan.
    """
    return size[0] * size[1] * max(_BYTES_A_PIXEL.get(format_name, 12), 4 + coefficients)


def _is_large(header: ImageHeader, policy: ImagePolicy) -> bool:
    """Whether the image is within the limits only at half of each side, at which a JPEG can be decoded."""
    if header.size is None:
        return False
    width, height = header.size
    half = -(-width // 2) * -(-height // 2)
    return half <= policy.max_pixels < width * height and max(width, height) <= _LONGEST_SIDE


@cache
def _reader(format_name: str) -> type[ImageFile.ImageFile]:
    reader: type[ImageFile.ImageFile]
    if format_name == "HEIC":
        try:
            import pillow_heif
        except ImportError as error:
            raise ImageLoadError('HEIC needs the extra "heic": pip install "mm-retriever[heic]"') from error
        reader = pillow_heif.HeifImageFile
        return reader
    if format_name == "AVIF" and not features.check("avif"):
        if other := _registered_reader("AVIF"):
            return other
        raise ImageLoadError("AVIF, which this Pillow was built without: pip install --upgrade Pillow") from _NO_READER
    module, name = _READERS[format_name].split(".")
    reader = getattr(importlib.import_module(f"PIL.{module}"), name)
    return reader


def _registered_reader(format_name: str) -> type[ImageFile.ImageFile] | None:
    """The reader of a format that another package has registered with Pillow, as `register_..._opener()` does.

    Whoever registers one asks for it. Pillow's own readers beyond our list are never used: nobody looked at what
    hostile bytes do to them.
    """
    factory = Image.OPEN.get(format_name, (None, None))[0]
    if not isinstance(factory, type) or factory.__module__.partition(".")[0] == "PIL":
        return None
    return factory


def _registered_reader_of(data: bytes) -> type[ImageFile.ImageFile] | None:
    for name in Image.ID:
        reader, accepts = _registered_reader(name), Image.OPEN[name][1]
        if reader is not None and accepts is not None and accepts(data[:64]) is True:
            return reader
    return None


def _check_size(size: tuple[int, int], policy: ImagePolicy, format_name: str = "") -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageLoadError(f"no pixels ({width}x{height})")
    if max(size) > _LONGEST_SIDE:
        raise ImageLoadError(f"{width}x{height} pixels; no side may be longer than {_LONGEST_SIDE}")
    if width * height > policy.max_pixels:
        raise ImageLoadError(
            f"{width}x{height} pixels, more than the limit of {policy.max_pixels} (ImagePolicy.max_pixels)"
        )
    if format_name == "WEBP" and width * height > policy.max_pixels // 2:
        raise ImageLoadError(
            f"{width}x{height} pixels; a WEBP, whose decoder takes five times the memory of others, may have half of "
            f"the limit of {policy.max_pixels} (ImagePolicy.max_pixels)"
        )


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How samples lie in the file ("I;12", "L;4", "RGB;16B"), which the mode of the image does not always say."""
    arguments = image.tile[0][3] if image.tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""
