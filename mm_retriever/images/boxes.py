"""The boxes that HEIC and AVIF files are made of: where items lie, and what grids are put together on.

Pure bytes in, numbers out. Source: ISO/IEC 14496-12 (boxes), ISO/IEC 23008-12 (items, grids).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
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
    """Return those of the named boxes that there are.

    Raises:
        ImageLoadError: one is there twice: which of them a decoder takes is its own affair.
    """
    found: dict[bytes, Span] = {}
    for kind, place in boxes(data, span, budget):
        if kind in names:
            if kind in found:
                raise ImageLoadError(f"two {kind.decode()} boxes where there is one in any honest file")
            found[kind] = place
    return found


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
