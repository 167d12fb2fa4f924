"""Several images of one item: `group_by` of `ComposedRetriever`, on a real Milvus Lite.

The colour embedding makes the scores: an image of which f of 16 columns are red and the rest is blue has the cosine
f / sqrt(f^2 + (16 - f)^2) with the text "red".
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from PIL import Image

from mm_retriever.engine import image_query_engine
from mm_retriever.errors import FilterError
from mm_retriever.ingest import ingest_images
from mm_retriever.rerank import ScorerRerank
from mm_retriever.retriever import ITEM_IMAGES, ComposedRetriever
from mm_retriever.search_tools import ImageSearch
from mm_retriever.store import open_store
from tests.support.colour_embedding import COLOURS, ColourEmbedding
from tests.support.colour_scorer import MeanColour
from tests.support.command_line import run

MANY = 40
"""Images of item A: more than ten times the two results that are asked for."""


def stripes(path: Path, red: int, height: int = 16) -> Path:
    """Write an image of which so many of 16 columns are red, the others blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, 16, 3), COLOURS["blue"], np.uint8)
    pixels[:, :red] = COLOURS["red"]
    Image.fromarray(pixels).save(path)
    return path


def cosine(red: int) -> float:
    return red / math.hypot(red, 16 - red)


def draw_shop(folder: Path) -> dict[str, dict[str, Any]]:
    """Item A has 40 images that are all red, B a front and a back, C one; two images are of no item. The sidecar."""
    columns = {stripes(folder / f"a{n:02d}.png", 16, 16 + n).name: {"sku": "A"} for n in range(MANY)}
    columns[stripes(folder / "b-front.png", 12).name] = {"sku": "B", "view": "front", "caption": "a kettle"}
    columns[stripes(folder / "b-back.png", 2).name] = {"sku": "B", "view": "back", "caption": "a kettle"}
    columns[stripes(folder / "c.png", 10).name] = {"sku": "C", "view": "front"}
    columns[stripes(folder / "x.png", 8).name] = {"view": "front"}
    columns[stripes(folder / "y.png", 6).name] = {"sku": ""}
    return columns


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("items"), ColourEmbedding()
    columns = draw_shop(folder / "photos")
    with open_store(folder / "shop.db", model, hybrid=True) as store:
        ingest_images(folder / "photos", store, model, sidecar=columns, item="sku", show_progress=False)
        yield store, model, folder / "photos"


def per_item(shop: Any, query: Any = "red", **options: Any) -> list[NodeWithScore]:
    return ComposedRetriever(shop[0], shop[1], **{"group_by": "item", **options}).retrieve(query)


def names(hits: list[NodeWithScore]) -> list[str]:
    return [hit.node.metadata["file_name"] for hit in hits]


def image_names(hit: NodeWithScore) -> list[str]:
    return [Path(image["image"]).name for image in hit.node.metadata[ITEM_IMAGES]]


def where(key: str, value: Any) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator.EQ)])


def test_results_are_items_however_many_images_one_of_them_has(shop):
    hits = per_item(shop, top_k=2)
    assert names(hits)[0].startswith("a")
    assert names(hits)[1:] == ["b-front.png"], "each item by its best image"
    assert [hit.score for hit in hits] == pytest.approx([1.0, cosine(12)], abs=1e-6)


def test_images_of_no_item_are_items_of_their_own(shop):
    """Neither a missing nor an empty value makes two images one item."""
    hits = per_item(shop)
    assert names(hits)[1:] == ["b-front.png", "c.png", "x.png", "y.png"]
    assert [hit.score for hit in hits] == pytest.approx([1, *map(cosine, (12, 10, 8, 6))], abs=1e-6)
    assert [image_names(hit) for hit in hits[3:]] == [["x.png"], ["y.png"]]


def test_each_result_has_all_images_of_its_item_its_own_first(shop):
    first, second, third, *_ = per_item(shop)
    assert image_names(second) == ["b-front.png", "b-back.png"]
    assert image_names(third) == ["c.png"]
    assert sorted(image_names(first)) == [f"a{n:02d}.png" for n in range(MANY)]
    assert image_names(first)[0] == first.node.metadata["file_name"]
    ids = [image["id"] for image in first.node.metadata[ITEM_IMAGES]]
    assert {node.node_id for node in shop[0].get_nodes(filters=where("sku", "A"))} == set(ids)
    assert "photos" not in first.node.get_metadata_str(MetadataMode.EMBED).replace(first.node.metadata["file_path"], "")


def test_filters_choose_the_best_image_and_not_the_images_of_its_item(shop):
    hits = per_item(shop, filters=where("view", "back"))
    assert (names(hits), hits[0].score) == (["b-back.png"], pytest.approx(cosine(2)))
    assert image_names(hits[0]) == ["b-back.png", "b-front.png"]


def test_a_lowest_score_leaves_out_items(shop):
    assert names(per_item(shop, min_score=cosine(11)))[1:] == ["b-front.png"]


def test_a_hybrid_search_per_item_is_the_ranking_of_all_images_with_each_item_once(shop):
    """Truth: the ranking of all images, without groups."""
    everything = per_item(shop, "a red kettle", mode="hybrid", top_k=100, group_by=None)
    first: dict[str, NodeWithScore] = {}
    for hit in everything:
        first.setdefault(hit.node.metadata.get("sku") or hit.node.node_id, hit)
    hits = per_item(shop, "a red kettle", mode="hybrid", top_k=5)
    assert [(hit.node.node_id, hit.score) for hit in hits] == [(hit.node.node_id, hit.score) for hit in first.values()]
    assert names(hits)[0] == "b-front.png", "by the word, and by the colour"
    assert image_names(hits[0]) == ["b-front.png", "b-back.png"]


def test_a_query_image_that_is_left_out_leaves_its_item_to_its_other_images(shop):
    query = QueryBundle("", image_path=str(shop[2] / "b-front.png"))
    assert names(per_item(shop, query, top_k=1)) == ["b-front.png"]
    hits = per_item(shop, query, exclude_query_image=True)
    assert "b-back.png" in names(hits)
    assert len(hits) == 5
    alone = QueryBundle("", image_path=str(shop[2] / "c.png"))
    assert "c.png" not in names(per_item(shop, alone, exclude_query_image=True))


def test_copies_of_one_file_are_one_result_before_items_are(shop, tmp_path):
    """D has but a copy of C's image, and E a copy of it and an image of its own."""
    _, model, folder = shop
    for name in ("c", "d", "e"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(folder / "c.png", tmp_path / "photos" / f"{name}.png")
    stripes(tmp_path / "photos" / "e-own.png", 3)
    items = {"c.png": {"item": "C"}, "d.png": {"item": "D"}, "e.png": {"item": "E"}, "e-own.png": {"item": "E"}}
    with open_store(tmp_path / "a.db", model) as store:
        ingest_images(tmp_path / "photos", store, model, sidecar=items, show_progress=False)
        assert len(per_item((store, model), "red")) == 3
        hits = per_item((store, model), "red", unique=True)
        assert [hit.node.metadata.get("copies_left_out") for hit in hits] == [2, None]
        assert names(hits)[1] == "e-own.png"
        assert sorted(image_names(hits[1])) == ["e-own.png", "e.png"], "all images of the item, copies too"


def test_grouping_agrees_with_a_full_sort_over_random_vectors(tmp_path):
    """Truth: every score by numpy, sorted, the first of each item. Items are texts, numbers, lists and nothing."""
    generator = np.random.default_rng(3)
    names_of_items = ["a", "b", 7, "7", 2.5, True, ["a", "b"], "", None, *(f"item {n}" for n in range(12))]
    weights = 1.0 / np.arange(1, len(names_of_items) + 1)
    vectors = generator.normal(size=(300, 27)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    picks = generator.choice(len(names_of_items), size=300, p=weights / weights.sum())
    nodes = [
        TextNode(id_=f"n{row:03d}", text="x", metadata={"group": names_of_items[pick]}, embedding=vectors[row].tolist())
        for row, pick in enumerate(picks)
    ]
    model = ColourEmbedding()
    with open_store(tmp_path / "a.db", model) as store:
        store.add(nodes)
        for top_k in (1, 5, 30, 100):
            query = generator.normal(size=27).astype(np.float32)
            query /= np.linalg.norm(query)
            expected: dict[object, int] = {}
            for row in np.argsort(-(vectors @ query), kind="stable").tolist():
                name = nodes[row].metadata["group"]
                alone = name is None or name == "" or isinstance(name, list)
                expected.setdefault(row if alone else repr(name), row)
            bundle = QueryBundle("x", embedding=query.tolist())
            hits = per_item((store, model), bundle, top_k=top_k, group_by="group")
            assert [hit.node.node_id for hit in hits] == [f"n{row:03d}" for row in list(expected.values())[:top_k]]


@pytest.mark.slow
def test_an_item_of_more_images_than_one_search_returns_is_said_to_hide_others(tmp_path, caplog):
    model = ColourEmbedding()
    red, blue = (model.get_text_embedding(colour) for colour in ("red", "blue"))
    nodes = [TextNode(id_=f"{n}", text="", metadata={"item": "screws"}, embedding=red) for n in range(16_384)]
    with open_store(tmp_path / "a.db", model) as store:
        store.add([*nodes, TextNode(id_="nut", text="", metadata={"item": "nuts"}, embedding=blue)])
        assert len(per_item((store, model), top_k=2)) == 1
    assert "the nearest 16384 images are of 1 items: there may be more items" in caplog.text


def test_names_that_no_column_has_are_said(shop, caplog):
    assert len(per_item(shop, group_by="itme", top_k=5)) == 5
    assert "no column 'itme'" in caplog.text
    assert "did you mean 'item'?" in caplog.text
    for wrong in ("id", "text", "a/b", ""):
        with pytest.raises(FilterError, match="cannot group by"):
            per_item(shop, group_by=wrong)


def test_a_collection_made_before_is_grouped_by_any_column_it_has(shop):
    """No column of the schema is needed: `sku` is what the sidecar called it."""
    assert names(per_item(shop, group_by="sku"))[1:] == ["b-front.png", "c.png", "x.png", "y.png"]


# ------------------------------------------------------------------------------------------ where items come from


def test_the_column_of_the_item_is_stored_replaced_and_missed(tmp_path):
    model, photos = ColourEmbedding(), tmp_path / "photos"
    columns = draw_shop(photos)
    columns["c.png"]["item"] = "old"
    with open_store(tmp_path / "a.db", model) as store:

        def ingest(**options: Any) -> Any:
            return ingest_images(photos, store, model, sidecar=columns, show_progress=False, **options)

        first = ingest(item="sku")
        assert "1 images have another value in their column 'item' than in 'sku', which replaces it" in first.notes
        assert "2 images have no column 'sku' to name their item" in first.notes
        (c,) = store.get_nodes(filters=where("file_name", "c.png"))
        assert c.metadata["item"] == "C"
        again = ingest(item="sku")
        assert (again.unchanged, again.embedded) == (MANY + 5, 0)
        without = ingest()
        assert (without.updated, without.embedded) == (MANY + 3, 0)
        assert any(note.startswith(f"{MANY + 2} images no longer have the column 'item'") for note in without.notes)
        nodes = [ImageNode(image_path=str(photos / "x.png"), metadata={"article": 5})]
        ingest_images(nodes, store, model, item="article", show_progress=False)
        assert store.count(where("item", 5)) == 1


# ------------------------------------------------------------------------------------------ on every surface


def test_a_reranker_sees_the_best_image_of_each_item(shop):
    """By its mean colour, B's front is nearest to the query image; its back would be last."""
    scorer = ScorerRerank(MeanColour("mean-colour", calibrated=True), top_n=3)
    engine = image_query_engine(shop[0], shop[1], rerank=scorer, top_k=5, group_by="item")
    answer = engine.query(QueryBundle("", image_path=str(shop[2] / "b-front.png")))
    assert names(answer.source_nodes)[0] == "b-front.png"
    assert image_names(answer.source_nodes[0]) == ["b-front.png", "b-back.png"]


def test_agents_are_given_items_and_the_ids_of_their_other_images(shop):
    search = ImageSearch(shop[0], shop[1], group_by="item")
    found = search.search("red", top_k=2)
    (back,) = shop[0].get_nodes(filters=where("file_name", "b-back.png"))
    assert found.results[1].item_images == (back.node_id,)
    assert back.node_id in found.results[1].line
    assert found.to_dict()["results"][1]["item_images"] == [back.node_id]
    assert str(shop[2]) not in found.text, "places are not told"
    assert "item_images" not in ImageSearch(shop[0], shop[1]).search("red").to_dict()["results"][0]


def test_the_command_line_indexes_and_searches_items(tmp_path, capfd, monkeypatch):
    import json

    from mm_retriever.cli import options

    monkeypatch.setattr(options, "embed_model", lambda *_, **__: ColourEmbedding())
    (tmp_path / "skus.json").write_text(json.dumps(draw_shop(tmp_path / "photos")))
    db = ["--db", tmp_path / "a.db", "--model", "colours"]
    index = ["index", tmp_path / "photos", *db, "--sidecar", tmp_path / "skus.json"]
    assert run(capfd, *index)[0] == 0
    code, _, error = run(capfd, "search", "--text", "red", *db, "--per-item")
    assert (code, "--per-item: no column 'item'" in error, "--item COLUMN" in error) == (2, True, True)
    assert run(capfd, *index, "--item", "sku")[0] == 0
    code, out, _ = run(capfd, "search", "--text", "red", *db, "--per-item", "--json", "-k", "2")
    assert code == 0
    rows = json.loads(out)
    assert rows[1]["file_name"] == "b-front.png"
    assert [Path(image["image"]).name for image in rows[1][ITEM_IMAGES]] == ["b-front.png", "b-back.png"]


def test_a_running_server_gives_items_to_the_command_line(shop, tmp_path, capfd):
    """As without a server, but for where the images lie, which a server tells nobody else."""
    import json

    pytest.importorskip("starlette", reason='needs the extra "web"')
    from web_mm_retriever import web_app

    from tests.support.web import served

    with served(web_app(shop[0], shop[1], thumbnails=tmp_path)) as address:
        code, out, error = run(capfd, "search", "red", "--via", address, "--per-item", "--json", "-k", "3")
    assert code == 0, error
    rows, alone = json.loads(out), per_item(shop, top_k=3)
    assert [row["file_name"] for row in rows] == names(alone)
    assert [len(row[ITEM_IMAGES]) for row in rows] == [len(image_names(hit)) for hit in alone]
    assert str(shop[2]) not in out


def test_langchain_gives_items(shop):
    from langchain_mm_retriever import ComposedImageRetriever

    documents = ComposedImageRetriever(store=shop[0], embeddings=shop[1], k=2, group_by="item").invoke("red")
    assert [document.metadata["item"] for document in documents] == ["A", "B"]
