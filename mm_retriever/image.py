"""Images in: path, URL, data URI, base64, bytes, file, upload, PIL image or array to a safe, upright RGB image.

The public face of four files: `image_source` decides what may be read, `image_url` fetches, `image_format` looks at
the bytes before a decoder does, and this one turns every kind of pixel into 8-bit RGB. Knows nothing of models or
stores. Colour profiles are not applied and no metadata survives: what a picture shows is its pixels.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

from PIL import Image, ImageFile, ImageOps, features

from mm_retriever.errors import ImageLoadError
from mm_retriever.image_format import FORMATS, PictureHeader, describe_bytes, read_header, sniff_format
from mm_retriever.image_source import (
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

__all__ = [
    "DEFAULT_POLICY",
    "IMAGE_SUFFIXES",
    "ImageDataURI",
    "ImagePolicy",
    "ImageSource",
    "encode_thumbnail",
    "first_readable",
    "is_image_path",
    "is_place",
    "load_image",
    "lossless_bytes",
    "media_type",
    "pixel_digest",
    "portable_image",
    "read_image_bytes",
    "source_name",
    "thumbnail_data_uri",
]

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif",
})
# fmt: on

_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG = 0x0106
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
_NO_READER = ImportError("no decoder")  # tells a reader that is missing from a file that is damaged
_LONGEST_SIDE = 1_000_000  # pixels; each row costs 8 bytes and more beside its pixels
_STRIP = 2**20  # pixels turned from numbers to grey at a time
_MEDIA_TYPES = {"PPM": "image/x-portable-anymap"}
_LARGEST_EXIF = 2**20  # 16 times what a JPEG can hold; a tag of ten million numbers is no orientation


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix is that of a picture format which `load_image` reads (the file itself is not touched)."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()  # noqa: PTH122 - ten times Path's speed
    return suffix in IMAGE_SUFFIXES or _registered_reader(Image.EXTENSION.get(suffix, "")) is not None


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
        if is_pixel_array(source):
            return _normalised(_from_array(source, policy), rawmode="", keep_mode=keep_mode)
        return _decode(read_source(source, policy), policy, keep_mode)


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
    """Return an image as a text that every later reader finds the same pixels in.

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
        refusal = ImageLoadError(f"cannot load {source_name(source)}: {reason}")
        refusal.reason = reason
        raise refusal from cause


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() if error.errno else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = " ".join(str(error).split())[:300]
    if "truncated" in text.lower():
        return f"truncated ({text})"
    if "unknown" in text or "unsupported" in text:
        return f"a variant that is not supported ({text})"
    return f"damaged ({text or type(error).__name__})"


# ---------------------------------------------------------------------------------------------- bytes to pixels


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


def _decode(data: bytes, policy: ImagePolicy, keep_mode: bool) -> Image.Image:
    if not data:
        raise ImageLoadError("zero bytes")
    header = read_header(data, max_frames=policy.max_frames)
    reader = _reader(header.format) if header else _registered_reader_of(data)
    if header is None and reader is not None:
        header = PictureHeader(reader.format or "")
    if header is None or reader is None:
        raise ImageLoadError(f"not a picture in a supported format ({', '.join(FORMATS)}): {describe_bytes(data)}")
    if header.size:
        _check_size(header.size, policy)
    # The reader itself, not Image.open: that would try every format, and warn about large pictures before we can look.
    with reader(io.BytesIO(data), "") as image:
        _check_size(image.size, policy)
        frames = header.frames if header.frames is not None else int(getattr(image, "n_frames", 1))
        if frames > policy.max_frames:
            raise ImageLoadError(f"more than {policy.max_frames} frames (ImagePolicy.max_frames)")
        rawmode = _rawmode(image)
        image.load()
        _scale_transparent_key(image, rawmode)
        pixels = _normalised(image, rawmode=rawmode, keep_mode=keep_mode)
        if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0:
            return ImageOps.invert(pixels)  # a TIFF of more than 8 bits where 0 is white, which Pillow leaves as it is
        return pixels


@cache
def _reader(format_name: str) -> type[ImageFile.ImageFile]:
    if format_name == "HEIC":
        return _heic_reader()
    if format_name == "AVIF" and not features.check("avif"):
        if other := _registered_reader("AVIF"):
            return other
        raise ImageLoadError("AVIF, which this Pillow was built without: pip install --upgrade Pillow") from _NO_READER
    module, name = _READERS[format_name].split(".")
    reader: type[ImageFile.ImageFile] = getattr(importlib.import_module(f"PIL.{module}"), name)
    return reader


def _heic_reader() -> type[ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageLoadError('HEIC needs the extra "heic": pip install "mm-retriever[heic]"') from error
    reader: type[ImageFile.ImageFile] = HeifImageFile
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


def _check_size(size: tuple[int, int], policy: ImagePolicy) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageLoadError(f"no pixels ({width}x{height})")
    if max(size) > _LONGEST_SIDE:
        raise ImageLoadError(f"{width}x{height} pixels; no side may be longer than {_LONGEST_SIDE}")
    if width * height > policy.max_pixels:
        raise ImageLoadError(
            f"{width}x{height} pixels, more than the limit of {policy.max_pixels} (ImagePolicy.max_pixels)"
        )


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How samples lie in the file ("I;12", "L;4", "RGB;16B"), which the mode of the picture does not always say."""
    arguments = image.tile[0][3] if image.tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _scale_transparent_key(image: Image.Image, rawmode: str) -> None:
    """Bring the transparent colour of a PNG, which Pillow leaves in the file's bit depth, to that of the pixels."""
    key = image.info.get("transparency")
    if isinstance(key, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    elif isinstance(key, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(sample >> 8 for sample in key)


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
    if len(image.info.get("exif") or b"") > _LARGEST_EXIF:
        return 1
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

    samples = np.asarray(image)
    rows = max(1, _STRIP // image.width)  # strip by strip: as doubles, all of it would take a gigabyte
    places = [slice(top, top + rows) for top in range(0, image.height, rows)]

    def doubles(place: slice) -> NDArray[np.float64]:
        return np.nan_to_num(samples[place].astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)

    low = min(float(doubles(place).min()) for place in places)
    high = max(float(doubles(place).max()) for place in places)
    black, scale = 0.0, 255.0 if high <= 1 else 1.0
    if low < 0 or high > 255:
        black, scale = low, 255 / (high - low or 1.0)
    grey = np.empty(samples.shape, np.uint8)
    for place in places:
        grey[place] = (doubles(place) - black) * scale + 0.5
    return Image.fromarray(grey)


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
