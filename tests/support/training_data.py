"""Queries whose answers a model can learn: a colour by its name, in images of noise around that colour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEProcessor
from tests.support.golden import small_config, small_model, word_tokenizer
from tests.support.small_models import WORDS

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (210, 40, 40), "green": (40, 190, 40), "blue": (40, 40, 210), "white": (230, 230, 230),
}  # fmt: skip


def coloured(path: Path, colour: str, seed: int) -> Path:
    noise = np.random.default_rng(seed).integers(-25, 26, (48, 48, 3))
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def write_queries(folder: Path, count: int, *, first: int = 0, with_image: bool = True, shuffled: bool = False) -> Path:
    """A file of queries that ask for a colour beside an image of another; each has images of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*COLOURS]
    rng = np.random.default_rng(first)
    wanted = [names[number % 4] for number in range(count)]
    shown = [wanted[place] for place in rng.permutation(count)] if shuffled else wanted
    lines = []
    for number in range(count):
        seed = 1000 * first + number
        target = coloured(folder / f"target{seed}.png", shown[number], seed)
        line = {"text": f"a {wanted[number]} mug", "targets": [target.name]}
        if with_image:
            other = names[(number + 1 + number // 4 % 3) % 4]
            line["image"] = coloured(folder / f"query{seed}.png", other, 500_000 + seed).name
        lines.append(json.dumps(line))
    path = folder / f"queries{first}{'-shuffled' if shuffled else ''}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_model(folder: Path, seed: int = 0) -> Path:
    """A small random Visualized BGE."""
    folder.mkdir(parents=True, exist_ok=True)
    small_model(seed).save_pretrained(folder)
    VisualizedBGEProcessor(small_config(), word_tokenizer(small_config(), WORDS)).save_pretrained(folder)
    return folder
