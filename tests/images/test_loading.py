"""Every kind of pixel becomes the right 8-bit RGB, checked against numbers worked out here and not by Pillow."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import (
    IMAGE_SUFFIXES,
    ImagePolicy,
    encode_thumbnail,
    is_image_path,
    load_image,
    opened_image,
    pixel_digest,
    thumbnail_data_uri,
)
from mm_retriever.images.memory import BUDGET
from tests.support.image_files import chunk, encoded
from tests.support.memory import peak_growth

RNG = np.random.default_rng(7)
PHOTO = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # rows, columns, RGB: odd and distinct


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *extra: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = b"".join(chunk(*one) for one in extra)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, data: bytes, *, order: str = "<", **more: int) -> bytes:
    """A greyscale TIFF in one uncompressed strip; `more`: photometric, orientation."""
    shorts = {258: bits, 259: 1, 262: more.get("photometric", 1), 274: more.get("orientation", 1), 277: 1}
    longs = {256: width, 257: height, 273: 8 + 2 + 12 * 9 + 4, 278: height, 279: len(data)}
    entries = shorts | longs
    longs[273] = 8 + 2 + 12 * len(entries) + 4
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(entries))
    for tag in sorted(entries):
        value = struct.pack(order + "HH", shorts[tag], 0) if tag in shorts else struct.pack(order + "L", longs[tag])
        out += struct.pack(order + "HHL", tag, 3 if tag in shorts else 4, 1) + value
    return out + struct.pack(order + "L", 0) + data


def pixels(data: bytes | Image.Image, **options: bool) -> list[list[int]]:
    """The pixels in reading order, one list of channels each."""
    image = load_image(data, **options)
    return np.asarray(image).reshape(image.width * image.height, -1).tolist()


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


def over_white(value: int, alpha: int) -> int:
    return round((value * alpha + 255 * (255 - alpha)) / 255)


# ---------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_of_a_lossless_format_comes_out_as_it_went_in(kind: str) -> None:
    """Truth: the array that was written."""
    image = load_image(encoded(Image.fromarray(PHOTO), kind))
    assert image.mode == "RGB"
    assert image.size == (7, 5)
    assert np.array_equal(np.asarray(image), PHOTO)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_lossy_formats_come_out_close_to_what_went_in(kind: str) -> None:
    """Truth: a smooth ramp, which every codec keeps within a few levels."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    ramp = np.repeat(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    image = load_image(encoded(Image.fromarray(ramp), kind, quality=95))
    assert (image.mode, image.size) == ("RGB", (48, 32))
    assert np.abs(np.asarray(image).astype(int) - ramp).max() <= 8


def test_one_bit_becomes_black_and_white() -> None:
    """Truth: the bits written, most significant first (PNG 7.2)."""
    assert pixels(png(8, 1, 1, 0, [b"\xb0"])) == grey(255, 0, 255, 255, 0, 0, 0, 0)


def test_two_and_four_bits_are_spread_over_the_whole_range() -> None:
    """Truth: PNG 13.12, sample * 255 / (2^depth - 1)."""
    assert pixels(png(4, 1, 2, 0, [b"\x1b"])) == grey(0, 85, 170, 255)
    assert pixels(png(4, 1, 4, 0, [b"\x05\xaf"])) == grey(0, 85, 170, 255)


def test_a_palette_is_looked_up() -> None:
    """Truth: the palette written."""
    palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    assert pixels(png(3, 1, 8, 3, [b"\2\0\1"], palette)) == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_scaled_not_clipped(order: str) -> None:
    """Truth: value * 255 / 65535, rounded."""
    values = [0, 128, 129, 257, 0x1234, 32768, 65407, 65535]
    expected = grey(*(round(value * 255 / 65535) for value in values))
    assert pixels(tiff(8, 1, 16, struct.pack(order + "8H", *values), order=order)) == expected
    assert pixels(png(8, 1, 16, 0, [struct.pack(">8H", *values)])) == expected
    assert pixels(Image.fromarray(np.array([values], np.int32))) == expected
    assert pixels(b"P5 8 1 65535\n" + struct.pack(">8H", *values)) == expected


def test_sixteen_bits_with_zero_as_white_are_turned_over() -> None:
    """Truth: TIFF 6.0, PhotometricInterpretation 0 is WhiteIsZero."""
    data = struct.pack("<3H", 0, 257, 65535)
    assert pixels(tiff(3, 1, 16, data, photometric=0)) == grey(255, 254, 0)
    assert pixels(tiff(3, 1, 8, b"\x00\x01\xff", photometric=0)) == grey(255, 254, 0)


def test_twelve_bits_reach_white() -> None:
    """Truth: value * 255 / 4095, rounded; two samples in three bytes."""
    assert pixels(tiff(4, 1, 12, bytes.fromhex("000 800 fff 123".replace(" ", "")))) == grey(0, 128, 255, 18)


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    """Truth: the high bytes of the samples written."""
    row = struct.pack(">6H", 0x0000, 0x12FF, 0xFFFF, 0x8000, 0x7FFF, 0x0100)
    assert pixels(png(2, 1, 16, 2, [row])) == [[0, 0x12, 255], [0x80, 0x7F, 1]]


def test_floats_in_0_1_and_0_255_keep_their_meaning_and_others_are_stretched() -> None:
    """Truth: our rule; NaN and infinities count as 0."""
    for values, expected in [
        ([0.0, 0.25, 1.0], grey(0, 64, 255)),
        ([0.0, 100.4, 255.0], grey(0, 100, 255)),
        ([-1.0, 0.0, 1.0], grey(0, 128, 255)),
        ([0.0, 500.0, 1000.0], grey(0, 128, 255)),
        ([float("nan"), float("inf"), 0.5], grey(0, 0, 128)),
    ]:
        assert pixels(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")) == expected


def test_thirty_two_bit_integers_are_stretched() -> None:
    """Truth: our rule: darkest to lightest when the values leave 0..65535."""
    assert pixels(Image.fromarray(np.array([[-(2**30), 0, 2**30]], np.int32))) == grey(0, 128, 255)


def test_cmyk_becomes_rgb_as_pillow_does_without_a_profile() -> None:
    """Truth: 255 - min(255, ink + black) up to rounding; Pillow multiplies, so the corners are compared."""
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8)
    image = Image.frombytes("CMYK", (5, 1), inks.tobytes())
    expected = [[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    assert pixels(encoded(image, "TIFF")) == expected
    assert pixels(image) == expected


def test_an_adobe_cmyk_jpeg_is_not_inverted() -> None:
    """Truth: white paper stays white; Adobe writes CMYK inverted and Pillow's own writer does as Adobe."""
    data = encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in data[:64]
    assert pixels(data)[0] == [255, 255, 255]


def test_lab_and_ycbcr_become_rgb() -> None:
    """Truth: white and black of both spaces."""
    lab = ImageCms.applyTransform(
        Image.fromarray(np.array([[[255] * 3, [0] * 3]], np.uint8)),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert np.allclose(pixels(encoded(lab, "TIFF")), grey(255, 0), atol=2)
    assert pixels(Image.frombytes("YCbCr", (2, 1), bytes([255, 128, 128, 0, 128, 128]))) == grey(255, 0)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]


@pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16L", "I;16B", "I;16N"])
def test_every_mode_of_pillow_is_taken(mode: str) -> None:
    """Truth: Pillow's list of modes."""
    image = load_image(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


# ---------------------------------------------------------------------------------------------- transparency


def test_alpha_is_laid_over_white() -> None:
    """Truth: value * alpha + 255 * (1 - alpha), rounded."""
    samples = [(200, 100, 0, 255), (200, 100, 0, 128), (200, 100, 0, 0), (0, 0, 0, 1)]
    expected = [[over_white(value, sample[3]) for value in sample[:3]] for sample in samples]
    data = b"".join(bytes(sample) for sample in samples)
    assert pixels(png(4, 1, 8, 6, [data])) == expected
    assert pixels(Image.frombytes("RGBA", (4, 1), data)) == expected
    assert pixels(encoded(Image.frombytes("RGBA", (4, 1), data), "TIFF")) == expected


def test_grey_with_alpha_is_laid_over_white() -> None:
    """Truth: as for colour."""
    expected = grey(*(over_white(100, alpha) for alpha in (255, 128, 0)))
    assert pixels(png(3, 1, 8, 4, [bytes([100, 255, 100, 128, 100, 0])])) == expected
    assert pixels(png(3, 1, 8, 4, [bytes([100, 255, 100, 128, 100, 0])]), keep_mode=True) == expected


def test_a_palette_with_transparency_is_laid_over_white() -> None:
    """Truth: alpha of palette entries from the tRNS chunk; missing ones are opaque (PNG 11.3.2.1)."""
    palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    data = png(3, 1, 8, 3, [b"\0\1\2"], palette, (b"tRNS", bytes([0, 128])))
    assert pixels(data) == [[255] * 3, [over_white(value, 128) for value in (40, 50, 60)], [70, 80, 90]]


@pytest.mark.parametrize(
    ("depth", "row", "key", "expected"),
    [
        (1, b"\xa0", 0, [255, 14, 255, 14]),  # white on nothing: on the dark that browsers put behind an image
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (4, b"\x05\xaf", 5, [0, 255, 170, 255]),
        (8, bytes([5, 0, 5, 200]), 5, [255, 0, 255, 200]),
        (16, struct.pack(">4H", 0, 257, 0x8000, 0x0101), 257, [0, 255, 128, 255]),
    ],
)
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(
    depth: int, row: bytes, key: int, expected: list[int]
) -> None:
    """Truth: PNG 11.3.2.1: the key is in the depth of the file, which Pillow forgets at 2 and 4 bits."""
    assert pixels(png(4, 1, depth, 0, [row], (b"tRNS", struct.pack(">H", key)))) == grey(*expected)


def test_the_transparent_colour_of_a_png_is_white() -> None:
    """Truth: as for grey; at 16 bits Pillow compares the wrong byte."""
    key = (b"tRNS", struct.pack(">3H", 1, 2, 3))
    assert pixels(png(2, 1, 8, 2, [bytes([1, 2, 3, 1, 2, 4])], key)) == [[255] * 3, [1, 2, 4]]
    wide = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1134, 0x5678, 0x9ABC)
    key = (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    assert pixels(png(2, 1, 16, 2, [wide], key)) == [[255] * 3, [0x11, 0x56, 0x9A]]


def test_a_transparent_gif_is_laid_over_white() -> None:
    """Truth: the transparent index written."""
    image = Image.frombytes("P", (2, 1), b"\0\1")
    image.putpalette([9, 9, 9, 200, 0, 0])
    assert pixels(encoded(image, "GIF", transparency=0)) == [[255] * 3, [200, 0, 0]]


# ---------------------------------------------------------------------------------------------- orientation, frames


def upright(orientation: int) -> np.ndarray:
    """What a viewer shows of PHOTO with this EXIF orientation: the tag says where row 0 and column 0 are."""
    turned = {
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: PHOTO.transpose(1, 0, 2)[:, ::-1],
        7: PHOTO.transpose(1, 0, 2)[::-1, ::-1],
        8: PHOTO.transpose(1, 0, 2)[::-1],
    }
    return turned[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    """Truth: EXIF 2.3, tag 0x0112, worked out with array flips."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo, tolerance = PHOTO, 0
    options: dict[str, object] = {"exif": exif}
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    if kind == "JPEG":  # blocks of one colour survive its losses
        photo, tolerance = PHOTO.repeat(8, axis=0).repeat(8, axis=1), 6
        options |= {"quality": 100, "subsampling": 0}
    image = load_image(encoded(Image.fromarray(photo), kind, **options))
    shown = np.asarray(image).astype(int)
    if kind == "JPEG":
        shown = shown[4::8, 4::8]
    assert np.abs(shown - upright(orientation)).max() <= tolerance


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_in_xmp_alone_is_honoured(orientation: int) -> None:
    """Truth: XMP tiff:Orientation has the values of EXIF's."""
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + packet.encode()
    rows = [PHOTO[row].tobytes() for row in range(5)]
    assert np.array_equal(np.asarray(load_image(png(7, 5, 8, 2, rows, (b"iTXt", text)))), upright(orientation))


def test_loading_twice_turns_once() -> None:
    """Truth: what comes out is upright and says nothing about its orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    once = load_image(encoded(Image.fromarray(PHOTO), "PNG", exif=exif))
    assert not once.info
    assert load_image(once) is once
    assert load_image(encoded(once, "PNG", exif=once.getexif())).size == once.size == (5, 7)


@pytest.mark.parametrize("orientation", [0, 9, 77, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    """Truth: our choice; viewers do the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(load_image(encoded(Image.fromarray(PHOTO), "PNG", exif=exif))), PHOTO)


def test_broken_exif_is_no_reason_to_refuse_pixels() -> None:
    """Truth: our choice."""
    rows = [PHOTO[row].tobytes() for row in range(5)]
    for exif in (b"", b"Exif\0\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", bytes(2**20 + 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(np.asarray(load_image(png(7, 5, 8, 2, rows, (b"eXIf", exif)))), PHOTO)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    """Truth: three frames of one colour each, red first."""
    red, green, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(red, kind, save_all=True, append_images=[green, blue], **options)
    assert pixels(data) == [[255, 0, 0]] * 24


def test_a_multi_image_jpeg_gives_its_first_image() -> None:
    """Truth: the first of two images in an MPO file."""
    first, second = Image.new("RGB", (32, 32), "white"), Image.new("RGB", (16, 16), "black")
    image = load_image(encoded(first, "MPO", save_all=True, append_images=[second]))
    assert image.size == (32, 32)
    assert image.getpixel((5, 5)) == (255, 255, 255)


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")])
def test_keep_mode_leaves_grey_and_cmyk_as_the_file_has_them(mode: str, kind: str) -> None:
    """Truth: Pillow's own reading of the same file, which the original preprocessing starts from."""
    data = encoded(Image.fromarray(PHOTO).convert(mode), kind)
    image = load_image(data, keep_mode=True)
    assert image.mode == mode
    with Image.open(io.BytesIO(data)) as plain:
        assert image.tobytes() == plain.tobytes()


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "LA", "RGBA", "F", "YCbCr"])
def test_keep_mode_converts_everything_else(mode: str) -> None:
    """Truth: the contract of keep_mode."""
    assert load_image(Image.new(mode, (3, 2)), keep_mode=True).mode in ("RGB", "L")


@pytest.mark.parametrize(
    ("least_side", "size"), [(0, (800, 600)), (301, (800, 600)), (300, (400, 300)), (70, (100, 75))]
)
def test_a_jpeg_may_come_smaller_down_to_a_least_side(least_side: int, size: tuple[int, int]) -> None:
    """libjpeg's own sizes: a half, a quarter, an eighth. A PNG has one size only."""
    gradient = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
    with opened_image(encoded(gradient, "JPEG"), least_side=least_side) as image:
        assert image.size == size
        expected = np.asarray(gradient.resize(size), dtype=int)
        assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 3
    with opened_image(encoded(gradient, "PNG"), least_side=least_side) as image:
        assert image.size == (800, 600)


def test_the_callers_image_stays_as_it_was() -> None:
    """Truth: our promise; the caller goes on using its object."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encoded(Image.fromarray(PHOTO), "PNG", exif=exif))) as lazy:
        loaded = load_image(lazy)
        assert loaded.size == (5, 7)
        assert (lazy.size, lazy.mode) == ((7, 5), "RGB")
        assert lazy.getexif()[0x0112] == 6


def test_a_digest_follows_pixels_and_nothing_else() -> None:
    """Truth: SHA-256 of mode, size and pixels, computed here."""
    image = load_image(encoded(Image.fromarray(PHOTO), "PNG"))
    assert pixel_digest(image) == hashlib.sha256(b"RGB 7 5\0" + PHOTO.tobytes()).hexdigest()
    assert pixel_digest(load_image(encoded(Image.fromarray(PHOTO), "BMP"))) == pixel_digest(image)
    assert pixel_digest(image.transpose(Image.Transpose.TRANSPOSE)) != pixel_digest(image)
    assert pixel_digest(Image.new("L", (3, 4))) != pixel_digest(Image.new("L", (4, 3)))
    red, blue = (Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert pixel_digest(red) != pixel_digest(blue)


def test_a_thumbnail_is_small_and_keeps_its_shape() -> None:
    """Truth: sides worked out here."""
    with Image.open(io.BytesIO(encode_thumbnail(Image.new("RGB", (1000, 500), "teal"), 128))) as small:
        assert (small.format, small.size) == ("JPEG", (128, 64))
    with Image.open(io.BytesIO(encode_thumbnail(Image.new("RGBA", (20, 10)), 128))) as small:
        assert small.size == (20, 10)
        assert small.getpixel((3, 3)) == (255, 255, 255)
    with Image.open(io.BytesIO(encode_thumbnail(Image.new("RGB", (9000, 1)), 128))) as small:
        assert small.size == (128, 1)


def test_a_thumbnail_uri_can_be_loaded_again() -> None:
    """Truth: the round trip."""
    uri = thumbnail_data_uri(Image.new("RGB", (64, 48), (200, 30, 40)))
    assert uri.startswith("data:image/jpeg;base64,")
    assert np.allclose(pixels(uri)[0], (200, 30, 40), atol=4)


def test_image_paths_are_told_by_suffix() -> None:
    """Truth: the list of suffixes."""
    assert all(is_image_path(f"folder/PICTURE{suffix.upper()}") for suffix in IMAGE_SUFFIXES)
    assert is_image_path(Path("a.b.jpeg"))
    assert not any(is_image_path(name) for name in ("a.txt", "jpg", ".jpg", "a.jpg.txt", "a", "", "a.psd", "a.svg"))


# ---------------------------------------------------------------------------------------------- refusals


def refusal(source: object, **limits: int) -> str:
    with pytest.raises(ImageLoadError) as caught:
        load_image(source, policy=ImagePolicy(**limits))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("cannot load ")
    assert message.endswith(f": {caught.value.reason}")
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_a_refusal_names_the_file_and_the_reason(tmp_path: Path) -> None:
    """Truth: the contract of ImageLoadError."""
    good = encoded(Image.fromarray(PHOTO.repeat(40, 0).repeat(40, 1)), "JPEG")
    for name, data, reason in [
        ("empty.jpg", b"", "zero bytes"),
        ("half.jpg", good[: len(good) // 2], "truncated"),
        ("text.jpg", b"no image at all", "not an image in a supported format"),
        ("page.jpg", b"  <!DOCTYPE html><html></html>", "HTML"),
        ("drawing.jpg", b'<?xml version="1.0"?><svg/>', "SVG"),
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "no meta box"),
        ("paper.jpg", b"%PDF-1.4", "PDF"),
        ("print.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "not an image in a supported format"),
        ("layers.psd", b"8BPS\0\1" + bytes(40), "not an image in a supported format"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        message = refusal(path)
        assert repr(str(path)) in message
        assert reason in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, part: float) -> None:
    """Truth: no part of a file is the image. A nearly whole JPEG is another matter: tests/images/test_pixels.py."""
    part = min(part, 0.8) if kind == "JPEG" else part
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.fromarray(PHOTO.repeat(20, 0).repeat(20, 1)), kind)
    refusal(data[: int(len(data) * part)])


def bombs(side: int) -> dict[str, bytes]:
    """Headers that promise side x side pixels, in a few hundred bytes."""
    webp = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)
    bits = struct.pack("<I", (min(side, 16384) - 1) | (min(side, 16384) - 1) << 14)
    jpeg = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", min(side, 65500), min(side, 65500))
    gif = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    gif[6:10] = struct.pack("<HH", min(side, 65535), min(side, 65535))
    inner = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    at = inner.rindex(b"\x2c\0\0\0\0\x10\0\x10\0")
    inner[at + 5 : at + 9] = struct.pack("<HH", min(side, 65535), min(side, 65535))
    bmp = bytearray(encoded(Image.new("RGB", (16, 16)), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    return {
        "PNG": png(side, side, 8, 0, [b"\0"]),
        "WEBP": webp[:21] + bits + webp[25:],
        "JPEG": bytes(jpeg),
        "GIF": bytes(gif),
        "a frame of a GIF": bytes(inner),
        "BMP": bytes(bmp),
        "TIFF": tiff(side, side, 8, b"\0"),
        "PPM": b"P6 %d %d 255\n" % (side, side),
    }


@pytest.mark.parametrize("side", [9_600, 12_000, 16_384, 19_000])
@pytest.mark.parametrize("kind", list(bombs(100)))
def test_a_decompression_bomb_is_refused_from_its_header(
    kind: str, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    """Truth: 92, 144, 268 and 361 megapixels: above our limit, below, between and above Pillow's two.

    A JPEG can be decoded to half its sides: it may have four times the limit.
    """
    if kind == "JPEG" and side < 19_000:
        assert side > 9_600 or load_image(bombs(side)[kind]).size == (4_800, 4_800)
        return
    assert "more than the limit of 89478485" in refusal(bombs(side)[kind])
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]


def test_the_limits_are_the_callers_to_set() -> None:
    """Truth: the policy."""
    data = encoded(Image.new("RGB", (40, 30)), "PNG")
    assert "max_pixels" in refusal(data, max_pixels=1199)
    assert load_image(data, policy=ImagePolicy(max_pixels=1200)).size == (40, 30)
    assert "max_pixels" in refusal(Image.new("RGB", (40, 30)), max_pixels=1199)
    assert "max_bytes" in refusal(data, max_bytes=len(data) - 1)
    assert load_image(data, policy=ImagePolicy(max_bytes=len(data))).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_more_frames_than_the_limit_are_refused(kind: str) -> None:
    """Truth: five frames written."""
    frames = [Image.fromarray(np.roll(PHOTO, turn, axis=0)) for turn in range(5)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "frames" in refusal(data, max_frames=4)
    assert load_image(data, policy=ImagePolicy(max_frames=5)).size == (7, 5)


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_extreme_shapes_within_the_limit_are_fine(kind: str, size: tuple[int, int]) -> None:
    """Truth: the size written."""
    assert load_image(encoded(Image.new("RGB", size, "white"), kind)).size == size


def test_an_image_without_pixels_is_refused() -> None:
    """Truth: our choice: every model needs a pixel."""
    assert "no pixels (0x5)" in refusal(Image.new("RGB", (0, 5)))
    assert "no pixels" in refusal(png(0, 5, 8, 0, [b""]))


@pytest.mark.parametrize(
    "wrong", [{"max_pixels": 0}, {"max_bytes": -1}, {"max_frames": 0}, {"url_timeout": 0}, {"max_redirects": -1}]
)
def test_a_policy_without_sense_is_refused(wrong: dict[str, int]) -> None:
    """Truth: our choice; the message names the argument."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImagePolicy(**wrong)


def test_messages_stay_short_whatever_is_given() -> None:
    """Truth: megabytes of base64 must not end up in a log."""
    text = base64.b64encode(encoded(Image.fromarray(PHOTO), "PNG")[:50] + bytes(3_000_000)).decode()
    assert len(refusal(text)) < 400
    assert len(refusal("data:image/png;base64," + text)) < 400
    assert len(refusal("x" * 3_000_000)) < 400


def test_progressive_jpegs_in_many_threads_stay_within_the_budget():
    """Truth: a decoder keeps two bytes of each sample until the last scan (ITU-T T.81, G.1), beside the result."""
    data = encoded(Image.new("CMYK", (5500, 5500), (10, 60, 90, 20)), "JPEG", progressive=True)

    def decoded(_: int) -> tuple[int, int]:
        with opened_image(data) as image:
            return image.size

    with peak_growth() as mib, ThreadPoolExecutor(6) as threads:
        assert set(threads.map(decoded, range(6))) == {(5500, 5500)}
    assert mib() * 2**20 < BUDGET
