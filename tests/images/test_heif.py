"""HEIC and AVIF: bounded before decoding by what the coded images say, whatever the boxes around them say."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, is_image_path, load_image
from mm_retriever.images.header import read_header, sniff_format
from tests.support.image_files import box, encoded
from tests.support.memory import peak_growth

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")

RED = (220, 20, 20)
SMALL = ImagePolicy(max_pixels=1_000_000)
START = box(b"ftyp", b"avif\0\0\0\0mif1avifmiaf")


def heic(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(image).save(file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def red() -> bytes:
    return heic(Image.new("RGB", (96, 64), RED))


def test_it_is_read_by_contents_whatever_its_suffix_and_is_upright(red, tmp_path):
    """A phone's photo is turned by its own property or by EXIF; the reader applies both once."""
    assert sniff_format(red) == "HEIC"
    path = tmp_path / "IMG_1.jpg"
    path.write_bytes(red)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (96, 64))
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 8
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = heic(Image.new("RGB", (96, 64), RED), exif=exif.tobytes())
    assert load_image(turned).size == (64, 96)


@pytest.mark.parametrize("suffix", [".heic", ".HEIC", ".heif", ".hif", ".avif"])
def test_its_suffixes_are_those_of_images(suffix):
    assert is_image_path(Path(f"IMG{suffix}"))


@pytest.mark.parametrize(
    ("main", "others", "kind"),
    [
        (b"heic", b"mif1heic", "HEIC"),
        (b"mif1", b"mif1heicmiaf", "HEIC"),
        (b"mif1", b"avifmif1miaf", "AVIF"),
        (b"msf1", b"hevc", "HEIC"),
        (b"mif1", b"", "AVIF"),
        (b"qt  ", b"heic", None),
    ],
)
def test_brands_tell_heic_from_avif_and_from_films(main, others, kind):
    """Source: ISO/IEC 23008-12, annex B; a file that says only "HEIF" names what it is among its other brands."""
    brands = main + b"\0\0\0\0" + others
    assert sniff_format(struct.pack(">L", 8 + len(brands)) + b"ftyp" + brands + b"\0" * 64) == kind


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new)


def test_a_bomb_is_refused_before_it_is_decoded_wherever_its_size_stands():
    """The property says 64x64; the coded image, which is what the decoder allocates, is 1280x1280."""
    large = heic(Image.new("RGB", (1280, 1280)), quality=1)
    policy = ImagePolicy(max_pixels=1_000_000)
    with pytest.raises(ImageLoadError, match="1280x1280 pixels, more than the limit"):
        load_image(large, policy=policy)
    hidden = patched(large, struct.pack(">LL", 1280, 1280), struct.pack(">LL", 64, 64))
    assert read_header(hidden, max_frames=1).size >= (1280, 1280)
    with pytest.raises(ImageLoadError, match="more than the limit"):
        load_image(hidden, policy=policy)


def grid_file(kind: bytes = b"grid", size: tuple[int, int] = (60_000, 60_000)) -> bytes:
    """One item that puts tiles together on a canvas; the size property says 64x64."""
    canvas = b"\0\1\1\1" + struct.pack(">LL", *size)
    start = box(b"ftyp", b"heic\0\0\0\0mif1heic")
    infe = box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), kind, b"\0")
    meta = [
        box(b"iinf", b"\0\0\0\0", struct.pack(">H", 1), infe),
        box(b"iprp", box(b"ipco", box(b"ispe", b"\0\0\0\0", struct.pack(">LL", 64, 64)))),
        box(b"iloc", b"\1\0\0\0", b"\x44\0", struct.pack(">HHHHHLL", 1, 1, 1, 0, 1, 0, len(canvas))),
        box(b"idat", canvas),
    ]
    return start + box(b"meta", b"\0\0\0\0", *meta)


def test_a_canvas_for_tiles_counts_and_overlays_are_not_read():
    """Source: ISO/IEC 23008-12, 6.6.2: such items say their size in their own data."""
    assert read_header(grid_file(), max_frames=1).size == (60_000, 60_000)
    with pytest.raises(ImageLoadError, match="more than the limit"):
        load_image(grid_file())
    with pytest.raises(ImageLoadError, match="overlay"):
        load_image(grid_file(b"iovl"))


def test_broken_boxes_are_refused_and_many_cost_nothing(red):
    for size in (12, 40, 100, 200, 300, len(red) - 20):
        with pytest.raises(ImageLoadError):
            load_image(red[:size])
    with pytest.raises(ImageLoadError, match="boxes that any honest"):
        load_image(red[:28] + b"\0\0\0\x08free" * 2_000_000 + red[28:])


def test_without_the_extra_the_error_says_how_to_install_it(red, tmp_path):
    """In a process of its own that cannot import the reader; such a file is not called damaged."""
    (tmp_path / "IMG.HEIC").write_bytes(red)
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from mm_retriever.images import load_image\n"
        "load_image(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "IMG.HEIC"], capture_output=True, text=True)
    assert 'HEIC needs the extra "heic": pip install "mm-retriever[heic]"' in done.stderr
    assert "damaged" not in done.stderr


class DotsReader(ImageFile.ImageFile):
    """A format of another package: "DOTS", width, height, and so many bytes of grey."""

    format = "DOTS"

    def _open(self):
        header = self.fp.read(6)
        self._size, self._mode = (header[4], header[5]), "L"
        self.tile = [("raw", (0, 0, *self._size), 6, ("L", 0, 1))]


def test_a_format_that_another_package_registers_with_pillow_is_read_under_the_same_limits(monkeypatch, tmp_path):
    """As pillow-jxl-plugin does. Pillow's own readers beyond our list stay unused."""
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION})
    data = b"DOTS\x04\x03" + bytes(12)
    with pytest.raises(ImageLoadError, match="not an image in a supported format"):
        load_image(data)
    Image.register_open("DOTS", DotsReader, lambda start: start.startswith(b"DOTS"))
    Image.register_extension("DOTS", ".dots")
    assert is_image_path("a.dots")
    assert load_image(data).size == (4, 3)
    with pytest.raises(ImageLoadError, match="more than the limit"):
        load_image(data, policy=ImagePolicy(max_pixels=11))
    Image.init()
    assert not is_image_path("a.tga")
    with pytest.raises(ImageLoadError, match="not an image in a supported format"):
        load_image(b"\x0a\x05\x01\x08" + bytes(200))  # PCX


# ------------------------------------------------------------------------------------------ AVIF


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@needs_avif
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("size", [(1, 1), (29, 17), (2_000, 33)])
def test_the_size_that_is_read_is_the_size_that_is_decoded(size, subsampling, mode):
    """Truth: the image that was written."""
    data = encoded(noise(*size, mode), "AVIF", subsampling=subsampling, speed=10)
    assert read_header(data, max_frames=1).size == size == load_image(data).size


@needs_avif
def test_the_size_of_an_animation_is_that_of_its_first_frame():
    """Truth: the image that was written; each frame has a header that may say another size, and here none does."""
    frames = [noise(40, 30).rotate(angle) for angle in (0, 90, 180)]
    data = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert data[8:12] == b"avis"
    assert read_header(data, max_frames=9).size == (40, 30)


@needs_avif
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


@needs_avif
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


@needs_avif
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


@needs_avif
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


@needs_avif
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
