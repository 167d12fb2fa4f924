"""Colours as a browser shows them: samples to sRGB through the profile that an image carries.

A profile comes with the image, from anywhere: one that is too large, broken, or made for other channels is passed over,
as browsers do, and the samples count as sRGB. One that changes no colour by more than a rounding leaves every bit as it
is, so that images in sRGB are the same with their profile as without it.
"""

from __future__ import annotations

import io
import logging
import struct
from functools import cache, lru_cache
from itertools import product
from typing import Any

from PIL import Image

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
