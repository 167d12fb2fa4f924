"""What the bytes of an image file say before any decoder sees them: format, size, number of frames.

Pure bytes in, numbers out; knows nothing of Pillow, files or the network. Only the formats named here ever reach a
decoder. The decoder itself would allocate, loop or warn before it could be asked: a file of 60 MB of empty blocks keeps
Pillow busy for minutes, and fills gigabytes, without a single pixel.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from mm_retriever.errors import ImageLoadError
from mm_retriever.images.heif import avif_size, heif_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIC")

# Limits that no honest file comes near. Blocks: so many, plus one for every so many bytes of the file.
MAX_JPEG_SCANS = 100  # 10 to 20 in a progressive file; each is a pass over the whole image
MAX_JPEG_EXIF = 100  # 1, and 1 in each further image; each is copied again for every one that follows
MAX_PNG_TEXTS = 1_000  # a few, or none; each may unpack to a megabyte
MAX_PNG_TEXT = 2**18  # bytes
MAX_PNG_PROFILE = 2**22  # bytes
MAX_TIFF_TAGS = 1_000
MAX_TIFF_VALUES = 200_000  # strips, mostly: one a row and channel; a 16-bit palette has 196,608
MAX_FREE_TILE = 2_048 * 2_048  # pixels. A tile may be larger than the image, but is allocated whole
MAX_FREE_TILES = 16 * MAX_FREE_TILE  # all of them, which are unpacked whole, also where they stand out of the image
MAX_SLOW_BYTES = 4 * 2**20  # for what Pillow decodes in Python, at 3 to 6 MB/s: run-length BMP, PPM of odd depth
_FREE_BLOCKS = 2_000
_BYTES_A_BLOCK = {"JPEG": 1_024, "PNG": 512, "GIF": 128}

_PPM_HEADER = re.compile(rb"P[456](?:\s|#[^\r\n]*[\r\n])+\d{1,10}(?:\s|#[^\r\n]*[\r\n])+\d{1,10}\s")
_PPM_WHITE = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*(\d{1,10})\s")
_FILL = re.compile(rb"\xff*")
_JPEG_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})  # no length follows; decoders pass over a zero too
# What both decoders, Pillow's and libjpeg's, pass over by its length. They look into all others for markers.
_JPEG_SEGMENTS = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}) - {0xC8}
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA
_PNG_TEXTS = (b"iCCP", b"iTXt", b"zTXt")
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
_PNG_NEEDED = (b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"eXIf")
_PNG_FRAMES = (b"acTL", b"fcTL", b"fdAT")
JPEG_END = b"\xff\xd9"
_CODED_DATA = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_FRAME = struct.Struct(">HHB")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_HEIF_BRANDS = (b"mif1", b"msf1", b"mif2", b"miaf")  # say nothing of how the images are coded; other brands do


@dataclass(frozen=True)
class _TiffLayout:
    first: int  # where the offset of the first directory stands
    count: str
    entry: str  # tag, type, number of values, value or its offset
    offset: str


_TIFF = _TiffLayout(first=4, count="H", entry="HHL4s", offset="L")
_BIG_TIFF = _TiffLayout(first=8, count="Q", entry="HHQ8s", offset="Q")
_TIFF_BYTES = frozenset({1, 2, 6, 7})
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q", 17: "q"}
_TIFF_SIZES = (0x100, 0x101, 0x142, 0x143)  # width and height of the image and of a tile
_TIFF_LISTS = frozenset({0x111, 0x117, 0x140, 0x144, 0x145})  # strips, colours, tiles: lists, also when stored as bytes
_TIFF_NESTED = frozenset({0x8769, 0x8825, 0xA005})  # EXIF, GPS, interoperability


@dataclass(frozen=True)
class ImageHeader:
    """The format's name and, where the bytes say so cheaply, the size in pixels and the number of frames.

    ``reducible``: a JPEG of one scan, which can be decoded at half its size without ever being in memory whole.
    """

    format: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    reducible: bool = False


def sniff_format(data: bytes) -> str | None:
    """Return the format that the first bytes belong to (one of `FORMATS`), or None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and len(data) >= 18 and 12 <= int.from_bytes(data[14:18], "little") <= 124:
        return "BMP"
    if data[:1] == b"P" and data[1:2] in (b"4", b"5", b"6") and data[2:3].isspace():
        return "PPM"
    if data[4:8] == b"ftyp":
        return _heif_kind(data)
    return None


def _heif_kind(data: bytes) -> str | None:
    """AVIF or HEIC, by the main brand; where that says only HEIF, by the first other one that says more."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    main, others = data[8:12], [data[at : at + 4] for at in range(16, end - 3, 4)]
    for brand in [main, *(others if main in _HEIF_BRANDS else ())]:
        if brand in _AVIF_BRANDS:
            return "AVIF"
        if brand in _HEIC_BRANDS:
            return "HEIC"
    return "AVIF" if main in _HEIF_BRANDS else None


def describe_bytes(data: bytes) -> str:
    """Return what bytes in no supported format look like, for an error message."""
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it looks like an HTML page"
    if b"<svg" in start:
        return "it looks like SVG, which has no pixels: render it first"
    if start.startswith(b"%pdf"):
        return "it looks like a PDF"
    return f"it starts with {data[:8]!r}"


def read_header(data: bytes, *, max_frames: int) -> ImageHeader | None:
    """Return what can be known without a decoder, or None for any other format.

    Args:
        data: the whole file.
        max_frames: counting stops one above this, so that a file of a million empty frames costs nothing.

    Raises:
        ImageLoadError: the structure is broken, or asks for more work than any honest file does.
    """
    kind = sniff_format(data)
    if kind == "JPEG":
        return _jpeg_header(data)
    if kind == "PNG":
        return _png_header(data)
    if kind == "GIF":
        return _gif_header(data, max_frames)
    if kind == "TIFF":
        return _tiff_header(data, max_frames)
    if kind == "WEBP":
        return ImageHeader(kind, _webp_size(data))
    if kind in ("AVIF", "HEIC"):
        try:
            return ImageHeader(kind, avif_size(data) if kind == "AVIF" else heif_size(data))
        except (struct.error, IndexError) as error:
            raise ImageLoadError("truncated or broken header") from error
    if kind == "BMP":
        _check_bmp(data)
    if kind == "PPM":
        _check_ppm(data)
    return ImageHeader(kind) if kind else None


def _most_blocks(kind: str, data: bytes) -> int:
    return _FREE_BLOCKS + len(data) // _BYTES_A_BLOCK[kind]


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment, as decoders find them. Source: ITU-T T.81, annex B.

    Whatever a decoder would read where this walk does not look could be of any size, so a doubt is a refusal.
    """
    at = 2
    for _ in range(_most_blocks("JPEG", data)):
        if at + 4 > len(data) or data[at] != 0xFF:
            return
        marker = data[at + 1]
        if marker == 0xFF:  # fill bytes: any number of them
            at = _FILL.match(data, at).end() - 1  # type: ignore[union-attr]
        elif marker in _JPEG_ALONE:
            at += 2
        elif marker in _JPEG_SEGMENTS:
            end = at + 2 + (data[at + 2] << 8 | data[at + 3] or 2)
            yield marker, at, end
            at = end
            if marker == _JPEG_SCAN:  # coded data end at a marker that is no restart and no stuffed zero
                following = _CODED_DATA.search(data, at)
                at = following.start() if following else len(data)
        else:
            raise ImageLoadError(f"a segment of kind {marker:#x}, which no decoder knows")
    raise ImageLoadError("more segments than any honest JPEG has")


def _jpeg_header(data: bytes) -> ImageHeader:
    if (parts := data.count(b"Exif\0\0")) > MAX_JPEG_EXIF:
        raise ImageLoadError(f"{parts} parts of EXIF, more than the {MAX_JPEG_EXIF} that any honest file has")
    size, components, several_scans = None, 0, False
    for marker, at, _ in _jpeg_segments(data):
        if marker in _JPEG_FRAMES and at + 10 <= len(data):
            height, width, components = _FRAME.unpack_from(data, at + 5)
            size, several_scans = (width, height), marker > 0xC1
        elif marker == _JPEG_SCAN:
            several_scans |= at + 4 < len(data) and data[at + 4] != components
            if several_scans and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
                raise ImageLoadError(f"{scans} scans, more than the {MAX_JPEG_SCANS} that any honest file has")
            return ImageHeader("JPEG", size, reducible=not several_scans)
    raise ImageLoadError("truncated or broken before the first scan")


def ends_in_last_scan(data: bytes) -> bool:
    """Whether a JPEG that ends early lacks a part of its last pass over the image at most. Source: ITU-T T.81, G.1.

    Of one that is coded in one scan, any part can be missing. A progressive one must have begun the scan that brings
    the last bit of the last coefficient, without which colours or details are not there at all.
    """
    components, progressive = 0, False
    bits: dict[tuple[int, int], int] = {}
    for marker, at, after in _jpeg_segments(data):
        if marker in _JPEG_FRAMES and at + 10 <= len(data):
            components, progressive = data[at + 9], marker == 0xC2
        if marker != _JPEG_SCAN:
            continue
        count, header = data[at + 4] if at + 4 < len(data) else 0, data[at + 5 : after]
        if not progressive:
            return count == components
        if len(header) < 2 * count + 3:
            break
        start, end, low = header[2 * count], header[2 * count + 1], header[2 * count + 2] & 15
        for component in header[0 : 2 * count : 2]:
            bits |= {(component, coefficient): low for coefficient in range(start, min(end, 63) + 1)}
    return len(bits) == 64 * components and not any(bits.values())


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk. Source: W3C PNG, section 5."""
    at = 8
    for _ in range(_most_blocks("PNG", data)):
        kind = data[at + 4 : at + 8]
        if len(kind) < 4:
            return
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end
    raise ImageLoadError("more chunks than any honest PNG has")


def _png_header(data: bytes) -> ImageHeader:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageLoadError("truncated or broken header")
    if sum(kind in _PNG_TEXTS for kind, _, _ in _png_chunks(data)) > MAX_PNG_TEXTS:
        raise ImageLoadError(f"more than {MAX_PNG_TEXTS} compressed texts and profiles")
    return ImageHeader("PNG", struct.unpack_from(">LL", data, 16))


def clean_png(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without the chunks that hold no pixels, and its colour profile.

    A comment that is too large or broken, or a profile whose chunk is, makes decoders refuse the image; browsers pass
    over them. What stays: image data, transparency, gamma, orientation, the frames of an animation.
    """
    kept, begun, profile = [], 0, None
    for kind, at, end in _png_chunks(data):
        if end > len(data):
            break
        if kind == b"iCCP" and profile is None:
            profile = _inflated(data[at + 8 : end - 4].partition(b"\0")[2][1:], MAX_PNG_PROFILE)
        is_critical = not kind[0] & 32
        if not (is_critical or kind in _PNG_FRAMES or _is_needed(kind, data, at, end)):
            kept.append(data[begun:at])
            begun = end
    return b"".join([*kept, data[begun:]]) if kept else data, profile


def _is_needed(kind: bytes, data: bytes, at: int, end: int) -> bool:
    if kind in _PNG_TEXTS or kind == b"tEXt":
        if kind == b"iCCP" or end - at > MAX_PNG_TEXT or not data.startswith(_PNG_ORIENTATION, at + 8):
            return False
        if kind == b"iTXt" and data[data.index(b"\0", at + 8) + 1] == 0:
            return True
        body = data[at + 8 : end - 4].partition(b"\0")[2][1:]
        if kind == b"iTXt":
            body = body[1:].partition(b"\0")[2].partition(b"\0")[2]
        return kind == b"tEXt" or _inflated(body, MAX_PNG_TEXT) is not None
    if kind not in _PNG_NEEDED:
        return False
    return zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _inflated(packed: bytes, most: int) -> bytes | None:
    """Unpacked bytes, or None where they are broken or more than `most`."""
    unpacking = zlib.decompressobj()
    try:
        unpacked = unpacking.decompress(packed, most)
    except zlib.error:
        return None
    return unpacked if unpacking.eof and not unpacking.unconsumed_tail else None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size. Source: RFC 9649, sections 2.5 to 2.7; the decoder allocates the canvas as it is opened."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ImageLoadError("truncated or broken header")


def _gif_header(data: bytes, max_frames: int) -> ImageHeader:
    """Size of the screen grown to hold every frame, and the number of frames. Source: GIF89a, section 17 on."""
    if len(data) < 13:
        raise ImageLoadError("truncated (no GIF screen)")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames, blocks, most_blocks = 0, 0, _most_blocks("GIF", data)
    while frames <= max_frames and at < len(data) and blocks <= most_blocks:
        blocks += 1
        kind, at = data[at], at + 1
        if kind == 0x2C and at + 9 <= len(data):  # a frame: its place and size, palette, code size
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, at)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            frames += 1
            at += 9 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
        elif kind == 0x21:  # an extension: its label
            at += 1
        elif kind == 0x3B:  # the end
            break
        else:  # what decoders do too: pass over bytes that begin no block
            continue
        while at < len(data) and data[at] and blocks <= most_blocks:  # sub-blocks, each with its length in front
            blocks += 1
            at += data[at] + 1
        at += 1
    if blocks > most_blocks:
        raise ImageLoadError("more blocks than any honest GIF has")
    return ImageHeader("GIF", (width, height), frames)


def _tiff_header(data: bytes, max_frames: int) -> ImageHeader:
    """Number of image directories; the first one, which is decoded, must be modest. Source: TIFF 6.0, section 2."""
    layout = _BIG_TIFF if data[2:4] in (b"+\0", b"\0+") else _TIFF
    order = "<" if data[:2] == b"II" else ">"
    frames, visited = 0, set[int]()
    try:
        (at,) = struct.unpack_from(order + layout.offset, data, layout.first)
        if at < len(data):
            _check_tiff_directory(data, at, order, layout)
        while at and at not in visited and frames <= max_frames:
            visited.add(at)
            (entries,) = struct.unpack_from(order + layout.count, data, at)
            frames += 1
            skipped = struct.calcsize("<" + layout.count) + entries * struct.calcsize("<" + layout.entry)
            (at,) = struct.unpack_from(order + layout.offset, data, at + skipped)
    except (struct.error, OverflowError):  # the chain leads out of the file: the images before count
        pass
    return ImageHeader("TIFF", None, frames)


def _check_tiff_directory(data: bytes, at: int, order: str, layout: _TiffLayout, *, nested: bool = False) -> None:
    """Refuse what makes the decoder allocate or loop: too many tags or values, or tiles larger than the image."""
    (entries,) = struct.unpack_from(order + layout.count, data, at)
    if entries > MAX_TIFF_TAGS:
        raise ImageLoadError(f"{entries} tags in a directory, more than the {MAX_TIFF_TAGS} that any honest TIFF has")
    at += struct.calcsize("<" + layout.count)
    values = {}
    for tag, kind, count, value in struct.iter_unpack(
        order + layout.entry, data[at : at + entries * struct.calcsize("<" + layout.entry)]
    ):
        if count > MAX_TIFF_VALUES and (kind not in _TIFF_BYTES or tag in _TIFF_LISTS):
            raise ImageLoadError(f"{count} values in one tag, more than the {MAX_TIFF_VALUES} that any honest TIFF has")
        if tag in _TIFF_SIZES and tag in values:
            raise ImageLoadError("a size is given twice")
        number = _TIFF_NUMBERS.get(kind, "x")
        if number != "x" and struct.calcsize("<" + number) <= len(value):
            (values[tag],) = struct.unpack_from(order + number, value)
        if tag in _TIFF_NESTED and not nested and 0 < values.get(tag, 0) < len(data):
            _check_tiff_directory(data, values[tag], order, layout, nested=True)
    width, height, tile_width, tile_height = (values.get(tag, 0) for tag in _TIFF_SIZES)
    if tile_width < 1 or tile_height < 1:
        return
    tiles = -(-width // tile_width) * -(-height // tile_height)
    for pixels, free in ((tile_width * tile_height, MAX_FREE_TILE), (tiles * tile_width * tile_height, MAX_FREE_TILES)):
        if pixels > max(free, 2 * width * height):
            raise ImageLoadError(f"tiles of {tile_width}x{tile_height} in a image of {width}x{height} pixels")


def _check_bmp(data: bytes) -> None:
    """Source: Microsoft, BITMAPINFOHEADER (biCompression: BI_RLE8 is 1, BI_RLE4 is 2)."""
    if len(data) > MAX_SLOW_BYTES and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise ImageLoadError(f"a run-length coded BMP of over {MAX_SLOW_BYTES} bytes")


def _check_ppm(data: bytes) -> None:
    """Binary forms only, with a short header. Source: netpbm's pbm(5), pgm(5), ppm(5)."""
    header = _PPM_HEADER.match(data[:4096])
    if not header:
        raise ImageLoadError("truncated or broken header")
    if data[:2] == b"P4" or len(data) <= MAX_SLOW_BYTES:
        return
    white = _PPM_WHITE.match(data[header.end() : header.end() + 4096])
    common = (b"255", b"65535") if data[:2] == b"P5" else (b"255",)
    if not white or white[1] not in common:
        raise ImageLoadError(f"a PPM of over {MAX_SLOW_BYTES} bytes whose white is not {b' or '.join(common).decode()}")
