"""The same contents under another name, time or URL: known by digest, embedded once; and changes that hide are seen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from llama_index.core.schema import ImageNode

from mm_retriever.ingest import nodes as nodes_module
from mm_retriever.ingest import vectors as known
from mm_retriever.retriever import ComposedRetriever
from tests.support.colour_embedding import COLOURS, paint
from tests.support.ingesting import counts, ingest, nearest, nodes
from tests.support.settled import settle


def extra(report) -> tuple[int, int]:
    return report.moved, report.reused


# ------------------------------------------------------------------------------------------ moves and copies


def test_a_renamed_folder_is_moved_with_its_metadata_and_nothing_is_embedded(folder, store, model):
    """Rows of the old place go, so that nothing is found twice or at a dead path."""
    sidecar = {"red.png": {"price": 9.5}}
    ingest(folder, store, model, sidecar=sidecar)
    new = folder.rename(folder.parent / "renamed")
    report = ingest(new, store, model)
    assert (*extra(report), report.embedded, model.embedded, store.count()) == (3, 0, 0, 3, 3)
    stored = nodes(store)["red.png"]
    assert stored.metadata["price"] == 9.5
    assert stored.metadata["file_path"] == stored.image_path == str(new / "cars" / "fast" / "red.png")
    assert str(report).startswith("0 indexed, 3 moved, ")
    best = nearest(store, model.get_text_embedding("red"))
    assert best.metadata["file_name"] == "red.png"
    assert counts(ingest(new, store, model, sidecar=sidecar)) == {"unchanged": 3}


def test_a_file_moved_and_renamed_inside_the_folder_is_one_move(folder, store, model):
    ingest(folder, store, model)
    (folder / "green.JPEG").rename(folder / "cars" / "renamed.jpeg")
    report = ingest(folder, store, model)
    assert (report.moved, report.unchanged, report.indexed, store.count()) == (1, 2, 0, 3)


def test_copies_are_embedded_once_in_a_run_and_not_at_all_later(tmp_path, store, model):
    """Each copy has its row; one of two copies that are moved takes the place of one."""
    one = paint(tmp_path / "a" / "1.png", "red")
    for name in ("2.png", "3.png"):
        shutil.copy(one, one.with_name(name))
    report = ingest(tmp_path / "a", store, model)
    assert (report.indexed, report.reused, report.embedded, model.embedded) == (3, 2, 1, 1)
    assert str(report).startswith("3 indexed, 2 of them copies of known files in ")
    shutil.copy(one, paint(tmp_path / "b" / "4.png", "blue"))
    report = ingest(tmp_path / "b", store, model, batch_size=1)
    assert (report.indexed, report.reused, model.embedded, store.count()) == (1, 1, 1, 4)
    (tmp_path / "a").rename(tmp_path / "c")
    report = ingest(tmp_path / "c", store, model, batch_size=1)
    assert (report.moved, report.reused, model.embedded, store.count()) == (3, 0, 1, 4)


def test_known_digests_are_found_by_requests_first_and_from_one_list_later(tmp_path, store, model, monkeypatch):
    """Both ways give the same; the list is kept up with what the run writes."""
    names = list(COLOURS)
    for n in range(8):
        paint(tmp_path / "a" / f"{n}.png", names[n])
    ingest(tmp_path / "a", store, model)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for n in range(8):
        shutil.copy(paint(tmp_path / "b" / f"x{n}.png", names[n], size=(9, 9)), tmp_path / "b" / f"y{n}.png")
    monkeypatch.setattr(known, "REQUESTS", 2)
    report = ingest(tmp_path / "b", store, model, batch_size=2)
    assert (report.indexed, report.reused, model.embedded) == (24, 16, 16)


def test_a_row_whose_file_is_still_there_is_not_taken_for_a_move(folder, store, model):
    ingest(folder, store, model)
    shutil.copytree(folder, folder.parent / "copy")
    report = ingest(folder.parent / "copy", store, model)
    assert (report.moved, report.indexed, report.reused, store.count()) == (0, 3, 3, 6)


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("options", [{}, {"exclude_query_image": True}])
def test_copies_are_found_once_and_the_next_results_take_their_places(tmp_path, store, model, options):
    one = paint(tmp_path / "a" / "0.png", "red")
    for n in range(1, 30):
        shutil.copy(one, one.with_name(f"{n}.png"))
    for colour in ("purple", "black", "white"):
        paint(tmp_path / "a" / f"{colour}.png", colour)
    ingest(tmp_path / "a", store, model)
    bundle = model.get_query_bundle("red", None)
    if options:
        bundle = model.get_query_bundle(None, paint(tmp_path / "query.png", "red", size=(5, 5)))
    assert len({hit.node.metadata["digest"] for hit in ComposedRetriever(store, model, top_k=3).retrieve(bundle)}) == 1
    hits = ComposedRetriever(store, model, top_k=3, unique=True, **options).retrieve(bundle)
    assert len({hit.node.metadata["digest"] for hit in hits}) == len(hits) == 3
    assert hits[0].node.metadata["copies_left_out"] > 0
    assert "copies_left_out" not in nodes(store)["0.png"].metadata, "the stored node stays as it was"
    assert len(ComposedRetriever(store, model, top_k=9, unique=True).retrieve(bundle)) == 4


def test_nodes_without_a_digest_are_never_taken_for_copies(store, model):
    vector = model.get_text_embedding("red")
    store.add([ImageNode(id_=name, image_path="/a.png", embedding=vector) for name in ("a", "b")])
    assert len(ComposedRetriever(store, model, unique=True).retrieve(model.get_query_bundle("red"))) == 2


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
    assert counts(ingest(folder, store, model)) == {"unchanged": 3}
    assert model.embedded == 3
    assert all("file_stamp" in node.metadata for node in nodes(store).values())
