"""A user's own queries and MegaPairs' triplets. Truth: the files as written here, with what they say by hand."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import read_evaluation, read_queries
from mm_retriever.evaluation.runs import main_way


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mugs").mkdir()
    for name in ("red.jpg", "blue.jpg", "mugs/green.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def written(folder: Path, *lines: object) -> Path:
    path = folder / "queries.jsonl"
    text = "\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_paths_of_queries_are_those_of_files_beside_them(folder):
    written(
        folder,
        {"image": "red.jpg", "text": "in blue", "targets": ["blue.jpg"], "negatives": ["./mugs/../mugs/green.jpg"]},
        {"image": None, "text": "a mug", "targets": ["red.jpg", "blue.jpg", "red.jpg"]},
        {"image": "red.jpg", "targets": [str(folder / "blue.jpg")], "negatives": [], "note": "by hand"},
    )
    first, second, third = read_queries(folder)
    assert (first.image, first.text, first.targets) == (folder / "red.jpg", "in blue", (folder / "blue.jpg",))
    assert first.negatives == (folder / "mugs" / "green.jpg",)
    assert (second.image, second.targets) == (None, (folder / "red.jpg", folder / "blue.jpg"))
    assert (third.text, third.targets) == ("", (folder / "blue.jpg",))
    assert third.place.endswith("queries.jsonl, line 5"), "empty lines are counted"


def test_each_text_of_a_megapairs_line_is_a_query(folder, tmp_path_factory):
    """The published layout: several texts for one pair, the query image first among the hard negatives."""
    elsewhere = tmp_path_factory.mktemp("annotations")
    line = {"q_img": "red.jpg", "q_text": ["in blue", "same, blue"], "t_img": "blue.jpg", "hns": ["red.jpg"]}
    queries = read_queries(written(elsewhere, line), images=folder)
    assert [query.text for query in queries] == ["in blue", "same, blue"]
    assert {query.targets for query in queries} == {(folder / "blue.jpg",)}
    assert {query.negatives for query in queries} == {(folder / "red.jpg",)}


GOOD = {"image": "red.jpg", "text": "in blue", "targets": ["blue.jpg"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ([GOOD], "line 1: .* is no JSON object"),
        (GOOD | {"target": "blue.jpg"}, "line 1: unknown key 'target'; there are image, text, targets, negatives"),
        ({"image": "red.jpg"}, "'targets' is missing; expected a value"),
        (GOOD | {"targets": "blue.jpg"}, "'targets' is 'blue.jpg'; expected a list of texts"),
        (GOOD | {"targets": []}, "no targets: name at least one right image"),
        (GOOD | {"targets": ["blue.jpg", "pink.jpg"]}, "1 of 3 images are missing: .*pink.jpg"),
        (GOOD | {"text": 3}, "'text' is 3; expected a text"),
        (GOOD | {"image": None, "text": ""}, "there is nothing to search for"),
        (GOOD | {"negatives": ["blue.jpg"]}, "both a target and a negative"),
        (GOOD | {"targets": ["red.jpg"]}, "the query image is one of its targets"),
        (GOOD | {"image": "http://host/red.jpg"}, "is no path; give images as files"),
        (GOOD | {"image": "\0"}, "is no path of an image"),
        ({"q_img": "red.jpg", "q_text": [""], "t_img": "blue.jpg"}, "'q_text' is .*; expected at least one text"),
        ("", "has no queries"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(folder, line, message):
    path = written(folder, line)
    with pytest.raises(QueryError, match=message) as refused:
        read_queries(path)
    assert "queries.jsonl" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    with pytest.raises(QueryError, match=r"cannot read .*queries.jsonl.*No such file"):
        read_queries(folder)
    (folder / "queries.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QueryError, match="not UTF-8"):
        read_queries(folder)


@pytest.mark.parametrize("place", ["mugs/..", "linked", "mugs/../queries.jsonl"])
def test_the_gallery_has_each_image_once_however_its_folder_is_named(folder, place):
    """Twice in the gallery, once as a target and once beside the query image, an image made every figure wrong."""
    written(folder, {"image": "red.jpg", "text": "in blue", "targets": ["blue.jpg"], "negatives": ["mugs/green.jpg"]})
    (folder / "linked").symlink_to(folder, target_is_directory=True)
    (data,) = read_evaluation(folder / place)
    assert sorted(data.gallery) == ["blue.jpg", "mugs/green.jpg", "red.jpg"]
    assert (data.queries[0].image, data.queries[0].targets, data.notes) == ("red.jpg", ("blue.jpg",), ())


def test_an_image_that_is_named_by_a_link_is_the_one_of_the_gallery(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "photos").symlink_to(folder, target_is_directory=True)
    query = {"image": str(elsewhere / "photos/red.jpg"), "targets": [str(elsewhere / "photos/mugs/green.jpg")]}
    (data,) = read_evaluation(written(folder, query))
    assert sorted(data.gallery) == ["blue.jpg", "mugs/green.jpg", "red.jpg"]
    assert (data.queries[0].image, data.queries[0].targets) == ("red.jpg", ("mugs/green.jpg",))
    assert main_way([data]) == "query image removed"
    written(folder, {"image": "red.jpg", "targets": [str(elsewhere / "photos/red.jpg")]})
    with pytest.raises(QueryError, match="the query image is one of its targets"):
        read_evaluation(folder)


def test_copies_of_a_file_are_one_image(folder, tmp_path_factory):
    """A copy of the query image stood before every right one, though the retriever leaves copies out too."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("red.jpg", "mugs/a copy of red.jpg", "again.jpg", elsewhere / "red.jpg"):
        (folder / name).write_bytes(b"red")
    for name in ("blue.jpg", "mugs/a copy of blue.jpg"):
        (folder / name).write_bytes(b"blu")
    query = {"image": str(elsewhere / "red.jpg"), "targets": ["mugs/a copy of blue.jpg"], "negatives": ["red.jpg"]}
    (data,) = read_evaluation(written(folder, {**query, "negatives": []}))
    assert sorted(data.gallery) == ["again.jpg", "mugs/a copy of blue.jpg", "mugs/green.jpg"]
    assert (data.queries[0].image, data.queries[0].targets) == ("again.jpg", ("mugs/a copy of blue.jpg",))
    assert main_way([data]) == "query image removed"
    assert data.notes == (f"3 files below {folder} are copies of others: the gallery has each image once",)
    (data,) = read_evaluation(written(folder, query))
    assert (data.queries[0].image, data.queries[0].negatives) == ("red.jpg", ("red.jpg",))
    for wrong in ({"targets": ["again.jpg"]}, {"negatives": ["blue.jpg"]}):
        written(folder, query | wrong)
        with pytest.raises(QueryError, match=r"line 1: (the query image is one of its targets|.* is both a target)"):
            read_evaluation(folder)


def test_names_are_found_in_every_unicode_form_and_by_file_urls(folder):
    """A Mac writes names in decomposed letters."""
    name = "grün.jpg"
    (folder / unicodedata.normalize("NFD", name)).touch()
    written(folder, {"text": "green", "targets": [unicodedata.normalize("NFC", name)], "negatives": ["red.jpg"]})
    (query,) = read_queries(folder)
    assert [path.name for path in query.targets] == [unicodedata.normalize("NFD", name)]
    written(folder, {"text": "blue", "targets": [(folder / "blue.jpg").as_uri()]})
    assert read_queries(folder)[0].targets == (folder / "blue.jpg",)
