"""What the original Phi-3 Vision was recorded to do, and images to ask it about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parents[1] / "data" / "phi3_vision"
PROCESSOR = json.loads((DATA / "processor.json").read_text())
SIZES = {"sheet1200x900": (1200, 900), "sq336": (336, 336), "wide800x200": (800, 200), "tall120x700": (120, 700)}
NORM = "model.norm.weight"
ASK = "<|user|>\n<|image_1|>\nDescribe the image in detail.<|end|>\n<|assistant|>\n"


def made_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(name: str) -> Image.Image:
    return Image.open(next(DATA.glob(f"{name}.*"))).convert("RGB")
