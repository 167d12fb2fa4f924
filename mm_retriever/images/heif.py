"""How large a HEIC file is, told from its boxes and its HEVC headers before any decoder sees them.

Pure bytes in, numbers out. A HEIC file says its size in four places, and the decoder allocates what the innermost of
them says: the size property (`ispe`), the grid that tiles are put together on, and the sequence parameter sets (SPS) of
the coded images. The largest counts. Source: ISO/IEC 23008-12 (HEIF), ISO/IEC 14496-12 (boxes), ITU-T H.265, 7.3.2.2.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from mm_retriever.errors import ImageLoadError
from mm_retriever.images.boxes import MAX_BOXES, META_BOXES, Bits, Size, boxes, contents, grid_sizes

MAX_SPS = 1_000
_SPS_NAL = 33
_SPS_START = 256  # bytes of an SPS that the size lies within
# an SPS among the coded data: its length in four bytes, its type, temporal id 1
_SPS_IN_DATA = re.compile(rb"\x00\x00[\x00-\x0f][\x00-\xff]\x42\x01", re.DOTALL)


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
    children = contents(data, (meta[0] + 4, meta[1]), budget, *META_BOXES)
    properties = contents(data, children.get(b"iprp", (0, 0)), budget, b"ipco").get(b"ipco", (0, 0))
    sizes: list[Size] = []
    for kind, (start, end) in boxes(data, properties, budget):
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
