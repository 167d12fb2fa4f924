"""What can be said without labels. Truth: counts by hand, and the same sums by numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.evaluation.health import folder_health, health_of, nearest, set_health
from tests.support.data_sets import colour_set
from tests.support.mean_colour import MeanColour


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_copies_hubs_and_images_that_nothing_finds_are_counted():
    """Forty directions around a middle one, about at right angles to each other: all find the middle first."""
    around = np.eye(40, 41) + np.eye(1, 41, 40) * 0.5 + np.random.default_rng(0).normal(size=(40, 41)) * 0.02
    vectors = unit(np.vstack([around, np.eye(1, 41, 40), np.eye(1, 41, 40)]))
    names = [f"around {row}" for row in range(40)] + ["middle", "its copy"]
    health = health_of(names, vectors, [("broken.jpg", "not an image")])
    assert health.near_duplicates == 1
    assert health.nearest_pairs == (("middle", "its copy", pytest.approx(1)),)
    assert {name for name, _ in health.hubs[:2]} == {"middle", "its copy"}
    assert [times for _, times in health.hubs[:2]] == [41, 41]
    rows, _ = nearest(vectors, 10)
    times = np.bincount(rows.ravel(), minlength=42)
    assert health.never_found == (times == 0).mean()
    assert health.hubness == pytest.approx(((times - times.mean()) ** 3).mean() / times.std() ** 3)
    assert health.dead == (("broken.jpg", "not an image"),)


def test_the_nearest_are_those_of_a_full_sort():
    vectors = unit(np.random.default_rng(0).normal(size=(700, 8)))
    rows, cosines = nearest(vectors, 3)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    expected = np.argsort(-scores, axis=1)[:, :3]
    assert np.allclose(cosines, np.take_along_axis(scores, expected, 1), atol=1e-6)
    assert (rows == expected).mean() > 0.999, "the order of numbers that differ in the last bit is free"


def test_files_that_cannot_be_read_are_named_and_the_rest_is_looked_at(tmp_path):
    model = ComposedEmbedding(MeanColour())
    paths = [tmp_path / name for name in ("red.png", "dead.jpg", "blue.png")]
    for path in paths:
        Image.new("RGB", (8, 8), path.stem if path.stem != "dead" else "black").save(path)
    paths[1].write_bytes(b"no image at all")
    health = folder_health(model, paths)
    assert (health.images, [Path(name).name for name, _ in health.dead]) == (2, ["dead.jpg"])
    with pytest.raises(QueryError, match="1 of 2 images can be read"):
        folder_health(model, paths[:2])


def test_shortcuts_say_how_far_a_part_of_the_query_goes(tmp_path):
    """The image alone finds the query image's own neighbours; with words of no colour it is the whole query."""
    data = colour_set(tmp_path, 12)
    model = ComposedEmbedding(MeanColour())
    silent = replace(data, queries=tuple(replace(query, words={"text": "a mug"}) for query in data.queries))
    text, image = set_health(model, silent).shortcuts
    assert (text.use, image.use, image.same_first) == ("text", "image", 1)
    assert image.reached == image.whole
    assert text.same_first < 1
    assert set_health(model, replace(data, queries=tuple(replace(q, image="") for q in data.queries))).shortcuts == ()
    hidden = replace(silent, queries=tuple(replace(query, targets=()) for query in silent.queries))
    text, image = set_health(model, hidden).shortcuts
    assert (image.same_first, image.reached) == (1, None)
