"""The training of the tiny embedder: same look as the catalogue, no held-out pair, and a script that runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny_embedder
from tiny_training import LayerCache, build_tokenizer, labels_of, reworded
from train_tiny_embedder import draw_queries

from mm_retriever.demo.catalogue import COLOURS, HELD_OUT, KINDS, NATURAL, PATTERNS, Looks, draw_product
from mm_retriever.embedders.visualized_bge.encoder import load_visualized_bge


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def layers(cache_folder: Path):
    return LayerCache.load(cache_folder, 48, shapes=2, textures=3, seed=0)


def test_composed_images_look_like_drawn_ones(layers):
    """The cache must not drift from the catalogue: mean colour of a product agrees with ``draw_product``."""
    looks = Looks("backpack", "plain", "red")
    composed = layers.render(labels_of([looks] * 16), np.random.default_rng(0))[:, :, 16:32, 16:32].mean((0, 2, 3))
    drawn = np.mean([np.asarray(draw_product(*looks, seed, 48))[16:32, 16:32].mean((0, 1)) for seed in range(16)], 0)
    assert composed.shape == (3,)
    np.testing.assert_allclose(composed.numpy(), drawn, atol=14)


def test_a_cache_file_gives_back_the_same_layers(layers, cache_folder: Path):
    """A second start draws nothing."""
    again = LayerCache.load(cache_folder, 48, shapes=2, textures=3, seed=0)
    assert len(list(cache_folder.iterdir())) == 1
    labels = torch.tensor([[0, 1, 1], [16, 10, 0]])
    first, second = (cache.render(labels, np.random.default_rng(3)) for cache in (layers, again))
    assert torch.equal(first, second)


def test_training_queries_never_touch_a_held_out_pair():
    """The claim of the model card."""
    rng = np.random.default_rng(0)
    for query in (query for _ in range(20) for query in draw_queries(32, rng)):
        for kind, pattern, colour in (query.source, query.wanted):
            assert (kind, pattern) not in HELD_OUT
            assert pattern in PATTERNS
            assert colour in COLOURS


def test_the_tokenizer_knows_every_training_word_and_survives_the_rest():
    """Unknown words are one [UNK] each; endings of known words are pieces."""
    tokenizer = build_tokenizer()
    assert tokenizer.encode("An Orange Tote Bag, with hearts").tokens[1:-1] == [
        "an", "orange", "tote", "bag", ",", "with", "hearts",
    ]  # fmt: skip
    assert tokenizer.encode("leopards xylophone 猫").tokens[1:-1] == ["leopard", "##s", "[UNK]", "[UNK]"]
    assert tokenizer.encode("").tokens == ["[CLS]", "[SEP]"]


def test_rewording_keeps_what_the_query_asks_for():
    """Noise may hit the carrier sentence, never kind, pattern or colour."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = reworded("show me a red mug with polka dots", rng).replace("mugs", "mug").replace("reds", "red").split()
        assert {"red", "mug"} <= set(words)
        assert any(word.startswith("polka") for word in words)


def test_the_script_trains_and_writes_a_loadable_model(cache_folder, tmp_path, monkeypatch):
    """Two steps of each stage, then the public loading path."""
    arguments = ["--size", "48", "--shapes", "2", "--textures", "3", "--tower-steps", "2", "--report", "12"]
    arguments += ["--steps", "2", "--batch", "8", "--tower-batch", "8"]
    arguments += ["--out", str(tmp_path / "model"), "--cache", str(cache_folder)]
    monkeypatch.setattr(sys, "argv", ["train_tiny_embedder.py", *arguments])
    threads = torch.get_num_threads()
    train_tiny_embedder.main()
    torch.set_num_threads(threads)
    model, processor = load_visualized_bge(tmp_path / "model")
    vector = model.encode_image(processor.pixel_values([draw_product("mug", "marble", NATURAL, 0)]))
    assert vector.shape == (1, model.config.dimension)
    assert len(KINDS) == 16
