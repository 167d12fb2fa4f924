"""A folder of drawn products, its store, and a query image."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_retriever.cli import main
from mm_retriever.demo.catalogue import draw_product, draw_theme


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of drawn products, one sub-folder a kind."""
    folder = tmp_path_factory.mktemp("images")
    for kind in ("phone case", "mug", "umbrella"):
        for pattern, colour in (("leopard", "natural"), ("polka dots", "red"), ("stars", "blue")):
            path = folder / kind / f"{colour} {pattern}.jpg"
            path.parent.mkdir(exist_ok=True)
            draw_product(kind, pattern, colour, seed=7, size=160).save(path, quality=92)
    return folder


@pytest.fixture(scope="module")
def leopard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("query") / "leopard.png"
    draw_theme("leopard", "natural", seed=99, size=160).save(path)
    return path


@pytest.fixture(scope="module")
def db(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "images.db"
    with pytest.raises(SystemExit) as stopped:
        main(["index", str(images), "--db", str(path), "--model", "tiny"])
    assert not stopped.value.code
    return path
