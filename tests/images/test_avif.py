"""AVIF: bounded before decoding by what the coded images say, whatever the boxes around them say."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from PIL import Image, features

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.images.header import read_header
from tests.support.image_files import box, encoded
from tests.support.memory import peak_growth

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")

SMALL = ImagePolicy(max_pixels=1_000_000)
START = box(b"ftyp", b"avif\0\0\0\0mif1avifmiaf")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("size", [(1, 1), (29, 17), (2_000, 33)])
def test_the_size_that_is_read_is_the_size_that_is_decoded(size, subsampling, mode):
    """Truth: the image that was written."""
    data = encoded(noise(*size, mode), "AVIF", subsampling=subsampling, speed=10)
    assert read_header(data, max_frames=1).size == size == load_image(data).size


def test_the_size_of_an_animation_is_that_of_its_first_frame():
    """Truth: the image that was written; each frame has a header that may say another size, and here none does."""
    frames = [noise(40, 30).rotate(angle) for angle in (0, 90, 180)]
    data = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert data[8:12] == b"avis"
    assert read_header(data, max_frames=9).size == (40, 30)


@pytest.mark.parametrize("is_animated", [False, True])
def test_a_bomb_whose_boxes_say_that_it_is_small_is_refused_before_it_is_decoded(is_animated, tried):
    """Truth: the decoder allocates 4096x4096 pixels, and shrinks them to the 64x64 that the boxes say."""
    large = Image.new("RGB", (4_096, 4_096), "red")
    options = {"save_all": True, "append_images": [large]} if is_animated else {}
    data = encoded(large, "AVIF", speed=10, quality=1, **options)
    hidden = data.replace(struct.pack(">LL", 4_096, 4_096), struct.pack(">LL", 64, 64))
    hidden = hidden.replace(struct.pack(">LL", 4_096 << 16, 4_096 << 16), struct.pack(">LL", 64 << 16, 64 << 16))
    assert hidden != data
    for bomb in (data, hidden):
        with peak_growth() as mib, pytest.raises(ImageLoadError, match="4096x4096 pixels, more than the limit"):
            load_image(bomb, policy=SMALL)
        assert mib() < 8
        tried["image bombs"] += 1


def unit(kind: int, bits: str) -> bytes:
    """A unit of AV1 with its length."""
    bits = bits.ljust(-len(bits) % 8 + len(bits), "0")
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return bytes([kind << 3 | 2, len(payload)]) + payload


def avif(coded: bytes, *, parts: int = 1, meta: tuple[bytes, ...] = ()) -> bytes:
    """A file with one coded image, whose boxes say that it is 64x64."""
    infe = box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), b"av01", b"\0")
    place = (
        struct.pack(">LL", 0, len(coded)) if parts == 1 else b"".join(struct.pack(">LL", at, 1) for at in range(parts))
    )
    boxes = [
        box(b"iinf", b"\0\0\0\0", struct.pack(">H", 1), infe),
        box(b"iprp", box(b"ipco", box(b"ispe", b"\0\0\0\0", struct.pack(">LL", 64, 64)))),
        box(b"iloc", b"\1\0\0\0", b"\x44\0", struct.pack(">HHHHH", 1, 1, 1, 0, parts), place),
        box(b"idat", coded),
    ]
    return START + box(b"meta", b"\0\0\0\0", *boxes, *meta)


def size_field(width: int, height: int) -> str:
    return f"{15:04b}{15:04b}{width - 1:016b}{height - 1:016b}"


STILL = "000" + "1" + "1" + "00000"
FILM = "000" + "0" + "0"
NO_TIMING, NO_DELAY, ONE_POINT = "0", "0", "00000" + "0" * 12 + "00000"
TIMING = "1" + "0" * 63 + "1" + "1" + "010"  # with equal intervals of two ticks
MODEL = "1" + "00011" + "0" * 32 + "00011" + "00111"  # delays of 4 bits, times of 8
TOOLS = "0" + "000" + "0000" + "0" + "1" + "1"  # no frame ids, no order hints; each frame chooses for itself
IDS = "1" + "0001" + "010" + "000" + "0000" + "1" + "00" + "0" + "1" + "0"  # of 6 bits; order hints; screen content


@pytest.mark.parametrize(
    "header",
    [
        STILL,
        FILM + NO_TIMING + NO_DELAY + ONE_POINT,
        FILM + TIMING + "0" + NO_DELAY + ONE_POINT,
        FILM + TIMING + MODEL + "1" + "00001" + ("0" * 12 + "01000" + "1" + "1" + "0" * 9 + "1" + "1111") * 2,
    ],
)
def test_the_size_in_a_sequence_header_is_read_behind_all_that_may_stand_before_it(header):
    """Truth: AV1 specification, 5.5.1, written bit by bit."""
    data = avif(unit(1, header + size_field(5_000, 300) + TOOLS))
    assert read_header(data, max_frames=1).size == (5_000, 300)


@pytest.mark.parametrize(
    ("header", "tools", "frame"),
    [
        (FILM + NO_TIMING + NO_DELAY + ONE_POINT, TOOLS, "0" + "00" + "1" + "0" + "0"),
        (FILM + NO_TIMING + NO_DELAY + ONE_POINT, TOOLS, "0" + "10" + "0" + "0" + "1" + "0" + "1" + "1"),
        (FILM + NO_TIMING + NO_DELAY + ONE_POINT, IDS, "0" + "01" + "1" + "1" + "0" + "101010"),
        (FILM + TIMING + MODEL + "0" + ONE_POINT + "0", TOOLS, "0" + "00" + "1" + "0" + "0"),
        (FILM + TIMING[:65] + "0" + MODEL + "0" + ONE_POINT + "0", TOOLS, "0" + "00" + "1" + "1" * 8 + "0" + "0"),
    ],
)
def test_a_frame_that_says_a_size_of_its_own_counts_as_the_largest_it_can_say(header, tools, frame):
    """Truth: AV1 specification, 5.9.2, up to frame_size_override_flag, and 5.9.5; here sizes have 16 bits."""
    sequence = unit(1, header + size_field(64, 64) + tools)
    for flag, size in (("0", (64, 64)), ("1", (65_536, 65_536))):
        assert read_header(avif(sequence + unit(6, frame + flag + "0" * 20)), max_frames=1).size == size


def test_a_coded_image_in_many_parts_is_put_together():
    coded = unit(1, STILL + size_field(5_000, 300))
    assert read_header(avif(coded, parts=len(coded)), max_frames=1).size == (5_000, 300)


def many_parts(items: int) -> bytes:
    """An item table in which 65,535 parts of an item take no byte."""
    infe = box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), b"av01", b"\0")
    table = struct.pack(">HHHH", 2, 0, 0, 65_535) * items
    return START + box(
        b"meta",
        b"\0\0\0\0",
        box(b"iinf", b"\0\0\0\0", struct.pack(">H", 1), infe),
        box(b"iprp", box(b"ipco", box(b"ispe", b"\0\0\0\0", struct.pack(">LL", 64, 64)))),
        box(b"iloc", b"\1\0\0\0", b"\0\0", struct.pack(">H", items), table),
    )


TWO = avif(unit(1, STILL + size_field(64, 64)), meta=(box(b"iprp", box(b"ipco")),))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (many_parts(65_535), "parts that the items"),
        (many_parts(65_535).replace(b"avif", b"heic").replace(b"av01", b"grid"), "parts that the items"),
        (avif(unit(1, STILL + size_field(64, 64)) + b"\x12\0" * 200_000), "units that any honest"),
        (START + box(b"free") * 200_000, "boxes that any honest"),
        (TWO, "two iprp boxes"),
        (TWO.replace(b"avif", b"heic"), "two iprp boxes"),
        (avif(unit(1, FILM + TIMING[:65] + "1" + "0" * 32 + "1" + "0" * 40)), "stand longer"),
        (avif(b"\x0a"), "truncated or broken header"),
        (START, "no size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_honest_file_has_is_refused_at_once(data, reason, tried):
    """Truth: our limits; which of two boxes a decoder takes is its own affair, and a small size could hide a large."""
    started = time.process_time()
    with pytest.raises(ImageLoadError, match=reason):
        load_image(data)
    assert time.process_time() - started < 1.5
    tried["image bombs"] += 1
