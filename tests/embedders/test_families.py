"""What every model family must keep to, on a small model of each: one suite, parametrised by the registry."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core.schema import QueryBundle
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mm_retriever import ComposedEmbedding, ComposedRetriever, ingest_images, load_embedder, load_reranker, open_store
from mm_retriever.cli import main
from mm_retriever.embedders import registry
from mm_retriever.embedders.embedder import Content, Embedder, Trainable, cache_identity
from mm_retriever.embedders.registry import convert_model, published_models
from mm_retriever.errors import CheckpointError, QueryError
from mm_retriever.packed_linear import PackedLinear, can_pack
from mm_retriever.rerank.reranker import Reranker
from tests.support.colour_embedding import paint
from tests.support.small_models import MAKERS, SmallModel

TOLERANCE = 2e-6
COLOURS = ("red", "blue", "green", "white")
TEXTS = ("red mug", "a", "phone case with this in the red and the blue and the white", "")


@pytest.fixture(scope="module", params=MAKERS)
def make(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., SmallModel]]:
    """Makes small models of one family; a family without a maker fails here."""
    opened = []

    def made(seed: int = 0) -> SmallModel:
        context = MAKERS[request.param](tmp_path_factory.mktemp(request.param.rpartition(".")[2]), seed)
        opened.append(context)
        return context.__enter__()

    yield made
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def model(make: Callable[..., SmallModel]) -> SmallModel:
    return make()


def load(model: SmallModel, **options: Any) -> Embedder:
    return load_embedder(model.name, **model.where, **model.options, **options)


@pytest.fixture(scope="module")
def embedder(model: SmallModel) -> Embedder:
    return load(model)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for colour in COLOURS:
        paint(folder / f"{colour}.png", colour)
    return folder


@pytest.fixture(scope="module")
def reranker() -> Reranker:
    return load_reranker("tiny", device="cpu", top_n=2)


def noise(seed: int, size: tuple[int, int] = (70, 50), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)


def every_kind(model: SmallModel, embedder: Embedder) -> list[Content]:
    """Texts, images and pairs, mixed, as far as the model takes them."""
    images = [embedder.prepare(noise(seed)) for seed in range(3)]
    kinds = {
        "text": [Content(text) for text in TEXTS],
        "image": [Content(image=image) for image in images],
        "pair": [Content(text, image) for text, image in zip(TEXTS[:3], images, strict=True)],
    }
    return [content for kind, contents in kinds.items() if kind not in model.refuses for content in contents][::-1]


def test_every_family_has_a_small_model() -> None:
    assert set(registry.FAMILIES) <= set(MAKERS)


def test_published_models_say_what_people_choose_by() -> None:
    for name, entry in published_models():
        assert entry.licence, name
        assert entry.dimension, name
        assert entry.parameters, name
        assert entry.languages, name


def test_linear_layers_stay_packed(model: SmallModel) -> None:
    embedder = load(model)
    if getattr(embedder, "torch_model", None) is None:
        pytest.skip("computes elsewhere")
    if not can_pack(torch.ones(1, 1)):
        pytest.skip("oneDNN does not pack weights on this machine")
    embedder.encode(every_kind(model, embedder))
    linears = {name: type(part) for name, part in embedder.torch_model.named_modules() if isinstance(part, nn.Linear)}
    # torch's MultiheadAttention multiplies by the weight of its last layer itself
    assert {kind for name, kind in linears.items() if not name.endswith("head.attention.out_proj")} == {PackedLinear}


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("kind", ["text", "image", "pair"])
def test_every_kind_has_a_vector_or_is_refused_in_a_line(
    model: SmallModel, embedder: Embedder, kind: str, query: bool
) -> None:
    image = embedder.prepare(noise(1))
    content = {"text": Content("red mug"), "image": Content(image=image), "pair": Content("red mug", image)}[kind]
    if kind in model.refuses:
        with pytest.raises(QueryError) as refused:
            embedder.encode([content], query=query)
        assert len(str(refused.value).splitlines()) == 1
        return
    vectors = embedder.encode([content], query=query)
    assert vectors.shape == (1, embedder.dimension)
    assert vectors.dtype == np.float32
    assert abs(float(np.linalg.norm(vectors)) - 1) < 1e-5


def test_different_contents_have_different_vectors(model: SmallModel, embedder: Embedder) -> None:
    """Text and image both count in a pair."""
    images = [embedder.prepare(noise(seed)) for seed in range(2)]
    contents = [Content(image=image) for image in images]
    if "pair" not in model.refuses:
        contents += [Content(text, image) for text in ("red mug", "a blue case") for image in images]
    if "text" not in model.refuses:
        contents += [Content("red mug"), Content("a blue case")]
    vectors = embedder.encode(contents)
    assert (vectors @ vectors.T - np.eye(len(contents))).max() < 1 - 2e-5


def test_a_batch_is_its_rows_one_by_one_in_their_order(model: SmallModel, embedder: Embedder) -> None:
    """So padding changes nothing either: the texts have different lengths."""
    contents = every_kind(model, embedder)
    batch = embedder.encode(contents)
    single = np.concatenate([embedder.encode([content]) for content in contents])
    assert np.abs(batch - single).max() < TOLERANCE
    assert np.abs(embedder.encode(contents[::-1])[::-1] - batch).max() < TOLERANCE
    assert np.abs(embedder.encode([*contents, *contents])[len(contents) :] - batch).max() < TOLERANCE
    assert embedder.encode([]).shape == (0, embedder.dimension)


@pytest.mark.parametrize("text", ["", " ", "\x00", "\ud800 broken", "é\u202e🦒", "red " * 3000])
def test_any_text_has_a_vector(model: SmallModel, embedder: Embedder, text: str) -> None:
    image = embedder.prepare(noise(1)) if "text" in model.refuses else None
    assert np.isfinite(embedder.encode([Content(text, image)])).all()


@pytest.mark.parametrize(("size", "mode"), [((1, 1), "RGB"), ((3, 900), "L"), ((900, 3), "CMYK"), ((64, 64), "RGB")])
def test_any_image_has_a_vector(embedder: Embedder, size: tuple[int, int], mode: str) -> None:
    """`load_image` hands over RGB, L and CMYK; pixels are small whatever the image is."""
    prepared = embedder.prepare(noise(2, size, mode))
    assert prepared.ndim == 3
    assert prepared.nbytes < 4_000_000
    assert np.isfinite(embedder.encode([Content(image=prepared)])).all()


def test_a_plain_image_has_a_vector(embedder: Embedder) -> None:
    """Black is where division by an image's own statistics ends."""
    black, white = (embedder.prepare(Image.new("RGB", (60, 40), colour)) for colour in ("black", "white"))
    vectors = embedder.encode([Content(image=black), Content(image=white)])
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_a_float_format_changes_the_note_and_hardly_the_vectors(model: SmallModel, embedder: Embedder) -> None:
    if model.least_cosine is None:
        pytest.skip("computes in one float format only")
    half = load(model, dtype="bfloat16")
    assert (half.space, half.note) == (embedder.space, embedder.note.replace("float32", "bfloat16"))
    assert half.note != embedder.note
    assert cache_identity(half, query=False) != cache_identity(embedder, query=False)
    contents = every_kind(model, embedder)
    cosine = (half.encode(contents) * embedder.encode(contents)).sum(1)
    assert model.least_cosine < cosine.min()
    assert cosine.max() < 1 + 1e-5


def test_a_device_or_float_format_that_is_not_there_is_refused(model: SmallModel) -> None:
    with pytest.raises((CheckpointError, QueryError), match=r"cuda:99|runs on a server"):
        load_embedder(model.name, **{**model.where, "device": "cuda:99"}, **model.options)
    if model.least_cosine is not None:
        with pytest.raises(CheckpointError, match="float8"):
            load(model, dtype="float8")


def test_the_same_model_has_the_same_space_and_vectors_and_another_has_not(
    make: Callable[..., SmallModel], model: SmallModel, embedder: Embedder
) -> None:
    contents = every_kind(model, embedder)
    again, other = load(make(0)), load(make(1))
    assert again.space == embedder.space
    assert np.array_equal(again.encode(contents), embedder.encode(contents))
    assert other.space != embedder.space
    assert np.abs(other.encode(contents) - embedder.encode(contents)).max() > 1e-3


def test_a_converted_model_is_the_same_model(model: SmallModel, embedder: Embedder, tmp_path: Path) -> None:
    """By command and in Python; a rounded copy too, until its weights change."""
    if model.weights is None:
        with pytest.raises(CheckpointError, match=r"nothing to convert|does not exist"):
            convert_model(model.name, tmp_path)
        return
    contents = every_kind(model, embedder)
    with pytest.raises(SystemExit) as ended:
        main(["convert", model.name, str(tmp_path / "out")])
    assert not ended.value.code
    out = load_embedder(tmp_path / "out", device="cpu")
    assert out.space == embedder.space
    assert np.array_equal(out.encode(contents), embedder.encode(contents))
    rounded = convert_model(tmp_path / "out", tmp_path / "rounded", dtype="bfloat16")
    assert load_embedder(rounded, device="cpu").space == embedder.space
    twice = convert_model(rounded, tmp_path / "twice", dtype="float32")
    assert load_embedder(twice, device="cpu").space == embedder.space
    changed = load_file(rounded / "model.safetensors")
    changed[min(changed)] += 1
    save_file(changed, rounded / "model.safetensors", metadata={"format": "pt"})
    assert load_embedder(rounded, device="cpu").space != embedder.space


def test_threads_get_the_vectors_of_one(model: SmallModel, embedder: Embedder) -> None:
    contents = every_kind(model, embedder)
    expected = embedder.encode(contents)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(embedder.encode, [contents] * 8))
        prepared = list(threads.map(embedder.prepare, [noise(5)] * 8))
    assert all(np.abs(vectors - expected).max() < TOLERANCE for vectors in results)
    assert all(np.array_equal(prepared[0], pixels) for pixels in prepared)


def test_an_embedding_survives_pickling(model: SmallModel, photos: Path) -> None:
    embedding = ComposedEmbedding(model.name, **model.where, options=model.options)
    copy = pickle.loads(pickle.dumps(embedding))
    image = photos / "red.png"
    assert copy.model_id == embedding.model_id
    assert copy.get_image_embedding(image) == embedding.get_image_embedding(image)


def test_a_cache_gives_back_what_was_computed(model: SmallModel, photos: Path, tmp_path: Path) -> None:
    images = [photos / f"{colour}.png" for colour in COLOURS]
    plain = ComposedEmbedding(model.name, **model.where, options=model.options).get_image_embedding_batch(images)
    for _ in range(2):
        cached = ComposedEmbedding(model.name, **model.where, options=model.options, cache_dir=tmp_path)
        assert np.abs(np.subtract(cached.get_image_embedding_batch(images), plain)).max() < TOLERANCE


def test_a_folder_is_indexed_searched_and_reranked(
    model: SmallModel, photos: Path, tmp_path: Path, reranker: Reranker
) -> None:
    """By vector, by vector and words, and in the order of the small bundled reranker."""
    embedding = ComposedEmbedding(model.name, **model.where, options=model.options)
    image = str(photos / "red.png")
    query = QueryBundle("" if "pair" in model.refuses else "blue mug", image_path=image)
    with open_store(tmp_path / "a.db", embedding, hybrid=True) as store:
        assert ingest_images(photos, store, embedding, show_progress=False).indexed == 4
        assert ingest_images(photos, store, embedding, show_progress=False).unchanged == 4
        nearest = ComposedRetriever(store, embedding).retrieve(QueryBundle("", image_path=image))
        if not model.instructed:
            assert Path(nearest[0].node.image_path).stem == "red"
            assert nearest[0].score == pytest.approx(1, abs=1e-4)
        hits = ComposedRetriever(store, embedding, exclude_query_image=True).retrieve(query)
        assert {Path(hit.node.image_path).stem for hit in hits} == {"blue", "green", "white"}
        hybrid = ComposedRetriever(store, embedding, mode="hybrid").retrieve(query)
        assert len(hybrid) == 4
        if "text" not in model.refuses:
            assert len(ComposedRetriever(store, embedding).retrieve("blue")) == 4
        assert len(reranker.postprocess_nodes(hits, query)) == 2


@pytest.mark.parametrize("damage", ["missing", "cut", "a key less", "a wrong shape"])
def test_damaged_weights_are_refused_in_a_line(model: SmallModel, tmp_path: Path, damage: str) -> None:
    if model.weights is None:
        pytest.skip("reads no weight file on this machine")
    folder = Path(shutil.copytree(model.weights.parent, tmp_path / "copy"))
    weights = folder / model.weights.name
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        state = load_file(weights)
        key = max(state, key=lambda name: state[name].numel())
        state[key] = state[key][:-1] if damage == "a wrong shape" else state.pop(key)[:0]
        if damage == "a key less":
            del state[key]
        save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        load_embedder(folder, device="cpu")
    assert len(str(refused.value).splitlines()) == 1
    assert str(folder) in str(refused.value)


def test_vectors_with_gradients_are_those_of_encode(model: SmallModel, embedder: Embedder) -> None:
    """Training makes better what searching uses; a model on a server cannot be trained."""
    if "base_url" in model.where:
        assert not isinstance(embedder, Trainable)
        return
    assert isinstance(embedder, Trainable)
    contents = every_kind(model, embedder)
    for query in (False, True):
        vectors = embedder.vectors(contents, query=query)
        assert vectors.requires_grad
        np.testing.assert_allclose(vectors.detach(), embedder.encode(contents, query=query), atol=TOLERANCE)
    vectors.sum().backward()
    assert any(parameter.grad is not None for parameter in embedder.network.parameters())
    embedder.network.zero_grad(set_to_none=True)


def test_the_sides_of_a_model_are_apart_and_read_what_they_say(model: SmallModel, embedder: Embedder) -> None:
    """A frozen text side has no gradient from a text; what it alone reads changes nothing else."""
    if not isinstance(embedder, Trainable):
        return
    parameters = {
        side: {id(one) for module in modules for one in module.parameters()} for side, modules in embedder.sides.items()
    }
    assert parameters["text"]
    assert parameters["image"]
    assert not parameters["text"] & parameters["image"]


def test_a_model_that_is_saved_is_the_same_model(model: SmallModel, embedder: Embedder, tmp_path: Path) -> None:
    if not isinstance(embedder, Trainable):
        return
    embedder.save(tmp_path)
    again = load_embedder(tmp_path, device="cpu")
    contents = every_kind(model, embedder)
    assert again.space == embedder.space
    np.testing.assert_allclose(again.encode(contents), embedder.encode(contents), atol=TOLERANCE)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
