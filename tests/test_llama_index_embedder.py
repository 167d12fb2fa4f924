"""An embedding of LlamaIndex as an `Embedder`, like every model family; the models here are mean colours."""

from __future__ import annotations

import io

import numpy as np
import pytest
from llama_index.core.embeddings import MockEmbedding, MultiModalEmbedding
from PIL import Image

from mm_retriever import ComposedRetriever, ingest_images, open_store
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ModelServerError, QueryError
from mm_retriever.llama_index_embedder import LlamaIndexEmbedder
from tests.support.mean_colour import MeanColour


class ColourAPI(MultiModalEmbedding):
    """What an integration package is: texts and images by LlamaIndex's methods, vectors of any length."""

    model_name: str = "colours-1"

    def _get_text_embedding(self, text: str) -> list[float]:
        return (3 * MeanColour().encode([Content(text)])[0]).tolist()

    _get_query_embedding = _get_text_embedding

    def _get_image_embedding(self, img_file_path: io.BytesIO) -> list[float]:
        with Image.open(img_file_path) as image:
            return (0.5 * MeanColour().encode([Content(image=np.asarray(image))])[0]).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    async def _aget_image_embedding(self, img_file_path: io.BytesIO) -> list[float]:
        return self._get_image_embedding(img_file_path)


@pytest.fixture(scope="module")
def embedder() -> LlamaIndexEmbedder:
    return LlamaIndexEmbedder(ColourAPI())


@pytest.mark.parametrize("query", [False, True])
def test_a_pair_is_the_sum_of_the_unit_vectors_of_both(embedder, query):
    red, blue = np.full((4, 4, 3), (255, 0, 0), np.uint8), "blue"
    text, image, both = embedder.encode([Content(blue), Content(image=red), Content(blue, red)], query=query)
    for vector in (text, image, both):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(both, (text + image) / np.linalg.norm(text + image), atol=1e-6)
    assert (embedder.dimension, embedder.space) == (3, "ColourAPI/colours-1/3")


class Faulty(ColourAPI):
    """Its words are what it answers."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(number) for number in text.split()]

    _get_query_embedding = _get_text_embedding


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("answer", ["7", "1 2 3 4", "0 0 0", "nan 1 1", "1 inf 1"])
def test_what_is_no_vector_of_the_model_is_an_error(answer, query):
    """A single number was spread over all of them; nothing else had a direction."""
    with pytest.raises(ModelServerError, match=r"'colours-1' gave a vector of \d numbers .*; expected 3 numbers"):
        LlamaIndexEmbedder(Faulty(), dimension=3).encode([Content("1 0 0"), Content(answer)], query=query)


def test_a_model_of_texts_refuses_images_in_a_line():
    words = LlamaIndexEmbedder(MockEmbedding(8))
    assert words.encode([Content("red"), Content("")]).shape == (2, 8)
    with pytest.raises(QueryError, match="embeds texts and no images"):
        words.encode([Content(image=np.zeros((2, 2, 3), np.uint8))])


def test_it_indexes_and_searches(embedder, tmp_path):
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
    model = ComposedEmbedding(embedder)
    with open_store(tmp_path / "a.db", model) as store:
        ingest_images(tmp_path, store, model, show_progress=False)
        (first,) = ComposedRetriever(store, model, top_k=1).retrieve("blue")
    assert first.node.metadata["file_name"] == "blue.png"
