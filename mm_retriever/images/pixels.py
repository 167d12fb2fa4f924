"""Every kind of pixel to 8-bit sRGB: depth, colour profile, transparency, orientation. Knows nothing of files.

What a person sees in a browser is right. Images without a profile, transparency or a depth above 8 keep every bit.

A profile comes with the image, from anywhere: one that is too large, broken, or made for other channels is passed over,
as browsers do, and the samples count as sRGB. One that changes no colour by more than a rounding leaves every bit as it
is, so that images in sRGB are the same with their profile as without it.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from PIL import Image, ImageChops, ImageOps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)

MAX_PROFILE_BYTES = 4 * 2**20  # those of printing presses have up to 3
_CHANNELS = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")
_ROUNDING = 2  # levels
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x, y of white, red, green and blue
_SRGB_CURVE = (3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC.1, parametric curve of type 3
_D50 = (0.9642, 1.0, 0.8249)


def transform_to_srgb(info: dict[Any, Any], mode: str) -> Any | None:
    """Return what `ImageCms.applyTransform` takes to make RGB of samples, or None where they are sRGB already.

    Args:
        info: of a Pillow image: its profile, or what a PNG says of its colours without one.
        mode: of the samples: RGB, L or CMYK.
    """
    profile = info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        profile = _png_profile(info, mode)
    if profile is None or not 128 < len(profile) <= MAX_PROFILE_BYTES or profile[36:40] != b"acsp":
        return None
    if profile[12:16] not in _CLASSES or _CHANNELS.get(profile[16:20]) != mode:
        return None
    return _transform(profile, mode)


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> Any | None:
    cms = _cms()
    if cms is None:
        return None
    try:
        source = cms.ImageCmsProfile(io.BytesIO(profile))
        flags = cms.Flags.BLACKPOINTCOMPENSATION | (cms.Flags.NOOPTIMIZE if mode == "L" else 0)
        made = cms.buildTransform(source, _srgb(), mode, "RGB", cms.Intent.PERCEPTUAL, flags)
        made = _GreyTable(made) if mode == "L" else made
        return None if _changes_nothing(made, mode) else made
    except Exception as error:  # a parser of hostile bytes
        logger.debug("a colour profile is passed over: %s", error)
        return None


class _GreyTable:
    """A transform of grey samples, exact where LittleCMS's own, made for speed, is ten levels off in the darks."""

    def __init__(self, exact: Any) -> None:
        self.table: list[int] = list(
            exact.apply(Image.frombytes("L", (256, 1), bytes(range(256)))).getchannel(0).tobytes()
        )

    def apply(self, image: Image.Image) -> Image.Image:
        return image.point(self.table).convert("RGB")


def _changes_nothing(made: Any, mode: str) -> bool:
    if mode == "CMYK":
        return False
    if mode == "L":
        probe = Image.frombytes("L", (256, 1), bytes(range(256)))
    else:
        colours = bytes(value for colour in product([*range(0, 256, 32), 255], repeat=3) for value in colour)
        probe = Image.frombytes("RGB", (len(colours) // 3, 1), colours)
    before, after = probe.convert("RGB").tobytes(), made.apply(probe).tobytes()
    return bool(max(abs(a - b) for a, b in zip(before, after, strict=True)) <= _ROUNDING)


@cache
def _cms() -> Any | None:
    try:
        from PIL import ImageCms

        ImageCms.createProfile("sRGB")
    except ImportError:
        logger.warning("this Pillow was built without LittleCMS: colour profiles of images are not applied")
        return None
    return ImageCms


@cache
def _srgb() -> Any:
    cms = _cms()
    assert cms is not None
    return cms.ImageCmsProfile(cms.createProfile("sRGB"))


# ---------------------------------------------------------------------------------------------- gAMA and cHRM of a PNG


def _png_profile(info: dict[Any, Any], mode: str) -> bytes | None:
    """A profile of what the gAMA and cHRM chunks say; None where that is sRGB, as nearly always."""
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if "srgb" in info or (gamma is None and primaries is None) or mode not in ("RGB", "L"):
        return None
    exponent = 1 / gamma if isinstance(gamma, float) and 0.1 < gamma < 10 else 2.2
    curve = (0, exponent) if abs(exponent - 2.2) > 0.05 else _SRGB_CURVE
    if not isinstance(primaries, tuple) or len(primaries) != 8 or not all(0 <= value <= 1 for value in primaries):
        primaries = _SRGB_PRIMARIES
    near = all(abs(value - usual) < 0.01 for value, usual in zip(primaries, _SRGB_PRIMARIES, strict=True))
    if near and curve is _SRGB_CURVE:
        return None
    return _made_profile(mode, curve, _SRGB_PRIMARIES if near else primaries)


@lru_cache(maxsize=8)
def _made_profile(mode: str, curve: tuple[float, ...], primaries: tuple[float, ...]) -> bytes | None:
    """A profile of a curve and three primaries. Source: ICC.1:2022, sections 7 to 10; Bradford adaptation, annex E."""
    tones = struct.pack(">4sIHH", b"para", 0, int(curve[0]), 0) + b"".join(_fixed(value) for value in curve[1:])
    tags = {b"wtpt": _xyz(_D50)}
    if mode == "L":
        tags[b"kTRC"] = tones
    else:
        columns = _adapted(primaries)
        if columns is None:
            return None
        tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tones)
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    space = b"GRAY" if mode == "L" else b"RGB "
    head = struct.pack(">I4x4s4s4s4s12x4s", start + len(body), b"\4\x20\0\0", b"mntr", space, b"XYZ ", b"acsp")
    return (head.ljust(68, b"\0") + b"".join(_fixed(value) for value in _D50)).ljust(128, b"\0") + table + body


def _adapted(primaries: tuple[float, ...]) -> list[tuple[float, ...]] | None:
    import numpy as np  # only PNGs of other primaries need it

    points = np.asarray(primaries, np.float64).reshape(4, 2)
    if (points[:, 1] <= 0).any():
        return None
    white, *colours = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in points)
    matrix = np.stack(colours, axis=1)
    if abs(np.linalg.det(matrix)) < 1e-6:
        return None
    matrix = matrix * np.linalg.solve(matrix, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = np.diag(bradford @ np.array(_D50) / (bradford @ white))
    adapted = np.linalg.inv(bradford) @ scale @ bradford @ matrix
    return [tuple(column) for column in adapted.T] if np.abs(adapted).max() < 100 else None


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


MOST_MISSING = 1 / 20  # of a JPEG that ends early; browsers show any part, but a half is not the image

_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG = 0x0106
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 2**20  # pixels that are worked on at a time
_LARGEST_EXIF = 2**20  # 16 times what a JPEG can hold; a tag of ten million numbers is no orientation
_BLOCK = 16  # rows
_ZERO_IS_ONE = [1] + [0] * 255
_LOW_RANGE = 0x1FFF  # an eighth of 16 bits
_NARROW = (64, 0xFFF)  # levels: fewer are noise on a plain surface, more are contrast enough
_WHITE = (255, 255, 255)
_DARK = (14, 14, 14)  # the background on which browsers show an image
_NEARLY_WHITE = 245
_VISIBLE = 128  # alpha


def _scale_transparent_key(image: Image.Image, rawmode: str) -> None:
    """Bring the transparent colour of a PNG, which Pillow leaves in the file's bit depth, to that of the pixels."""
    key = image.info.get("transparency")
    if isinstance(key, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    elif isinstance(key, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(sample >> 8 for sample in key)


def normalised(image: Image.Image, *, rawmode: str, keep_mode: bool, is_ours: bool = False) -> Image.Image:
    """Return an upright, opaque, 8-bit image in sRGB without metadata; its mode is RGB, or L or CMYK with `keep_mode`.

    Args:
        image: loaded; it stays as it is.
        rawmode: how samples lie in the file, where Pillow's mode does not say it.
        keep_mode: leave L and CMYK without a profile as they are.
        is_ours: nobody will use `image` again, so that its pixels need no copy, which takes half as long as decoding.
    """
    orientation = _orientation(image)
    if image.mode == "RGB" and orientation == 1 and not image.info and type(image) is Image.Image:
        return image
    _scale_transparent_key(image, rawmode)
    pixels = _in_srgb_on_paper(_eight_bit(image, rawmode), _ignores_alpha(image), image.info)
    if pixels.mode != "RGB" and not (keep_mode and pixels.mode in ("L", "CMYK")):
        pixels = pixels.convert("RGB")
    if orientation != 1:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0:
        pixels = ImageOps.invert(pixels)  # a TIFF of more than 8 bits where 0 is white, which Pillow leaves as it is
    if pixels is image:
        pixels = image._new(image.im) if is_ours else image.copy()
    pixels.info = {}
    return pixels


def missing_share(image: Image.Image) -> float:
    """Return how much of a JPEG was not there: decoders leave the blocks at the end in the middle grey."""
    if image.mode not in ("L", "RGB"):
        return 1.0
    grey, missing = (128,) * len(image.getbands()), 0
    for top in range((image.height - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        strip = image.crop((0, top, image.width, min(top + _BLOCK, image.height)))
        alike = ImageChops.difference(strip, Image.new(image.mode, strip.size, grey)).convert("L").point(_ZERO_IS_ONE)
        here = alike.histogram()[1]
        missing += here
        if here < strip.width * strip.height:
            break
    return missing / (image.width * image.height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it cannot be understood: no reason to refuse the pixels."""
    if len(image.info.get("exif") or b"") > _LARGEST_EXIF:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a parser of hostile bytes
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _eight_bit(image: Image.Image, rawmode: str) -> Image.Image:
    """Pixels of more than 8 bits scaled to 8 (not clipped, as Pillow's own conversion does), others as they are."""
    if image.mode.startswith("I"):
        samples = image.convert("I")
        low, high = cast("tuple[int, int]", samples.getextrema())
        if low < 0 or high > 0xFFFF:
            return _float_to_grey(samples)
        grey = samples.point(_grey_table(*_black_and_white(low, high, rawmode)), "L")
        key = image.info.get("transparency")
        if not isinstance(key, int):
            return grey
        opaque = [255] * 0x10000
        opaque[key & 0xFFFF] = 0
        return Image.merge("LA", (grey, samples.point(opaque, "L")))
    if image.mode == "F":
        return _float_to_grey(image)
    return image


def _black_and_white(low: int, high: int, rawmode: str) -> tuple[int, int]:
    """Which of 65,536 samples are black and white.

    Cameras and scanners write 10, 12 or 14 bits into 16: the white of a file that stays below an eighth of the range
    is the largest number of the fewest bits, at least 8, that hold its samples. One that keeps to a narrow band higher
    up has its darkest sample as black, its lightest as white.
    """
    if rawmode == "I;12":
        return 0, 0xFFF
    if high <= _LOW_RANGE:
        return 0, 2 ** max(8, high.bit_length()) - 1
    if _NARROW[0] <= high - low <= _NARROW[1]:
        return low, high
    return 0, 0xFFFF


@lru_cache(maxsize=16)
def _grey_table(black: int, white: int) -> list[int]:
    span = white - black
    return [(min(max(value - black, 0), span) * 510 + span) // (2 * span) for value in range(0x10000)]


def _float_to_grey(image: Image.Image) -> Image.Image:
    """0..1 and 0..255 keep their meaning; any other range has no agreed white and is stretched from black to white."""
    import numpy as np  # only images of floats need it

    samples = np.asarray(image)
    rows = max(1, _STRIP // image.width)  # strip by strip: as doubles, all of it would take a gigabyte
    places = [slice(top, top + rows) for top in range(0, image.height, rows)]

    def doubles(place: slice) -> NDArray[np.float64]:
        return np.nan_to_num(samples[place].astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)

    low = min(float(doubles(place).min()) for place in places)
    high = max(float(doubles(place).max()) for place in places)
    black, scale = 0.0, 255.0 if high <= 1 else 1.0
    if low < 0 or high > 255:
        black, scale = low, 255 / (high - low or 1.0)
    grey = np.empty(samples.shape, np.uint8)
    for place in places:
        grey[place] = (doubles(place) - black) * scale + 0.5
    return Image.fromarray(grey)


def _ignores_alpha(image: Image.Image) -> bool:
    """Whether it is a BMP whose alpha is 0 everywhere: programs that know of no alpha leave it so; browsers show it."""
    return image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _in_srgb_on_paper(image: Image.Image, ignores_alpha: bool, info: dict[Any, Any]) -> Image.Image:
    """The samples in sRGB, and on paper where they have any transparency; an image that needs neither as it is.

    Strip by strip: whole copies of a large image would take gigabytes.
    """
    has_alpha = image.has_transparency_data and not ignores_alpha
    mode = {"LA": "L", "La": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB"}.get(
        image.mode, image.mode
    )
    transform = transform_to_srgb(info, mode)
    if not has_alpha and transform is None:
        return image.convert("RGB") if ignores_alpha else image
    result = Image.new("RGB", image.size)
    darkest, visible = 255, False
    for box in _strips(image.size):
        colours, alpha = _strip(image.crop(box), has_alpha, mode, transform)
        if alpha is not None:
            colours = _over(colours, alpha, _WHITE)
            darkest = min([darkest, *(cast("tuple[int, int]", band.getextrema())[0] for band in colours.split())])
            visible = visible or cast("tuple[int, int]", alpha.getextrema())[1] >= _VISIBLE
        result.paste(colours, box[:2])
    if has_alpha and visible and darkest >= _NEARLY_WHITE:  # white on white would be invisible
        for box in _strips(image.size):
            colours, alpha = _strip(image.crop(box), has_alpha, mode, transform)
            if alpha is not None:
                result.paste(_over(colours, alpha, _DARK), box[:2])
    return result


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    width, height = size
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _strip(
    image: Image.Image, has_alpha: bool, mode: str, transform: Any | None
) -> tuple[Image.Image, Image.Image | None]:
    """Colours in sRGB, and alpha where there is any."""
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    alpha = None
    if has_alpha:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if transform is not None:
            image = image.getchannel("R") if mode == "L" else image.convert("RGB")
    elif image.mode != mode:
        image = image.convert(mode)
    if transform is not None:
        image.info = {}
        image = transform.apply(image)
    return image, alpha


def _over(colours: Image.Image, alpha: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    sheet = Image.new("RGB", colours.size, paper)
    sheet.paste(colours.convert("RGB"), mask=alpha)
    return sheet
