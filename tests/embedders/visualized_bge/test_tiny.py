"""The bundled tiny embedder finds products that it never saw, as its model card says.

Thresholds are the project's targets, a little lower on the small samples of the fast tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_quality
from phrases import MODES

from mm_retriever.demo.catalogue import HELD_OUT, catalogue, draw_product, draw_theme
from mm_retriever.embedders.embedder import Content, cache_identity
from mm_retriever.embedders.registry import load_embedder
from tests.support.effort import EFFORT

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "mm_retriever" / "embedders" / "visualized_bge" / "tiny"


@pytest.fixture(scope="module")
def embedder():
    return load_embedder("tiny", device="cpu")


@pytest.fixture(scope="module")
def products():
    """All held-out products of the catalogue of 900 and every sixth of the others."""
    return [product for row, product in enumerate(catalogue()) if product.held_out or row % 6 == 0]


@pytest.fixture(scope="module")
def candidates(embedder, products) -> np.ndarray:
    return tiny_quality.product_vectors(embedder, products, 320)


def test_the_bundled_files_are_small():
    """Our choice: a few megabytes; they travel in the wheel."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000
    assert {path.name for path in FOLDER.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
    }  # fmt: skip


def test_its_identity_is_that_of_earlier_collections_and_caches():
    """Collections name the model by its space, caches key vectors by it: a change would orphan all of them."""
    encoder = load_embedder("tiny", device="cpu")
    assert encoder.space == "visualized-bge@5a8d8510b01c.a3f6cb"
    key = Content("red mug").key(cache_identity(encoder, query=True))
    assert key.hex() == "6bd3b9e3cba354f29d714f26e07f98ee4c320c72a69973a866373685cb758198"


def test_vectors_have_length_one_and_any_text_can_be_asked(embedder):
    """Unknown words, other scripts, nothing at all, and far too much must all give a unit vector."""
    texts = ["red mug", "Zürich 12.5€ ???", "", "猫の傘", "word " * 500]
    vectors = embedder.model.encode_text(**embedder.processor.tokens(texts)).detach().numpy()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def found_at(embedder, queries, candidates) -> dict[int, np.ndarray]:
    vectors = tiny_quality.query_vectors(embedder, queries)
    return tiny_quality.found_at(vectors, candidates, [query.wanted for query in queries])


@pytest.mark.slow
def test_held_out_products_are_found_by_composed_queries(embedder, products, candidates):
    """Our choice: mean R@1 >= .85, R@9 >= .99 over four kinds of query; here one query a product among fewer."""
    found_1, found_9 = [], []
    for mode in MODES:
        queries = tiny_quality.composed_queries(products, mode, held_out=True, draws=1)[::3]
        found = found_at(embedder, queries, candidates)
        assert len(found[1]) >= 40
        found_1.append(found[1].mean())
        found_9.append(found[9].mean())
    assert np.mean(found_1) >= 0.85
    assert np.mean(found_9) >= 0.98


@pytest.mark.slow
def test_wordings_that_training_never_used_are_understood(embedder, products, candidates):
    """Our choice: R@1 >= .75 with wordings not used in training."""
    found = []
    for mode in MODES:
        queries = tiny_quality.composed_queries(products, mode, held_out=True, wording="held-out", draws=1)[::4]
        found.append(found_at(embedder, queries, candidates)[1].mean())
    assert np.mean(found) >= 0.75


def test_the_published_example_works_on_a_pair_never_seen(embedder):
    """ "phone case with this" beside a leopard: the leopard phone case comes first, though none was in training.

    Here among what is nearest to it: every phone case and every natural leopard print of the 900 products.
    """
    assert ("phone case", "leopard") in HELD_OUT
    products = [p for p in catalogue() if p.kind == "phone case" or (p.pattern, p.colour) == ("leopard", "natural")]
    candidates = tiny_quality.product_vectors(embedder, products, 320)
    wanted = next(row for row, p in enumerate(products) if p.looks == ("phone case", "leopard", "natural"))
    pixel_values = embedder.processor.pixel_values([draw_theme("leopard", "natural", seed) for seed in range(5)])
    tokens = embedder.processor.tokens(["phone case with this"] * 5, beside_image=True)
    vectors = embedder.model.encode_multimodal(pixel_values, **tokens).detach().numpy()
    assert (np.argmax(vectors @ candidates.T, axis=1) == wanted).sum() >= 4


def test_size_and_file_format_of_an_image_hardly_matter(embedder):
    """People's images come in other sizes than the training's 320 pixels."""
    sizes = [
        embedder.processor.pixel_values([draw_product("mug", "hearts", "red", 5, size)]) for size in (160, 320, 700)
    ]
    small, usual, large = (embedder.model.encode_image(values).detach().numpy()[0] for values in sizes)
    assert small @ usual > 0.97
    assert large @ usual > 0.97


@pytest.mark.slow
@pytest.mark.skipif(EFFORT == 1, reason="minutes; tests/cli/test_evaluate.py has the hardest row: EFFORT=2 has all")
@pytest.mark.timeout(2400)
def test_the_figures_of_the_model_card_are_reproduced(embedder):
    """The card's numbers are those of ``python benchmarks/tiny_quality.py``, row by row."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    tables = tiny_quality.measure(embedder, report=lambda _: None)
    assert tables
    for title, rows in tables.items():
        printed = {line.split("|")[1].strip(): line for line in _section(card, title)}
        for row in rows:
            n, at_1, at_9 = (printed[row.name].split("|")[column].strip() for column in (2, 3, 5))
            assert int(n) == row.at_1.queries
            assert float(at_1) == pytest.approx(row.at_1.mean, abs=0.006)
            assert float(at_9) == pytest.approx(row.at_9.mean, abs=0.006)


def _section(card: str, title: str) -> list[str]:
    """Rows of the table under a title."""
    after = card.split(f"**{title}**", 1)[1].lstrip("\n")
    return after.split("\n\n", 1)[0].splitlines()[2:]
