"""Image files made in memory."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The image as a file, written by Pillow."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG. Source: W3C PNG, section 5.3."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks after its header."""
    return png[:33] + b"".join(chunk(*parts) for parts in chunks) + png[33:]


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box of a HEIC or AVIF file. Source: ISO/IEC 14496-12, 4.2."""
    contents = b"".join(parts)
    return struct.pack(">L", 8 + len(contents)) + kind + contents
