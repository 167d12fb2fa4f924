"""The store and ingestion on a real Milvus server: what works on Milvus Lite, and what only a server can do to them.

It is killed, restarted and frozen in the middle of ingestion and of queries: it is waited for, then there is one clear
error within the timeout, then all goes on without loss or duplicate.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from llama_index.core import VectorStoreIndex
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from pymilvus import MilvusClient

from mm_retriever.errors import StoreError, StoreMismatchError, StoreUnavailableError
from mm_retriever.ingest import ingest_images
from mm_retriever.retriever import ITEM_IMAGES, ComposedRetriever
from mm_retriever.store import ImageStore, describe_store, open_store
from tests.store.test_image_store import asked, node
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.support.effort import EFFORT
from tests.support.metadata_filters import (
    NASTY,
    PINNED_ROWS,
    filters,
    found,
    group,
    matches,
    metadata,
    row_nodes,
    where,
)
from tests.support.milvus_server import MilvusServer
from tests.test_items import draw_shop

pytestmark = pytest.mark.slow
MODEL = SimpleNamespace(dimension=3, model_id="three numbers")
PATIENT = 90
"""Seconds: a killed server is back, and has its collections loaded, well before."""
IMAGES = 60


@pytest.fixture
def opened(milvus_server: MilvusServer, request: pytest.FixtureRequest) -> Iterator[Callable[..., ImageStore]]:
    """Opens stores on the test's own collection, which goes afterwards."""
    name = "".join(one if one.isalnum() else "_" for one in request.node.name)[:200]
    stores: list[ImageStore] = []

    def open_one(model: Any = MODEL, *, timeout: float = PATIENT, **options: Any) -> ImageStore:
        stores.append(open_store(milvus_server.uri, model, collection=name, timeout=timeout, **options))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()
    client = MilvusClient(milvus_server.uri, timeout=PATIENT)
    client.drop_collection(name)
    client.close()


def impatient(store: ImageStore, seconds: float) -> ImageStore:
    """The store with another timeout; to make a new collection may take this server longer than that."""
    store._collection.connection.timeout = seconds
    return store


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(IMAGES):
        paint(tmp_path / "photos" / f"{number:03d}.png", list(COLOURS)[number % 8], size=(number + 8, 20))
    return tmp_path / "photos"


def test_what_a_server_holds_can_be_verified(opened, folder):
    """The numbers, lists and signs of metadata come back from a server as they were stored."""
    store = opened(ColourEmbedding())
    ingest_images(folder, store, ColourEmbedding(), show_progress=False)
    rich = node("rich", price=1 / 3, big=2**53 + 1, sizes=[1, 2.5, -3], words=["a", "\u00e9"], sign="\u2028\\")
    rich.embedding = ColourEmbedding().get_text_embedding("red")
    store.add([rich])
    assert str(store.verify()) == f"{IMAGES + 1} rows read, {IMAGES + 1} checked, 0 damaged"
    assert store.get_nodes(["rich"])[0].metadata == rich.metadata
    (row,) = next(store._collection.scan(["*"], 'id == "rich"'))
    store._collection.write([{**row, "price": 2}])
    assert store.verify().damaged == ("rich",)


def check_whole(store: ImageStore, folder: Path, **options: Any) -> None:
    """Every image once, as it is now; a search finds each once; nothing is left to do."""
    rows = [row for page in store.scan(["file_path", "width"]) for row in page]
    assert sorted(row["file_path"] for row in rows) == sorted(map(str, folder.iterdir())), "every image exactly once"
    assert all(row["width"] == int(Path(row["file_path"]).stem) + 8 for row in rows)
    everything = asked(store, ColourEmbedding().get_text_embedding("red"), top_k=2 * len(rows))
    assert sorted(everything) == sorted(row["id"] for row in rows)
    again = ingest_images(folder, store, ColourEmbedding(), show_progress=False, **options)
    assert (again.embedded, again.unchanged) == (0, len(rows))


# ------------------------------------------------------------------------------------------ the same as on Lite


def test_images_are_added_replaced_pruned_and_found_as_on_milvus_lite(opened, folder, tmp_path):
    """Truth: the same folder, through the same steps, in a Milvus Lite file."""
    model = ColourEmbedding()
    store = opened(model)
    assert store.index_type == "HNSW"
    sidecar = {"001.png": {"price": 5}}
    with open_store(tmp_path / "a.db", model) as single:

        def step() -> None:
            reports = [
                ingest_images(folder, one, model, prune=True, show_progress=False, sidecar=sidecar)
                for one in (store, single)
            ]
            assert replace(reports[0], seconds=0) == replace(reports[1], seconds=0)
            rows, expected = (
                {row["id"]: row for page in one.scan(["file_path", "width", "digest", "price"]) for row in page}
                for one in (store, single)
            )
            assert rows == expected
            assert store.count() == single.count()
            red = model.get_text_embedding("red")
            results = [
                one.query(VectorStoreQuery(query_embedding=red, similarity_top_k=100)) for one in (store, single)
            ]
            scores = [dict(zip(result.ids, result.similarities, strict=True)) for result in results]
            assert scores[0] == pytest.approx(scores[1], abs=1e-6)
            assert results[0].similarities == sorted(results[0].similarities, reverse=True)

        step()
        paint(folder / "000.png", "blue", size=(8, 20))
        (folder / "059.png").unlink()
        step()
        assert store.count(MetadataFilters(filters=[where("price", ">", 4)])) == 1
    check_whole(store, folder, sidecar=sidecar)


def test_results_are_items_as_on_milvus_lite(opened, tmp_path):
    """Truth: the same images in a Milvus Lite file. This server's own grouping search takes no column of metadata."""
    model, stores = ColourEmbedding(), []
    columns = draw_shop(tmp_path / "photos")
    with open_store(tmp_path / "a.db", model) as single:
        for store in (opened(model), single):
            ingest_images(tmp_path / "photos", store, model, sidecar=columns, item="sku", show_progress=False)
            stores.append(store)
        front = MetadataFilters(filters=[MetadataFilter(key="view", value="front")])
        for options in ({"top_k": 2}, {"top_k": 5}, {"filters": front}, {"min_score": 0.7}):
            there, here = (ComposedRetriever(one, model, group_by="item", **options).retrieve("red") for one in stores)
            assert [hit.score for hit in there] == pytest.approx([hit.score for hit in here], abs=1e-6)
            for ours, theirs in zip(here[1:], there[1:], strict=True):  # all of A's images are equally near
                assert ours.node.node_id == theirs.node.node_id
                assert ours.node.metadata[ITEM_IMAGES] == theirs.node.metadata[ITEM_IMAGES]
            if "filters" not in options:
                assert len(there[0].node.metadata[ITEM_IMAGES]) == 40


def test_a_row_is_replaced_whole_and_is_gone_as_soon_as_it_is_removed(opened):
    """An insert would leave both rows on a server, and a weaker read would still see a removed one."""
    store = opened()
    store.add([node("a", year=1), node("b", year=2, source="document"), node("c", [0.0, 1.0, 0.0]), node("b", year=3)])
    store.add([node("a", owner="ann")])
    assert sorted(asked(store)) == ["a", "b", "c"]
    assert store.get_nodes(["a"])[0].metadata == {"owner": "ann"}
    assert asked(store, filters=group(where("year", "<", 3))) == []
    store.add([node("b", year=3, source="document")])
    for number in range(10):
        store.add([node(f"x{number}", [0.0, 0.0, 1.0], source="other")])
        store.delete_nodes([f"x{number}"])
        assert f"x{number}" not in asked(store, [0.0, 0.0, 1.0])
    store.delete("document")
    assert sorted(asked(store)) == ["a", "c"]
    store.delete_nodes(filters=group(where("owner", "==", "ann")))
    assert asked(store) == ["c"]
    store.clear()
    assert (store.count(), asked(store)) == (0, [])
    store.add([node("d")])
    assert asked(store) == ["d"]


def test_another_store_of_the_same_collection_sees_what_was_written(opened):
    """Two processes, two servers of an app: counts, scans, filters and ids are read strongly."""
    writer, reader = opened(), opened()
    for number in range(20):
        writer.add([node(f"n{number}", year=number)])
        assert reader.count() == number + 1
        assert [one.node_id for one in reader.get_nodes([f"n{number}"])] == [f"n{number}"]
        assert reader.count(group(where("year", "==", number))) == 1
        assert len([row for page in reader.scan() for row in page]) == number + 1


def test_a_reopened_collection_knows_its_model_and_index(opened, milvus_server):
    store = opened()
    store.add([node("a")])
    again = opened()
    assert (again.model_id, again.index_type, asked(again)) == (MODEL.model_id, "HNSW", ["a"])
    for model, difference in (
        (SimpleNamespace(dimension=4, model_id="three numbers"), "vectors of 3 numbers, the model gives 4"),
        (SimpleNamespace(dimension=3, model_id="other"), "of the model 'three numbers'"),
    ):
        with pytest.raises(StoreMismatchError, match=difference):
            open_store(milvus_server.uri, model, collection=store.collection_name, timeout=PATIENT)
    with pytest.raises(StoreMismatchError, match="HNSW index, FLAT"):
        opened(index="FLAT")
    described = describe_store(milvus_server.uri)[store.collection_name]
    assert (described["dimension"], described["model"]) == (3, "three numbers")
    store.add([node("b"), node("a")])
    store.delete_nodes(["b"])
    assert describe_store(milvus_server.uri)[store.collection_name]["rows"] == 1, "not those of the server's statistics"
    with pytest.raises(StoreError, match=rf"there is no collection 'none'.*'{store.collection_name}' \(1 rows\)"):
        open_store(milvus_server.uri, MODEL, collection="none", create=False, timeout=PATIENT)


def test_many_rows_are_paged_and_may_be_removed_on_the_way(opened):
    """More than a page; pymilvus' own iterator pastes ids into its expressions."""
    store = opened()
    ids = [f'{number:05d} \\ " or id != "' for number in range(12_000)]
    store.add([node(one) for one in ids])
    assert [row["id"] for page in store.scan() for row in page] == ids
    store.delete_nodes(filters=group(where("missing", "is_empty")))
    assert store.count() == 0


def test_hybrid_search_needs_a_newer_server_and_says_so(opened, milvus_server):
    """This server is Milvus 2.3; BM25 came with 2.5. No half collection is left, and none is dropped for it."""
    refused = pytest.raises(StoreError, match=r"is Milvus 2\.3\.\S+; hybrid=True needs 2\.5 or later")
    with refused:
        open_store(milvus_server.uri, MODEL, collection="hybrid", hybrid=True, timeout=PATIENT)
    assert "hybrid" not in describe_store(milvus_server.uri)
    store = opened()
    store.add([node("a")])
    with refused:
        opened(hybrid=True, overwrite=True)
    assert asked(store) == ["a"]


@pytest.fixture(scope="module")
def filtered(milvus_server: MilvusServer) -> Iterator[ImageStore]:
    with open_store(milvus_server.uri, MODEL, collection="filters", timeout=PATIENT) as store:
        yield store
        store.client.drop_collection("filters")


def asks_for_substrings(item: MetadataFilter | MetadataFilters) -> bool:
    if isinstance(item, MetadataFilters):
        return any(map(asks_for_substrings, item.filters))
    return item.operator is FilterOperator.TEXT_MATCH


@settings(max_examples=4 * EFFORT, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(rows=st.lists(metadata(), min_size=20, max_size=40), items=st.lists(filters, min_size=40, max_size=60))
def test_a_filter_matches_on_a_server_what_its_definition_says(
    filtered: ImageStore, tried: Counter[str], rows: list[dict[str, Any]], items: list[MetadataFilters]
):
    """Truth: `tests.support.metadata_filters.matches`, in plain Python, as on Milvus Lite.

    What this old server cannot express (Milvus 2.4 and later can) is refused, never dropped.
    """
    rows = PINNED_ROWS + rows
    filtered.clear()
    filtered.add(row_nodes(rows))
    for item in items:
        tried["filters"] += 1
        try:
            matched = found(filtered, item)
        except StoreError as error:
            assert asks_for_substrings(item), item
            assert "only prefix pattern match" in str(error)
            continue
        assert matched == {number for number, row in enumerate(rows) if matches(item, row)}, item


def test_large_integers_are_told_from_decimals_beside_them(filtered):
    """A server compares an integer with a decimal as doubles, which beyond 2**53 have no odd numbers."""
    filtered.clear()
    filtered.add(row_nodes([{"year": 2**53 + 1}, {"year": 2**53}, {"year": 2.0**54}]))
    for operator, value, rows in (
        ("==", 2.0**53, {1}),
        ("in", [2.0**53, 2.0**54], {1, 2}),
        ("nin", [2.0**53], {0, 2}),
        (">", 2.0**53, {0, 2}),
        ("<=", 2.0**53, {1}),
    ):
        assert found(filtered, MetadataFilters(filters=[where("year", operator, value)])) == rows, (operator, value)


def test_ids_texts_and_values_stay_what_they_are(filtered):
    """Keys aside, all that LlamaIndex's own store pastes into expressions: each selects its own row or none."""
    filtered.clear()
    values = [value for value in NASTY if value]
    filtered.add([node(value, source=value, owner=value) for value in values])
    for value in values:
        assert [one.node_id for one in filtered.get_nodes([value])] == [value]
        assert asked(filtered, node_ids=[value]) == [value]
        assert asked(filtered, doc_ids=[value]) == [value]
        assert asked(filtered, filters=group(where("owner", "==", value))) == [value]
    for injection in ('x"] or id != "', 'x" or id != "', "x' or id != '", 'x\\" or id != \\"', 'x\\\\" or id != "'):
        assert filtered.get_nodes([injection]) == []
        assert asked(filtered, doc_ids=[injection]) == []
        assert asked(filtered, filters=group(where("owner", "in", [injection]))) == []
        filtered.delete(injection)
        filtered.delete_nodes([injection])
    assert filtered.count() == len(values)
    for value in values:
        filtered.delete(value)
        assert filtered.get_nodes([value]) == []
    assert filtered.count() == 0


def test_an_index_searches_it_and_maximal_marginal_relevance_works(opened, folder):
    model = ColourEmbedding()
    store = opened(model)
    ingest_images(folder, store, model, show_progress=False)
    retriever = VectorStoreIndex.from_vector_store(store, model).as_retriever(similarity_top_k=3)
    assert [int(Path(hit.node.image_path).stem) % len(COLOURS) for hit in retriever.retrieve("red")] == [0, 0, 0]
    diverse = store.query(
        VectorStoreQuery(
            query_embedding=model.get_text_embedding("red green"),
            similarity_top_k=2,
            mode=VectorStoreQueryMode.MMR,
            mmr_threshold=0.1,
        ),
        mmr_prefetch_k=60,
    )
    assert len({int(Path(one.image_path).stem) % 8 for one in diverse.nodes}) == 2


# ------------------------------------------------------------------------------------------ killed and restarted


class Slow(ColourEmbedding):
    """Gives a run time to be in the middle of."""

    def embed_images(self, images):
        time.sleep(0.05)
        return super().embed_images(images)


@contextmanager
def trouble(*steps: Callable[[], object]) -> Iterator[None]:
    """Does the steps in a thread of its own; an error in them is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(lambda: [step() for step in steps])
        yield
        doing.result(PATIENT)


def pause(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_a_server_killed_at_random_moments_of_ingestion_is_waited_for(opened, folder, milvus_server, tried):
    """The run does not notice. Nothing is lost or stored twice, and what was added meanwhile is in the report."""
    chance = random.Random(1)
    store = opened(Slow())
    for number in range(2 * EFFORT):
        store.clear()
        with trouble(pause(chance.uniform(0.0, 0.6)), milvus_server.kill, pause(0.5), milvus_server.start):
            report = ingest_images(folder, store, Slow(), batch_size=4, show_progress=False)
        tried["servers killed"] += 1
        assert (report.indexed, report.skipped) == (IMAGES, ()), number
        check_whole(store, folder)


def test_a_server_that_stays_away_is_a_clear_error_and_what_was_stored_stays(opened, folder, milvus_server, tried):
    """The message says how many; the same call goes on from there."""

    class Fatal(ColourEmbedding):
        def embed_images(self, images):
            if self.embedded == 20:
                milvus_server.kill()
            return super().embed_images(images)

    model = Fatal()
    store = impatient(opened(model), 2)
    start = time.monotonic()
    try:
        with pytest.raises(StoreUnavailableError, match=r"20 images were stored; the same call goes on from there"):
            ingest_images(folder, store, model, batch_size=4, show_progress=False)
        assert time.monotonic() - start < PATIENT
        tried["servers killed"] += 1
    finally:
        milvus_server.start()
    patient = opened(ColourEmbedding())
    assert patient.count() == 20
    assert ingest_images(folder, patient, ColourEmbedding(), show_progress=False).indexed == IMAGES - 20
    check_whole(patient, folder)


def test_queries_go_on_over_a_restart_and_no_answer_is_wrong(opened, milvus_server, tried):
    """Threads ask for known rows while the server is killed: each answer is whole and right, none is an error."""
    store = opened()
    store.add([node(f"n{number}", [1.0, number / 10, 0.0], year=number) for number in range(10)])
    over = threading.Event()

    def ask(seed: int) -> int:
        chance, count = random.Random(seed), 0
        while not over.is_set():
            number = chance.randrange(10)
            only = group(where("year", "<=", number))
            assert asked(store, [0.0, 1.0, 0.0], filters=only) == [f"n{one}" for one in range(number, -1, -1)]
            assert [one.node_id for one in store.get_nodes([f"n{number}"])] == [f"n{number}"]
            count += 2
        return count

    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(ask, seed) for seed in range(8)]
        try:
            for _ in range(EFFORT):
                time.sleep(1)
                milvus_server.kill()
                milvus_server.start()
                tried["servers killed"] += 1
            assert asked(store, top_k=1) == ["n0"]
            time.sleep(1)
        finally:
            over.set()
        tried["queries over a restart"] += sum(thread.result() for thread in threads)
    assert store.count() == 10


def test_a_server_that_accepts_and_never_answers_holds_nobody_longer_than_the_timeout(opened, milvus_server, tried):
    """Frozen: every kind of request, in one thread and in many at once. Awake again, it has lost nothing."""
    store = opened()
    store.add([node("a", year=1)])
    impatient(store, 2)
    calls: dict[str, Callable[[], object]] = {
        "query": lambda: asked(store),
        "filtered query": lambda: asked(store, filters=group(where("year", ">", 0))),
        "get": lambda: store.get_nodes(["a"]),
        "scan": lambda: list(store.scan()),
        "count": store.count,
        "add": lambda: store.add([node("b", year=2)]),
        "delete": lambda: store.delete_nodes(["c"]),
        "delete by filter": lambda: store.delete_nodes(filters=group(where("year", ">", 5))),
        "open": lambda: opened(timeout=2),
        "describe": lambda: describe_store(milvus_server.uri, timeout=2),
    }

    def timed(call: Callable[[], object]) -> float:
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=r"no answer from Milvus at .* within 2 s"):
            call()
        return time.monotonic() - start

    milvus_server.freeze()
    try:
        assert {name: seconds for name, call in calls.items() if (seconds := timed(call)) > 6} == {}
        with ThreadPoolExecutor(16) as pool:
            assert max(pool.map(timed, [calls["query"], calls["count"], calls["add"], calls["get"]] * 4)) < 6
        tried["requests to a frozen server"] += len(calls) + 16
    finally:
        milvus_server.thaw()
    patient = opened()
    assert asked(patient, filters=group(where("year", "==", 1))) == ["a"]
    patient.add([node("b", year=3)])
    assert sorted(asked(patient)) == ["a", "b"]
    assert patient.count() == 2
