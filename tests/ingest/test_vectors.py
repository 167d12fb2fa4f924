"""The same contents under another name or time are known by digest and embedded once."""

from __future__ import annotations

import shutil

from mm_retriever.ingest import vectors as known
from tests.support.colour_embedding import COLOURS, paint
from tests.support.ingesting import counts, ingest, nearest, nodes


def extra(report) -> tuple[int, int]:
    return report.moved, report.reused


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
