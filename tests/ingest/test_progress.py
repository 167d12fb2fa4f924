"""A run that is watched and stopped, on real Milvus Lite."""

from __future__ import annotations

from mm_retriever.ingest import ingest_images
from tests.support.colour_embedding import COLOURS, paint
from tests.support.ingesting import counts, ingest


def draw(folder, first, end):
    """Images of different sizes, so that no two files are alike."""
    for number in range(first, end):
        paint(folder / f"{number:02}.png", list(COLOURS)[number % len(COLOURS)], size=(20 + number, 20))


def test_a_watcher_is_told_how_many_are_done_of_how_many(tmp_path, store, model):
    draw(tmp_path / "images", 0, 6)
    told = []
    report = ingest(tmp_path / "images", store, model, batch_size=2, progress=lambda *how: not told.append(how))
    assert counts(report) == {"indexed": 6}
    assert told == sorted(told)
    assert {total for _, total in told} == {6}
    assert told[-1][0] >= 4
    assert not report.notes


def test_a_run_that_is_stopped_says_so_removes_nothing_and_goes_on_later(tmp_path, store, model):
    draw(tmp_path / "images", 0, 12)
    ingest(tmp_path / "images", store, model)
    (tmp_path / "images" / "00.png").unlink()
    draw(tmp_path / "images", 12, 20)
    report = ingest_images(
        tmp_path / "images",
        store,
        model,
        batch_size=2,
        prune=True,
        show_progress=False,
        progress=lambda done, total: done < 13,
    )
    assert 2 <= report.indexed < 8
    assert report.removed == 0
    assert "stopped before its end" in report.notes[0]
    rest = ingest(tmp_path / "images", store, model, prune=True)
    assert (rest.indexed, rest.removed) == (8 - report.indexed, 1)
