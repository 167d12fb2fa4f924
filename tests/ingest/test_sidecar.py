"""Columns from files beside the pictures."""

from __future__ import annotations

import json

import pytest

from mm_retriever.errors import IngestError
from mm_retriever.ingest import read_sidecar


def write(tmp_path, name: str, content: str):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_json_by_file_name(tmp_path):
    path = write(tmp_path, "labels.json", json.dumps({"a/b.png": {"year": 2020, "new": True, "tags": ["x"]}}))
    sidecar = read_sidecar(path)
    assert len(sidecar) == 1
    assert sidecar.columns("a/b.png", "b.png") == {"year": 2020, "new": True, "tags": ["x"]}
    assert sidecar.columns("b.png") == sidecar.columns() == {}


def test_json_as_a_list_of_objects(tmp_path):
    """The columns that name the file are not stored again."""
    path = write(tmp_path, "labels.json", json.dumps([{"file_name": "b.png", "year": 2020}, {"file": "c.png"}]))
    assert read_sidecar(path).columns("x/b.png", "b.png") == {"year": 2020}


def test_csv_columns_are_numbers_where_every_cell_is_one(tmp_path):
    """Our choice: a column has one type, or comparisons would miss rows. '007' is no number."""
    path = write(
        tmp_path,
        "labels.csv",
        "\ufefffile_name,year,price,code,mixed,note\n"
        'a.png,2020,1.5,007,1,"two\nlines, one ""quoted"""\n'
        "b.png,-3,2,008,x,\n"
        "c.png,,1e3,9,,nan\n",
    )
    sidecar = read_sidecar(path)
    assert sidecar.columns("a.png") == {
        "year": 2020,
        "price": 1.5,
        "code": "007",
        "mixed": "1",
        "note": 'two\nlines, one "quoted"',
    }
    assert sidecar.columns("b.png") == {"year": -3, "price": 2.0, "code": "008", "mixed": "x"}
    assert sidecar.columns("c.png") == {"price": 1000.0, "code": "9", "note": "nan"}
    assert type(sidecar.columns("b.png")["price"]) is float


def test_the_path_below_the_folder_wins_over_the_bare_name():
    sidecar = read_sidecar({"b.png": {"n": 1}, "./a\\b.png": {"n": 2}})
    assert sidecar.columns("a/b.png", "b.png") == {"n": 2}
    assert sidecar.columns("c/b.png", "b.png") == {"n": 1}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "a list of objects"),
        ("a.json", '{"a.png": 1}', "'a.png': needs an object of columns, got int"),
        ("a.json", '[{"year": 1}]', "row 1 has none of the columns file_path, file_name"),
        ("a.json", '{"a.png": {"size": {"width": 1}}}', "'size': a dict is not flat"),
        ("a.json", '{"a.png": {"x": NaN}}', "not a finite number"),
        ("a.json", '{"a.png": {"digest": "x"}}', "column 'digest' is one that ingestion itself stores"),
        ("a.json", '{"a.png": {"id": "x"}}', "'id' is a column of the store itself"),
        ("a.json", '{"a.png": {"price ($)": 1}}', "is not a key"),
        ("a.csv", "year\n2020\n", "row 1 has none of the columns"),
        ("a.csv", "file\na.png,2020\n", "more cells than the header"),
        ("a.csv", 'file\n"a.png\n', "not CSV"),
        ("a.txt", "x", "give a .json or .csv file"),
    ],
)
def test_a_sidecar_that_cannot_be_used_is_refused_before_anything_is_stored(tmp_path, name, content, reason):
    path = write(tmp_path, name, content)
    with pytest.raises(IngestError, match=reason.replace("(", r"\(").replace("$", r"\$")) as caught:
        read_sidecar(path)
    assert name in str(caught.value)


def test_a_sidecar_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(IngestError, match="cannot read the sidecar file"):
        read_sidecar(tmp_path / "none.json")
    (tmp_path / "bytes.csv").write_bytes(b"file\n\xff\xfe\n")
    with pytest.raises(IngestError, match="cannot read the sidecar file"):
        read_sidecar(tmp_path / "bytes.csv")


def test_an_empty_csv_has_no_columns(tmp_path):
    assert len(read_sidecar(write(tmp_path, "a.csv", "file_name,year\n"))) == 0
