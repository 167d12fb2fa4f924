"""Rows go only for files that are provably gone, never many at once unasked, and by name when someone names them."""

from __future__ import annotations

import errno
import os
import unicodedata
from pathlib import Path

import fsspec
import pytest
from llama_index.core.vector_stores.types import MetadataFilters

from mm_retriever.errors import ImageLoadError, IngestError
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import prune_images, remove_images
from mm_retriever.ingest.reading import read_image
from mm_retriever.ingest.removal import fate
from tests.support.colour_embedding import COLOURS, paint
from tests.support.ingesting import counts, ingest, nodes, where

TRANSIENT = ("EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ETIMEDOUT", "EACCES", "EMFILE", "ENOMEM", "ELOOP")


def album(root: Path, count: int) -> list[Path]:
    """Images of different contents."""
    names = list(COLOURS)
    return [paint(root / f"{n:02d}.png", names[n % 8], size=(20 + n, 20)) for n in range(count)]


@pytest.fixture
def failing(monkeypatch):
    """Has the file system fail for paths with a name, as a stale mount does: `failing("sub", errno.EIO)`."""
    real = os.stat

    def fail(part: str, number: int) -> None:
        def stat(path, *args, **kwargs):
            if isinstance(path, str | os.PathLike) and part in os.fspath(path) and "test" in os.fspath(path):
                raise OSError(number, os.strerror(number))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "stat", stat)

    return fail


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_file_that_cannot_be_looked_at_keeps_its_row(tmp_path, store, model, failing, name, tried):
    """All are there and intact; a run says which it could not see, and the report counts what it kept."""
    photos = tmp_path / "photos"
    album(photos / "sub", 6)
    paint(photos / "other.png", "red", size=(50, 50))
    ingest(photos, store, model)
    failing("/sub/", getattr(errno, name))
    report = ingest(photos, store, model, prune=True, force=True)
    assert (report.removed, report.kept, len(report.skipped)) == (0, 6, 6)
    assert store.count() == 7
    assert "6 kept that cannot be looked at or read" in str(report)
    tried["files that fail while rows are pruned"] += 6


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EACCES", "ENOMEM"])
def test_a_file_that_can_be_looked_at_and_not_read_keeps_its_row_and_is_counted(
    tmp_path, store, model, monkeypatch, name, tried
):
    """A bad block, or a permission that was lost: the file may have changed, and nobody knows."""
    photos = tmp_path / "photos"
    files = album(photos / "sub", 6)
    paint(photos / "other.png", "red", size=(50, 50))
    ingest(photos, store, model)
    for path in files:
        os.utime(path, (1, 1))  # else its size and times say that it need not be read
    real = os.open

    def fails(path, *args, **kwargs):
        if str(path).endswith(".png") and "other" not in str(path):
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    report = ingest(photos, store, model, prune=True, force=True)
    assert (report.removed, report.kept, len(report.skipped), store.count()) == (0, 6, 6, 7)
    assert ingest(photos, store, model).kept == 0, "without pruning nothing is kept from it"
    tried["files that fail while rows are pruned"] += 6


@pytest.mark.parametrize(
    ("cause", "spoiled", "unread"),
    [
        (OSError(errno.EIO, "Input/output error"), False, True),
        (MemoryError(), False, True),
        (ImportError("no decoder"), False, False),
        (OSError("image file is truncated"), True, False),
        (SyntaxError("broken"), True, False),
    ],
)
def test_only_a_decoders_verdict_on_the_bytes_says_that_a_file_is_spoiled(
    tmp_path, monkeypatch, cause, spoiled, unread
):
    """Too little memory, a bad disk and a reader that is missing say nothing about the image."""
    path = paint(tmp_path / "a.png", "red")

    def load(*args, **kwargs):
        raise ImageLoadError("cannot load it") from cause

    monkeypatch.setattr("mm_retriever.ingest.reading.opened_image", load)
    image = read_image(str(path), "", lambda image: image, ImagePolicy())
    assert (image.spoiled, image.unread) == (spoiled, unread)


def test_a_limit_of_ours_is_no_verdict_and_nonsense_is(tmp_path):
    path = paint(tmp_path / "a.png", "red")
    assert not read_image(str(path), "", lambda image: image, ImagePolicy(max_pixels=1)).spoiled
    path.write_bytes(b"nonsense")
    assert read_image(str(path), "", lambda image: image, ImagePolicy()).spoiled


def test_more_than_a_fifth_at_once_has_to_be_asked_for(tmp_path, store, model):
    """Five of twenty: a folder that did not come back from a backup looks the same."""
    photos = tmp_path / "photos"
    files = album(photos, 20)
    ingest(photos, store, model)
    for path in files[:5]:
        path.unlink()
    with pytest.raises(IngestError, match=r"^0 indexed, 15 unchanged in .*5 of the 20 images .* more than a fifth"):
        ingest(photos, store, model, prune=True)
    with pytest.raises(IngestError, match=r"--force \(force=True in Python\)"):
        prune_images(photos, store)
    assert store.count() == 20
    files[4].write_bytes(paint(tmp_path / "again.png", "blue", size=(24, 20)).read_bytes())
    assert counts(ingest(photos, store, model, prune=True)) == {"replaced": 1, "unchanged": 15, "removed": 4}
    for path in files[5:15]:
        path.unlink()
    assert counts(ingest(photos, store, model, prune=True, force=True)) == {"unchanged": 6, "removed": 10}


def test_an_emptied_mount_point_is_noticed_by_its_device(tmp_path, store, model):
    """An empty folder on another device than the files were on; the same folder emptied by hand has its own."""
    photos = tmp_path / "photos"
    files = album(photos / "mount", 3)
    paint(photos / "a.png", "red", size=(50, 50))
    ingest(photos, store, model)
    for path in files:
        path.unlink()
    stamped = {"file_stamp": f"1-2-{files[0].parent.stat().st_dev}"}
    moved = {"file_stamp": f"1-2-{files[0].parent.stat().st_dev + 1}"}
    assert [fate(str(files[0]), one) for one in (stamped, moved, {})] == ["gone", "unknown", "gone"]
    paint(photos / "mount" / "new.png", "blue", size=(60, 60))
    assert fate(str(files[0]), moved) == "gone", "the mount is there: it is not empty"


def test_a_link_that_leads_nowhere_may_lead_somewhere_again(tmp_path, store, model):
    """To a file, or to the folder that it lies in, on a drive that is not mounted; `force` says that it is gone."""
    nas, photos = tmp_path / "nas", tmp_path / "photos"
    album(nas, 2)
    paint(photos / "a.png", "red", size=(50, 50))
    (photos / "linked.png").symlink_to(nas / "00.png")
    (photos / "2024").symlink_to(nas)
    assert counts(ingest(photos, store, model))["indexed"] == 4
    nas.rename(tmp_path / "elsewhere")
    report = ingest(photos, store, model, prune=True)
    assert (report.removed, report.kept) == (0, 3)
    (photos / "linked.png").unlink()
    (photos / "2024").unlink()
    assert ingest(photos, store, model, prune=True).removed == 3


# ------------------------------------------------------------------------------------------ a folder that is gone


def test_a_vanished_folder_is_pruned_by_ingestion_and_by_itself(tmp_path, store, model):
    photos = tmp_path / "photos"
    album(photos / "small", 3)
    album(photos / "large", 6)
    ingest(photos, store, model)
    photos.rename(tmp_path / "away")
    assert counts(ingest(photos / "small", store, model, prune=True)) == {"removed": 3}
    with pytest.raises(IngestError, match="more than a fifth"):
        ingest(photos, store, model, prune=True)
    pruned = prune_images(photos, store, force=True)
    assert (pruned.rows, pruned.removed, store.count()) == (6, 6, 0)
    with pytest.raises(IngestError, match=r"there is no folder .* and nothing is stored of it"):
        ingest(photos, store, model, prune=True)
    with pytest.raises(IngestError, match="goes with prune"):
        ingest(tmp_path / "away", store, model, force=True)


# ------------------------------------------------------------------------------------------ rows by name


def test_rows_are_removed_by_file_folder_id_and_metadata(folder, store, model):
    """Whether the files are there or not; what is named and not stored is an error, and then nothing goes."""
    ingest(folder, store, model)
    with pytest.raises(IngestError, match=r"nothing of '.*nowhere'"):
        remove_images(store, [folder / "green.JPEG", folder / "nowhere"])
    with pytest.raises(IngestError, match="no row of the id 'x'"):
        remove_images(store, [folder / "green.JPEG"], ids=["x"])
    with pytest.raises(IngestError, match="nothing is named"):
        remove_images(store)
    with pytest.raises(IngestError, match="nothing is named"):
        remove_images(store, filters=MetadataFilters(filters=[]))
    assert store.count() == 3
    (folder / "green.JPEG").unlink()
    assert remove_images(store, [os.path.relpath(folder / "green.JPEG")]) == 1
    assert remove_images(store, [folder / "cars" / "fast"]) == 1
    ingest(folder, store, model)
    assert remove_images(store, filters=where("file_name", "red.png"), ids=[nodes(store)["blue.jpg"].node_id]) == 2
    assert store.count() == 0


def test_one_path_is_no_list_of_paths(folder, store, model):
    """The first letter of an absolute path is the root of all; an empty path would be the working directory."""
    ingest(folder, store, model)
    green = folder / "green.JPEG"
    assert remove_images(store, str(green)) == 1
    ingest(folder, store, model)
    assert remove_images(store, green) == 1
    ingest(folder, store, model)
    assert remove_images(store, (place for place in [green.as_uri()])) == 1
    with pytest.raises(IngestError, match="names nothing"):
        remove_images(store, "")
    with pytest.raises(IngestError, match="the folder is ''"):
        prune_images("", store)
    assert remove_images(store, ids=(node.node_id for node in nodes(store).values())) == 2


def test_an_image_in_a_bucket_is_removed_by_the_url_that_results_show(folder, store, model):
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/album/green.jpg", (folder / "green.JPEG").read_bytes())
    ingest("/album", store, model, fs=bucket)
    place = nodes(store)["green.jpg"].image_url
    assert place == "memory:///album/green.jpg"
    assert remove_images(store, [place]) == 1
    with pytest.raises(IngestError, match=r"nothing of 'memory:///album/green.jpg'"):
        remove_images(store, [place])


def test_a_name_in_decomposed_letters_finds_the_composed_one_that_is_stored(tmp_path, store, model):
    """A Mac completes names in the shell in decomposed letters; `file_name` and `label` are stored composed."""
    composed, decomposed = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFC", "NFD"))
    paint(tmp_path / composed / f"{composed}.png", "red")
    ingest(tmp_path, store, model)
    for name in (composed, decomposed):
        assert store.count(where("label", name)) == store.count(where("file_name", f"{name}.png")) == 1
        assert store.count(where("label", [name], "in")) == 1
        assert store.count(where("label", name[:-3], "text_match")) == 1
        assert store.count(where("label", name, "!=")) == store.count(where("label", [name], "nin")) == 0


def test_a_name_in_decomposed_letters_is_removed_by_its_composed_form(tmp_path, store, model):
    """As a Mac writes it, and as people type it; one that is stored in the form given goes alone."""
    composed, decomposed = (unicodedata.normalize(form, "M\u00fcller.png") for form in ("NFC", "NFD"))
    paint(tmp_path / decomposed, "red")
    ingest(tmp_path, store, model)
    assert remove_images(store, [tmp_path / composed]) == 1
    paint(tmp_path / composed, "blue")
    ingest(tmp_path, store, model)
    assert remove_images(store, [tmp_path / composed]) == 1
    assert store.count() == 1


def test_a_name_in_either_unicode_form_is_ingested_and_pruned(tmp_path, store, model):
    """What is typed composed, and is decomposed on the disk: a file by itself, and a folder, also one that is gone."""
    composed, decomposed = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFC", "NFD"))
    paint(tmp_path / decomposed / f"{decomposed}.png", "red")
    assert counts(ingest([tmp_path / composed / f"{composed}.png"], store, model)) == {"indexed": 1}
    assert counts(ingest(tmp_path / composed, store, model)) in ({"unchanged": 1}, {"updated": 1})
    (tmp_path / decomposed / f"{decomposed}.png").unlink()
    assert prune_images(tmp_path / composed, store).removed == 1
    assert store.count() == 0
