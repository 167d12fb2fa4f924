"""How large a HEIC or AVIF file is, told from its boxes and its coded headers before any decoder sees them.

Pure bytes in, numbers out. Such a file says its size in several places, and the decoder allocates what the innermost of
them says, whatever the size property (`ispe`) says beside them: 12,000x12,000 pixels hide in 2 kB that claim to be
64x64, and are shrunk once they are decoded. So the largest counts: of the size property, the grid that tiles are put
together on, the parameter sets (SPS) or sequence headers of all coded images, and the tracks of an animation.

Source: ISO/IEC 14496-12 (boxes, tracks), ISO/IEC 23008-12 (HEIF: items, grids), ITU-T H.265, 7.3.2.2; AV1 Image File
Format 1.1, AV1 specification, 5.3 to 5.9 (headers).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from mm_retriever.errors import ImageLoadError

MAX_BOXES = 20_000  # in one file; a phone's photo of 48 megapixels has about 200
MAX_ITEMS = 1_000  # grids and coded images whose sizes are looked for; that photo has about 50
MAX_PARTS = 10_000  # of the data of all items; naming one may take no bytes
META_BOXES = (b"iprp", b"iinf", b"iloc", b"idat")

Size: TypeAlias = tuple[int, int]
Span: TypeAlias = tuple[int, int]


def boxes(data: bytes, span: Span, budget: list[int]) -> Iterator[tuple[bytes, Span]]:
    """Yield kind and contents of the boxes that lie in a part of the file."""
    at, end = span
    while at + 8 <= end:
        budget[0] -= 1
        if budget[0] < 0:
            raise ImageLoadError(f"more than the {MAX_BOXES} boxes that any honest file has")
        size, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = end if size == 0 else at + size
        if stop < start:
            raise ImageLoadError("truncated or broken header")
        yield kind, (start, min(stop, end))
        at = stop


def contents(data: bytes, span: Span, budget: list[int], *names: bytes) -> dict[bytes, Span]:
    """Return the named boxes that exist.

    Raises:
        ImageLoadError: one occurs twice: decoders differ in which of them they use.
    """
    spans: dict[bytes, Span] = {}
    for kind, place in boxes(data, span, budget):
        if kind in names:
            if kind in spans:
                raise ImageLoadError(f"two {kind.decode()} boxes where there is one in any honest file")
            spans[kind] = place
    return spans


def items(data: bytes, children: dict[bytes, Span], budget: list[int], kind: bytes) -> set[int]:
    """Return the numbers of the items of a kind. Source: ISO/IEC 14496-12, 8.11.6.

    Raises:
        ImageLoadError: there are too many, or overlays, which put images together on a canvas of their own.
    """
    numbers = set()
    start, end = children.get(b"iinf", (0, 0))
    entries = start + (6 if start < end and data[start] == 0 else 8)
    for box, (at, _) in boxes(data, (entries, end), budget):
        if box == b"infe" and data[at] >= 2:
            wide = data[at] > 2
            coded_as = data[at + (10 if wide else 8) :][:4]
            if coded_as == b"iovl":
                raise ImageLoadError("an overlay of several images, which is not read")
            if coded_as == kind:
                numbers.add(int.from_bytes(data[at + 4 : at + (8 if wide else 6)], "big"))
    if len(numbers) > MAX_ITEMS:
        raise ImageLoadError(f"more than the {MAX_ITEMS} images that any honest file is put together of")
    return numbers


def grid_sizes(data: bytes, children: dict[bytes, Span], budget: list[int]) -> list[Size]:
    """Return the sizes of the canvases that tiles are put together on. Source: ISO/IEC 23008-12, 6.6.2.3."""
    grids, sizes = items(data, children, budget, b"grid"), []
    for number, (at, length) in places(data, children, grids):
        if length < 8 or at + length > len(data):
            raise ImageLoadError("truncated or broken header (a grid)")
        if number not in grids:
            raise ImageLoadError("a grid in several places, which is not read")
        sizes.append(struct.unpack_from(">LL" if data[at + 1] & 1 else ">HH", data, at + 4))
        grids.discard(number)
    if grids:
        raise ImageLoadError("truncated or broken header (a grid without a place)")
    return sizes


def places(data: bytes, children: dict[bytes, Span], wanted: set[int]) -> Iterator[tuple[int, Span]]:
    """Yield number, offset and length of each part of the wanted items. Source: ISO/IEC 14496-12, 8.11.3."""
    start, end = children.get(b"iloc", (0, 0))
    if not wanted or start == end:
        return
    wanted = set(wanted)
    version, at = data[start], start + 6
    offset_size, length_size = data[start + 4] >> 4, data[start + 4] & 15
    base_size, index_size = data[start + 5] >> 4, data[start + 5] & 15 if version else 0
    left = MAX_PARTS

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > end:
            raise ImageLoadError("truncated or broken header (iloc)")
        return int.from_bytes(data[at - size : at], "big")

    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)
        base = number(base_size)
        parts = number(2)
        left -= parts
        if left < 0:
            raise ImageLoadError(f"more than the {MAX_PARTS} parts that the items of any honest file lie in")
        for _ in range(parts):
            number(index_size)
            offset, length = base + number(offset_size), number(length_size)
            if item in wanted:
                if method > 1:
                    raise ImageLoadError("an item that lies in another one, which is not read")
                yield item, (offset + (children.get(b"idat", (0, 0))[0] if method else 0), length)


class Bits:
    """Numbers from bits; past the end there are none."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def number(self, bits: int) -> int:
        """Return the number that the next so many bits are."""
        if bits > self._left:
            raise IndexError("no more bits")
        self._left -= bits
        return self._value >> self._left & ((1 << bits) - 1)

    def skip(self, bits: int) -> None:
        """Pass over so many bits."""
        self.number(bits)

    def golomb(self) -> int:
        """Return the next number that says its own length. Source: ITU-T H.265, 9.2."""
        zeros = 0
        while not self.number(1):
            zeros += 1
            if zeros > 32:
                raise IndexError("no such number")
        return (1 << zeros) - 1 + self.number(zeros)


MAX_SPS = 1_000
_SPS_NAL = 33
_SPS_START = 256  # bytes of an SPS that the size lies within
# an SPS among the coded data: its length in four bytes, its type, temporal id 1
_SPS_IN_DATA = re.compile(rb"\x00\x00[\x00-\x0f][\x00-\xff]\x42\x01", re.DOTALL)


def _described(data: bytes, meta: Span, budget: list[int]) -> tuple[dict[bytes, Span], Iterator[tuple[bytes, Span]]]:
    """What a meta box holds, and the properties of its items."""
    children = contents(data, (meta[0] + 4, meta[1]), budget, *META_BOXES)
    place = contents(data, children.get(b"iprp", (0, 0)), budget, b"ipco").get(b"ipco", (0, 0))
    return children, boxes(data, place, budget)


def heif_size(data: bytes) -> Size:
    """Return the largest width and the largest height that anything in the file makes a decoder allocate.

    Raises:
        ImageLoadError: the boxes are broken, too many, or say no size.
        struct.error, IndexError: the file is cut off.
    """
    budget = [MAX_BOXES]
    meta = contents(data, (0, len(data)), budget, b"meta").get(b"meta")
    if meta is None:
        raise ImageLoadError("truncated or broken header (no meta box)")
    children, properties = _described(data, meta, budget)
    sizes: list[Size] = []
    for kind, (start, end) in properties:
        if kind == b"ispe":
            sizes.append(struct.unpack_from(">LL", data, start + 4))
        elif kind == b"hvcC":
            sizes += [_sps_size(unit) for unit in _parameter_sets(data[start:end])]
    if not sizes:
        raise ImageLoadError("truncated or broken header (no size)")
    for index, match in enumerate(_SPS_IN_DATA.finditer(data)):
        if index == MAX_SPS:
            raise ImageLoadError(f"more than the {MAX_SPS} parameter sets that any honest HEIC file has")
        sizes.append(_sps_size(data[match.start() + 4 : match.start() + 4 + _SPS_START]))
    sizes += grid_sizes(data, children, budget)
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _parameter_sets(config: bytes) -> Iterator[bytes]:
    """Yield the SPS units of an hvcC box. Source: ISO/IEC 14496-15, 8.3.3.1."""
    at = 23
    for _ in range(config[22]):
        kind, units = config[at] & 0x3F, int.from_bytes(config[at + 1 : at + 3], "big")
        at += 3
        for _ in range(units):
            length = int.from_bytes(config[at : at + 2], "big")
            if kind == _SPS_NAL:
                yield config[at + 2 : at + 2 + length]
            at += 2 + length
            if at > len(config):
                raise ImageLoadError("truncated or broken header")


def _sps_size(unit: bytes) -> Size:
    """Width and height of the coded image. Source: ITU-T H.265, 7.3.2.2 and 7.3.3."""
    payload = unit[2:_SPS_START].replace(b"\0\0\3", b"\0\0")
    bits = Bits(payload)
    bits.skip(4)
    layers = bits.number(3)
    bits.skip(1 + 96)  # the general profile and level
    present = [(bits.number(1), bits.number(1)) for _ in range(layers)]
    bits.skip(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.skip(88 * profile + 8 * level)
    bits.golomb()
    if bits.golomb() == 3:
        bits.skip(1)
    return bits.golomb(), bits.golomb()


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
        children, properties = _described(data, meta, budget)
        for kind, (start, _) in properties:
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
