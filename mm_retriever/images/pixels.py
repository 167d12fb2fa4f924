"""Every kind of pixel to 8-bit sRGB: depth, colour profile, transparency, orientation. Knows nothing of files.

What a person sees in a browser is right. Images without a profile, transparency or a depth above 8 keep every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from PIL import Image, ImageChops, ImageOps

from mm_retriever.images.profile import transform_to_srgb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
_DARK = (14, 14, 14)  # the paper of browsers for an image that is opened alone
_NEARLY_WHITE = 245
_VISIBLE = 128  # alpha


def _scale_transparent_key(image: Image.Image, rawmode: str) -> None:
    """Bring the transparent colour of a PNG, which Pillow leaves in the file's bit depth, to that of the pixels."""
    key = image.info.get("transparency")
    if isinstance(key, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    elif isinstance(key, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(sample >> 8 for sample in key)


def normalised(image: Image.Image, *, rawmode: str, keep_mode: bool) -> Image.Image:
    """Return an upright, opaque, 8-bit image in sRGB without metadata; its mode is RGB, or L or CMYK with `keep_mode`.

    Args:
        image: loaded; it stays as it is.
        rawmode: how samples lie in the file, where Pillow's mode does not say it.
        keep_mode: leave L and CMYK without a profile as they are.
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
        pixels = image.copy()
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
    if has_alpha and visible and darkest >= _NEARLY_WHITE:  # white on white: nothing to see
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
