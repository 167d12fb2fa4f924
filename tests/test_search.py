"""The bundled model, real Milvus Lite and the retriever together: what a user does first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.schema import ImageDocument, ImageNode, QueryBundle
from PIL import Image

from mm_retriever import ComposedRetriever, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import catalogue, draw_theme


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twenty drawn products, and images in the modes that are prepared differently."""
    folder = tmp_path_factory.mktemp("search") / "photos"
    folder.mkdir()
    for number, product in enumerate(catalogue(20, seed=3)):
        product.draw(160).save(folder / f"{number:02d}.jpg")
    Image.open(folder / "00.jpg").convert("L").save(folder / "grey.png")
    Image.open(folder / "01.jpg").convert("CMYK").save(folder / "cmyk.jpg")
    Image.open(folder / "02.jpg").resize((90, 160)).save(folder / "tall.png")
    draw_theme("leopard", "orange", 1).save(folder.parent / "leopard.jpg")
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    with open_store(folder.parent / "photos.db", model) as store:
        report = ingest_images(folder, store, model, show_progress=False, batch_size=8)
        assert (report.indexed, report.skipped) == (23, ())
        yield store, model, folder


def test_ingested_vectors_are_those_of_the_embedding_itself(world):
    """Truth: `get_image_embedding` of the file; grey and CMYK images must not take another path."""
    store, model, _ = world
    rows = [row for page in store.scan(["file_path", "embedding"]) for row in page]
    expected = np.array(model.get_image_embedding_batch([row["file_path"] for row in rows]))
    np.testing.assert_allclose(np.array([row["embedding"] for row in rows]), expected, atol=1e-5)


def test_a_second_run_embeds_nothing(world):
    store, model, folder = world
    report = ingest_images(folder, store, model, show_progress=False)
    assert (report.embedded, report.unchanged) == (0, 23)


@pytest.mark.parametrize(("text", "image"), [("phone case with this", True), ("", True), ("a blue mug", False)])
def test_the_nearest_images_come_back_in_their_order(world, text, image):
    """Truth: the inner products with all vectors, by numpy."""
    store, model, folder = world
    path = str(folder.parent / "leopard.jpg") if image else None
    rows = [row for page in store.scan(["file_path", "embedding"]) for row in page]
    vector = np.array(model.get_query_bundle(text or None, path).embedding)
    scores = np.array([row["embedding"] for row in rows]) @ vector
    order = np.argsort(-scores)[:9]
    found = ComposedRetriever(store, model, top_k=9).retrieve(QueryBundle(text, image_path=path))
    np.testing.assert_allclose([one.score for one in found], scores[order], atol=1e-5)
    assert found[0].node.image_path == rows[order[0]]["file_path"]


def test_an_existing_llamaindex_app_gives_the_same_results(world):
    """With a text as it is, and with `get_query_bundle` for images and both."""
    store, model, folder = world
    index = VectorStoreIndex.from_vector_store(store, model)
    ours = ComposedRetriever(store, model, top_k=5)
    bundle = model.get_query_bundle("phone case with this", folder.parent / "leopard.jpg")
    for query in ("a red bag", bundle):
        theirs = index.as_retriever(similarity_top_k=5).retrieve(query)
        assert [one.node_id for one in theirs] == [one.node_id for one in ours.retrieve(query)]
        assert all(isinstance(one.node, ImageNode) for one in theirs)
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=3)
    assert len(engine.query(bundle).source_nodes) == 3


def test_a_pipeline_with_a_cache_stores_two_vectors_for_two_images(world, tmp_path):
    """Truth: `get_image_embedding`. LlamaIndex's cache key knows nothing of pixels."""
    _, model, folder = world
    paths = [folder / "00.jpg", folder / "05.jpg"]
    cache = IngestionCache()
    with open_store(tmp_path / "a.db", model) as store:
        for path in paths:
            pipeline = IngestionPipeline(transformations=[model], vector_store=store, cache=cache)
            pipeline.run(documents=[ImageDocument(id_=path.name, image_path=str(path))])
        rows = store.columns([path.name for path in paths], ["embedding"])
        for path in paths:
            np.testing.assert_allclose(rows[Path(path).name]["embedding"], model.get_image_embedding(path), atol=1e-5)
