"""One query image from the first call to the last: in whatever form it comes, wherever it is asked.

Truth: the order that the file's path gives. A reranker whose order depends on every pixel of the query image
(`PixelOrder`) tells whether the pixels arrived unchanged; the models of the package are the bundled small ones.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import logging
import pickle
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.indices.query.query_transform.base import HyDEQueryTransform, ImageOutputQueryTransform
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import ImageDocument, ImageNode, MediaResource, Node, NodeWithScore, QueryBundle
from PIL import Image

from mm_retriever.cli import main
from mm_retriever.embedding import VisualizedBGEEmbedding, node_images
from mm_retriever.engine import image_query_engine
from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image, pixel_digest, portable_image
from mm_retriever.rerank import Phi3VisionRerank, VisionLLMRerank
from mm_retriever.rerank.candidates import Candidate, Ranking, read_candidates
from mm_retriever.rerank.reranker import Meter, Query, Reranker
from mm_retriever.retriever import ComposedRetriever, KeepQueryImage
from mm_retriever.search_tools import Conversation, ImageSearch
from mm_retriever.store import ImageStore, open_store
from mm_retriever.tools import ImageSearchToolSpec
from tests.support.drawn_store import ScriptedLLM, draw_pictures, drawn_store, pictures_of, says

TEXT = "mug with this"
TOP_K = 6


class PixelOrder(Reranker):
    """Puts candidates in an order that is another one for every other query image."""

    model_name: str = "pixel order"
    top_n: int = TOP_K

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        assert query.image is not None
        order = list(range(len(candidates)))
        random.Random(pixel_digest(query.image) + query.text).shuffle(order)
        return Ranking(order, [float(-order.index(place)) for place in range(len(order))])


@dataclass(frozen=True)
class World:
    """A store of drawn products, what searches it, and the file in it that is the query."""

    store: ImageStore
    model: VisualizedBGEEmbedding
    path: Path
    vision: Phi3VisionRerank


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("query")
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    store = drawn_store(folder, model)
    path = folder / "pictures" / "phone case" / "natural leopard.jpg"
    yield World(store, model, path, Phi3VisionRerank("tiny", top_n=TOP_K, caption=False, reasons="none"))
    store.close()
    for file in _uploads:
        file.close()


_uploads: list[Any] = []


def upload(data: bytes) -> Any:
    """What web frameworks give: a temporary file that was read or written to its end."""
    file = tempfile.SpooledTemporaryFile(max_size=2**20)  # noqa: SIM115 - closed with the world
    file.write(data)
    _uploads.append(file)
    return file


def starlette_upload(data: bytes) -> Any:
    """The object itself, of which `read` must be awaited."""
    datastructures = pytest.importorskip("starlette.datastructures")
    return datastructures.UploadFile(upload(data), filename="photo.jpg")


def data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": str,
    "Path": Path,
    "bytes": Path.read_bytes,
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "PIL": Image.open,
    "data URI": lambda path: data_uri(path.read_bytes()),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "upload": lambda path: upload(path.read_bytes()),
    "UploadFile": lambda path: starlette_upload(path.read_bytes()),
    "numpy": lambda path: np.asarray(load_image(path)),
}
SIMILAR = ("Path", "memoryview", "BytesIO", "base64", "UploadFile")  # to another form, where a model looks at it


def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.node.node_id for node in nodes]


def retrieved(world: World, image: Any) -> list[NodeWithScore]:
    return ComposedRetriever(world.store, world.model, top_k=TOP_K).retrieve(world.model.get_query_bundle(TEXT, image))


def others(world: World, image: Any) -> list[NodeWithScore]:
    retriever = ComposedRetriever(world.store, world.model, top_k=TOP_K, exclude_query_image=True)
    return retriever.retrieve(world.model.get_query_bundle(TEXT, image))


def reranked(reranker: Reranker, count: int, world: World, image: Any) -> list[str]:
    bundle = world.model.get_query_bundle(TEXT, image)
    nodes = ComposedRetriever(world.store, world.model, top_k=count).retrieve(bundle)
    return ids(reranker.postprocess_nodes(nodes, query_bundle=bundle))


def likelihood(world: World, image: Any) -> list[str]:
    return reranked(world.vision, 3, world, image)


def sheet(world: World, image: Any) -> list[str]:
    return reranked(world.vision.model_copy(update={"mode": "sheet"}), 3, world, image)


def remote(world: World, image: Any) -> list[str]:
    """An LLM of which the answer depends on every byte of the query image that it was sent."""

    def answer(messages: Sequence[ChatMessage], **_: Any) -> ChatMessage:
        first = next(block for block in messages[-1].blocks if isinstance(block, ImageBlock))
        order = list(range(1, TOP_K + 1))
        random.Random(first.resolve_image().read()).shuffle(order)
        return says(json.dumps({"ranking": order}))

    llm = MockFunctionCallingLLM(response_generator=answer, is_chat_model=True)
    return reranked(VisionLLMRerank(llm, reasons="none"), TOP_K, world, image)


def engine(world: World, image: Any) -> list[str]:
    llm = ScriptedLLM.of(says("The first."))
    asked = image_query_engine(
        world.store, world.model, rerank=PixelOrder(), llm=llm, top_k=TOP_K, exclude_query_image=True
    )
    response = asked.query(world.model.get_query_bundle(TEXT, image))
    first = pictures_of(llm.asked[0])[0]
    return [*ids(response.source_nodes), pixel_digest(Image.open(first.resolve_image()))]


def tool(world: World, image: Any) -> list[str]:
    search = ImageSearch(world.store, world.model, rerank=PixelOrder())
    tools = ImageSearchToolSpec(search)
    tools.attach("photo", image)
    (searching,) = tools.to_tool_list(["search_images"])
    output = searching.call(text=TEXT, image="photo", top_k=TOP_K)
    assert not output.is_error, output.content
    return [one["id"] for one in output.raw_output["results"]]


def langchain(world: World, image: Any) -> list[str]:
    adapters = pytest.importorskip("langchain_mm_retriever")
    retriever = adapters.ComposedImageRetriever(
        store=world.store, embeddings=world.model, k=TOP_K, exclude_query_image=True
    )
    query = {"text": TEXT, "image": image}
    documents = adapters.RerankCompressor(reranker=PixelOrder()).compress_documents(retriever.invoke(query), query)
    return [document.id for document in documents]


def mcp(world: World, image: Any) -> list[str]:
    """MCP carries text: a path in an allowed folder, or a data URI."""
    pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
    from mcp.client.client import Client
    from mcp_server_mm_retriever import create_server

    policy = ImagePolicy(roots=(world.path.parent,))
    search = ImageSearch(world.store, world.model, rerank=PixelOrder(), image_policy=policy)
    arguments = {"text": TEXT, "image": str(portable_image(image)), "top_k": TOP_K}

    async def ask() -> list[str]:
        async with Client(create_server(search)) as client:
            found = await client.call_tool("search_images", arguments)
        assert not found.is_error, found.content
        return [one["id"] for one in found.structured_content["results"]]

    return asyncio.run(ask())


WAYS: dict[str, Callable[[World, Any], list[str]]] = {
    "retrieve": lambda world, image: ids(retrieved(world, image)),
    "exclude": lambda world, image: ids(others(world, image)),
    "likelihood": likelihood,
    "sheet": sheet,
    "remote": remote,
    "engine": engine,
    "agent tool": tool,
    "LangChain": langchain,
    "MCP": mcp,
}
_expected: dict[str, list[str]] = {}


@pytest.mark.parametrize(
    ("form", "way"),
    [
        pytest.param(form, way, marks=[pytest.mark.slow] * (form in SIMILAR and way in ("likelihood", "sheet")))
        for form in FORMS
        for way in WAYS
        if form != "path"
    ],
)
def test_every_form_of_the_query_image_gives_the_order_of_its_path(world: World, form: str, way: str) -> None:
    if way not in _expected:
        _expected[way] = WAYS[way](world, str(world.path))
        assert len(set(_expected[way])) >= 3
    assert WAYS[way](world, FORMS[form](world.path)) == _expected[way]


def test_python_engine_agent_langchain_and_mcp_give_one_order(world: World) -> None:
    bundle = world.model.get_query_bundle(TEXT, world.path.read_bytes())
    retriever = ComposedRetriever(world.store, world.model, top_k=9, exclude_query_image=True)
    expected = ids(PixelOrder().postprocess_nodes(retriever.retrieve(bundle)[:TOP_K], query_bundle=bundle))
    assert engine(world, world.path)[:-1] == langchain(world, world.path) == expected
    assert tool(world, world.path) == mcp(world, world.path)  # these choose from more candidates
    assert set(tool(world, world.path)) <= set(ids(retriever.retrieve(bundle)))


# ---------------------------------------------------------------------------------------- what a bundle carries


def test_a_bundle_carries_the_bytes_that_were_given_and_exactly_the_pixels_of_an_image_without_a_file(
    world: World,
) -> None:
    data = world.path.read_bytes()
    uri = world.model.get_query_bundle(TEXT, io.BytesIO(data)).image_path
    assert base64.b64decode(uri.partition(",")[2]) == data
    assert uri.startswith("data:image/jpeg;base64,")
    photo = Image.open(world.path)
    for image in (photo, photo.convert("L"), photo.convert("CMYK"), photo.convert("RGBA"), photo.convert("P")):
        bundle = world.model.get_query_bundle(None, image)
        assert bundle.query_str == ""
        assert load_image(bundle.image_path).tobytes() == load_image(image).tobytes()
        assert np.allclose(bundle.embedding, world.model.get_image_embedding(image), atol=1e-6)


def test_a_bundle_is_copied_pickled_and_written_as_json_with_its_image(world: World) -> None:
    bundle = world.model.get_query_bundle(TEXT, world.path.read_bytes())
    expected = ids(others(world, world.path))
    retriever = ComposedRetriever(world.store, world.model, top_k=TOP_K, exclude_query_image=True)
    for twin in (
        copy.deepcopy(bundle),
        pickle.loads(pickle.dumps(bundle)),
        replace(bundle),
        QueryBundle.from_json(bundle.to_json()),
        QueryBundle(TEXT, image_path=bundle.image_path),
        QueryBundle(TEXT, image_path=world.path),  # type: ignore[arg-type]
        QueryBundle(TEXT, image_path=world.path.read_bytes()),  # type: ignore[arg-type]
        QueryBundle(TEXT, image_path=Image.open(world.path)),  # type: ignore[arg-type]
    ):
        assert ids(retriever.retrieve(twin)) == expected
        assert ids(asyncio.run(retriever.aretrieve(twin))) == expected
    for twin in (copy.deepcopy(bundle.image_path), pickle.loads(pickle.dumps(bundle.image_path))):
        assert (twin, repr(twin)) == (bundle.image_path, repr(bundle.image_path))


def test_an_engine_asked_from_an_event_loop_shows_the_same_image(world: World) -> None:
    async def ask(image: Any) -> list[str]:
        llm = ScriptedLLM.of(says("The first."))
        asked = image_query_engine(world.store, world.model, rerank=PixelOrder(), llm=llm, top_k=3)
        response = await asked.aquery(await world.model.aget_query_bundle(None, image))
        return [*ids(response.source_nodes), pixel_digest(Image.open(pictures_of(llm.asked[0])[0].resolve_image()))]

    assert asyncio.run(ask(world.path.read_bytes())) == asyncio.run(ask(world.path))


def test_words_of_white_space_beside_an_image_are_no_words(world: World) -> None:
    blank, alone = (world.model.get_query_bundle(text, world.path.read_bytes()) for text in ("  ", None))
    assert (blank.query_str, blank.embedding) == (alone.query_str, alone.embedding)


def test_an_upload_can_still_be_saved_after_it_was_the_query(world: World) -> None:
    """It stays open, and where it was."""
    file = io.BytesIO(world.path.read_bytes())
    world.model.get_query_bundle(TEXT, file)
    assert file.read() == world.path.read_bytes()
    end = upload(world.path.read_bytes())
    world.model.get_query_bundle(TEXT, end)
    assert end.tell() == len(world.path.read_bytes())


def test_an_upload_that_can_only_be_awaited_is_refused_with_what_to_do() -> None:
    class Awaited:
        async def read(self, size: int = -1) -> bytes:
            return b""

    with pytest.raises(ImageLoadError, match=r"give the bytes: await file.read\(\)"):
        load_image(Awaited())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros(7, np.uint8),
        np.zeros((4, 5), np.int64),
        np.zeros((4, 5, 3), bool),
        np.zeros((0, 5), np.uint8),
        np.zeros((4, 5), object),
    ],
)
def test_an_array_that_can_be_read_in_several_ways_is_refused_with_what_is_taken(array: Any) -> None:
    with pytest.raises(ImageLoadError, match=r"give uint8 of shape|no pixels"):
        load_image(array)


def test_arrays_of_grey_of_transparency_and_of_truth_values_are_images() -> None:
    """Truth: Pillow's own reading of the same arrays."""
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert load_image(grey).tobytes() == load_image(Image.fromarray(grey)).tobytes()
    assert load_image(grey[:, :, None]).tobytes() == load_image(grey).tobytes()
    assert load_image(grey[::-1, ::2]).tobytes() == load_image(Image.fromarray(grey[::-1, ::2].copy())).tobytes()
    assert load_image(grey > 9).tobytes() == load_image(Image.fromarray(grey > 9)).tobytes()
    clear = np.zeros((2, 2, 4), np.uint8)
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_the_image_of_a_url_is_fetched_once_and_left_out_by_its_url_too(world: World, tmp_path: Path) -> None:
    """Rerankers that may not fetch, and addresses that answer once, are served too."""
    data, asked = world.path.read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/photo.jpg?signature=secret"
        policy = ImagePolicy(allow_urls=True, allow_private_addresses=True)
        bundle = world.model.get_query_bundle(TEXT, url, image_policy=policy)
        with pytest.raises(ImageLoadError, match="fetching URLs is off"):
            world.model.get_query_bundle(TEXT, url)
    finally:
        server.shutdown()
        server.server_close()
    assert "secret" not in repr(bundle)
    nodes = ComposedRetriever(world.store, world.model, top_k=TOP_K, exclude_query_image=True).retrieve(bundle)
    assert ids(nodes) == ids(others(world, world.path))
    by_path = replace(bundle, image_path=str(world.path))
    assert ids(PixelOrder().postprocess_nodes(nodes, bundle)) == ids(PixelOrder().postprocess_nodes(nodes, by_path))
    assert len(asked) == 1
    elsewhere = ImageNode(id_="elsewhere", image_url=url, embedding=bundle.embedding)  # of which no digest is known
    other = ImageNode(id_="other", image_url=url + "&page=2", embedding=bundle.embedding)
    with open_store(tmp_path / "urls.db", world.model) as store:
        store.add([elsewhere, other])
        found = ComposedRetriever(store, world.model, exclude_query_image=True).retrieve(bundle)
    assert ids(found) == ["other"]


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


# ---------------------------------------------------------------------------------------- transforms of queries


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


# ---------------------------------------------------------------------------------------- what logs and events say


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


# ---------------------------------------------------------------------------------------- one node, one image


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


# ---------------------------------------------------------------------------------------- policies and the command line


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


def test_the_command_line_takes_a_path_and_a_data_uri_alike(
    tmp_path: Path, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, db = draw_pictures(tmp_path / "pictures"), tmp_path / "drawn.db"
    path = folder / "phone case" / "natural leopard.jpg"

    def run(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert not ended.value.code, err
        return out

    run("index", folder, "--db", db, "--model", "tiny")
    asked = ("search", "--db", db, "--model", "tiny", "-t", TEXT, "--exclude-query", "-k", 3)
    uri = data_uri(path.read_bytes())
    rows = [json.loads(run(*asked, "--json", "--rerank", "-i", image)) for image in (path, uri)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    page = tmp_path / "page.html"
    shown = run(*asked, "-i", uri, "--html", page)
    assert uri[100:150] not in shown
    assert page.read_text(encoding="utf-8").count("data:image/") == 4
