"""How large an AVIF file is, told from its boxes and its AV1 headers before any decoder sees them.

Pure bytes in, numbers out. The decoder allocates what the coded images say, whatever the size property (`ispe`) says
beside them: 12,000x12,000 pixels hide in 2 kB that claim to be 64x64, and are shrunk once they are decoded. So the
sequence headers of all coded images count, with the size property, the grid that tiles are put together on, and the
tracks of an animation. Source: AV1 Image File Format 1.1, ISO/IEC 14496-12 (boxes, tracks), AV1 specification, 5.3 to
5.9 (headers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mm_retriever.errors import ImageLoadError
from mm_retriever.images.boxes import (
    MAX_BOXES,
    META_BOXES,
    Bits,
    Size,
    Span,
    boxes,
    contents,
    grid_sizes,
    items,
    places,
)

MAX_UNITS = 20_000  # units of AV1 in one file; a coded image has about five
MAX_TICKS = 2**20
_SEQUENCE_HEADER = 1
_FRAME_HEADERS = (3, 6, 7)
_HEADER_START = 1_024  # bytes that a sequence header, or what is read of a frame's, lies within
_KEY_FRAME, _SWITCH_FRAME = 0, 3
_CHOOSE = 2  # each frame says it for itself


@dataclass(frozen=True)
class _Sequence:
    """What a sequence header says; the lengths are of fields in frame headers, in bits."""

    size: Size
    size_lengths: Size
    reduced: bool = False  # of a still image: its frame says no size of its own
    time_length: int = 0
    id_length: int = 0
    screen_content: int = _CHOOSE
    integer_motion: int = _CHOOSE


def avif_size(data: bytes) -> Size:
    """Return the largest width and the largest height that anything in the file makes a decoder allocate.

    Raises:
        ImageLoadError: the boxes or headers are broken, too many, or say no size.
        struct.error, IndexError: the file is cut off.
    """
    budget, units = [MAX_BOXES], [MAX_UNITS]
    top = contents(data, (0, len(data)), budget, b"meta", b"moov")
    sizes: list[Size] = []
    coded: list[bytes] = []
    if (meta := top.get(b"meta")) is not None:
        children = contents(data, (meta[0] + 4, meta[1]), budget, *META_BOXES)
        properties = contents(data, children.get(b"iprp", (0, 0)), budget, b"ipco").get(b"ipco", (0, 0))
        for kind, (start, _) in boxes(data, properties, budget):
            if kind == b"ispe":
                sizes.append(struct.unpack_from(">LL", data, start + 4))
        sizes += grid_sizes(data, children, budget)
        coded += _coded_items(data, children, budget)
    for kind, track in boxes(data, top.get(b"moov", (0, 0)), budget):
        if kind == b"trak":
            parts = contents(data, track, budget, b"tkhd", b"mdia")
            if (header := parts.get(b"tkhd")) is not None:
                width, height = struct.unpack_from(">LL", data, header[0] + (88 if data[header[0]] else 76))
                sizes.append((width >> 16, height >> 16))
            coded.append(_first_sample(data, parts, budget))
    if not sizes:
        raise ImageLoadError("truncated or broken header (no size)")
    for image in coded:
        sizes += _coded_sizes(image, units)
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _coded_items(data: bytes, children: dict[bytes, Span], budget: list[int]) -> list[bytes]:
    """The data of the coded images, each together where it lies in several parts."""
    parts: dict[int, list[bytes]] = {}
    taken = 0
    for number, (at, length) in places(data, children, items(data, children, budget, b"av01")):
        part = data[at : at + length] if length else data[at:]
        parts.setdefault(number, []).append(part)
        taken += len(part)
        if taken > len(data):
            raise ImageLoadError("coded images that lie over each other")
    return [b"".join(image) for image in parts.values()]


def _first_sample(data: bytes, track: dict[bytes, Span], budget: list[int]) -> bytes:
    """The data of a track's first frame, the only one that is decoded. Source: ISO/IEC 14496-12, 8.7.3 and 8.7.5."""
    for name in (b"mdia", b"minf", b"stbl"):
        track = contents(data, track.get(name, (0, 0)), budget, b"minf", b"stbl", b"stco", b"co64", b"stsz")
    if b"stsz" not in track or (b"stco" in track) == (b"co64" in track):
        raise ImageLoadError("truncated or broken header (a track without samples)")
    form, offsets = (">L", track[b"stco"]) if b"stco" in track else (">Q", track[b"co64"])
    (at,) = struct.unpack_from(form, data, offsets[0] + 8)
    same, _, first = struct.unpack_from(">LLL", data, track[b"stsz"][0] + 4)
    length = same or first
    return data[at : at + length]


def _coded_sizes(data: bytes, units: list[int]) -> list[Size]:
    """Sizes that the units of a coded image say. Source: AV1 specification, 5.3 to 5.5."""
    sizes: list[Size] = []
    sequence: _Sequence | None = None
    for kind, unit in _units(data, units):
        if kind == _SEQUENCE_HEADER:
            sequence = _sequence(Bits(unit))
            sizes.append(sequence.size)
        elif kind in _FRAME_HEADERS and sequence is not None and _has_own_size(Bits(unit), sequence):
            sizes.append((1 << sequence.size_lengths[0], 1 << sequence.size_lengths[1]))  # the most that it can say
    return sizes


def _units(data: bytes, budget: list[int]) -> Iterator[tuple[int, bytes]]:
    """Yield the kinds and the beginnings of the units of a coded image."""
    at = 0
    while at < len(data):
        budget[0] -= 1
        if budget[0] < 0:
            raise ImageLoadError(f"more than the {MAX_UNITS} units that any honest AVIF file has")
        header = data[at]
        at += 2 if header & 4 else 1
        length = len(data) - at
        if header & 2:
            length = 0
            for shift in range(0, 56, 7):
                length |= (data[at] & 127) << shift
                at += 1
                if data[at - 1] < 128:
                    break
        yield header >> 3 & 15, data[at : at + min(length, _HEADER_START)]
        at += length


def _sequence(bits: Bits) -> _Sequence:
    """Source: AV1 specification, 5.5.1 to 5.5.4."""
    bits.skip(4)  # profile, still image
    if bits.number(1):
        bits.skip(5)
        lengths = bits.number(4) + 1, bits.number(4) + 1
        return _Sequence((bits.number(lengths[0]) + 1, bits.number(lengths[1]) + 1), lengths, reduced=True)
    equal_intervals = delay_length = time_length = 0
    if bits.number(1):  # timing
        bits.skip(64)
        if (equal_intervals := bits.number(1)) and bits.golomb() >= MAX_TICKS:
            raise ImageLoadError("frames that stand longer than those of any honest file")  # a number without an end
        if bits.number(1):  # a model of the decoder
            delay_length = bits.number(5) + 1
            bits.skip(32 + 5)
            time_length = bits.number(5) + 1
    display_delay = bits.number(1)
    for _ in range(bits.number(5) + 1):  # operating points
        bits.skip(12)
        if bits.number(5) > 7:
            bits.skip(1)
        if delay_length and bits.number(1):
            bits.skip(2 * delay_length + 1)
        if display_delay and bits.number(1):
            bits.skip(4)
    lengths = bits.number(4) + 1, bits.number(4) + 1
    size = bits.number(lengths[0]) + 1, bits.number(lengths[1]) + 1
    id_length = bits.number(4) + bits.number(3) + 3 if bits.number(1) else 0
    bits.skip(3 + 4)
    if bits.number(1):  # order hints
        bits.skip(2)
    screen_content = _CHOOSE if bits.number(1) else bits.number(1)
    integer_motion = _CHOOSE if not screen_content or bits.number(1) else bits.number(1)
    return _Sequence(
        size,
        lengths,
        time_length=0 if equal_intervals else time_length,
        id_length=id_length,
        screen_content=screen_content,
        integer_motion=integer_motion,
    )


def _has_own_size(bits: Bits, sequence: _Sequence) -> bool:
    """Whether a frame may be of another size than its sequence. Source: AV1 specification, 5.9.2."""
    if sequence.reduced or bits.number(1):  # or one that was decoded before is shown
        return False
    kind, shown = bits.number(2), bits.number(1)
    if shown:
        bits.skip(sequence.time_length)
    else:
        bits.skip(1)
    if not (kind == _SWITCH_FRAME or (kind == _KEY_FRAME and shown)):
        bits.skip(1)
    bits.skip(1)
    screen_content = bits.number(1) if sequence.screen_content == _CHOOSE else sequence.screen_content
    if screen_content and sequence.integer_motion == _CHOOSE:
        bits.skip(1)
    bits.skip(sequence.id_length)
    return kind == _SWITCH_FRAME or bool(bits.number(1))
