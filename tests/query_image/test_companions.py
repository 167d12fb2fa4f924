"""The query image through LlamaIndex's own parts, events, logs, policies and what is left out."""

from __future__ import annotations

import base64
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.indices.query.query_transform.base import HyDEQueryTransform, ImageOutputQueryTransform
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import ImageDocument, ImageNode, MediaResource, Node, NodeWithScore, QueryBundle
from PIL import Image

from mm_retriever.embedding import node_images
from mm_retriever.engine import image_query_engine
from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.rerank.scorer import read_candidates
from mm_retriever.retriever import ComposedRetriever, KeepQueryImage
from mm_retriever.search_tools import Conversation, ImageSearch
from tests.support.query_image import (
    TEXT,
    TOP_K,
    PixelOrder,
    World,
    data_uri,
    ids,
    others,
    retrieved,
)


def test_retrievers_and_engines_of_llamaindex_hand_the_image_on(world: World) -> None:
    index = VectorStoreIndex.from_vector_store(world.store, embed_model=world.model)
    plain = index.as_retriever(similarity_top_k=TOP_K)
    fusion = QueryFusionRetriever([plain], llm=MockLLM(), num_queries=1, similarity_top_k=TOP_K, use_async=False)
    for retriever in (plain, fusion):
        engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM(), node_postprocessors=[PixelOrder()])
        by_path, by_bytes = (
            ids(engine.query(world.model.get_query_bundle(TEXT, form)).source_nodes)
            for form in (world.path, world.path.read_bytes())
        )
        assert by_path == by_bytes
        bundle = world.model.get_query_bundle(TEXT, world.path)
        assert by_path == ids(PixelOrder().postprocess_nodes(retrieved(world, world.path), query_bundle=bundle))


def test_several_texts_of_a_bundle_are_averaged_together_with_its_image(world: World) -> None:
    """Truth: the mean that LlamaIndex takes of several texts, here of text and image together."""
    texts = ["mug with this", "umbrella with this"]
    retriever = ComposedRetriever(world.store, world.model, top_k=TOP_K)
    image = str(world.path)
    mean = np.mean([world.model.get_composed_embedding(text, image) for text in texts], axis=0).tolist()
    found = retriever.retrieve(QueryBundle("ignored", image_path=image, custom_embedding_strs=texts))
    assert ids(found) == ids(retriever.retrieve(QueryBundle("ignored", embedding=mean)))


def test_a_transform_of_the_words_keeps_the_image(world: World) -> None:
    bundle = world.model.get_query_bundle(TEXT, world.path.read_bytes())
    hyde = HyDEQueryTransform(MockLLM(max_tokens=4))
    assert hyde.run(bundle).image_path is None  # if that ever changes, KeepQueryImage is no longer needed
    kept = KeepQueryImage(hyde).run(bundle)
    assert (kept.image_path, kept.query_str, len(kept.custom_embedding_strs)) == (bundle.image_path, TEXT, 2)
    assert ImageOutputQueryTransform().run(bundle).image_path == bundle.image_path
    engine = image_query_engine(world.store, world.model, rerank=PixelOrder(), top_k=TOP_K, exclude_query_image=True)
    transformed = TransformQueryEngine(engine, KeepQueryImage(hyde))
    bundles = [world.model.get_query_bundle(TEXT, form) for form in (world.path, world.path.read_bytes())]
    by_path, by_bytes = (ids(transformed.query(bundle).source_nodes) for bundle in bundles)
    assert by_path == by_bytes


class Heard(BaseEventHandler):
    """Keeps what every event looks like in a log."""

    shown: list[str] = []  # noqa: RUF012 (a pydantic field)

    def handle(self, event: Any, **_: Any) -> None:
        self.shown.append(repr(event) + str(event.model_dump()))


def test_events_logs_callbacks_and_errors_name_the_image_and_never_hold_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, "PNG")
    inside = base64.b64encode(file.getvalue()).decode()[2000:2100]
    handler, dispatcher, debug = Heard(shown=[]), get_dispatcher(), LlamaDebugHandler(print_trace_on_end=False)
    dispatcher.add_event_handler(handler)
    world.model.callback_manager = CallbackManager([debug])
    try:
        with caplog.at_level(logging.DEBUG):
            for image in (file.getvalue(), "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()):
                bundle = world.model.get_query_bundle(TEXT, image)
                assert inside not in repr(bundle)
                assert inside in bundle.image_path
                query = image_query_engine(
                    world.store, world.model, rerank=PixelOrder(), top_k=3, callback_manager=CallbackManager([debug])
                )
                query.query(bundle)
                PixelOrder().rerank(retrieved(world, world.path), TEXT, query_image=image)
    finally:
        dispatcher.event_handlers.remove(handler)
        world.model.callback_manager = CallbackManager([])
    assert len(handler.shown) > 10
    payloads = [str(event.payload) for pair in debug.get_event_pairs() for event in pair]
    assert not [text[:300] for text in (*handler.shown, *payloads, caplog.text) if inside in text]
    damaged = "data:image/png;base64," + base64.b64encode(file.getvalue()[:3000]).decode()
    for attempt in (
        lambda: world.model.get_query_bundle(TEXT, damaged),
        lambda: PixelOrder().rerank(retrieved(world, world.path), QueryBundle(TEXT, image_path=damaged)),
        lambda: ImageSearch(world.store, world.model).search(TEXT, damaged),
        lambda: load_image("data:image/png;base64," + "A!" * 5000),
    ):
        with pytest.raises(ImageLoadError) as caught:
            attempt()
        assert len(str(caught.value)) < 400


def test_the_event_of_a_reranking_tells_of_the_query_image_that_was_given_beside_the_bundle(world: World) -> None:
    handler = Heard(shown=[])
    get_dispatcher().add_event_handler(handler)
    try:
        PixelOrder().rerank(retrieved(world, world.path), TEXT, query_image=world.path)
        PixelOrder().rerank(retrieved(world, world.path), TEXT, query_image=Image.open(world.path))
    finally:
        get_dispatcher().event_handlers.remove(handler)
    starts = [text for text in handler.shown if text.startswith("ReRankStartEvent")]
    assert str(world.path) in starts[0]
    assert "160x160" in starts[1]


def test_a_query_image_that_cannot_be_read_is_left_out_by_its_name_with_a_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = world.model.get_query_bundle(TEXT, world.path)
    gone = replace(bundle, image_path="gone.png")
    ComposedRetriever(world.store, world.model, top_k=2, exclude_query_image=True).retrieve(gone)
    assert "by its path alone" in caplog.text


def test_the_pixels_of_an_image_without_a_file_are_left_out_and_others_of_its_size_stay(world: World) -> None:
    photo = load_image(world.path)
    assert str(world.path) not in [one.node.metadata["file_path"] for one in others(world, photo)]
    changed = photo.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert len(others(world, changed)) == TOP_K
    assert retrieved(world, changed)[0].node.node_id in ids(others(world, changed))


def test_a_node_with_a_path_and_bytes_is_one_image_for_embedding_and_reranking(world: World, tmp_path: Path) -> None:
    """Its path, which is what a store keeps; its bytes where the path cannot be read."""
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "red.png")
    file = io.BytesIO()
    blue.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    path, gone = str(tmp_path / "red.png"), str(tmp_path / "gone.png")
    nodes = [
        (ImageNode(image_path=path, image=data), red),
        (ImageDocument(image_path=path, image=data), blue),  # LlamaIndex keeps the bytes alone
        (Node(image_resource=MediaResource(path=Path(path), data=file.getvalue())), red),
        (ImageNode(image_path=gone, image=data), blue),
        (ImageNode(image="data:image/png;base64," + data), blue),
    ]
    embedded = world.model([node for node, _ in nodes])
    candidates = read_candidates([NodeWithScore(node=node) for node, _ in nodes], ImagePolicy())
    for node, candidate, (_, expected) in zip(embedded, candidates, nodes, strict=True):
        assert candidate.image is not None
        assert candidate.image.tobytes() == expected.tobytes()
        assert np.allclose(node.embedding, world.model.get_image_embedding(expected), atol=1e-6)
    assert len(node_images(nodes[0][0])) == 2
    with pytest.raises(ImageLoadError, match=r"gone.png.*; cannot load 'data:"):
        world.model([ImageNode(image_path=gone, image="no base64 !")])


def test_a_search_reads_images_under_its_own_policy_not_under_the_embedders(world: World) -> None:
    strict, data = ImagePolicy(max_pixels=100), world.path.read_bytes()
    narrow = world.model.model_copy(update={"image_policy": strict})
    with pytest.raises(ImageLoadError, match="max_pixels"):
        narrow.get_query_bundle(TEXT, data)
    assert ImageSearch(world.store, narrow).search(TEXT, data_uri(data)).results
    with pytest.raises(ImageLoadError, match="max_pixels"):
        ImageSearch(world.store, world.model, image_policy=strict).search(TEXT, data_uri(data))
    talk = Conversation()
    talk.attach("photo", data)  # the host's own policy, also for what is read later
    assert (
        ImageSearch(world.store, world.model, stored_policy=replace(strict, max_pixels=160 * 160))
        .search(TEXT, "photo", conversation=talk)
        .results
    )
