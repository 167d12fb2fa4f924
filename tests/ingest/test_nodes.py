"""What is stored beside an image: the caller's metadata stay, absence is not deletion, and hidden changes are seen."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
from llama_index.core.schema import ImageNode, MetadataMode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

from mm_retriever.ingest import nodes as nodes_module
from mm_retriever.own_keys import LAYERS_KEY, own_value
from mm_retriever.search_tools import ImageSearch
from mm_retriever.search_tools.results import SearchLimits, shown_metadata
from mm_retriever.search_tools.rows import result_rows
from mm_retriever.store import open_store
from tests.support.colour_embedding import paint
from tests.support.ingesting import counts, facts, ingest, node_of, nodes, where
from tests.support.settled import settle


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    paint(root / "cars" / "red.png", "red")
    paint(root / "blue.png", "blue")
    return root


# ------------------------------------------------------------------------------------------ absence is not deletion


def test_a_run_without_a_sidecar_keeps_columns_and_captions(folder, store, model):
    red = folder / "cars" / "red.png"
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme", "text": "a red car"}})
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert counts(ingest([ImageNode(image_path=str(red))], store, model)) == {"unchanged": 1}
    assert (node_of(store, red).text, facts(store, red, "brand")) == ("a red car", {"brand": "acme"})
    assert len(store.get_nodes(filters=where("brand", "acme"))) == 1


@pytest.mark.parametrize("change", ["pixels", "time"])
def test_a_changed_file_keeps_its_columns(folder, store, model, change):
    red = folder / "cars" / "red.png"
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme", "text": "a car"}})
    if change == "pixels":
        paint(red, "yellow")
    else:
        os.utime(red, (1, 1))
    report = ingest(folder, store, model)
    assert counts(report) == ({"replaced": 1, "unchanged": 1} if change == "pixels" else {"unchanged": 2})
    assert (node_of(store, red).text, facts(store, red, "brand")) == ("a car", {"brand": "acme"})
    assert node_of(store, red).metadata["digest"] == hashlib.sha256(red.read_bytes()).hexdigest()
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}


def test_columns_go_where_that_is_asked_for(folder, store, model):
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme"}, "blue.png": {"brand": "x", "caption": "c"}})
    report = ingest(folder, store, model, drop_columns=True, sidecar={"blue.png": {"brand": "y"}})
    assert counts(report) == {"updated": 2}
    assert facts(store, folder / "cars" / "red.png", "brand") == {}
    assert (node_of(store, folder / "blue.png").text, facts(store, folder / "blue.png", "brand")) == (
        "",
        {"brand": "y"},
    )
    assert report.notes == ("1 images no longer have the column 'brand': what this run says about them has none",)
    assert counts(ingest(folder, store, model, drop_columns=True, sidecar=False)) == {"updated": 1, "unchanged": 1}


def test_a_sidecar_replaces_what_a_sidecar_said_and_nothing_else(folder, store, model):
    """What it no longer says goes with a note, what a node or nobody else said stays, and so do other images'."""
    red, blue = folder / "cars" / "red.png", folder / "blue.png"
    ingest([ImageNode(image_path=str(red), text="mine", metadata={"album": 1})], store, model)
    ingest(folder, store, model, sidecar={"red.png": {"a": 1, "b": 2}, "blue.png": {"a": 3}})
    report = ingest(folder, store, model, sidecar={"red.png": {"a": 5}, "lost.png": {"a": 1}})
    assert counts(report) == {"updated": 1, "unchanged": 1}
    assert facts(store, red, "a", "b", "album") == {"a": 5, "album": 1}
    assert node_of(store, red).text == "mine"
    assert facts(store, blue, "a") == {"a": 3}
    assert report.unused_rows == 1
    assert "1 sidecar rows unused" in str(report)
    assert report.notes == (
        "sidecar: 1 of 2 rows match no image: 'lost.png'",
        "1 images no longer have the column 'b': what this run says about them has none",
        "1 images that the sidecar does not name keep the columns that they have",
    )
    assert ingest(folder, store, model, sidecar={"red.png": {"a": 5}}).updated == 0


def test_what_a_sidecar_hid_comes_back_with_the_node(folder, store, model):
    """Its caption and price, below those of a sidecar that no longer gives any: they were gone for ever."""
    red = folder / "cars" / "red.png"
    node = ImageNode(image_path=str(red), text="of the node", metadata={"price": 1, "brand": "acme"})
    ingest([node], store, model)
    ingest(folder, store, model, sidecar={"red.png": {"caption": "of the sidecar", "price": 2}})
    assert (node_of(store, red).text, facts(store, red, "price")) == ("of the sidecar", {"price": 2})
    assert counts(ingest([node], store, model)) == {"unchanged": 1}
    assert counts(ingest(folder, store, model, sidecar={"red.png": {"n": 3}})) == {"updated": 1, "unchanged": 1}
    assert counts(ingest([node], store, model)) == {"updated": 1}
    assert (node_of(store, red).text, facts(store, red, "price", "n")) == ("of the node", {"price": 1, "n": 3})
    assert counts(ingest([node], store, model)) == {"unchanged": 1}


def test_what_a_node_hides_and_belongs_to_stays(folder, store, model):
    """What language models are not shown, and the document that it is deleted by; runs without it keep both."""
    red = folder / "cars" / "red.png"
    hidden = {"excluded_llm_metadata_keys": ["cost"], "excluded_embed_metadata_keys": ["sku"]}
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="album")}
    node = ImageNode(image_path=str(red), metadata={"cost": 3, "sku": "x"}, relationships=source, **hidden)
    ingest([node, TextNode(text="words", metadata={"cost": 4}, **hidden)], store, model)
    for sidecar in (None, {"red.png": {"n": 1}}):
        ingest(folder, store, model, sidecar=sidecar)
        assert "cost" not in node_of(store, red).get_metadata_str(MetadataMode.LLM)
        assert "sku" not in node_of(store, red).get_metadata_str(MetadataMode.EMBED)
        assert node_of(store, red).ref_doc_id == "album"
    [words] = store.get_nodes(filters=where("cost", 4))
    assert "cost" not in words.get_metadata_str(MetadataMode.LLM)
    store.delete("album")
    assert store.count(where("cost", 3)) == 0


def test_rows_of_earlier_versions_stay_as_they_are(folder, store, model, monkeypatch):
    """They say by one digest what they have, and not where it came from."""
    red = folder / "cars" / "red.png"
    ingest(folder, store, model)
    node = node_of(store, red)
    extra = {"brand": "acme", "year": 2020}
    digest = hashlib.sha256(json.dumps(["a car", extra], default=str, sort_keys=True).encode()).hexdigest()
    node.metadata |= extra | {"metadata_digest": digest}
    vector = store.columns([node.node_id], ["embedding"])[node.node_id]["embedding"]
    store.add([node.model_copy(update={"text": "a car", "embedding": list(map(float, vector))})])
    before = node_of(store, red).metadata
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert counts(ingest(folder, store, model, sidecar={"red.png": {**extra, "text": "a car"}})) in (
        {"unchanged": 2},
        {"updated": 1, "unchanged": 1},
    )
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert {key: facts(store, red, *before)[key] for key in extra} == extra
    os.utime(red, (1, 1))
    ingest(folder, store, model)
    assert (node_of(store, red).text, facts(store, red, *extra)) == ("a car", extra)
    assert model.embedded == 2, "nothing was embedded again"


# ------------------------------------------------------------------------------------------ our keys and the caller's


GIVEN = {
    "file_name": "catalogue.pdf",
    "file_path": "/docs/catalogue.pdf",
    "label": "mine",
    "width": "30 cm",
    "height": 12,
    "bytes": 7,
    "digest": "abc",
    "mtime_ns": "never",
    "metadata_digest": "x",
}


@pytest.mark.parametrize("way", ["node", "sidecar"])
def test_metadata_of_the_caller_win_over_ours(folder, store, model, way):
    """Ours are beside them, and do their work: nothing is embedded twice, changes are seen, what is gone is pruned."""
    red = folder / "cars" / "red.png"
    source = [ImageNode(image_path=str(red), metadata=GIVEN)] if way == "node" else folder
    options = {} if way == "node" else {"sidecar": {"cars/red.png": GIVEN}}
    ingest(source, store, model, **options)
    embedded = model.embedded
    assert ingest(source, store, model, **options).unchanged == embedded
    assert ingest(folder, store, model, **options).unchanged == embedded
    metadata = node_of(store, red).metadata
    assert {key: metadata.get(key) for key in GIVEN} == GIVEN
    assert own_value(metadata, "file_path") == str(red)
    assert (own_value(metadata, "width"), own_value(metadata, "height")) == (24, 18)
    assert own_value(metadata, "digest") == hashlib.sha256(red.read_bytes()).hexdigest()
    assert "mm_" not in node_of(store, red).get_metadata_str(mode="llm")
    os.utime(red, (1, 1))
    assert ingest(folder, store, model).replaced == 0
    paint(red, "green")
    assert ingest(folder, store, model).replaced == 1
    assert facts(store, red, *GIVEN) == GIVEN
    red.unlink()
    assert ingest(folder, store, model, prune=True).removed == 1


def test_a_text_may_have_a_digest_of_its_own(store, model):
    note = TextNode(id_="note", text="a red letter", metadata={"digest": "mine", "bytes": 3})
    assert ingest([note], store, model).indexed == 1
    assert counts(ingest([note], store, model)) == {"unchanged": 1}
    assert store.get_nodes(["note"])[0].metadata["digest"] == "mine"


def test_a_sidecar_cannot_say_what_ingestion_says_of_a_file(folder, store, model):
    """Results of a search, saved as JSON, name it: with the digest of another file, it was read in every run."""
    report = ingest(folder, store, model, sidecar={"red.png": {"mm_digest": "x", "price": 3}})
    assert own_value(node_of(store, folder / "cars" / "red.png").metadata, "digest") != "x"
    assert any("'mm_digest'" in note for note in report.notes)
    assert counts(ingest(folder, store, model, sidecar={"red.png": {"mm_digest": "x", "price": 3}})) == {"unchanged": 2}


def test_nodes_from_one_store_go_into_another(folder, store, model, tmp_path):
    """They bring our keys along. Nothing is refused, and names of our own accounts are left out with a word."""
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme"}})
    nodes = store.get_nodes([row["id"] for page in store.scan() for row in page])
    with open_store(tmp_path / "other.db", model) as other:
        report = ingest(nodes, other, model)
        assert counts(report) == {"indexed": 2}
        assert any(LAYERS_KEY in note for note in report.notes)
        assert counts(ingest(nodes, other, model)) == {"unchanged": 2}
        assert counts(ingest(folder, other, model)) in ({"unchanged": 2}, {"updated": 1, "unchanged": 1})
        red = node_of(other, folder / "cars" / "red.png").metadata
    assert (red["brand"], red["width"]) == ("acme", 24)


def test_the_label_does_not_depend_on_what_was_indexed_first(folder, store, model):
    """Truth: each order of the same sources ends with the same labels."""
    paint(folder / "cars" / "fast" / "green.png", "green")
    sources = [folder, folder / "cars", [folder / "blue.png", folder / "cars" / "fast" / "green.png"]]
    ends = []
    for order in itertools.permutations(sources):
        store.clear()
        for source in order:
            ingest(source, store, model)
        rows = [row for page in store.scan(["file_name", "label"]) for row in page]
        ends.append({row["file_name"]: row.get("label") for row in rows})
    assert all(end == ends[0] for end in ends)
    assert ends[0] == {"blue.png": "photos", "red.png": "cars", "green.png": "cars/fast"}


def test_a_label_of_the_callers_stays_in_every_order(folder, store, model):
    red = folder / "cars" / "red.png"
    for sources in ((folder / "cars", folder), (folder, folder / "cars")):
        store.clear()
        for source in sources:
            ingest(source, store, model, sidecar={"red.png": {"label": "vehicle"}})
        assert facts(store, red, "label") == {"label": "vehicle"}
        assert own_value(node_of(store, red).metadata, "label") == "cars"


# ------------------------------------------------------------------------------------------ results


def test_columns_in_json_results_are_never_overwritten():
    """The usual shape, and beside it what has a name of ours."""
    metadata = {"rank": 5, "score": "A", "id": 7, "text": "t", "metadata": "m", "brand": "acme", LAYERS_KEY: "{}"}
    rows = result_rows(
        [
            NodeWithScore(node=TextNode(id_="x", text="words", metadata=metadata), score=0.5),
            NodeWithScore(node=ImageNode(id_="y", image_path="/a.png", metadata={"brand": "b"}), score=0.25),
        ]
    )
    assert rows[0] == {
        "rank": 1,
        "id": "x",
        "score": 0.5,
        "text": "words",
        "brand": "acme",
        "metadata": {"rank": 5, "score": "A", "id": 7, "text": "t", "metadata": "m"},
    }
    assert rows[1] == {"rank": 2, "id": "y", "score": 0.25, "brand": "b"}


def test_tools_show_the_callers_columns_and_no_accounts_of_ours():
    metadata = {"digest": "mine", "mm_digest": "ours", "bytes": 7, "brand": "acme", LAYERS_KEY: "{}"}
    assert shown_metadata(metadata, SearchLimits(), without=frozenset()) == {"digest": "mine", "brand": "acme"}


def test_tools_say_how_many_columns_they_do_not_show(folder, store, model):
    ingest([folder / "blue.png"], store, model, sidecar={"blue.png": {f"c{n}": n for n in range(30)}})
    result = ImageSearch(store, model).search(text="blue").results[0]
    assert len(result.metadata) == SearchLimits().metadata
    assert result.note == "17 more metadata not shown"


# ------------------------------------------------------------------------------------------ changes that hide


@pytest.fixture
def quick_clocks(monkeypatch):
    """Stamps settle after 50 ms, so that tests need not wait for the clock of a FAT disk."""
    monkeypatch.setattr(nodes_module, "SETTLED_NS", 50_000_000)


def keep_times(path: Path, colour: str) -> None:
    """Other contents under the same size and time, as `rsync -t` and `exiftool -P` leave them."""
    status = path.stat()
    paint(path, colour)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_contents_under_the_same_size_and_time_are_seen(tmp_path, store, model, quick_clocks):
    photos = tmp_path / "photos"
    one, two = paint(photos / "a.bmp", "red"), paint(photos / "b.bmp", "blue")
    settle(one, two)
    ingest(photos, store, model)
    assert counts(ingest(photos, store, model)) == {"unchanged": 2}
    keep_times(one, "green")
    assert counts(ingest(photos, store, model)) == {"replaced": 1, "unchanged": 1}
    for path in (one, two):
        os.utime(path, ns=(1, 1))
    settle(one, two)
    ingest(photos, store, model)
    one.rename(photos / "x")
    two.rename(one)
    (photos / "x").rename(two)
    report = ingest(photos, store, model)
    assert (report.replaced, report.reused) == (2, 2), "swapped: seen, and not embedded again"


def test_a_file_that_changed_a_moment_ago_is_read_again(tmp_path, store, model):
    """Within one tick of the clock it may change again under the very same stamp."""
    path = paint(tmp_path / "photos" / "a.bmp", "red")
    ingest(tmp_path / "photos", store, model)
    assert "file_stamp" not in nodes(store)["a.bmp"].metadata
    keep_times(path, "blue")
    assert counts(ingest(tmp_path / "photos", store, model)) == {"replaced": 1}


def test_verify_reads_everything(tmp_path, store, model, quick_clocks, monkeypatch):
    """Bit rot changes neither size nor any time."""
    path = paint(tmp_path / "photos" / "a.bmp", "red")
    settle(path)
    ingest(tmp_path / "photos", store, model)
    now = nodes_module.file_stamp(str(path))
    paint(path, "blue")
    monkeypatch.setattr("mm_retriever.ingest.nodes.file_stamp", lambda path: now)
    assert counts(ingest(tmp_path / "photos", store, model)) == {"unchanged": 1}
    assert counts(ingest(tmp_path / "photos", store, model, verify=True)) == {"replaced": 1}
    assert counts(ingest(tmp_path / "photos", store, model, verify=True)) == {"unchanged": 1}


def test_rows_of_an_earlier_version_get_their_stamp_and_keep_their_vectors(folder, store, model, quick_clocks):
    """Earlier versions stored size and time alone: the digest decides."""
    settle(folder)
    ingest(folder, store, model)
    ids = [row["id"] for page in store.scan() for row in page]
    vectors = store.columns(ids, [store.embedding_field])
    old = store.get_nodes(ids)
    for node in old:
        del node.metadata["file_stamp"]
        node.embedding = list(vectors[node.node_id][store.embedding_field])
    store.clear()
    store.add(old)
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert model.embedded == 2
    assert all("file_stamp" in node.metadata for node in nodes(store).values())
