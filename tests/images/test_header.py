"""Hostile files: each gives an image or an ImageLoadError, soon, and without taking the memory along."""

from __future__ import annotations

import io
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.images.header import FORMATS, MAX_JPEG_SCANS, ImageHeader, read_header, sniff_format
from tests.support.effort import EFFORT
from tests.support.image_files import chunk, encoded, with_chunks
from tests.support.memory import peak_growth

MIB = 2**20


def noise(mode: str = "RGB", size: tuple[int, int] = (29, 17)) -> Image.Image:
    raw = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(raw).convert("RGB").convert(mode)


def corpus() -> dict[str, bytes]:
    """Small honest files of every kind that the readers tell apart."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    rgb, frames = noise(), [noise().rotate(angle) for angle in (90, 180)]
    files = {
        "jpeg": encoded(rgb, "JPEG", exif=exif),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg grey": encoded(noise("L"), "JPEG"),
        "jpeg cmyk": encoded(noise("CMYK"), "JPEG"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=frames),
        "png": encoded(rgb, "PNG", exif=exif),
        "png alpha": encoded(noise("RGBA"), "PNG"),
        "png palette": encoded(noise("P"), "PNG", transparency=3),
        "png 16 bit": encoded(Image.fromarray(np.arange(493, dtype=np.uint16).reshape(17, 29) * 130), "PNG"),
        "png 1 bit": encoded(noise("1"), "PNG"),
        "apng": encoded(rgb, "PNG", save_all=True, append_images=frames),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp lossless": encoded(noise("RGBA"), "WEBP", lossless=True),
        "webp animated": encoded(rgb, "WEBP", save_all=True, append_images=frames),
        "gif": encoded(noise("P"), "GIF"),
        "gif animated": encoded(rgb, "GIF", save_all=True, append_images=frames, transparency=1),
        "bmp": encoded(rgb, "BMP"),
        "bmp palette": encoded(noise("P"), "BMP"),
        "bmp 1 bit": encoded(noise("1"), "BMP"),
        "ppm": encoded(rgb, "PPM"),
        "pgm": encoded(noise("L"), "PPM"),
        "pbm": encoded(noise("1"), "PPM"),
        "pgm 16 bit": b"P5\n29 17\n65535\n" + bytes(29 * 17 * 2),
        "pgm odd": b"P5\n29 17\n300\n" + bytes(29 * 17 * 2),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"):
        mode = "1" if compression == "group4" else "RGB"
        files[f"tiff {compression}"] = encoded(noise(mode), "TIFF", compression=compression, exif=exif)
    files["tiff frames"] = encoded(noise(), "TIFF", save_all=True, append_images=[frame.copy() for frame in frames])
    files["tiff big"] = encoded(noise(), "TIFF", big_tiff=True)
    files["tiff float"] = encoded(Image.fromarray(np.linspace(0, 1, 493, dtype=np.float32).reshape(17, 29)), "TIFF")
    if features.check("avif"):
        files["avif"] = encoded(rgb, "AVIF")
    heic = io.BytesIO()
    pillow_heif.from_pillow(rgb).save(heic)
    files["heic"] = heic.getvalue()
    return files


CORPUS = corpus()
EXTREMES = [b"\0\0", b"\xff\xff", b"\xff\x7f", b"\x7f\xff", b"\0\0\0\0", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\1\0\0\0"]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to six changes: mostly in the header, where they matter."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        reach = len(changed) if chance.random() < 0.35 else min(len(changed), chance.choice((32, 64, 160, 640)))
        at = chance.randrange(max(1, reach))
        what = chance.randrange(7)
        if what == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif what == 1 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << chance.randrange(8)
        elif what == 2:
            extreme = chance.choice(EXTREMES)
            changed[at : at + len(extreme)] = extreme
        elif what == 3:
            del changed[at : at + chance.choice((1, 2, 4, 12, 100))]
        elif what == 4:
            changed[at:at] = chance.randbytes(chance.choice((1, 2, 4, 12)))
        elif what == 5:
            part = changed[at : at + chance.choice((4, 13, 64))]
            changed[at:at] = part * chance.choice((1, 3, 50))
        elif chance.random() < 0.3:
            del changed[chance.randrange(max(1, len(changed))) :]
    return bytes(changed)


def outcome(data: bytes, policy: ImagePolicy) -> str:
    """ "image" or "refused"; anything else raises and fails the test."""
    try:
        image = load_image(data, policy=policy)
    except ImageLoadError as error:
        assert str(error).startswith(f"cannot load <{len(data)} bytes>: ")
        assert len(str(error)) < 700
        assert str(error).isprintable()
        return "refused"
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= policy.max_pixels
    assert len(image.tobytes()) == image.width * image.height * 3
    return "image"


def fuzz(cases: int, seed: int, policy: ImagePolicy, seconds: float) -> Counter[str]:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        name = chance.choice(list(CORPUS))
        data = mutated(CORPUS[name], chance)
        started = time.process_time()
        with warnings.catch_warnings():  # a warning made an error must not escape either
            warnings.simplefilter("error" if case % 4 == 0 else "ignore")
            outcomes[outcome(data, policy)] += 1
        assert time.process_time() - started < seconds, f"case {case} of seed {seed}: {name}"
    return outcomes


def test_the_unharmed_corpus_loads() -> None:
    """Truth: honest files of 29x17 pixels (17x29 where EXIF turns them)."""
    for name, data in CORPUS.items():
        assert sorted(load_image(data).size) == [17, 29], name
    assert {sniff_format(data) for data in CORPUS.values()} | {"AVIF", "HEIC"} == set(FORMATS)


def test_mutated_files_give_an_image_or_an_image_load_error(tried: Counter[str]) -> None:
    """Truth: the contract of load_image; 3,000 seeded mutations."""
    outcomes = fuzz(3_000, seed=1, policy=ImagePolicy(max_pixels=1_000_000), seconds=5)
    assert outcomes.total() == 3_000
    tried["mutated image files"] += 3_000
    assert min(outcomes.values()) > 500  # both happen: the mutations are neither harmless nor all fatal


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + 10 * EFFORT))
def test_many_mutated_files_in_bounded_time_and_memory(seed: int, tried: Counter[str]) -> None:
    """Truth: as above with the default limits; no case takes 10 s, and the whole no 1.5 GiB more than before."""
    with peak_growth() as mib:
        outcomes = fuzz(5_000, seed=seed, policy=ImagePolicy(), seconds=10)
    assert outcomes.total() == 5_000
    tried["mutated image files"] += 5_000
    assert mib() < 1_536


@pytest.mark.slow
def test_every_single_byte_of_a_header_may_be_wrong(tried: Counter[str]) -> None:
    """Truth: the contract; each of the first 64 bytes of each file set to 0, 1, 127 and 255."""
    policy = ImagePolicy(max_pixels=1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in CORPUS.values():
            for at in range(64):
                for value in (0, 1, 127, 255):
                    outcome(data[:at] + bytes([value]) + data[at + 1 :], policy)
                    tried["mutated image files"] += 1


@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 12, 16, 30, 64, 1000])
def test_noise_after_any_signature_is_refused(size: int) -> None:
    """Truth: noise is no image."""
    chance = random.Random(size)
    for name, data in CORPUS.items():
        if name[:3] not in ("ppm", "pgm", "pbm"):  # whose pixels may be anything
            assert outcome(data[:16] + chance.randbytes(size), ImagePolicy()) == "refused", name


# ---------------------------------------------------------------------------------------------- bombs of work


def tiff(*tags: tuple[int, int, int, int], blob: bytes = b"") -> bytes:
    """Tags as (number, type, count, value); a negative value is an offset into the blob."""
    start = 8 + 2 + 12 * len(tags) + 4
    out = b"II*\0" + struct.pack("<LH", 8, len(tags))
    for number, kind, count, value in sorted(tags):
        out += struct.pack("<HHLL", number, kind, count, value if value >= 0 else start - value - 1)
    return out + bytes(4) + blob


def bmp(compression: int, body: bytes) -> bytes:
    header = struct.pack("<LllHHLLllLL", 40, 9000, 9000, 1, 8, compression, len(body), 1, 1, 256, 0)
    return b"BM" + struct.pack("<LHHL", 1078 + len(body), 0, 0, 1078) + header + bytes(1024) + body


def segment(marker: bytes, content: bytes) -> bytes:
    return b"\xff" + marker + struct.pack(">H", len(content) + 2) + content


def profile(kind: bytes, start: bytes) -> bytes:
    """A megabyte of no Unicode in a kilobyte."""
    return chunk(kind, start + zlib.compress(b"\xff" * (MIB - 9), 9))


def narrow_png(height: int) -> bytes:
    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(bytes(2 * MIB)) for _ in range(height // MIB)) + pack.flush()
    header = struct.pack(">IIBBBBB", 1, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GREY = [(256, 4, 1, 100), (257, 4, 1, 100), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
GIF_SCREEN = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0)
JPEG = encoded(Image.new("RGB", (16, 16)), "JPEG")
PNG = encoded(Image.new("L", (1, 1)), "PNG")
PNG_START = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
TILE = zlib.compress(bytes(4 * MIB), 9)
SIZE = 24 * MIB

BOMBS: dict[str, Callable[[], bytes]] = {
    "a JPEG of empty segments": lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * (SIZE // 4),
    "a JPEG of segments without length": lambda: b"\xff\xd8\xff\xe1" + b"\xff\xd0" * (SIZE // 2),
    "a JPEG of fill bytes": lambda: b"\xff\xd8" + b"\xff" * SIZE,
    "a JPEG of EXIF": lambda: (
        JPEG[:2] + segment(b"\xe1", b"Exif\0\0" + bytes(1_016)) * (SIZE // 1_026) + JPEG[2:]  # joined one by one
    ),
    "a JPEG of segments that a decoy jumps over": lambda: (  # read as a length: 0xffe1
        JPEG[:2] + (b"\xff\0" + b"\xff\xe1\0\2" * (0xFFE1 // 4) + b"\xff") * (SIZE // 0xFFE3) + JPEG[2:]
    ),
    "a PNG of colour profiles": lambda: (
        PNG_START + profile(b"iCCP", b"x\0\0") * (SIZE // 1_100) + PNG[len(PNG_START) :]
    ),
    "a PNG of comments that are no text": lambda: (
        PNG_START + profile(b"iTXt", b"x\0\1\0\0\0") * (SIZE // 1_100) + PNG[len(PNG_START) :]
    ),
    "a PNG one pixel wide": lambda: narrow_png(80 * MIB),
    "a PNG of empty chunks": lambda: PNG_START + chunk(b"aaAa", b"") * (SIZE // 12),
    "a PNG of empty image data": lambda: PNG_START + chunk(b"IDAT", b"") * (SIZE // 12),
    "a GIF of frames": lambda: GIF_SCREEN + b"\x2c\0\0\0\0\1\0\1\0\0\2\0" * (SIZE // 12),
    "a GIF of extensions": lambda: GIF_SCREEN + b"\x21\xfe\0" * (SIZE // 3),
    "a GIF of a comment in single bytes": lambda: GIF_SCREEN + b"\x21\xfe" + b"\1a" * (SIZE // 2),
    "a GIF of bytes that mean nothing": lambda: GIF_SCREEN + b"\1" * SIZE,
    "a WebP of empty frames": lambda: (
        b"RIFF"
        + struct.pack("<L", SIZE)
        + b"WEBPVP8X\x0a\0\0\0\2\0\0\0\x10\0\0\x10\0\0"
        + b"ANMF\0\0\0\0" * (SIZE // 8)
    ),
    "an AVIF of empty boxes": lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0\0\0\x08free" * (SIZE // 8),
    "a HEIC of empty boxes": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x08free" * (SIZE // 8),
    "a HEIC of parameter sets": lambda: CORPUS["heic"] + b"\0\0\x0f\xff\x42\1" * (SIZE // 6),
    "a PPM of text": lambda: b"P2\n8000 2600\n255\n" + b"#\n" * (SIZE // 2),
    "a PPM with a long comment": lambda: b"P6\n#" + b"a" * SIZE,
    "a PPM of odd depth": lambda: b"P5\n4000 3000\n511\n" + bytes(SIZE),
    "a BMP of empty lines": lambda: bmp(1, b"\0\0" * (SIZE // 2)),
    "a BMP of single runs": lambda: bmp(1, b"\1\7" * (SIZE // 2)),
    "a TIFF of strips": lambda: tiff(
        *GREY,
        *((259, 3, 1, 1), (278, 4, 1, 1), (273, 4, SIZE // 8, -1), (279, 4, SIZE // 8, -1 - SIZE // 2)),
        blob=struct.pack("<L", 8) * (SIZE // 8) + struct.pack("<L", 100) * (SIZE // 8),
    ),
    "a TIFF of strips whose places are bytes": lambda: tiff(
        *GREY,
        *((259, 3, 1, 1), (278, 4, 1, 1), (273, 1, SIZE, -1), (279, 4, 1, 100)),
        blob=bytes(SIZE),
    ),
    "a TIFF with a tile of 2 GB": lambda: tiff(
        *GREY, (259, 3, 1, 8), (322, 4, 1, 46000), (323, 4, 1, 46000), (324, 4, 1, -1), (325, 4, 1, 12), blob=bytes(12)
    ),
    "a TIFF of tiles that stand out of it": lambda: tiff(
        *((256, 4, 1, 1_000_000), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)),
        *((322, 4, 1, 2048), (323, 4, 1, 2048), (324, 4, 489, -1), (325, 4, 489, -1 - 4 * 489)),
        blob=struct.pack("<L", 134 + 8 * 489) * 489 + struct.pack("<L", len(TILE)) * 489 + TILE,
    ),
    "a TIFF of numbers": lambda: tiff(
        *GREY, (259, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 100), (274, 3, SIZE // 2, -1), blob=bytes(SIZE)
    ),
    "a TIFF of directories": lambda: b"II*\0" + b"".join(struct.pack("<LH", 8 + 6 * n, 0) for n in range(2_000)),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_file_that_is_all_work_and_no_image_is_refused_at_once(name: str, tried: Counter[str]) -> None:
    """Truth: Pillow alone takes seconds to minutes of CPU, or gigabytes, over most of these."""
    data = BOMBS[name]()
    started = time.process_time()
    with (
        peak_growth() as mib,
        warnings.catch_warnings(),
    ):  # made an error, a warning of the decoder would refuse the file for us
        warnings.simplefilter("ignore")
        assert outcome(data, ImagePolicy()) == "refused"
    tried["image bombs"] += 1
    assert time.process_time() - started < 1.5
    assert mib() < 128


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Truth: each scan is a pass over the whole image; 10 are honest, our limit is MAX_JPEG_SCANS."""
    data = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert load_image(data).size == (64, 64)
    scan = data[last:-2]
    with pytest.raises(ImageLoadError, match="scans"):
        load_image(data[:-2] + scan * MAX_JPEG_SCANS + data[-2:])


def test_a_decoy_cannot_hide_the_scans_of_a_jpeg() -> None:
    """Truth: both decoders pass over the zero behind a marker's 0xff and read what follows; who takes it for a segment
    jumps to a frame of one scan, while the decoder goes through 400 of the other frame, 20 seconds in 460 KB."""
    progressive = encoded(Image.new("L", (1_000, 1_000)), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    scans = progressive[:-2] + progressive[last:-2] * 400 + progressive[-2:]
    frame = JPEG.index(b"\xff\xc0")
    decoy = JPEG[frame : frame + 19] + b"\xff\xda\0\x0c\3"
    hidden = (b"\xff\xe1\xff\xfd" + bytes(0xFFE1 - 4) + decoy).ljust(0xFFFF, b"\0")
    with pytest.raises(ImageLoadError, match="scans"):
        load_image(scans[:2] + b"\xff\0" + hidden + scans[2:])


@pytest.mark.parametrize("marker", [0x02, 0x4F, 0xBF, 0xC8, 0xF0, 0xF7, 0xFD])
def test_a_jpeg_segment_that_no_decoder_passes_over_is_refused(marker: int) -> None:
    """Truth: Pillow looks for markers inside of these, so whatever is in them would not be counted."""
    with pytest.raises(ImageLoadError, match="no decoder knows"):
        load_image(JPEG[:2] + segment(bytes([marker]), b"1234") + JPEG[2:])


def test_an_image_of_numbers_is_turned_grey_strip_by_strip() -> None:
    """16 million floats in 60 KB. Truth: as doubles, all of them at once would take 400 MB; the values are kept."""
    samples = np.zeros((4_000, 4_000), np.float32)
    samples[-1, -1] = 1_000
    data = encoded(Image.fromarray(samples), "TIFF", compression="tiff_adobe_deflate")
    tracemalloc.start()
    try:
        image = load_image(data)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()
    assert (image.getpixel((3_999, 3_999)), image.getpixel((0, 0))) == ((255, 255, 255), (0, 0, 0))
    assert load_image(encoded(Image.new("F", (5, 3), -7), "TIFF")).getpixel((0, 0)) == (0, 0, 0)


def test_scans_are_not_counted_where_they_cost_nothing() -> None:
    """Truth: in a baseline JPEG of one scan, the marker's two bytes may stand in a comment as often as they like."""
    data = encoded(Image.new("RGB", (64, 64)), "JPEG", comment=b"\xff\xda" * 200)
    assert load_image(data).size == (64, 64)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_words_in_a_png_are_not_unpacked(kind: bytes) -> None:
    """200 MB of zeros in 200 KB of comment, colour profile or XMP. Truth: Pillow's limit of 1 MB, which we rely on."""
    words = {b"zTXt": b"x\0\0", b"iCCP": b"x\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}[kind]
    data = with_chunks(encoded(Image.new("RGB", (4, 4))), (kind, words + zlib.compress(bytes(200_000_000), 9)))
    tracemalloc.start()
    try:
        assert outcome(data, ImagePolicy()) in ("refused", "image")
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_an_orientation_of_ten_million_numbers_is_not_read() -> None:
    """A PNG of 20 MB whose EXIF says one thing ten million times. Truth: read as numbers it takes 220 MB."""
    numbers = b"\1\0" * 10_000_000
    exif = b"II*\0" + struct.pack("<LHHHLLL", 8, 1, 0x0112, 3, len(numbers) // 2, 26, 0) + numbers
    data = with_chunks(encoded(Image.new("RGB", (4, 4))), (b"eXIf", exif))
    tracemalloc.start()
    try:
        assert outcome(data, ImagePolicy()) == "image"
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- headers


def headers() -> Iterator[tuple[str, ImageHeader]]:
    for name in ("jpeg", "jpeg progressive", "jpeg grey", "png", "apng", "webp", "webp lossless", "webp animated"):
        kind = name.split()[0].upper().replace("APNG", "PNG")
        yield name, ImageHeader(kind, (29, 17), reducible=name in ("jpeg", "jpeg grey"))
    yield "gif", ImageHeader("GIF", (29, 17), 1)
    yield "gif animated", ImageHeader("GIF", (29, 17), 3)
    yield "tiff raw", ImageHeader("TIFF", None, 1)
    yield "tiff frames", ImageHeader("TIFF", None, 3)
    yield "tiff big", ImageHeader("TIFF", None, 1)
    yield "bmp", ImageHeader("BMP")


@pytest.mark.parametrize(("name", "expected"), list(headers()))
def test_headers_are_read_without_a_decoder(name: str, expected: ImageHeader) -> None:
    """Truth: what was written."""
    assert read_header(CORPUS[name], max_frames=9) == expected


def test_counting_frames_stops_above_the_limit() -> None:
    """Truth: two allowed, three there."""
    assert read_header(CORPUS["gif animated"], max_frames=1) == ImageHeader("GIF", (29, 17), 2)
    assert read_header(CORPUS["tiff frames"], max_frames=1) == ImageHeader("TIFF", None, 2)


def test_tiles_of_an_honest_size_are_read() -> None:
    """Truth: the pixels written; the last tiles of a row and a column always stand out."""
    body = b"".join(bytes([row % 251]) * 48 for row in range(16)) + bytes(20_000)
    places = [8 + 2 + 12 * 9 + 4 + 8 * 9] * 9
    data = tiff(
        *((256, 4, 1, 100), (257, 4, 1, 40), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (322, 4, 1, 48)),
        *((323, 4, 1, 16), (324, 4, 9, -1), (325, 4, 9, -1 - 4 * 9)),
        blob=struct.pack("<9L", *places) + struct.pack("<9L", *[768] * 9) + body,
    )
    image = load_image(data)
    assert image.size == (100, 40)
    assert [image.getpixel((column, 33)) for column in (0, 50, 99)] == [(1, 1, 1)] * 3


def test_a_tiff_whose_directories_form_a_ring_ends() -> None:
    """Truth: two directories pointing at each other."""
    ring = b"II*\0" + struct.pack("<L", 8) + struct.pack("<HL", 0, 14) + struct.pack("<HL", 0, 8)
    assert read_header(ring, max_frames=1000) == ImageHeader("TIFF", None, 2)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff\xd8", b"BM", b"P6", b"P7\n", b"RIFF0000WAVE", b"%!PS", b"8BPS", b"Pf\n"]
)
def test_other_formats_are_never_opened(data: bytes) -> None:
    """Truth: the list of formats; Pillow would know several of these."""
    assert read_header(data, max_frames=9) is None
