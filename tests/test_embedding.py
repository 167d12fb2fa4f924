"""`VisualizedBGEEmbedding` inside LlamaIndex: the same vectors on every path, right images, free event loop."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import multiprocessing
import pickle
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import QueryBundle, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, Node, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from mm_retriever.devices import PASS_VALUES
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.registry import convert_model
from mm_retriever.embedding import ComposedEmbedding, VisualizedBGEEmbedding, node_image
from mm_retriever.errors import CheckpointError, ImageLoadError, ModelNotFoundError, QueryError, VectorCacheError
from mm_retriever.images import ImagePolicy, read_image_bytes
from mm_retriever.vector_cache import VectorCache
from tests.support.golden import small_model, word_tokenizer
from tests.support.mean_colour import MeanColour

WORDS = ["red", "blue", "shoe", "mug", "with", "stars"]
TEXTS = ["red shoe", "mug", "", "blue mug with stars " * 4, "red", "red shoe", "unknown words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded model of odd sizes, saved as the real one is."""
    path = tmp_path_factory.mktemp("model")
    model = small_model()
    model.save_pretrained(path)
    word_tokenizer(model.config, WORDS).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding(folder, device="cpu", embed_batch_size=3)


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven images of different sizes, modes and formats."""
    path = tmp_path_factory.mktemp("pictures")
    made = []
    for number, (size, mode, suffix) in enumerate(
        [
            ((60, 80), "RGB", "png"),
            ((48, 48), "L", "png"),
            ((130, 50), "CMYK", "jpg"),
            ((90, 61), "RGBA", "png"),
            ((50, 99), "P", "gif"),
            ((70, 70), "RGB", "webp"),
            ((49, 200), "RGB", "jpg"),
        ]
    ):
        image = Image.new("RGB", size, (30 * number, 255 - 30 * number, 80))
        ImageDraw.Draw(image).ellipse((5, 5, 20 + 4 * number, 40), fill=(255, 20 * number, 0))
        made.append(path / f"{number}.{suffix}")
        image.convert(mode).save(made[-1])
    return made


def close(ours: Any, theirs: Any) -> bool:
    return bool(np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 2e-6)


def test_every_path_gives_the_same_vectors(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """One by one, in batches with others of any length, async: the same numbers, in the order given."""
    images: list[Any] = list(image_paths)
    singles = {
        "text": [model.get_text_embedding(text) for text in TEXTS],
        "query": [model.get_query_embedding(text) for text in TEXTS],
        "image": [model.get_image_embedding(image) for image in images],
        "composed": [model.get_composed_embedding(text, image) for text, image in zip(TEXTS, images, strict=True)],
    }
    batches = {
        "text": model.get_text_embedding_batch(TEXTS),
        "query": model.get_text_embedding_batch(TEXTS),
        "image": model.get_image_embedding_batch(images),
        "composed": model.get_composed_embedding_batch(TEXTS, images),
    }

    async def concurrently() -> dict[str, Any]:
        return {
            "text": await model.aget_text_embedding_batch(TEXTS),
            "query": await asyncio.gather(*(model.aget_query_embedding(text) for text in TEXTS)),
            "image": await model.aget_image_embedding_batch(images),
            "composed": await model.aget_composed_embedding_batch(TEXTS, images),
        }

    later = asyncio.run(concurrently())
    for kind, expected in singles.items():
        assert close(batches[kind], expected), kind
        assert close(later[kind], expected), kind
        assert np.asarray(expected).shape == (7, model.dimension) == (7, 40)
        assert close(np.linalg.norm(expected, axis=1), np.ones(7))
    assert close(
        asyncio.run(model.aget_composed_embedding(TEXTS[0], images[0])),
        singles["composed"][0],
    )
    assert close(asyncio.run(model.aget_image_embedding(images[1])), singles["image"][1])
    assert close(asyncio.run(model.aget_text_embedding(TEXTS[3])), singles["text"][3])


def test_an_image_with_an_empty_text_is_the_image(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """Definition in the original; and text moves the vector."""
    alone = model.get_image_embedding(image_paths[0])
    assert close(model.get_composed_embedding("", image_paths[0]), alone)
    assert not close(model.get_composed_embedding("red", image_paths[0]), alone)


def test_every_kind_of_source_is_the_same_image(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """Path, string, bytes, file object, PIL, and the fast path that ingestion takes."""
    path = image_paths[2]
    with Image.open(path) as opened:
        opened.load()
        sources: list[Any] = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), opened]
        vectors = model.get_image_embedding_batch(sources)
        fast = model.embed_images([opened, model.prepare_image(opened)])
    assert fast.dtype == np.float32
    assert close([*vectors, *fast], [vectors[0]] * 7)


def test_passes_of_any_size_give_the_same_vectors(
    model: VisualizedBGEEmbedding, image_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass holds as many rows as fit, one at least; an image beside several texts is looked at once."""
    texts, images = TEXTS * 2, [*image_paths, *[image_paths[0]] * 7]
    expected = model.get_composed_embedding_batch(texts, images)
    for values in (1, 3000, 10**9):
        monkeypatch.setitem(PASS_VALUES, "cpu", values)
        assert close(model.get_composed_embedding_batch(texts, images), expected)
        assert close(model.get_text_embedding_batch(texts[:7]), [model.get_text_embedding(text) for text in TEXTS])
    looked_at: list[int] = []
    tower: Any = model.encoder.model.model_visual["visual"]
    hook = tower.register_forward_hook(lambda _, args, __: looked_at.append(len(args[0])))
    model.get_composed_embedding_batch(["red", "blue", "mug"], [image_paths[0]] * 3)
    hook.remove()
    assert looked_at == [1]


def test_nothing_gives_nothing(model: VisualizedBGEEmbedding) -> None:
    """Our choice: an empty batch is not an error."""
    assert model.get_text_embedding_batch([], show_progress=True) == []
    assert model.get_image_embedding_batch([]) == []
    assert model.embed_images([]).shape == (0, 40)
    assert list(model([])) == []


def test_text_of_any_length_beside_an_image_is_cut_not_refused(
    model: VisualizedBGEEmbedding, image_paths: list[Path]
) -> None:
    """The original crashes on it."""
    endless = "red shoe " * 5000
    vectors = model.get_composed_embedding_batch([endless, endless + "mug"], [image_paths[0], image_paths[0]])
    assert close(vectors[0], vectors[1])
    assert close(model.get_text_embedding(endless), model.get_text_embedding(endless + "mug"))


def test_a_bad_image_is_named(model: VisualizedBGEEmbedding, image_paths: list[Path], tmp_path: Path) -> None:
    """In a batch too; and no thread is left behind."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(image_paths[6].read_bytes()[:200])
    for call in (
        lambda: model.get_image_embedding(broken),
        lambda: model.get_image_embedding_batch([*image_paths, broken], show_progress=True),
        lambda: model.get_composed_embedding("red", broken),
        lambda: model([ImageNode(image_path=str(broken))]),
    ):
        with pytest.raises(ImageLoadError, match=r"broken\.jpg"):
            call()
    assert not any(thread.name.startswith("read-picture") for thread in threading.enumerate())


def test_images_outside_the_policy_are_not_read(folder: Path, image_paths: list[Path], tmp_path: Path) -> None:
    """The policy holds on every path into the class."""
    shut = VisualizedBGEEmbedding(folder, device="cpu", image_policy=ImagePolicy(roots=(tmp_path,)))
    for call in (
        lambda: shut.get_image_embedding(image_paths[0]),
        lambda: shut.get_composed_embedding_batch(["red"], [image_paths[0]]),
        lambda: shut.get_query_bundle("red", image_paths[0]),
        lambda: shut([ImageNode(image_path=str(image_paths[0]))]),
        lambda: shut([ImageNode(image_url="http://example.com/x.png")]),
    ):
        with pytest.raises(ImageLoadError):
            call()


def test_pairs_must_pair(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """Our choice."""
    with pytest.raises(QueryError, match="2 texts and 1 images"):
        model.get_composed_embedding_batch(["red", "blue"], [image_paths[0]])


def test_half_precision_points_the_same_way(
    folder: Path, model: VisualizedBGEEmbedding, image_paths: list[Path]
) -> None:
    """Our bound for a small random model: such vectors may be compared, so the float format is a note."""
    half = VisualizedBGEEmbedding(folder, device="cpu", dtype="bfloat16")
    ours = np.asarray(half.get_composed_embedding_batch(TEXTS, image_paths))
    theirs = np.asarray(model.get_composed_embedding_batch(TEXTS, image_paths))
    assert (ours * theirs).sum(1).min() > 0.99
    assert half.model_id == model.model_id
    assert (half.model_note, model.model_note) == (f"{folder.name}, bfloat16", f"{folder.name}, float32")


# ------------------------------------------------------------------------------------------------------------ queries


def test_a_query_bundle_carries_the_composed_vector(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """Text, image, both; from the event loop as well."""
    both = model.get_query_bundle("red shoe", image_paths[0])
    assert isinstance(both, QueryBundle)
    assert (both.query_str, both.image_path) == ("red shoe", str(image_paths[0]))
    assert close(both.embedding, model.get_composed_embedding("red shoe", image_paths[0]))
    assert close(asyncio.run(model.aget_query_bundle("red shoe", image_paths[0])).embedding, both.embedding)
    text = model.get_query_bundle("red shoe")
    assert text.image_path is None
    assert close(text.embedding, model.get_query_embedding("red shoe"))
    alone_bundle = model.get_query_bundle(image=image_paths[0].read_bytes())
    assert alone_bundle.query_str == ""
    assert read_image_bytes(alone_bundle.image_path or "") == image_paths[0].read_bytes()
    assert close(alone_bundle.embedding, model.get_image_embedding(image_paths[0]))


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_a_query_of_nothing_is_refused(model: VisualizedBGEEmbedding, text: str | None) -> None:
    """Our choice."""
    with pytest.raises(QueryError, match="give a text, an image, or both"):
        model.get_query_bundle(text)


def test_an_existing_index_answers_a_composed_query(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """LlamaIndex's own in-memory index and retriever, which know nothing of images."""
    vectors = model.get_composed_embedding_batch(TEXTS, image_paths)
    nodes = [TextNode(text=path.name, embedding=vector) for path, vector in zip(image_paths, vectors, strict=True)]
    retriever = VectorStoreIndex(nodes, embed_model=model).as_retriever(similarity_top_k=1)
    for text, path in zip(TEXTS, image_paths, strict=True):
        (found,) = retriever.retrieve(model.get_query_bundle(text, path))
        assert found.text == path.name
        assert found.score == pytest.approx(1.0, abs=1e-5)


# ------------------------------------------------------------------------------------------------------ transformation


def test_nodes_get_the_vector_of_what_they_are(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """Images by their pixels in every form LlamaIndex has for them, text by its text."""
    path = image_paths[0]
    data = path.read_bytes()
    image_nodes = [
        ImageNode(image_path=str(path)),
        ImageNode(image_path=str(path), text="red shoe"),
        ImageDocument(image_path=str(path)),
        ImageDocument(image=data),
        Node(image_resource=MediaResource(path=path)),
        Node(image_resource=MediaResource(data=data)),
        Document(image_resource=MediaResource(path=path), text="red"),
    ]
    text_nodes = [
        TextNode(text="red shoe"),
        Document(text="red shoe"),
        Node(text_resource=MediaResource(text="red shoe")),
    ]
    nodes = list(model([*image_nodes, *text_nodes]))
    expected = model.get_image_embedding(path)
    assert all(close(node.embedding, expected) for node in nodes[:7])
    assert all(close(node.embedding, model.get_text_embedding("red shoe")) for node in nodes[7:])
    assert node_image(ImageNode()) is None


def test_image_and_text_are_composed_on_request(folder: Path, image_paths: list[Path]) -> None:
    """Text without metadata that a node hides from embeddings; a node without text stays its image."""
    composing = VisualizedBGEEmbedding(folder, device="cpu", compose_nodes=True)
    nodes = [
        ImageNode(
            image_path=str(image_paths[0]), text="red shoe", metadata={"id": 7}, excluded_embed_metadata_keys=["id"]
        ),
        ImageNode(image_path=str(image_paths[0]), metadata={"id": 7}),
        TextNode(text="red shoe"),
    ]
    composing(nodes)
    assert close(nodes[0].embedding, composing.get_composed_embedding("red shoe", image_paths[0]))
    assert close(nodes[1].embedding, composing.get_image_embedding(image_paths[0]))
    assert close(nodes[2].embedding, composing.get_text_embedding("red shoe"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_cached_pipeline_never_takes_one_image_for_another(
    model: VisualizedBGEEmbedding, image_paths: list[Path], asynchronous: bool
) -> None:
    """LlamaIndex's cache key ignores pixels: without our guard the second run returns the first run's nodes."""
    pipeline = IngestionPipeline(transformations=[model], cache=IngestionCache())

    def run(*images: bytes) -> list[Any]:
        nodes = [ImageNode(image=ImageDocument(image=data).image) for data in images]
        found = asyncio.run(pipeline.arun(nodes=nodes)) if asynchronous else pipeline.run(nodes=nodes)
        return [node.embedding for node in found]

    data = [path.read_bytes() for path in image_paths]
    expected = [model.get_image_embedding(path) for path in image_paths]
    assert close(run(data[0], data[1]), expected[:2])
    assert close(run(data[2], data[3]), expected[2:4])
    assert close(run(data[0], data[1]), expected[:2])
    assert not close(expected[0], expected[1])


def test_a_file_that_changes_gets_a_new_vector_in_a_cached_pipeline(
    model: VisualizedBGEEmbedding, image_paths: list[Path], tmp_path: Path
) -> None:
    """The same path, other pixels."""
    pipeline = IngestionPipeline(transformations=[model], cache=IngestionCache())
    path = tmp_path / "picture.png"
    for source in (image_paths[0], image_paths[1]):
        path.write_bytes(source.read_bytes())
        (node,) = pipeline.run(nodes=[ImageNode(image_path=str(path))])
        assert close(node.embedding, model.get_image_embedding(source))


@pytest.mark.slow
def test_a_pipeline_of_processes_loads_the_model_in_each(
    model: VisualizedBGEEmbedding, image_paths: list[Path]
) -> None:
    """What crosses to another process is where the model lies, not its weights."""
    carried = pickle.dumps(model)
    assert len(carried) < 4000
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        vector = other.submit(model.get_image_embedding, str(image_paths[0])).result()
    assert close(vector, model.get_image_embedding(image_paths[0]))


def test_a_process_that_cannot_load_a_pickled_model_says_why(model: VisualizedBGEEmbedding) -> None:
    """LlamaIndex's own unpickling goes on with half a model."""
    elsewhere = copy.copy(model)
    elsewhere.device = "no such device"
    carried = pickle.dumps(elsewhere)
    with pytest.raises(CheckpointError, match="no such device"):
        pickle.loads(carried)


def test_to_dict_describes_and_from_dict_restores(folder: Path, tmp_path: Path) -> None:
    """LlamaIndex's serialisation, policy included; it names weights and dtype, which a pipeline's cache must see."""
    first = VisualizedBGEEmbedding(folder, device="cpu", dtype="float16", image_policy=ImagePolicy(roots=(tmp_path,)))
    described = first.to_dict()
    assert described["model_id"] == first.model_id
    again = VisualizedBGEEmbedding.from_dict(described)
    assert (again.model_id, again.image_policy, again.dtype) == (first.model_id, first.image_policy, "float16")
    assert VisualizedBGEEmbedding.from_json(first.to_json()).model_id == first.model_id
    assert isinstance(first, MultiModalEmbedding)


# -------------------------------------------------------------------------------------------------- events and progress


class Heard(BaseEventHandler):
    @classmethod
    def class_name(cls) -> str:
        return "Heard"

    def handle(self, event: Any, **kwargs: Any) -> None:
        EVENTS.append(event)


EVENTS: list[Any] = []


class Called(BaseCallbackHandler):
    def __init__(self) -> None:
        super().__init__([], [])
        self.payloads: list[dict[str, Any]] = []

    def on_event_start(self, event_type: Any, payload: Any = None, **kwargs: Any) -> str:
        return ""

    def on_event_end(self, event_type: Any, payload: Any = None, **kwargs: Any) -> None:
        if event_type == CBEventType.EMBEDDING:
            self.payloads.append(payload)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


@pytest.mark.parametrize("asynchronous", [False, True])
def test_images_send_the_events_that_texts_send(folder: Path, image_paths: list[Path], asynchronous: bool) -> None:
    """Instrumentation and callbacks, one start and one end a batch, with names and vectors."""
    called = Called()
    model = VisualizedBGEEmbedding(folder, device="cpu", embed_batch_size=4, callback_manager=CallbackManager([called]))
    root = get_dispatcher()
    root.add_event_handler(Heard())
    EVENTS.clear()
    try:
        for sync, later, arguments in [
            (model.get_text_embedding_batch, model.aget_text_embedding_batch, [TEXTS]),
            (model.get_image_embedding_batch, model.aget_image_embedding_batch, [image_paths]),
            (model.get_composed_embedding_batch, model.aget_composed_embedding_batch, [TEXTS, image_paths]),
        ]:
            asyncio.run(later(*arguments)) if asynchronous else sync(*arguments)  # type: ignore[operator]
        model.get_image_embedding(image_paths[0])
    finally:
        root.event_handlers.pop()
    ends = [event for event in EVENTS if isinstance(event, EmbeddingEndEvent)]
    assert len([event for event in EVENTS if isinstance(event, EmbeddingStartEvent)]) == len(ends) == 7
    assert [len(event.chunks) for event in ends] == [4, 3, 4, 3, 4, 3, 1]
    assert sorted(ends[2].chunks + ends[3].chunks) == sorted(repr(str(path)) for path in image_paths)
    assert any(chunk.endswith("+ red shoe") for chunk in ends[4].chunks + ends[5].chunks)
    assert [len(payload[EventPayload.EMBEDDINGS]) for payload in called.payloads] == [4, 3, 4, 3, 4, 3, 1]


class Spans(SimpleSpanHandler):
    @classmethod
    def class_name(cls) -> str:
        return "Spans"


def test_images_and_pairs_have_spans_as_texts_have(model: VisualizedBGEEmbedding, image_paths: list[Path]) -> None:
    """Tracers (OpenTelemetry, through openinference) make one span of each span of LlamaIndex's dispatcher."""
    root, spans = get_dispatcher(), Spans()
    root.add_span_handler(spans)
    try:
        model.get_text_embedding_batch(TEXTS[:1])
        model.get_image_embedding(image_paths[0])
        model.get_image_embedding_batch(image_paths[:1])
        model.get_composed_embedding("red", image_paths[0])
        asyncio.run(model.aget_composed_embedding_batch(["red"], image_paths[:1]))
        model.embed(images=image_paths[:1])
    finally:
        root.span_handlers.remove(spans)
    called = [span.id_.split("-")[0].split(".")[1] for span in spans.completed_spans]
    assert called == [
        "get_text_embedding_batch",
        "get_image_embedding",
        "get_image_embedding_batch",
        "get_composed_embedding",
        "get_composed_embedding_batch",
        "embed",
    ]


def test_one_call_embeds_texts_images_and_pairs_as_an_array(
    model: VisualizedBGEEmbedding, image_paths: list[Path]
) -> None:
    """Row by row what the single calls give; a place may have only the text or only the image."""
    assert np.allclose(model.embed(TEXTS), model.get_text_embedding_batch(TEXTS), atol=1e-6)
    assert np.allclose(model.embed(images=image_paths), model.get_image_embedding_batch(image_paths), atol=1e-6)
    mixed = model.embed(["red", "mug", None], [image_paths[0], None, image_paths[1]], query=True)
    single = [
        model.get_composed_embedding("red", image_paths[0]),
        model.get_query_embedding("mug"),
        model.get_image_embedding(image_paths[1], query=True),
    ]
    assert mixed.dtype == np.float32
    assert np.allclose(mixed, single, atol=1e-6)
    assert model.embed().shape == model.embed([], []).shape == (0, model.dimension)
    with pytest.raises(QueryError, match="1 texts and 7 images"):
        model.embed(["red"], image_paths)
    with pytest.raises(QueryError, match="neither a text nor an image at place 1"):
        model.embed(["red", None])


def test_generators_are_lists_of_texts_images_and_nodes_and_one_text_is_none(
    model: VisualizedBGEEmbedding, image_paths: list[Path]
) -> None:
    """One text would be embedded letter by letter."""
    given = ["red", None], [None, image_paths[0]]
    assert np.allclose(model.embed(*map(iter, given)), model.embed(*given), atol=1e-6)
    assert len(model.embed(images=(path for path in image_paths))) == len(image_paths)
    embedded = model(TextNode(text=text) for text in TEXTS)
    assert [node.embedding is not None for node in embedded] == [True] * len(TEXTS)
    for one in ("red", image_paths[0]):
        with pytest.raises(QueryError, match="is one text or image: give a list"):
            model.embed(one) if isinstance(one, str) else model.embed(images=one)


def test_progress_is_shown_on_request(
    model: VisualizedBGEEmbedding, image_paths: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar that reaches its end; silence otherwise."""
    model.get_image_embedding_batch(image_paths)
    assert capsys.readouterr().err == ""
    model.get_image_embedding_batch(image_paths, show_progress=True)
    assert "Embedding images: 100%" in capsys.readouterr().err
    IngestionPipeline(transformations=[model]).run(nodes=[ImageNode(image_path=str(image_paths[0]))])


# ------------------------------------------------------------------------------------------------------ threads, loops


def test_threads_share_one_model_and_get_their_own_answers(
    model: VisualizedBGEEmbedding, image_paths: list[Path]
) -> None:
    """Each answer is checked against the known one."""
    expected = model.get_composed_embedding_batch(TEXTS, image_paths)
    alone = [model.get_query_embedding(text) for text in TEXTS]

    def ask(number: int) -> bool:
        row = number % 7
        if number % 2:
            return close(model.get_query_embedding(TEXTS[row]), alone[row])
        return close(model.get_composed_embedding(TEXTS[row], image_paths[row]), expected[row])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(140)))


def test_async_calls_leave_the_event_loop_free(folder: Path, image_paths: list[Path]) -> None:
    """Another task runs while the model is held up; the model is held up until that task has run."""
    model = VisualizedBGEEmbedding(folder, device="cpu")
    tower: Any = model.encoder.model.model_visual["visual"]
    computing, ran = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        computing.set()
        assert ran.wait(30), "the event loop is blocked"

    tower.register_forward_pre_hook(hold)

    async def run_meanwhile() -> None:
        call = asyncio.create_task(model.acall([ImageNode(image_path=str(image_paths[0]))]))
        while not (computing.is_set() or call.done()):
            await asyncio.sleep(0.001)
        ran.set()
        await call

    asyncio.run(run_meanwhile())


def test_one_model_serves_several_event_loops(model: VisualizedBGEEmbedding) -> None:
    """Nothing is bound to the first loop."""
    assert asyncio.run(model.aget_query_embedding("red")) == asyncio.run(model.aget_query_embedding("red"))


# --------------------------------------------------------------------------------------------------------------- caches


def counted(model: VisualizedBGEEmbedding) -> list[int]:
    passes: list[int] = []
    encode = model.encoder.model.bge_encoder
    encode.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    return passes


def test_the_cache_answers_for_equal_content_only(folder: Path, image_paths: list[Path], tmp_path: Path) -> None:
    """By pixels, whatever the file is called; by text; never across texts beside an image, dtypes or weights."""
    copy = tmp_path / "copy.png"
    copy.write_bytes(image_paths[0].read_bytes())
    cache = tmp_path / "cache"
    first = VisualizedBGEEmbedding(folder, device="cpu", cache_dir=cache)
    vectors = [
        first.get_image_embedding(image_paths[0]),
        first.get_composed_embedding("red", image_paths[0]),
        first.get_text_embedding("red"),
        first.get_image_embedding(image_paths[1]),
    ]
    again = VisualizedBGEEmbedding(folder, device="cpu", cache_dir=cache)
    passes = counted(again)
    assert again.get_image_embedding(copy) == vectors[0]
    assert again.get_composed_embedding("red", copy) == vectors[1]
    assert again.get_query_embedding("red") == vectors[2]
    assert again.embed_images([Image.open(image_paths[1])]).tolist() == [vectors[3]]
    assert passes == []
    again.get_composed_embedding("blue", copy)
    assert passes == [1]
    half = VisualizedBGEEmbedding(folder, device="cpu", dtype="bfloat16", cache_dir=cache)
    passes = counted(half)
    half.get_image_embedding(copy)
    assert passes == [1]


def test_only_what_is_not_cached_is_computed_and_each_content_once(
    folder: Path, image_paths: list[Path], tmp_path: Path
) -> None:
    """A batch of seven with one known and two equal: five go through the model."""
    model = VisualizedBGEEmbedding(folder, device="cpu", cache_dir=tmp_path)
    model.get_text_embedding("mug")
    passes = counted(model)
    vectors = model.get_text_embedding_batch(TEXTS)
    assert sum(passes) == 5
    assert vectors[0] == vectors[5]


def test_a_cache_that_is_damaged_never_gives_a_wrong_vector(folder: Path, tmp_path: Path) -> None:
    """A row cut short is computed again; a file that is no database is refused by name."""
    model = VisualizedBGEEmbedding(folder, device="cpu", cache_dir=tmp_path)
    expected = model.get_text_embedding("red")
    with closing(sqlite3.connect(tmp_path / "vectors.sqlite3")) as database, database:
        database.execute("UPDATE vectors SET vector = substr(vector, 1, 20)")
    assert model.get_text_embedding("red") == expected
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vectors.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(VectorCacheError, match=r"other/vectors\.sqlite3"):
        VisualizedBGEEmbedding(folder, device="cpu", cache_dir=tmp_path / "other")
    with pytest.raises(VectorCacheError, match="cannot be used"):
        VectorCache(tmp_path / "vectors.sqlite3", 3)


def test_threads_share_one_cache(tmp_path: Path) -> None:
    """Writers and readers at once, through two connections to one file."""
    caches = [VectorCache(tmp_path, 5), VectorCache(tmp_path, 5)]

    def work(number: int) -> bool:
        cache = caches[number % 2]
        key = str(number % 50).encode()
        cache.put({key: np.full(5, number % 50, dtype=np.float32)})
        return bool((cache.get([key])[key] == number % 50).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(400)))
    assert len(caches[0]) == 50
    assert len(caches[1].get(str(number).encode() for number in range(2000))) == 50
    for cache in caches:
        cache.close()


def test_the_embeddings_cache_of_llama_index_is_honoured(folder: Path) -> None:
    """Its own rules: texts only, by text."""
    store = SimpleKVStore()
    model = VisualizedBGEEmbedding(folder, device="cpu", embeddings_cache=store)
    first = model.get_text_embedding_batch(["red", "blue"])
    passes = counted(model)
    assert model.get_text_embedding_batch(["red", "blue"]) == first
    assert passes == []


def test_what_is_no_text_and_no_image_is_refused_and_never_embedded_as_nothing(model: VisualizedBGEEmbedding) -> None:
    """None was the vector of the empty text; a pair whose image was None, that of its text."""
    for call, message in (
        (lambda: model.get_image_embedding(None), "neither a text nor an image, but None"),
        (lambda: model.get_image_embedding_batch([Image.new("RGB", (8, 8)), None]), "neither .* at place 1"),
        (lambda: model.get_text_embedding_batch(["red", None]), "neither .* at place 1"),
        (lambda: model.get_composed_embedding("red", None), r"no image \(None\) beside the text 'red'"),
        (lambda: model.get_text_embedding(None), "None is no text"),
        (lambda: model.get_query_embedding(7), "7 is no text"),
        (lambda: model.embed([{"text": "red"}]), "{'text': 'red'} is no text"),
        (lambda: model.get_text_embedding_batch("red"), "'red' is one text or image: give a list"),
        (lambda: model.get_image_embedding_batch("red.png"), "'red.png' is one text or image: give a list"),
        (lambda: model.get_query_bundle(Path("red.png")), r"text=.*red.png.*: give words as text"),
    ):
        with pytest.raises(QueryError, match=message):
            call()
    assert len(model.get_text_embedding_batch(text for text in ("red", ""))) == 2


class TellsQueriesApart(MeanColour):
    """Another vector for a text that is searched with, as of a model with instructions."""

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> np.ndarray:
        return super().encode(contents, query=query)[:, :: -1 if query else 1]


async def test_that_cache_keeps_no_vector_of_a_document_for_an_equal_query() -> None:
    """LlamaIndex keeps both under the text: whichever came first was the vector of the other."""
    for first in ("query", "text"):
        model = ComposedEmbedding(TellsQueriesApart(), embeddings_cache=SimpleKVStore())
        plain = ComposedEmbedding(TellsQueriesApart())
        if first == "query":
            assert model.get_query_embedding("red") == plain.get_query_embedding("red")
        assert model.get_text_embedding("red") == plain.get_text_embedding("red")
        assert model.get_query_embedding("red") == plain.get_query_embedding("red")
        assert await model.aget_query_embedding("red") == await plain.aget_query_embedding("red")
        assert plain.get_query_embedding("red") != plain.get_text_embedding("red")


# ------------------------------------------------------------------------------------------------------------- identity


def test_the_identity_does_not_depend_on_the_place(folder: Path, tmp_path: Path, model: VisualizedBGEEmbedding) -> None:
    """A copy under another name is the same model; other weights are not."""
    moved = tmp_path / "elsewhere" / "a-copy"
    moved.mkdir(parents=True)
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert VisualizedBGEEmbedding(moved, device="cpu").model_id == model.model_id
    small_model(seed=1).save_pretrained(moved)
    assert VisualizedBGEEmbedding(moved, device="cpu").model_id != model.model_id


def test_a_rounded_copy_of_the_weights_is_the_same_model_until_they_change(
    folder: Path, tmp_path: Path, model: VisualizedBGEEmbedding
) -> None:
    """Our choice: the copy names the weights it was rounded from, which counts for as long as it is that copy."""
    rounded = convert_model(folder, tmp_path / "rounded", dtype="bfloat16")
    assert VisualizedBGEEmbedding(rounded, device="cpu").model_id == model.model_id
    twice = convert_model(rounded, tmp_path / "twice", dtype="float32")
    assert VisualizedBGEEmbedding(twice, device="cpu").model_id == model.model_id
    weights = load_file(rounded / "model.safetensors")
    weights["visual_proj.bias"] += 1
    save_file(weights, rounded / "model.safetensors", metadata={"format": "pt"})
    assert VisualizedBGEEmbedding(rounded, device="cpu").model_id != model.model_id


def test_a_tokenizer_counts_only_where_it_splits_texts_differently(
    folder: Path, tmp_path: Path, model: VisualizedBGEEmbedding
) -> None:
    """Another layout of the same file gives the same vectors; other numbers for the same words do not."""
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text()), indent=4, sort_keys=True))
    assert VisualizedBGEEmbedding(folder, tokenizer=same, device="cpu").model_id == model.model_id
    word_tokenizer(model.encoder.model.config, WORDS[::-1]).save(str(other))
    assert VisualizedBGEEmbedding(folder, tokenizer=other, device="cpu").model_id != model.model_id


def test_a_name_that_leads_nowhere_says_what_works() -> None:
    """One line."""
    with pytest.raises(ModelNotFoundError, match=r"'no-such-model'.*'tiny'"):
        VisualizedBGEEmbedding("no-such-model")


def test_batch_sizes_are_checked(folder: Path) -> None:
    """LlamaIndex's own bounds."""
    make: Callable[..., Any] = VisualizedBGEEmbedding
    with pytest.raises(ValueError, match="embed_batch_size"):
        make(folder, embed_batch_size=0)


# --------------------------------------------------------------------------------------------------- the bundled model


def test_the_bundled_model_needs_no_network(image_paths: list[Path]) -> None:
    """By its name: the same class and loading code as the real one."""
    tiny = VisualizedBGEEmbedding("tiny", device="cpu")
    assert (tiny.model_id[:15], tiny.model_note) == ("visualized-bge@", "tiny, float32")
    composed = tiny.get_composed_embedding_batch(["phone case with this"] * 2, image_paths[:2])
    assert np.asarray(composed).shape == (2, tiny.dimension)
    assert not close(composed[0], composed[1])
    assert close(composed[0], tiny.get_composed_embedding("phone case with this", image_paths[0]))
    half = VisualizedBGEEmbedding("tiny", device="cpu", dtype="bfloat16")
    cosine = np.asarray(half.get_composed_embedding_batch(["phone case with this"] * 2, image_paths[:2])) * composed
    assert cosine.sum(1).min() > 0.99
