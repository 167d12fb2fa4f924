"""`evaluate` reproduces the model card of the bundled embedder. Truth: the card's own table, to its last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_quality

from mm_retriever.demo.catalogue import PATTERNS, catalogue
from tests.support.command_line import run

ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "mm_retriever" / "embedders" / "visualized_bge" / "tiny" / "README.md"


def drawn_queries(folder: Path) -> Path:
    """The catalogue of the card as files that lose no pixel, and the queries of the hardest row of its tables."""
    products = catalogue()
    for product in sorted(products, key=lambda one: PATTERNS.index(one.pattern)):
        path = (folder / "products" / product.file_name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        product.draw().save(path, compress_level=0)
    queries = tiny_quality.composed_queries(products, "colour", held_out=True, wording="held-out")
    (folder / "queries").mkdir()
    lines: dict[int, str] = {}
    for row, query in sorted(enumerate(queries), key=lambda one: PATTERNS.index(one[1].source.pattern)):
        query.image().save(folder / "queries" / f"{row}.png", compress_level=0)
        target = Path(products[query.wanted].file_name).with_suffix(".png").as_posix()
        image = str(folder / "queries" / f"{row}.png")
        lines[row] = json.dumps({"image": image, "text": query.text, "targets": [target]})
    file = folder / "queries.jsonl"
    file.write_text("\n".join(lines[row] for row in range(len(queries))), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cards_figures_are_those_of_the_command(capfd, tmp_path):
    file = drawn_queries(tmp_path)
    use = ("--images", tmp_path / "products", "--model", "tiny", "--device", "cpu", "--cache", tmp_path / "cache")
    code, out, err = run(capfd, "evaluate", file, *use, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["data"][0]["images"] == 900
    (figures,) = told["figures"].values()
    section = CARD.read_text(encoding="utf-8").split("**Held-out pairs, held-out wordings**", 1)[1]
    row = next(line for line in section.splitlines() if line.startswith("| product + colour"))
    count, at_1 = (row.split("|")[column].strip() for column in (2, 3))
    assert figures["tiny"]["Recall@1"]["queries"] == int(count)
    assert figures["tiny"]["Recall@1"]["mean"] == pytest.approx(float(at_1), abs=0.003), "one of 387 may flip"
    assert figures["tiny"]["Recall@10"]["mean"] == 1
