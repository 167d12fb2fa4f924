"""Images as the squares that vision towers see, and the channel statistics that CLIP and its descendants share."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 32  # times the short side; a longer image is not resized whole: one of 1 x 60,000 would take 9 GB


def middle_square(image: Image.Image, side: int, start: Callable[[int], int]) -> Image.Image:
    """``side`` x ``side`` in the mode of the image: the short side resized to it (bicubic), the middle cut out.

    Args:
        image: of any size.
        side: in pixels.
        start: from how many pixels are too many along the long side to how many go at its beginning; libraries round
            a half in different directions.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(side * long / short)
    if long <= LONGEST * short:
        size = (side, resized_long) if width <= height else (resized_long, side)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = start(size[0] - side), start(size[1] - side)
        return image.crop((left, top, left + side, top + side))
    first, scale = start(resized_long - side), long / resized_long
    middle = (first * scale, (first + side) * scale)
    box = (0, middle[0], width, middle[1]) if width <= height else (middle[0], 0, middle[1], height)
    return image.resize((side, side), Image.Resampling.BICUBIC, box)
