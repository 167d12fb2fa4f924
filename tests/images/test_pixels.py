"""What a person sees in a browser is what the model gets: profiles, depth, transparency, chunks, truncation, size."""

from __future__ import annotations

import io
import random
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mm_retriever.demo.catalogue import draw_product
from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, file_size, load_image, opened_image
from mm_retriever.images.memory import MemoryBudget
from mm_retriever.images.pixels import _made_profile
from mm_retriever.ingest.reading import read_image
from tests.support.image_files import encoded, with_chunks
from tests.support.processes import python

MUG = draw_product("mug", "plain", "red", seed=0).convert("RGB").resize((96, 80))
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
WIDE = {  # white, red, green, blue and the exponent, as their standards have them
    "Display P3": ((0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), 2.2),
    "Adobe RGB": ((0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 563 / 256),
    "ProPhoto": ((0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001), 1.8),
}


def profile(primaries: tuple[float, ...] = SRGB, gamma: float = 2.2, mode: str = "RGB") -> bytes:
    made = _made_profile(mode, (0, gamma), primaries)
    assert made is not None
    return made


def linear(pixels: np.ndarray) -> np.ndarray:
    """Source: IEC 61966-2-1."""
    value = pixels / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def matrix(primaries: tuple[float, ...]) -> np.ndarray:
    """RGB to XYZ. Source: the definition of chromaticities, as in Lindbloom, RGB/XYZ matrices."""
    white, *colours = [np.array([x, y, 1 - x - y]) / y for x, y in np.reshape(primaries, (4, 2))]
    columns = np.stack(colours, axis=1)
    return columns * np.linalg.solve(columns, white)


def in_space(image: Image.Image, primaries: tuple[float, ...], gamma: float) -> Image.Image:
    """The same colours as samples of another space, worked out without LittleCMS; only for a white of D65."""
    light = linear(np.asarray(image, float)) @ (np.linalg.inv(matrix(primaries)) @ matrix(SRGB)).T
    return Image.fromarray((np.clip(light, 0, 1) ** (1 / gamma) * 255).round().astype(np.uint8))


def error(found: Image.Image, expected: Image.Image) -> int:
    return int(np.abs(np.asarray(found, int) - np.asarray(expected, int)).max())


# ---------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("space", ["Display P3", "Adobe RGB"])
def test_a_wide_profile_is_applied_in_every_format(space: str, kind: str) -> None:
    """Truth: colours converted by the matrices and curves of their standards."""
    stored = in_space(MUG, *WIDE[space])
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    found = load_image(encoded(stored, kind, icc_profile=profile(*WIDE[space]), **options))
    assert error(stored, MUG) > 15
    assert error(found, MUG) <= (8 if kind == "JPEG" else 3)
    assert not found.info


def test_a_pil_image_and_its_file_are_one_image() -> None:
    """Truth: the same pixels, however the image comes."""
    data = encoded(in_space(MUG, *WIDE["Adobe RGB"]), icc_profile=profile(*WIDE["Adobe RGB"]))
    with Image.open(io.BytesIO(data)) as image:
        assert error(load_image(image), load_image(data)) == 0


def test_profiles_of_srgb_change_no_bit() -> None:
    """Our promise: an image in sRGB is the same with its profile as without."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "TIFF", "JPEG"):
        assert error(load_image(encoded(MUG, kind, icc_profile=made)), load_image(encoded(MUG, kind))) == 0
    grey = load_image(encoded(MUG.convert("L"), icc_profile=made), keep_mode=True)  # of other channels: passed over
    assert (grey.mode, error(grey, MUG.convert("L"))) == ("L", 0)


def test_a_grey_profile_is_applied() -> None:
    """Truth: gamma 1.0, which is light itself, as sRGB samples."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    found = np.asarray(load_image(encoded(ramp, icc_profile=profile(gamma=1.0, mode="L"))))[0, :, 0]
    light = np.arange(256) / 255
    expected = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(found - expected).max() <= 2
    assert load_image(encoded(ramp), keep_mode=True).mode == "L"


def test_transparency_and_palettes_go_through_the_profile_too() -> None:
    """Truth: the opaque image."""
    stored, icc = in_space(MUG, *WIDE["Adobe RGB"]), profile(*WIDE["Adobe RGB"])
    expected = load_image(encoded(stored, icc_profile=icc))
    clear = stored.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    found = load_image(encoded(clear, icc_profile=icc))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert error(found.crop((1, 1, 96, 80)), expected.crop((1, 1, 96, 80))) == 0
    few = stored.quantize(16)
    assert (
        error(load_image(encoded(few, icc_profile=icc)), load_image(encoded(few.convert("RGB"), icc_profile=icc))) == 0
    )


@pytest.mark.parametrize(
    "broken", [b"x", b"\0" * 128, b"\0" * 5_000_000, profile()[:200], profile(mode="L"), profile()[:36] + b"none" * 99]
)
def test_a_profile_that_cannot_be_used_is_passed_over(broken: bytes) -> None:
    """Truth: the image without it, as browsers show it."""
    assert error(load_image(encoded(MUG, "TIFF", icc_profile=broken)), MUG) == 0


def test_mutated_profiles_give_an_image() -> None:
    """Truth: a profile is no reason to refuse, to crash or to wait."""
    chance = random.Random(5)
    good = profile(*WIDE["ProPhoto"])
    small = Image.new("RGB", (2, 2), "teal")
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 12)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        assert load_image(encoded(small, icc_profile=bytes(bad))).size == (2, 2)


def test_the_gamma_and_the_primaries_of_a_png_count_as_browsers_count_them() -> None:
    """Truth: W3C PNG 11.3.2; colours converted by matrices. Values of sRGB change no bit, nor do any beside sRGB."""
    primaries, _ = WIDE["Display P3"]
    wide = struct.pack(">8I", *(round(value * 100_000) for value in primaries))
    usual = struct.pack(">8I", *(round(value * 100_000) for value in SRGB))
    stored = encoded(in_space(MUG, primaries, 1.8))
    assert error(load_image(with_chunks(stored, (b"gAMA", struct.pack(">I", 55_556)), (b"cHRM", wide))), MUG) <= 3
    plain = encoded(MUG)
    for chunks in (
        [(b"gAMA", struct.pack(">I", 45_455)), (b"cHRM", usual)],
        [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))],
        [(b"gAMA", struct.pack(">I", 0))],
        [(b"cHRM", bytes(32))],
    ):
        assert error(load_image(with_chunks(plain, *chunks)), MUG) == 0


# ---------------------------------------------------------------------------------------------- chunks


BIG = zlib.compress(b" " * 3_000_000)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Comment\0\0" + BIG),
        (b"iTXt", b"Comment\0\1\0\0\0" + BIG),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG),
        (b"zTXt", b"Comment\0\7none"),
        (b"iCCP", b"name\0\0" + BIG),
        (b"iCCP", b"name\0\5" + BIG),
        (b"iCCP", b"name\0\0no zlib"),
        (b"tEXt", b"Comment\0" + b"x" * 2_000_000),
        (b"eXIf", b"no exif"),
    ],
)
def test_no_text_or_profile_chunk_is_a_reason_to_refuse_a_png(chunk: tuple[bytes, bytes]) -> None:
    """Truth: the image without the chunk; ancillary chunks may be passed over (W3C PNG 5.4)."""
    assert error(load_image(with_chunks(encoded(MUG), chunk)), MUG) == 0


def test_broken_checksums_of_what_no_image_is_made_of_are_passed_over() -> None:
    """Truth: as above."""
    data = with_chunks(encoded(MUG), (b"tIME", b"\7\xe8\1\1\0\0\0"), (b"tEXt", b"a\0b"), (b"gAMA", b"\0\0\xb1\x8f"))
    for kind in (b"tIME", b"tEXt", b"gAMA"):
        at = data.index(kind)
        length = int.from_bytes(data[at - 4 : at], "big")
        data = data[: at + 4 + length] + b"\0\0\0\0" + data[at + 8 + length :]
    assert error(load_image(data), MUG) == 0


def test_a_large_profile_of_a_png_is_applied() -> None:
    """Truth: a profile of 2 MB, more than Pillow unpacks."""
    primaries, gamma = WIDE["Adobe RGB"]
    icc = profile(primaries, gamma).ljust(2 * 2**20, b"\0")
    icc = struct.pack(">I", len(icc)) + icc[4:]
    stored = encoded(in_space(MUG, primaries, gamma))
    assert error(load_image(with_chunks(stored, (b"iCCP", b"wide\0\0" + zlib.compress(icc)))), MUG) <= 3


# ---------------------------------------------------------------------------------------------- depth, transparency


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 13])
def test_few_bits_in_sixteen_reach_white(kind: str, bits: int) -> None:
    """Truth: value * 255 / (2^bits - 1): what wrote the file had so many bits."""
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16)[None].repeat(2, 0)
    found = np.asarray(load_image(encoded(Image.fromarray(values), kind)))[..., 0]
    assert np.abs(found - values * 255.0 / (2**bits - 1)).max() <= 0.51


def test_a_narrow_band_of_sixteen_bits_is_spread_and_noise_is_not() -> None:
    """Truth: our rule, for scanners and microscopes; a plain surface stays plain."""
    band = np.linspace(30_000, 33_000, 64).astype(np.uint16)[None]
    noise = (30_000 + np.arange(64) % 30).astype(np.uint16)[None]
    assert load_image(Image.fromarray(band)).getextrema()[0] == (0, 255)
    low, high = load_image(Image.fromarray(noise)).getextrema()[0]
    assert high - low <= 1
    assert np.asarray(load_image(Image.fromarray(np.zeros((2, 2), np.uint16)))).max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_white_on_transparent_can_be_seen(mode: str) -> None:
    """Truth: browsers put near-black behind an image that is opened alone."""
    logo = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
    logo.paste((255, 255, 255, 255), (10, 10, 30, 20))
    image = logo.convert("LA") if mode == "LA" else logo.quantize(4) if mode == "P" else logo
    found = load_image(encoded(image))
    assert (found.getpixel((0, 0)), found.getpixel((20, 15))) == ((14, 14, 14), (255, 255, 255))


def test_other_transparency_stays_on_white() -> None:
    """Truth: value * alpha + 255 * (1 - alpha); one dark pixel is something to see, and nothing at all stays white."""
    logo = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
    assert load_image(encoded(logo)).getextrema() == ((255, 255),) * 3
    logo.paste((255, 255, 255, 255), (10, 10, 30, 20))
    logo.putpixel((15, 15), (200, 0, 0, 255))
    found = load_image(encoded(logo))
    assert (found.getpixel((0, 0)), found.getpixel((15, 15))) == ((255, 255, 255), (200, 0, 0))


def bmp(alpha: list[int], bits_of_alpha: int = 0xFF000000) -> bytes:
    pixels = b"".join(bytes((200, 30, 10, value)) for value in alpha)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, bits_of_alpha)
    head = struct.pack("<IiiHHIIiiII", 124, len(alpha), 1, 1, 32, 3, len(pixels), 2835, 2835, 0, 0) + masks + b"BGRs"
    return b"BM" + struct.pack("<IHHI", 138 + len(pixels), 0, 0, 138) + head.ljust(124, b"\0") + pixels


def test_a_bmp_whose_alpha_is_nowhere_is_opaque() -> None:
    """Truth: browsers show it; one pixel with alpha makes the alpha count."""
    assert np.asarray(load_image(bmp([0, 0, 0]))).tolist() == [[[10, 30, 200]] * 3]
    assert np.asarray(load_image(bmp([0, 255, 0]))).tolist() == [[[255] * 3, [10, 30, 200], [255] * 3]]
    assert np.asarray(load_image(bmp([0, 0, 0], 0))).tolist() == [[[10, 30, 200]] * 3]


# ---------------------------------------------------------------------------------------------- truncation, size


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_lacks_its_last_bytes_is_read(
    progressive: bool, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Truth: the whole image, but for the last blocks; said in the log."""
    image = draw_product("mug", "leopard", "natural", seed=1).convert(mode).resize((320, 256))
    data = encoded(image, "JPEG", progressive=progressive, quality=90)
    whole = load_image(data)
    for lost in (1, 2, 30):
        found = load_image(data[:-lost])
        assert found.size == whole.size
        assert error(found.crop((0, 0, 320, 224)), whole.crop((0, 0, 320, 224))) <= (40 if progressive else 0)
    assert "ends early" in caplog.text


@pytest.mark.parametrize(("progressive", "share"), [(False, 0.3), (False, 0.9), (True, 0.3), (True, 0.6)])
def test_a_jpeg_of_which_more_is_missing_is_refused(progressive: bool, share: float) -> None:
    """Truth: our line: a twentieth of the blocks, or anything but the last pass over the image."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (256, 320, 3), dtype=np.uint8))
    data = encoded(noise, "JPEG", progressive=progressive)
    with pytest.raises(ImageLoadError, match="truncated"):
        load_image(data[: int(len(data) * share)])


def test_a_jpeg_of_up_to_four_times_the_pixels_is_decoded_at_half_its_sides() -> None:
    """Truth: the image shrunk; the size that is reported is the file's, and the orientation holds."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = draw_product("mug", "plain", "red", seed=0).convert("RGB").resize((400, 300))
    data, policy = encoded(image, "JPEG", quality=95, exif=exif), ImagePolicy(max_pixels=40_000)
    found = load_image(data, policy=policy)
    assert found.size == (150, 200)
    whole = load_image(data).resize((150, 200), Image.Resampling.BOX)
    assert np.abs(np.asarray(found, int) - np.asarray(whole, int)).mean() < 3
    assert file_size(data, found) == (300, 400)
    assert read_image(data, "", lambda image: image.size, policy).size == (300, 400)
    for refused in (
        encoded(image, "JPEG", progressive=True),
        encoded(image, "PNG"),
        encoded(image.resize((800, 600)), "JPEG"),
    ):
        with pytest.raises(ImageLoadError, match="more than the limit of 40000"):
            load_image(refused, policy=policy)


# ---------------------------------------------------------------------------------------------- memory


def test_threads_share_a_budget_first_come_first_served() -> None:
    """Truth: the sum of what is held never exceeds the budget; all come through, whoever wants all of it too."""
    budget, held, most, lock = MemoryBudget(10), 0, 0, threading.Lock()

    def work(share: int) -> None:
        nonlocal held, most
        for _ in range(50):
            with budget.hold(share), budget.hold(7):  # the inner one is part of the outer one
                with lock:
                    held += min(share, 10)
                    most = max(most, held)
                with lock:
                    held -= min(share, 10)

    threads = [threading.Thread(target=work, args=(share,)) for share in (1, 3, 4, 10, 99, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert most <= 10


def test_an_image_is_open_for_as_long_as_the_block_runs() -> None:
    """Truth: the contract; a caller's own image stays open."""
    with opened_image(encoded(MUG)) as image:
        assert error(image, MUG) == 0
    with pytest.raises(ValueError, match="closed"):
        image.getpixel((0, 0))
    with opened_image(MUG) as image:
        pass
    assert MUG.getpixel((0, 0)) == image.getpixel((0, 0))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_is_drawn_on_a_loaded_image_leaves_the_callers_as_it_was(mode: str) -> None:
    """Truth: only pixels that were decoded here may be passed on without a copy."""
    own = Image.new(mode, (4, 4), "white")
    own.info["dpi"] = (72, 72)
    with opened_image(own, keep_mode=True) as loaded:
        loaded.paste("black", (0, 0, 4, 4))
    assert own.getextrema() == Image.new(mode, (4, 4), "white").getextrema()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "progressive JPEG"])
def test_reading_bombs_in_many_threads_stays_below_a_gigabyte_and_a_half(tmp_path: Path, kind: str) -> None:
    """Truth: the system's own measure. Four threads read four files of a few kilobytes and 80 megapixels each."""
    side = 6_600 if kind == "WEBP" else 8_900
    options = {"lossless": True} if kind == "WEBP" else {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    options |= {"progressive": True} if kind == "progressive JPEG" else {}
    mode, kind = ("RGB", "JPEG") if kind.endswith("JPEG") else ("RGBA", kind)
    Image.new(mode, (side, side), (200, 30, 30, 128)[: len(mode)]).save(tmp_path / "bomb", kind, **options)
    code = (
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from mm_retriever.images import DEFAULT_POLICY\n"
        "from mm_retriever.ingest.reading import read_image\n"
        "from mm_retriever.embedders.visualized_bge.encoder import crop_square\n"
        "def read(_):\n"
        "    return read_image(sys.argv[1], '', lambda image: crop_square(image, 224), DEFAULT_POLICY).error\n"
        "with ThreadPoolExecutor(4) as pool: assert set(pool.map(read, range(4))) == {''}\n"
        "from tests.support.memory import peak_mib\n"
        "print(peak_mib())\n"
        "print(int(open('/proc/self/statm').read().split()[1]) * 4096 // 2**20)\n"
    )
    printed, _ = python("-c", code, tmp_path / "bomb").communicate(timeout=500)
    peak, kept = map(int, printed.split())
    assert peak < 1_500
    assert kept < 700


# ------------------------------------------------------------------------------------------ CMYK with a profile


INKS = {(0, 0, 0, 0): (255, 128, 128), (0, 255, 0, 0): (120, 200, 120), (255, 0, 0, 0): (140, 90, 90)}
"""Colours that only this press prints, as 8-bit Lab."""


def press() -> bytes:
    """The ICC profile of a printing press: two grid points an ink. Source: ICC.1:2001-04, 6.5.8 (lut8Type)."""
    corners = [tuple(255 * (number >> ink & 1) for ink in (3, 2, 1, 0)) for number in range(16)]
    colours = bytes(value for corner in corners for value in INKS.get(corner, (0, 128, 128)))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = (
        b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + bytes(range(256)) * 4 + colours + bytes(range(256)) * 3
    )
    white = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    header = b"none" + struct.pack(">I", 0x02400000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28) + white
    body = header + bytes(48) + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    return struct.pack(">I", len(body) + 4) + body


def srgb_of_lab(lab: tuple[int, int, int]) -> np.ndarray:
    """Source: CIE 15:2004 (Lab, D50), Bradford to D65, IEC 61966-2-1."""
    f_y = (lab[0] / 255 * 100 + 16) / 116
    f = np.array([f_y + (lab[1] - 128) / 500, f_y, f_y - (lab[2] - 128) / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1.0, 0.8249)
    to_rgb = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(to_rgb @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
@pytest.mark.parametrize("inks", INKS)
def test_the_inks_of_a_press_are_the_colours_that_its_profile_says(kind, inks):
    """Truth: the profile; without it magenta would be pure (255, 0, 255). Adobe writes the inks of a JPEG inverted."""
    data = io.BytesIO()
    Image.new("CMYK", (16, 16), inks).save(
        data, kind, icc_profile=press(), **({"quality": 100} if kind == "JPEG" else {})
    )
    assert np.abs(np.array(load_image(data.getvalue()).getpixel((8, 8))) - srgb_of_lab(INKS[inks])).max() <= 3
