"""HEIC, every iPhone's format: read like any other, bounded before decoding, and named where the extra is missing."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, is_image_path, load_image
from mm_retriever.images.header import read_header, sniff_format
from tests.support.image_files import box

pillow_heif = pytest.importorskip("pillow_heif")
RED = (220, 20, 20)


def heic(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
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
