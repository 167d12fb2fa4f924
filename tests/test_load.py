"""Many threads and many asyncio tasks ask one store and one model while images are added, replaced and removed.

Every answer is held against one known beforehand: the vectors that the model gave when nothing else ran, and the
rankings that NumPy makes of them. Images on the `Shelf`s come, go and change; what may be answered about them is the
state before or the state after, and nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import milvus_lite.engine.collection
import numpy as np
import pytest
import torch
from llama_index.core import QueryBundle, VectorStoreIndex
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from PIL import Image, ImageOps

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.ingest import ingest_images
from mm_retriever.ingest.sources import path_id
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.store import ImageStore, open_store
from mm_retriever.store.channel import deadline
from mm_retriever.threads import FairLock
from mm_retriever.vector_cache import VectorCache
from tests.support.drawn_store import KINDS, draw_images, draw_leopard
from tests.support.effort import EFFORT
from tests.support.processes import python

TOP = 5
CLOSE = 1e-5
"""Of numbers up to 1 that float32 gives in another order; different images and texts here differ by 1e-3 and more."""

LONG = "the same thing in blue with stars, for a child who likes the sea and the sky, " * 4
"""Fits a query by text (112 tokens); beside an image (48) its end is cut off."""

CONTENTS: Sequence[tuple[str | None, str | None]] = [
    *[(f"a {colour} {kind}", None) for colour in ("red", "blue") for kind in KINDS],
    (LONG, None),
    *[(None, image) for image in ("leopard.png", "still/mug/blue stars.jpg", "still/umbrella/red leopard.jpg")],
    *[(f"{kind} with this", "leopard.png") for kind in KINDS],
    *[("the same in red", f"still/{kind}/blue stars.jpg") for kind in KINDS],
    (LONG, "leopard.png"),
]
"""Text and image of each query."""

STRIPES = ("red", "blue", "yellow", "purple", "black", "white")

Vector = np.ndarray
Check = Callable[[Any, Sequence[int]], None]
"""Takes an answer, and the round of each shelf that was settled before the question."""


@dataclass(frozen=True)
class Hit:
    """One of the results: a row, how near it is, and the file that its metadata name."""

    id: str
    score: float
    digest: str = ""


@dataclass(frozen=True)
class Version:
    """What the file of an image holds, and the vector of that."""

    data: bytes
    vector: Vector

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Shelf:
    """A folder of images that one thread changes and ingests, round after round.

    Those of `changed` are there in every round, each time in the next of their versions; those of `coming` are there
    every other round.
    """

    folder: Path
    label: str
    changed: dict[Path, Sequence[Version]]
    coming: dict[Path, Version]
    begun: int = 0
    settled: int = 0

    def state(self, number: int) -> dict[Path, Version | None]:
        """What each image is in a round; None where it is not there."""
        state: dict[Path, Version | None] = {
            path: versions[number % len(versions)] for path, versions in self.changed.items()
        }
        return state | {
            path: version if (number + place) % 2 else None for place, (path, version) in enumerate(self.coming.items())
        }

    def possible(self, since: int) -> dict[str, list[Version | None]]:
        """What may be answered about each row, by its id, to who began to ask when that round was settled."""
        states = [self.state(number) for number in range(since, self.begun + 1)]
        return {path_id(str(path)): [state[path] for state in states] for path in states[0]}

    def seen(self, found: Sequence[Hit], since: int) -> dict[str, Version]:
        """The versions of its images that an answer holds, by the ids of their rows."""
        possible = self.possible(since)
        seen = {}
        for hit in found:
            if hit.id in possible:
                versions = [one for one in possible[hit.id] if one is not None and one.digest == hit.digest]
                assert versions, "as it was or as it is now"
                seen[hit.id] = versions[0]
        return seen

    def ingest(self, store: ImageStore, model: VisualizedBGEEmbedding) -> None:
        """The next round: images that are new, that changed, that went; read back exactly."""
        old, new = self.state(self.settled), self.state(self.settled + 1)
        self.begun += 1
        for path, version in new.items():
            if version is not None:
                path.write_bytes(version.data)
            else:
                path.unlink(missing_ok=True)
        report = ingest_images(self.folder, store, model, batch_size=3, prune=True, show_progress=False)
        self.settled += 1
        assert report.skipped == ()
        if self.settled > 1:
            came = sum(old[path] is None and new[path] is not None for path in self.coming)
            went = sum(old[path] is not None and new[path] is None for path in self.coming)
            assert (report.replaced, report.indexed, report.removed) == (len(self.changed), came, went)
        rows = {row["id"]: row for page in store.scan(["digest", "embedding"], labelled(self.label)) for row in page}
        there = {path_id(str(path)): version for path, version in new.items() if version is not None}
        assert rows.keys() == there.keys()
        for one, version in there.items():
            assert rows[one]["digest"] == version.digest
            assert np.abs(np.asarray(rows[one]["embedding"]) - version.vector).max() < CLOSE


@dataclass(frozen=True)
class Ask:
    """One query, the two ways of asking it, and what tells a right answer."""

    name: str
    now: Callable[[], Any]
    later: Callable[[], Awaitable[Any]]
    check: Check


@dataclass
class Shop:
    """A store, a model, images in both, and all that can be known of them."""

    folder: Path
    store: ImageStore
    model: VisualizedBGEEmbedding
    vectors: dict[tuple[str | None, str | None], Vector]
    still: dict[str, Vector]
    shelves: list[Shelf]
    asks: list[Ask] = field(default_factory=list)

    # -------------------------------------------------------------------------------------- what is known

    def settled(self) -> list[int]:
        return [shelf.settled for shelf in self.shelves]

    def check_still(self, vector: Vector) -> Check:
        """The images that nobody touches: the same answer at any time."""
        expected = ranking(vector, self.still)[:TOP]

        def check(answer: Any, since: Sequence[int]) -> None:
            assert_ranking(hits(answer), expected)

        return check

    def check_everything(self, vector: Vector, top_k: int) -> Check:
        """All images: those on the shelves as they were or as they are now, each in its right place."""

        def check(answer: Any, since: Sequence[int]) -> None:
            found = hits(answer)
            assert len(found) == top_k
            there = dict(self.still)
            for shelf, settled in zip(self.shelves, since, strict=True):
                seen = shelf.seen(found, settled)
                there |= {one: version.vector for one, version in seen.items() if version is not None}
                for one in shelf.possible(settled).keys() - seen.keys():
                    versions = shelf.possible(settled)[one]
                    hidden = [
                        version is None or version.vector @ vector < found[-1].score + CLOSE for version in versions
                    ]
                    assert any(hidden), "it is there, and near enough to be found"
            assert_ranking(found, ranking(vector, there)[:top_k])

        return check

    def check_shelf(self, number: int, vector: Vector) -> Check:
        """Everything on one shelf."""

        def check(answer: Any, since: Sequence[int]) -> None:
            shelf = self.shelves[number]
            found = hits(answer)
            seen = shelf.seen(found, since[number])
            for one, versions in shelf.possible(since[number]).items():
                assert one in seen or None in versions, "it is there"
            assert_ranking(found, ranking(vector, {one: version.vector for one, version in seen.items()}))

        return check

    # -------------------------------------------------------------------------------------- asking

    def place(self, image: str | None) -> str | None:
        return None if image is None else str(self.folder / image)

    def all_asks(self) -> Iterator[Ask]:
        still = MetadataFilters(filters=[MetadataFilter(key="label", value=list(KINDS), operator=FilterOperator.IN)])
        retriever = ComposedRetriever(self.store, self.model, top_k=TOP, filters=still)
        everything = ComposedRetriever(self.store, self.model, top_k=TOP)
        index = VectorStoreIndex.from_vector_store(self.store, self.model)
        engine = index.as_retriever(similarity_top_k=TOP, filters=still)
        for content in CONTENTS:
            vector = self.vectors[content]
            text, image = content[0], self.place(content[1])
            bundle = QueryBundle(text or "", image_path=image)
            yield self.embedding(text, image, vector)
            yield retrieval("still", retriever, bundle, self.check_still(vector))
            yield retrieval("everything", everything, bundle, self.check_everything(vector, TOP))
            carried = QueryBundle(text or "", image_path=image, embedding=vector.tolist())
            yield retrieval("index", engine, text if image is None else carried, self.check_still(vector))
            yield self.query("filtered", vector, TOP, still, self.check_still(vector))
            for number, shelf in enumerate(self.shelves):
                yield self.query("shelf", vector, 50, labelled(shelf.label), self.check_shelf(number, vector))
        yield from self.batches()
        yield self.counting(still)

    def embedding(self, text: str | None, image: str | None, vector: Vector) -> Ask:
        model = self.model
        check = same_vectors([vector])
        if image is None:
            return Ask(
                "text",
                lambda: [model.get_query_embedding(text)],
                lambda: listed(model.aget_query_embedding(text)),
                check,
            )
        if text is None:
            return Ask(
                "picture",
                lambda: [model.get_image_embedding(image)],
                lambda: listed(model.aget_image_embedding(image)),
                check,
            )
        return Ask(
            "composed",
            lambda: [model.get_composed_embedding(text, image)],
            lambda: listed(model.aget_composed_embedding(text, image)),
            check,
        )

    def batches(self) -> Iterator[Ask]:
        model = self.model
        images = [content for content in CONTENTS if content[0] is None]
        pairs = [content for content in CONTENTS if None not in content]
        texts = [content for content in CONTENTS if content[1] is None]
        files = [self.place(image) for _, image in images]
        yield Ask(
            "pictures",
            lambda: model.get_image_embedding_batch(files),
            lambda: model.aget_image_embedding_batch(files),
            same_vectors([self.vectors[content] for content in images]),
        )
        asked = [text for text, _ in pairs], [self.place(image) for _, image in pairs]
        yield Ask(
            "pairs",
            lambda: model.get_composed_embedding_batch(*asked),
            lambda: model.aget_composed_embedding_batch(*asked),
            same_vectors([self.vectors[content] for content in pairs]),
        )
        words = [text for text, _ in texts]
        yield Ask(
            "texts",
            lambda: model.get_text_embedding_batch(words),
            lambda: model.aget_text_embedding_batch(words),
            same_vectors([self.vectors[content] for content in texts]),
        )

    def query(self, name: str, vector: Vector, top_k: int, filters: MetadataFilters | None, check: Check) -> Ask:
        query = VectorStoreQuery(query_embedding=vector.tolist(), similarity_top_k=top_k, filters=filters)
        return Ask(name, lambda: self.store.query(query), lambda: self.store.aquery(query), check)

    def counting(self, still: MetadataFilters) -> Ask:
        def check(answer: Any, since: Sequence[int]) -> None:
            assert answer == len(self.still)

        count = self.store.count
        return Ask("count", lambda: count(still), lambda: asyncio.to_thread(count, still), check)


def labelled(label: str) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="label", value=label)])


def ranking(vector: Vector, rows: Mapping[str, Vector]) -> list[Hit]:
    """The rows, best first, as NumPy has it."""
    return sorted((Hit(one, float(row @ vector)) for one, row in rows.items()), key=lambda hit: -hit.score)


def hits(answer: list[NodeWithScore] | VectorStoreQueryResult) -> list[Hit]:
    if isinstance(answer, VectorStoreQueryResult):
        assert answer.ids == [node.node_id for node in answer.nodes]
        answer = [
            NodeWithScore(node=node, score=score) for node, score in zip(answer.nodes, answer.similarities, strict=True)
        ]
    return [Hit(hit.node.node_id, hit.score, hit.node.metadata["digest"]) for hit in answer]


def assert_ranking(found: Sequence[Hit], expected: Sequence[Hit]) -> None:
    """The same rows in the same order (but for those that are equally near), and the same scores."""
    assert len({hit.id for hit in found}) == len(found) == len(expected)
    assert {hit.id for hit in found} == {hit.id for hit in expected}
    known = {hit.id: hit.score for hit in expected}
    for hit, there in zip(found, expected, strict=True):
        assert abs(hit.score - there.score) < CLOSE, "the right score for the place"
        assert abs(hit.score - known[hit.id]) < CLOSE, "the right score for the row"


def same_vectors(expected: Sequence[Vector]) -> Check:
    def check(answer: Any, since: Sequence[int]) -> None:
        assert np.abs(np.asarray(answer) - np.asarray(expected)).max() < CLOSE

    return check


async def listed(later: Awaitable[Any]) -> list[Any]:
    return [await later]


def retrieval(name: str, retriever: Any, asked: QueryBundle | str, check: Check) -> Ask:
    return Ask(name, lambda: retriever.retrieve(asked), lambda: retriever.aretrieve(asked), check)


def fill_shelf(folder: Path, label: str, images: Sequence[Path], model: VisualizedBGEEmbedding) -> Shelf:
    """Four images with a stripe that gets another colour each round, and three upside down that come and go."""
    (folder / label).mkdir(parents=True)

    def version(path: Path, change: Callable[[Image.Image], Image.Image]) -> Version:
        data = io.BytesIO()
        with Image.open(path) as image:
            change(image).save(data, "JPEG", quality=92)
        return Version(data.getvalue(), np.asarray(model.get_image_embedding(data.getvalue())))

    def striped(colour: str) -> Callable[[Image.Image], Image.Image]:
        def change(image: Image.Image) -> Image.Image:
            image.paste(colour, (0, 60, 160, 90))
            return image

        return change

    files = [folder / label / f"{place}.jpg" for place in range(7)]
    changed = {
        file: [version(path, striped(one)) for one in STRIPES] for file, path in zip(files[:4], images[:4], strict=True)
    }
    coming = {file: version(path, ImageOps.flip) for file, path in zip(files[4:], images[4:7], strict=True)}
    return Shelf(folder, label, changed, coming)


def draw_all(folder: Path) -> Path:
    draw_images(folder / "still")
    draw_leopard(folder / "leopard.png")
    return folder


def open_shop(folder: Path, store: ImageStore, model: VisualizedBGEEmbedding, alone: VisualizedBGEEmbedding) -> Shop:
    """All that will be asked about the images of `draw_all`, and the answers, by a model that nobody else asks."""

    def vector(text: str | None, image: str | None) -> Vector:
        return np.asarray(alone.get_query_bundle(text, None if image is None else folder / image).embedding)

    images = sorted((folder / "still").rglob("*.jpg"))
    shop = Shop(
        folder,
        store,
        model,
        {content: vector(*content) for content in CONTENTS},
        {path_id(str(path)): np.asarray(alone.get_image_embedding(path)) for path in images},
        [
            fill_shelf(folder / f"shelf-{number}", f"shelf {number}", (images * 2)[7 * number :], alone)
            for number in range(2)
        ],
    )
    ingest_images(folder / "still", store, model, show_progress=False)
    for shelf in shop.shelves:
        shelf.ingest(store, model)
    shop.asks = list(shop.all_asks())
    versions = [one.vector for shelf in shop.shelves for of_file in shelf.changed.values() for one in of_file]
    versions += [one.vector for shelf in shop.shelves for one in shelf.coming.values()]
    for vectors in (np.stack(list(shop.vectors.values())), np.stack([*shop.still.values(), *versions])):
        apart = np.abs(vectors[:, None] - vectors).max(axis=-1) + np.eye(len(vectors))
        assert apart.min() > 100 * CLOSE, "no right answer passes for another"
    return shop


def under_load(shop: Shop, *, threads: int, tasks: Sequence[int], each: int, rounds: int = 2) -> int:
    """Ask from many threads and event loops (with so many tasks) at once while every shelf changes; say how often.

    Whoever gets a wrong answer, or an error, ends the test. Every shelf goes through so many rounds or more.
    """
    start = threading.Barrier(threads + len(tasks) + len(shop.shelves))
    asked = threading.Event()

    def chosen(number: int) -> list[Ask]:
        return random.Random(number).choices(shop.asks, k=each)

    def in_thread(number: int) -> int:
        start.wait(60)
        for ask in chosen(number):
            since = shop.settled()
            ask.check(ask.now(), since)
        return each

    def in_loop(number: int, count: int) -> int:
        async def task(one: int) -> None:
            for ask in chosen(1000 * number + one):
                since = shop.settled()
                ask.check(await ask.later(), since)

        async def all_tasks() -> None:
            await asyncio.gather(*map(task, range(count)))

        start.wait(60)
        asyncio.run(all_tasks())
        return count * each

    def ingesting(shelf: Shelf) -> None:
        start.wait(60)
        done = 0
        while done < rounds or not asked.is_set():
            shelf.ingest(shop.store, shop.model)
            done += 1

    with ThreadPoolExecutor(start.parties) as pool:
        writers = [pool.submit(ingesting, shelf) for shelf in shop.shelves]
        readers = [pool.submit(in_thread, number) for number in range(threads)]
        readers += [pool.submit(in_loop, number, count) for number, count in enumerate(tasks, start=1)]
        try:
            answered = sum(reader.result() for reader in readers)
        finally:
            asked.set()
        for writer in writers:
            writer.result()
    return answered


# ------------------------------------------------------------------------------------------ the load


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads that change fifty times as often as they would."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 50)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def restless(monkeypatch, restless_threads) -> None:
    """Such threads, and a Milvus Lite with little memory and a slow disk."""

    class SlowLog(milvus_lite.engine.collection.WAL):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            time.sleep(0.02)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(milvus_lite.engine.collection, "WAL", SlowLog)
    monkeypatch.setattr(milvus_lite.engine.collection, "MEMTABLE_MEMORY_LIMIT", 6_000)  # bytes: two rows


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """For a product of matrices; two threads of torch that wait for each other would wait for all the others here."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def alone() -> VisualizedBGEEmbedding:
    """A model that is asked by nobody else."""
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_all(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def folder(drawn, tmp_path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "pictures"))


def test_threads_and_event_loops_get_the_known_answers_while_images_come_and_go(
    folder, tmp_path, alone, restless, tried, caplog
):
    """Truth: the model and NumPy with nothing else running. 16 threads, 32 tasks in one loop and 8 in another."""
    model = VisualizedBGEEmbedding("tiny", device="cpu", cache_dir=tmp_path / "cache")
    with open_store(tmp_path / "a.db", model) as store:
        shop = open_shop(folder, store, model, alone)
        tried["queries under load"] += under_load(shop, threads=16, tasks=(32, 8), each=3)
    assert not caplog.records, "no error that a log hides"


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
def test_a_longer_load_gets_the_known_answers_too(folder, tmp_path, alone, restless, tried, cached):
    """As above, without a cache of vectors too."""
    model = VisualizedBGEEmbedding("tiny", device="cpu", cache_dir=tmp_path / "cache" if cached else None)
    with open_store(tmp_path / "a.db", model) as store:
        shop = open_shop(folder, store, model, alone)
        asked = under_load(shop, threads=24, tasks=(64, 16), each=10 * EFFORT, rounds=10 * EFFORT)
        tried["queries under load"] += asked


@pytest.mark.slow
def test_a_load_on_a_server_gets_the_known_answers_too(folder, tmp_path, alone, milvus_server, tried):
    """As above; a server takes writers and readers all at once."""
    model = VisualizedBGEEmbedding("tiny", device="cpu", cache_dir=tmp_path / "cache")
    with open_store(milvus_server.uri, model, collection="load", overwrite=True, timeout=120) as store:
        shop = open_shop(folder, store, model, alone)
        asked = under_load(shop, threads=24, tasks=(64, 16), each=10 * EFFORT, rounds=5 * EFFORT)
        tried["queries under load"] += asked


# ------------------------------------------------------------------------------------------ what threads share


def at_once(threads: int, work: Callable[[int], None]) -> None:
    start = threading.Barrier(threads)

    def begin(number: int) -> None:
        start.wait(60)
        work(number)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, range(threads)))


def test_a_long_text_is_cut_by_what_stands_beside_it_whoever_else_asks(alone, restless_threads):
    """Alone it has room for 112 tokens, beside an image for 48; a tokenizer that cuts by itself has one for all."""
    processor = VisualizedBGEEmbedding("tiny", device="cpu").encoder.processor
    whole, cut = (alone.encoder.processor.token_ids([LONG], beside_image=beside) for beside in (False, True))
    assert (len(cut[0]), len(whole[0]) > 48) == (48, True)

    def ask(number: int) -> None:
        for _ in range(1_000):
            assert processor.token_ids([LONG], beside_image=number % 2 == 1) == (cut if number % 2 else whole)

    at_once(8, ask)


def test_a_cache_of_vectors_that_many_threads_share_keeps_and_finds_every_vector(tmp_path, restless_threads, caplog):
    """One connection to SQLite; without turns it loses some, and raises now and then."""
    cache = VectorCache(tmp_path, 3)

    def work(number: int) -> None:
        for one in range(200):
            vector = np.asarray([number, one, 1], dtype=np.float32)
            cache.put({vector.tobytes(): vector})
            assert (cache.get([vector.tobytes()])[vector.tobytes()] == vector).all()

    at_once(16, work)
    assert len(cache) == 16 * 200
    assert not caplog.records
    cache.close()


def test_a_deadline_holds_for_the_thread_and_the_task_that_set_it_and_for_no_other():
    """Inside another one the sooner counts: what one asker has left must not end the requests of the rest."""

    def left() -> float:
        with deadline(60) as own:
            return own.left

    async def tasks() -> float:
        other_is_set, looked = asyncio.Event(), asyncio.Event()

        async def impatient() -> None:
            with deadline(0.001):
                other_is_set.set()
                await looked.wait()

        async def patient() -> float:
            await other_is_set.wait()
            try:
                return left()
            finally:
                looked.set()

        return (await asyncio.gather(impatient(), patient()))[1]

    with deadline(0.001), ThreadPoolExecutor(1) as pool:
        assert pool.submit(left).result() > 30
    assert asyncio.run(tasks()) > 30


READS: dict[str, Callable[[ImageStore], set[str]]] = {
    "query": lambda store: set(store.query(VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=9)).ids),
    "get_nodes": lambda store: {node.node_id for node in store.get_nodes(["a", "b"])},
    "scan": lambda store: {row["id"] for page in store.scan() for row in page},
    "count": lambda store: {"a", "b"} if store.count() >= 2 else set(),
}


@pytest.mark.parametrize("read", READS)
def test_who_reads_while_milvus_lite_empties_its_memory_to_disk_misses_no_row(tmp_path, monkeypatch, read):
    """Milvus Lite 3.2 starts with an empty memory before the rows of the old one are on disk; the disk is slow here."""
    emptying, answered = threading.Event(), threading.Event()

    class SlowLog(milvus_lite.engine.collection.WAL):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            emptying.set()
            answered.wait(0.5)  # whoever waits for the writer has no answer by then
            super().__init__(*arguments, **options)

    def reader(store: ImageStore) -> set[str]:
        assert emptying.wait(10)
        found = READS[read](store)
        answered.set()
        return found

    model = SimpleNamespace(dimension=2, model_id="two numbers")
    with open_store(tmp_path / "a.db", model) as store, ThreadPoolExecutor(1) as pool:
        store.add([TextNode(id_=one, text=one, embedding=[1.0, 0.0]) for one in "ab"])
        monkeypatch.setattr(milvus_lite.engine.collection, "WAL", SlowLog)
        monkeypatch.setattr(milvus_lite.engine.collection, "MEMTABLE_MEMORY_LIMIT", 1)
        answer = pool.submit(reader, store)
        store.add([TextNode(id_="c", text="c", embedding=[0.0, 1.0])])
        assert emptying.is_set()
        assert answer.result() >= {"a", "b"}


def test_who_comes_back_for_another_turn_at_once_waits_behind_who_waits_already():
    """A plain lock goes to the thread that has just let go of it: ingestion would not get on beside busy queries."""
    turn, order = FairLock(), []

    def waiter() -> None:
        with turn:
            order.append("waited")

    with ThreadPoolExecutor(1) as pool:
        for _ in range(50):
            with turn:
                waiting = pool.submit(waiter)
                asked = time.monotonic()
                while not turn._next.locked():  # until it waits
                    assert time.monotonic() < asked + 30
            with turn:
                order.append("came back")
            waiting.result()
    assert order == ["waited", "came back"] * 50


def test_the_model_works_for_one_thread_at_a_time(drawn):
    """Our choice: its memory is that of one pass, however many ask."""
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    busy: list[int] = []
    most: list[int] = []
    encoder = model.encoder.model.bge_encoder

    def enter(*_: object) -> None:
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.002)  # others come meanwhile

    def ask(number: int) -> None:
        for _ in range(5):
            model.get_query_embedding("a red mug")
            model.get_composed_embedding("in red", drawn / "leopard.png")

    encoder.register_forward_pre_hook(enter)
    encoder.register_forward_hook(lambda *_: busy.pop() and None)
    at_once(8, ask)
    assert (len(most), max(most)) == (80, 1)


# ------------------------------------------------------------------------------------------ an hour


@dataclass(frozen=True)
class Hour:
    """What an app does in an hour, and by how much it may have grown.

    Attributes:
        calls: of what `endurance.py` describes.
        blocks: pieces of Python's memory that may be more after one call; it would be some if anything were kept of it.
        mib: by which all its memory may be more after the hour; the allocator's own moves are some, up to ten at a time
            where threads come and go.
    """

    calls: int
    blocks: float
    mib: float


HOURS = {
    "queries": Hour(7_200, blocks=0.2, mib=12),  # two a second: caches of a fixed size fill during the first 3,600
    "load": Hour(120, blocks=20, mib=40),  # of thirty queries and two runs of ingestion: again one query a second
    "openings": Hour(360, blocks=3, mib=12),  # one every ten seconds
    "runs": Hour(360, blocks=2, mib=12),  # a folder that is looked at every ten seconds
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOURS)
def test_an_hour_of_work_does_not_make_the_process_grow(tmp_path, tried, kind):
    """One process is asked as often as in an hour, without the pauses; what it grows in half of that counts twice."""
    hour = HOURS[kind]
    count = hour.calls * EFFORT
    process = python("-m", "tests.support.endurance", kind, count, tmp_path)
    said, _ = process.communicate(timeout=500 * EFFORT)
    assert process.returncode == 0
    cost = json.loads(said)
    assert cost["blocks_a_call"] < hour.blocks, cost
    assert cost["kib_a_call"] * hour.calls / 1024 < hour.mib, cost
    assert cost["files"] <= 2, cost  # Milvus Lite may be merging its own just then
    assert cost["threads"] <= 2, cost  # a pool may not have had all of its threads before
    tried["calls in one process, memory watched"] += count
