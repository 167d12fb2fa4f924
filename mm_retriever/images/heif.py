"""How large a HEIC file is, told from its boxes and its HEVC headers before any decoder sees them.

Pure bytes in, numbers out. A HEIC file says its size in four places, and the decoder allocates what the innermost of
them says: the size property (`ispe`), the grid that tiles are put together on, and the sequence parameter sets (SPS) of
the coded images. The largest counts. Source: ISO/IEC 23008-12 (HEIF), ISO/IEC 14496-12 (boxes), ITU-T H.265, 7.3.2.2.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import TypeAlias

from mm_retriever.errors import ImageLoadError

MAX_BOXES = 20_000  # in one file; a phone's photo of 48 megapixels has about 200
MAX_GRIDS = 100
MAX_SPS = 1_000
_SPS_NAL = 33
_SPS_START = 256  # bytes of an SPS that the size lies within
# an SPS among the coded data: its length in four bytes, its type, temporal id 1
_SPS_IN_DATA = re.compile(rb"\x00\x00[\x00-\x0f][\x00-\xff]\x42\x01", re.DOTALL)

Size: TypeAlias = tuple[int, int]


def heif_size(data: bytes) -> Size:
    """Return the largest width and the largest height that anything in the file makes a decoder allocate.

    Raises:
        ImageLoadError: the boxes are broken, too many, or say no size.
    """
    try:
        return _size(data)
    except (struct.error, IndexError) as error:
        raise ImageLoadError("truncated or broken header") from error


def _size(data: bytes) -> Size:
    budget = [MAX_BOXES]
    meta = next((span for kind, span in _boxes(data, (0, len(data)), budget) if kind == b"meta"), None)
    if meta is None:
        raise ImageLoadError("truncated or broken header (no meta box)")
    children = dict(_boxes(data, (meta[0] + 4, meta[1]), budget))
    properties = dict(_boxes(data, children.get(b"iprp", (0, 0)), budget)).get(b"ipco", (0, 0))
    sizes: list[Size] = []
    for kind, (start, end) in _boxes(data, properties, budget):
        if kind == b"ispe":
            sizes.append(struct.unpack_from(">LL", data, start + 4))
        elif kind == b"hvcC":
            sizes += [_sps_size(unit) for unit in _parameter_sets(data[start:end])]
    if not sizes:
        raise ImageLoadError("truncated or broken header (no size)")
    for found, match in enumerate(_SPS_IN_DATA.finditer(data)):
        if found == MAX_SPS:
            raise ImageLoadError(f"more than the {MAX_SPS} parameter sets that any honest HEIC file has")
        sizes.append(_sps_size(data[match.start() + 4 : match.start() + 4 + _SPS_START]))
    sizes += _grid_sizes(data, children, budget)
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _boxes(data: bytes, span: Size, budget: list[int]) -> Iterator[tuple[bytes, Size]]:
    """Yield kind and contents of the boxes that lie in a part of the file."""
    at, end = span
    while at + 8 <= end:
        budget[0] -= 1
        if budget[0] < 0:
            raise ImageLoadError(f"more than the {MAX_BOXES} boxes that any honest HEIC file has")
        size, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = end if size == 0 else at + size
        if stop < start:
            raise ImageLoadError("truncated or broken header")
        yield kind, (start, min(stop, end))
        at = stop


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
    bits = _Bits(payload)
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


class _Bits:
    """Numbers from bits; past the end there are none."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def number(self, bits: int) -> int:
        if bits > self._left:
            raise IndexError("no more bits")
        self._left -= bits
        return self._value >> self._left & ((1 << bits) - 1)

    def skip(self, bits: int) -> None:
        self.number(bits)

    def golomb(self) -> int:
        zeros = 0
        while not self.number(1):
            zeros += 1
            if zeros > 32:
                raise IndexError("no such number")
        return (1 << zeros) - 1 + self.number(zeros)


def _grid_sizes(data: bytes, children: dict[bytes, Size], budget: list[int]) -> list[Size]:
    """Sizes of the canvases that tiles are put together on."""
    grids = set()
    start, end = children.get(b"iinf", (0, 0))
    entries = start + (6 if start < end and data[start] == 0 else 8)
    for kind, (at, _) in _boxes(data, (entries, end), budget):
        if kind == b"infe" and data[at] >= 2:
            wide = data[at] > 2
            number = int.from_bytes(data[at + 4 : at + (8 if wide else 6)], "big")
            coded_as = data[at + (10 if wide else 8) :][:4]
            if coded_as == b"iovl":
                raise ImageLoadError("an overlay of several images, which is not read")
            if coded_as == b"grid":
                grids.add(number)
    if len(grids) > MAX_GRIDS:
        raise ImageLoadError(f"{len(grids)} grids, more than the {MAX_GRIDS} that any honest HEIC file has")
    sizes = []
    for number, (at, length) in _places(data, children, grids):
        if length < 8 or at + length > len(data):
            raise ImageLoadError("truncated or broken header (a grid)")
        sizes.append(struct.unpack_from(">LL" if data[at + 1] & 1 else ">HH", data, at + 4))
        grids.discard(number)
    if grids:
        raise ImageLoadError("truncated or broken header (a grid without a place)")
    return sizes


def _places(data: bytes, children: dict[bytes, Size], wanted: set[int]) -> Iterator[tuple[int, Size]]:
    """Yield number, offset and length of the wanted items. Source: ISO/IEC 14496-12, 8.11.3."""
    start, end = children.get(b"iloc", (0, 0))
    if not wanted or start == end:
        return
    wanted = set(wanted)
    version, at = data[start], start + 6
    offset_size, length_size = data[start + 4] >> 4, data[start + 4] & 15
    base_size, index_size = data[start + 5] >> 4, data[start + 5] & 15 if version else 0

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
        extents = number(2)
        for _ in range(extents):
            number(index_size)
            offset, length = base + number(offset_size), number(length_size)
            if item in wanted:
                if extents != 1 or method > 1:
                    raise ImageLoadError("a grid in several places, which is not read")
                yield item, (offset + (children.get(b"idat", (0, 0))[0] if method else 0), length)
