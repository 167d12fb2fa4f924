"""What the first bytes of a picture say, before any decoder sees them: format, size, frames, scans.

Pure bytes in, numbers out; knows nothing of Pillow, files or the network. Only the formats named here are ever handed
to a decoder, and each check is here because the decoder itself would allocate, loop or warn before it could be asked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")

# An honest progressive JPEG has 10 to 20 scans. Every further one costs a pass over the whole picture.
MAX_JPEG_SCANS = 100

_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")


@dataclass(frozen=True)
class PictureHeader:
    """The format's name and, where the bytes say so cheaply, the size in pixels and the number of frames."""

    format: str
    size: tuple[int, int] | None = None
    frames: int | None = None


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
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    if data[4:8] == b"ftyp" and data[8:12] in _AVIF_BRANDS:
        return "AVIF"
    return None


def describe_bytes(data: bytes) -> str:
    """Return what bytes that are no supported picture look like, for an error message."""
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it looks like an HTML page"
    if b"<svg" in start:
        return "it looks like SVG, which has no pixels: render it first"
    if data[4:8] == b"ftyp" and data[8:10] == b"he":
        return "it looks like HEIC: convert it to JPEG first"
    if start.startswith(b"%pdf"):
        return "it looks like a PDF"
    return f"it starts with {data[:8]!r}"


def read_header(data: bytes, *, max_frames: int) -> PictureHeader | None:
    """Return what can be known without a decoder, or None when the bytes are no supported picture.

    Args:
        data: the whole file.
        max_frames: counting stops one above this, so that a file of a million empty frames costs nothing.

    Raises:
        ValueError: the structure is broken, or asks for more work than any honest picture does.
    """
    kind = sniff_format(data)
    if kind == "GIF":
        size, frames = _gif_header(data, max_frames)
        return PictureHeader(kind, size, frames)
    if kind == "TIFF":
        return PictureHeader(kind, None, _tiff_frames(data, max_frames))
    if kind == "WEBP":
        return PictureHeader(kind, _webp_size(data))
    if kind == "JPEG" and _jpeg_takes_passes(data) and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise ValueError(f"{scans} JPEG scans, more than the {MAX_JPEG_SCANS} that any honest file has")
    return PictureHeader(kind) if kind else None


def _jpeg_takes_passes(data: bytes) -> bool:
    """Whether every scan makes the decoder go over the whole picture: progressive, or components in separate scans."""
    at, components = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame: SOF0 to SOF15
            if marker not in (0xC0, 0xC1):
                return True
            components = data[at + 9] if at + 9 < len(data) else 0
        if marker == 0xDA:  # the first scan: how many components it holds
            return data[at + 4 : at + 5] != bytes([components])
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True  # lost the thread: count


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size. Source: RFC 9649 (WebP), sections 2.5 to 2.7; the decoder allocates the canvas as it is opened."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _gif_header(data: bytes, max_frames: int) -> tuple[tuple[int, int], int]:
    """Size of the screen grown to hold every frame, and the number of frames. Source: GIF89a specification."""
    if len(data) < 13:
        raise ValueError("truncated (no GIF screen)")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = 0
    while frames <= max_frames and at < len(data):
        block, at = data[at], at + 1
        if block == 0x2C and at + 9 <= len(data):  # a frame: its place and size, palette, code size
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, at)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            frames += 1
            at += 9 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
        elif block == 0x21:  # an extension: its label
            at += 1
        elif block == 0x3B:  # the end
            break
        else:  # what decoders do too: pass over bytes that begin no block
            continue
        while at < len(data) and data[at]:  # sub-blocks, each with its length in front
            at += data[at] + 1
        at += 1
    return (width, height), frames


def _tiff_frames(data: bytes, max_frames: int) -> int:
    """Number of image directories. Source: TIFF 6.0, section 2, and the BigTIFF layout."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_format, count_bytes, entry_bytes, offset_format = ("Q", 8, 20, "Q") if big else ("H", 2, 12, "L")
    frames, seen = 0, set[int]()
    try:
        (at,) = struct.unpack_from(order + offset_format, data, 8 if big else 4)
        while at and at not in seen and frames <= max_frames:
            seen.add(at)
            (entries,) = struct.unpack_from(order + count_format, data, at)
            frames += 1
            (at,) = struct.unpack_from(order + offset_format, data, at + count_bytes + entries * entry_bytes)
    except (struct.error, OverflowError):  # the chain runs out of the file: what came before it counts
        pass
    return frames
