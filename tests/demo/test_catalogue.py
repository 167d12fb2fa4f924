"""The drawn catalogue: deterministic, distinct, truthfully labelled, and free of look-alikes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from phrases import MODES, compose_query, full_text, reason, templates, vocabulary
from PIL import Image

from mm_retriever.demo.catalogue import (
    COLOURS,
    HELD_OUT,
    KINDS,
    NATURAL,
    PATTERNS,
    Looks,
    all_looks,
    caption,
    catalogue,
    colours_of,
    draw_product,
    draw_theme,
    write_catalogue,
)
from mm_retriever.demo.catalogue.drawing import MAPS_PER_BLOCK, SEED_BLOCK, map_seed


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def test_the_same_seed_draws_the_same_bytes():
    """Our promise: demo, tests and model card talk about the same images."""
    first, second = (draw_product("mug", "tiger", NATURAL, 7) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    first, second = (draw_theme("hearts", "red", 7) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_another_seed_draws_another_image_of_the_same_thing():
    """Otherwise held-out evaluation would see training images again."""
    first, second = (pixels(draw_product("mug", "tiger", NATURAL, seed)) for seed in (7, 8))
    assert np.abs(first - second).mean() > 5


@pytest.mark.parametrize("size", [17, 128, 320, 500])
def test_every_size_shows_the_same_scene(size: int):
    """Small images are the large one reduced, so a label and a look do not depend on the size."""
    large = draw_product("cushion", "plaid", "green", 3)
    image = draw_product("cushion", "plaid", "green", 3, size)
    assert image.size == (size, size)
    assert image.mode == "RGB"
    assert np.abs(pixels(image.resize((16, 16))) - pixels(large.resize((16, 16)))).mean() < 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_pattern_and_keeps_clear_of_the_corners(kind: str):
    """A red product is red in the middle of the image, and three corners or more are background."""
    image = pixels(draw_product(kind, "plain", "red", 11))
    red = (image[..., 0] > 110) & (image[..., 1] < 90) & (image[..., 2] < 95)
    assert red[80:240, 80:240].mean() > 0.15
    corners = [image[y, x] for y in (3, 316) for x in (3, 316)]
    assert sum(bool(corner.min() > 120) for corner in corners) >= 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_is_drawn_in_every_colour_it_comes_in(pattern: str):
    """The mean colour of cloth follows the palette: two colours of one pattern never give nearly the same image."""
    means = {colour: pixels(draw_theme(pattern, colour, 5, 64)).mean((0, 1)) for colour in colours_of(pattern)}
    for one in means:
        for other in means:
            if one < other:
                assert np.abs(means[one] - means[other]).max() > 8, (one, other)


@pytest.mark.slow
def test_no_two_products_of_one_kind_and_pattern_look_alike():
    """Ground and figure swapped must not give the same looks: compare sorted brightness, which ignores where the
    pattern lies."""
    for pattern in PATTERNS:
        profiles = {}
        for colour in colours_of(pattern):
            middle = pixels(draw_product("cushion", pattern, colour, 21))[90:230, 90:230].reshape(-1, 3)
            profiles[colour] = np.sort(middle, axis=0)
        for one in profiles:
            for other in profiles:
                if one < other:
                    assert np.abs(profiles[one] - profiles[other]).mean() > 14, (pattern, one, other)


def test_a_zebra_is_never_white_or_black():
    """Both would look like the natural zebra."""
    assert {"white", "black"}.isdisjoint(colours_of("zebra"))


def test_the_catalogue_has_900_distinct_products_with_every_pair():
    """Our choice: 900 products; every kind comes in every pattern."""
    products = catalogue()
    assert len({product.looks for product in products}) == len(products) == 900
    assert len({product.seed for product in products}) == len({product.file_name for product in products}) == 900
    assert {(product.kind, product.pattern) for product in products} == {(k, p) for k in KINDS for p in PATTERNS}
    assert catalogue() == products
    assert catalogue(900, seed=1) != products


def test_the_whole_catalogue_can_be_had_and_no_more():
    """16 kinds times the colours of 18 patterns."""
    everything = catalogue(len(all_looks()))
    assert {product.looks for product in everything} == set(all_looks())
    with pytest.raises(ValueError, match="not between 1 and"):
        catalogue(len(all_looks()) + 1)


def test_at_least_15_percent_of_the_pairs_are_held_out_evenly():
    """Our choice: at least 15%; no kind and no pattern loses more than three, so each is still learnt."""
    assert len(HELD_OUT) >= 0.15 * len(KINDS) * len(PATTERNS)
    assert ("phone case", "leopard") in HELD_OUT
    assert all(sum(k == kind for k, _ in HELD_OUT) == 3 for kind in KINDS)
    assert all(2 <= sum(p == pattern for _, p in HELD_OUT) <= 3 for pattern in PATTERNS)


def test_pattern_maps_of_different_catalogues_are_never_shared():
    """Training draws from blocks of seeds that no evaluation uses."""
    rng = np.random.default_rng(0)
    first = {map_seed(seed, rng) for seed in range(500)}
    second = {map_seed(SEED_BLOCK + seed, rng) for seed in range(500)}
    assert len(first) == len(second) == MAPS_PER_BLOCK
    assert first.isdisjoint(second)


def test_captions_tell_the_truth_and_tell_products_apart():
    """A caption names kind, pattern and colour, so different products have different captions."""
    captions = {looks: caption(looks) for looks in all_looks()}
    assert len(set(captions.values())) == len(captions)
    assert all(looks.kind in text for looks, text in captions.items() if looks.kind)
    assert all(looks.colour in text for looks, text in captions.items() if looks.colour != NATURAL)
    assert caption(Looks("tote bag", "hearts", "orange")) == "an orange tote bag with hearts"
    assert caption(Looks("phone case", "leopard", NATURAL)) == "a phone case with leopard print"
    assert caption(Looks(None, "hearts", "red")) == "a picture of red hearts"
    assert reason("theme", Looks("umbrella", "bricks", NATURAL)) == (
        "it is an umbrella with a brick pattern, like the picture"
    )


@pytest.mark.parametrize("wording", ["training", "held-out"])
@pytest.mark.parametrize("mode", MODES)
def test_a_query_changes_one_thing_and_never_shows_a_forbidden_pair(mode: str, wording: str):
    """Image and text together must determine the answer; training must not see held-out pairs."""
    rng = np.random.default_rng(0)
    for looks in all_looks()[::5]:
        if (looks.kind, looks.pattern) in HELD_OUT:
            continue
        query = compose_query(looks, mode, rng, wording=wording, never=HELD_OUT)
        if query is None:
            assert mode == "colour"
            assert looks.colour == NATURAL
            continue
        source, wanted = query.source, query.wanted
        assert wanted == looks
        assert "{" not in query.text
        assert (source.kind, source.pattern) not in HELD_OUT
        same = [a == b for a, b in zip(source, wanted, strict=True)]
        if mode == "pattern":
            assert same[0]
            assert not same[1]
        else:
            assert (
                same == {"theme": [False, True, True], "kind": [False, True, True], "colour": [True, True, False]}[mode]
            )


def test_held_out_wordings_share_no_template_with_training():
    """Our choice: recall with wordings not used in training."""
    for mode in MODES:
        assert set(templates("training")[mode]).isdisjoint(templates("held-out")[mode])


def test_text_queries_leave_natural_colours_unsaid():
    """Nobody asks for a natural leopard print."""
    rng = np.random.default_rng(0)
    assert all("natural" not in full_text(looks, rng) for looks in all_looks()[::7])
    assert "natural" not in vocabulary()


def test_a_written_catalogue_has_images_themes_and_truth(tmp_path: Path):
    """The sidecar's keys are the files, its labels what was drawn."""
    written = write_catalogue(tmp_path, count=24, size=96)
    labels = json.loads(written.labels.read_text(encoding="utf-8"))
    files = {path.relative_to(written.products).as_posix() for path in written.products.rglob("*.jpg")}
    assert files == set(labels) == {product.file_name for product in catalogue(24)}
    for product in catalogue(24)[:3]:
        assert labels[product.file_name]["description"] == product.description
        with Image.open(written.products / product.file_name) as image:
            assert image.size == (96, 96)
            assert np.abs(pixels(image) - pixels(product.draw(96))).mean() < 8
    assert (written.themes / "leopard.jpg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spoon", "stripes", "red", 0), "no kind of product 'spoon'"),
        (("mug", "spirals", "red", 0), "no pattern 'spirals'"),
        (("mug", "marble", "red", 0), "comes in: natural"),
        (("mug", "stripes", "red", -1), "seed -1"),
        (("mug", "stripes", "red", 0, 3), "size 3"),
    ],
)
def test_a_mistake_is_named(arguments: tuple, message: str):
    """Errors name the value and what is accepted."""
    with pytest.raises(ValueError, match=message):
        draw_product(*arguments)


def test_all_names_are_lower_case_words():
    """They stand in captions, file names and filters as they are."""
    assert all(name == name.lower() and "_" not in name for name in (*KINDS, *PATTERNS, *COLOURS))
