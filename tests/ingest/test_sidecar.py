"""Metadata files beside the images: how they are read, and which row belongs to which image."""

from __future__ import annotations

import datetime
import json
import unicodedata
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

from mm_retriever.errors import IngestError
from mm_retriever.ingest import read_sidecar
from mm_retriever.ingest.sidecar import Sidecar, find_sidecars
from mm_retriever.ingest.sidecar_match import SidecarMatch, match_sidecar
from mm_retriever.ingest.sources import items


def write(tmp_path, name: str, content: str, encoding: str = "utf-8"):
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    return path


# ------------------------------------------------------------------------------------------ files


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


def test_the_images_of_a_coco_file_with_their_captions_and_categories(tmp_path):
    """Source: the format of COCO's annotations; files of other tools have their rows in a list, too."""
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "url": "http://host", "name": "CC"}],
        "images": [{"id": 7, "file_name": "a.png", "license": 1}, {"id": 8, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 7, "caption": "a mug"},
            {"image_id": 7, "caption": "red", "category_id": 3},
            {"image_id": 7, "category_id": 4, "bbox": [0, 0, 1, 1]},
            {"image_id": 7, "category_id": 3},
            {"image_id": [8], "caption": "damaged"},
        ],
        "categories": [{"id": 3, "name": "mug"}, {"id": 4, "name": "cup"}],
    }
    sidecar = read_sidecar(write(tmp_path, "a.json", json.dumps(content)))
    assert {key: (row.text, row.columns) for key, row in sidecar.rows.items()} == {
        "a.png": ("a mug\nred", {"categories": ["mug", "cup"], "id": 7, "license": 1}),
        "b.png": ("", {"id": 8}),
    }
    rows = {"version": 2, "data": [{"file": "a.png", "n": 1}]}
    assert read_sidecar(write(tmp_path, "a.json", json.dumps(rows))).columns("a.png") == {"n": 1}


def test_the_path_below_the_folder_wins_over_the_bare_name():
    sidecar = read_sidecar({"b.png": {"n": 1}, "./a\\b.png": {"n": 2}})
    assert sidecar.columns("a/b.png", "b.png") == {"n": 2}
    assert sidecar.columns("c/b.png", "b.png") == {"n": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a mug", "n": 3}\n\n{"file_name": "b.png"}\n'),
        ("lines.json", '{"file_name": "a.png", "text": "a mug", "n": 3}\n{"file_name": "b.png"}\n'),
        ("captions.json", '{"a.png": {"caption": "a mug", "n": 3}}'),
        ("exif.json", '[{"SourceFile": "./a.png", "FileName": "a.png", "Caption": "a mug", "n": 3}]'),
        ("a.csv", "file_name,text,n\na.png,a mug,3\n"),
        ("a.csv", "\ufeffFile Name, Caption ,n\na.png,a mug,3\n"),
        ("a.csv", "FILENAME;Caption;n\na.png;a mug;3\n"),
        ("a.csv", "sep=;\nimage;caption;n\na.png;a mug;3\n"),
        ("a.csv", "image|caption|n\na.png|a mug|3\n"),
        ("a.csv", "Picture,caption,n\na.png,a mug,3\n"),
        ("a.csv", 'n,caption,img\r3,"a mug",a.png\r'),
        ("a.tsv", "image_path\tcaption\tn\na.png\ta mug\t3\n"),
        ("a.csv", "n\tcaption\tfile\n3\ta mug\tfile:///a.png\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_the_usual_sidecars_say_the_same(tmp_path, name, content, encoding):
    """Hugging Face, exiftool, spreadsheets of several countries: one image, a caption that is its text, a number."""
    sidecar = read_sidecar(write(tmp_path, name, content, encoding))
    found = SidecarMatch(sidecar, [(("a.png",), "/a.png")]).row(("a.png",), "/a.png")
    assert found is not None
    assert (found.text, found.columns) == ("a mug", {"n": 3})


def test_a_text_and_a_caption():
    """The first becomes the text, the other stays a column; captions in a list, and objects that are captions only."""
    sidecar = read_sidecar({"a.png": {"text": "x", "caption": "y"}, "b.png": {"caption": ["one", "two"]}})
    assert (sidecar.rows["a.png"].text, sidecar.columns("a.png")) == ("x", {"caption": "y"})
    assert sidecar.rows["b.png"].text == "one\ntwo"


def test_json_of_captions_alone(tmp_path):
    assert read_sidecar(write(tmp_path, "a.json", '{"a.png": "a mug"}')).rows["a.png"].text == "a mug"


def test_latin_1_is_read_and_said(tmp_path):
    sidecar = read_sidecar(write(tmp_path, "a.csv", "file,where\na.png,Köln\n", "latin-1"))
    assert sidecar.columns("a.png") == {"where": "Köln"}
    assert "not UTF-8" in sidecar.notes[0]
    with pytest.raises(IngestError, match=r"a.csv': it is neither UTF-8 nor Windows-1252; save it as UTF-8"):
        read_sidecar(write(tmp_path, "a.csv", "file,色\na.png,赤\n", "shift_jis"))


def test_rows_that_name_one_image_twice(tmp_path):
    """Flickr's way: a row for each caption. Other values cannot both be true: the later counts, and that is said."""
    table = "image,caption,n\na.png,one,1\na.png,two,1\nb.png,x,1\nb.png,x,2\n"
    sidecar = read_sidecar(write(tmp_path, "a.csv", table))
    assert sidecar.rows["a.png"].text == "one\ntwo"
    assert sidecar.columns("b.png") == {"n": 2}
    assert [note for note in sidecar.notes if "differ" in note] == [
        "a.csv: 1 images have rows that differ, the later counts: 'b.png'"
    ]


def test_columns_of_one_name_and_of_none(tmp_path):
    sidecar = read_sidecar(write(tmp_path, "a.csv", ",file,tag,tag\n0,a.png,x,y\n"))
    assert sidecar.columns("a.png") == {"tag": "x", "tag_2": "y"}
    assert len(sidecar.notes) == 2


def test_ids_name_images_where_nothing_else_does(tmp_path):
    """Kaggle's way: `00123` is `00123.jpg`. That is a guess, so it is said."""
    sidecar = read_sidecar(write(tmp_path, "a.csv", "id,breed\n00123,pug\n"))
    names = (("train/00123.jpg", "00123.jpg"), "/d/train/00123.jpg")
    assert SidecarMatch(sidecar, [names]).row(*names).columns == {"breed": "pug"}
    assert "named by the column 'id'" in sidecar.notes[0]


# ------------------------------------------------------------------------------------------ values


def columns_of(tmp_path, cells: list[str], delimiter: str = ","):
    quoted = "".join(f'{number}.png{delimiter}"{cell}"\n' for number, cell in enumerate(cells))
    sidecar = read_sidecar(write(tmp_path, "a.csv", f"file{delimiter}x\n{quoted}"))
    return [sidecar.columns(f"{number}.png").get("x") for number in range(len(cells))]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["2020", "-3", ""], [2020, -3, None]),
        (["9.5", "N/A", "null", "None", "NaN", "-", "NA", "7"], [9.5, None, None, None, None, None, None, 7.0]),
        (["1,234.50", "12", "1,000,000"], [1234.5, 12.0, 1000000.0]),
        (["1,234", "12"], [1234, 12]),
        (["007", "8"], ["007", "8"]),
        (["00123", "N/A"], ["00123", None]),
        (["1", "x", "nan"], ["1", "x", None]),
        (["2024-01-31", ""], ["2024-01-31", None]),
        (["1234567890123456789", "1"], [1234567890123456789, 1]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        (["1234567890123456789", "0.5"], ["1234567890123456789", "0.5"]),
        (["1e3", ".5"], [1000.0, 0.5]),
        (["1.5E3", "1E-2", "2e1"], [1500.0, 0.01, 20.0]),
        (["1E5", "10E4"], ["1E5", "10E4"]),  # two codes, and one number
        (["1e999", "1"], ["1e999", "1"]),
        (["+491234", "1"], ["+491234", "1"]),
        (["1_000", "1"], ["1_000", "1"]),
        (["٣", "1"], ["٣", "1"]),
        (["NA", "DE"], ["NA", "DE"]),
    ],
)
def test_a_column_is_numeric_where_all_that_is_there_is_a_number(tmp_path, cells, values):
    """Nothing that would lose a digit is a number: codes with zeros in front, integers beyond floats and 64 bits."""
    found = columns_of(tmp_path, cells)
    assert [(type(one), one) for one in found] == [(type(one), one) for one in values]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1.234,50", "3,5", "7"], [1234.5, 3.5, 7.0]),
        (["1,234", "2,345"], ["1,234", "2,345"]),
        (["1.5", "2.25"], [1.5, 2.25]),
        (["1.5", "2,5"], ["1.5", "2,5"]),
    ],
)
def test_decimal_commas_of_a_table_with_semicolons(tmp_path, cells, values):
    """`1,234` alone may be either, and stays what it is."""
    assert columns_of(tmp_path, cells, ";") == values


def test_missing_words_in_a_column_of_text_are_counted(tmp_path):
    sidecar = read_sidecar(write(tmp_path, "a.csv", "file,x\na.png,none\nb.png,red\n"))
    assert (sidecar.columns("a.png"), sidecar.columns("b.png")) == ({}, {"x": "red"})
    assert "1 cells such as N/A" in sidecar.notes[0]


def test_values_of_json_and_of_python():
    """Missing ones are left out, integers beyond 64 bits are kept as text, and what lists nest stays."""
    day = datetime.date(2024, 1, 31)
    sidecar = read_sidecar(
        {
            "a.png": {"x": float("nan"), "y": None, "z": "", "n": np.int64(3), "f": np.float32(0.5), "big": 2**70},
            "b.png": {"day": day, "price": Decimal("1.5"), "box": np.array([[1, 2]]), "of": {"a": 1}},
        }
    )
    assert sidecar.columns("a.png") == {"n": 3, "f": 0.5, "big": str(2**70)}
    assert sidecar.columns("b.png") == {"day": "2024-01-31", "price": 1.5, "box": [[1, 2]], "of": {"a": 1}}


def test_a_field_that_no_store_holds_is_left_out_and_counted(tmp_path):
    """Not the image, and not the other fields."""
    long = "x" * 200_000
    sidecar = read_sidecar(write(tmp_path, "a.csv", f"file,long,n,caption\na.png,{long},1,{long}\nb.png,y,2,z\n"))
    assert (sidecar.rows["a.png"].text, sidecar.columns("a.png")) == ("", {"n": 1})
    assert sidecar.columns("b.png") == {"long": "y", "n": 2}
    assert sum("left out of 1 rows" in note for note in sidecar.notes) == 2


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "a list of objects"),
        ("a.json", '{"a.png": 1}', "'a.png': needs an object of columns, got int"),
        ("a.json", '[{"year": 1}]', "row 1 has none of the columns file_path, file_name"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"file_name": "a.png"}\n{"file_name"\n', "line 2: not JSON"),
        ("a.jsonl", '{"file_name": "a.png"}\n[1]\n', "line 2: needs an object"),
        ("a.csv", "year\n2020\n", "line 2 has none of the columns"),
        ("a.csv", "file\na.png,2020\n", "line 2 has more cells than the header"),
        ("a.csv", 'file\n"a.png\n', "not CSV"),
        ("a.csv", "a.png,a mug\nb.png,a cap\n", "the first line is no header"),
        ("a.txt", "x", "give a .json, .jsonl, .csv or .tsv file"),
        ("a.csv", "PK\x03\x04", "save it as CSV"),
    ],
)
def test_a_sidecar_that_cannot_be_used_is_refused_before_anything_is_stored(tmp_path, name, content, reason):
    path = write(tmp_path, name, content)
    with pytest.raises(IngestError) as caught:
        read_sidecar(path)
    assert reason in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sidecar_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(IngestError, match="cannot read the sidecar file"):
        read_sidecar(tmp_path / "none.json")
    (tmp_path / "bytes.csv").write_bytes(b"file\n\xff\xfe\n\0" + bytes(range(256)) * 4)
    with pytest.raises(IngestError, match="cannot read the sidecar file"):
        read_sidecar(tmp_path / "bytes.csv")


def test_an_empty_csv_has_no_columns(tmp_path):
    assert len(read_sidecar(write(tmp_path, "a.csv", "file_name,year\n"))) == 0


def test_a_sidecar_without_rows_says_so(tmp_path):
    """Nothing of it is used, and there is nobody else to notice."""
    for content in ("", "\n", "file_name,year\n"):
        assert read_sidecar(write(tmp_path, "a.csv", content)).notes == ("a.csv: holds no rows",)
    assert read_sidecar(write(tmp_path, "a.jsonl", "\n")).notes == ("a.jsonl: holds no rows",)
    with pytest.raises(IngestError, match="the first line is no header but names an image"):
        read_sidecar(write(tmp_path, "a.csv", "a.png,a mug\n"))


def test_one_zero_byte_does_not_make_a_file_utf_16(tmp_path):
    """Its letters would be others, and its header none."""
    with pytest.raises(IngestError, match="it is not text"):
        read_sidecar(write(tmp_path, "a.csv", "file_name,kind\na.png,a\0b\n"))


def test_spaces_after_the_commas_of_the_header_are_those_of_its_style(tmp_path):
    sidecar = read_sidecar(
        write(tmp_path, "a.csv", 'file_name, kind, note\na.png, mug, "red, with dots"\nb.png, cup,\n')
    )
    assert sidecar.columns("a.png") == {"kind": "mug", "note": "red, with dots"}
    assert read_sidecar(write(tmp_path, "b.csv", "file_name,kind\na.png, mug\n")).columns("a.png") == {"kind": " mug"}


def test_rows_are_a_sidecar_as_they_are_in_json(tmp_path):
    rows = [{"file_name": "a.png", "n": 1}, {"file_name": "./b.png", "n": 2}]
    assert read_sidecar(rows).columns("b.png") == {"n": 2}
    assert read_sidecar(write(tmp_path, "a.json", json.dumps(rows))).rows == read_sidecar(rows).rows
    for wrong in (SimpleNamespace(), [1], True):
        with pytest.raises(IngestError, match=r"the sidecar is a .*: give a file, a mapping"):
            read_sidecar(wrong)


def test_rows_that_name_one_image_in_two_forms_are_joined(tmp_path):
    """As rows that name it in the same form: all captions stay, and values that differ are said."""
    sidecar = read_sidecar(write(tmp_path, "a.csv", "path,caption,n\nx/a.png,one,1\n.\\x\\a.png,two,2\n"))
    assert (sidecar.rows["x/a.png"].text, sidecar.columns("x/a.png")) == ("one\ntwo", {"n": 2})
    assert sidecar.notes == ("a.csv: 1 images have rows that differ, the later counts: 'x/a.png'",)


def test_names_of_a_mapping_in_two_forms_are_joined(tmp_path):
    """As rows of a list are: neither form's columns vanish."""
    sidecar = read_sidecar({"x/a.png": {"n": 1, "caption": "one"}, "./x/a.png": {"m": 2, "caption": "two"}})
    assert (sidecar.rows["x/a.png"].text, sidecar.columns("x/a.png")) == ("one\ntwo", {"n": 1, "m": 2})
    sidecar = read_sidecar(write(tmp_path, "a.json", '{"x/a.png": {"n": 1}, "x\\\\a.png": {"n": 2}}'))
    assert sidecar.columns("x/a.png") == {"n": 2}
    assert sidecar.notes == ("a.json: 1 images have rows that differ, the later counts: 'x/a.png'",)


def test_a_large_integer_beside_decimals_keeps_its_digits(tmp_path):
    content = "file,n\na.png,9007199254740993\nb.png,1.5\n"
    assert read_sidecar(write(tmp_path, "a.csv", content)).columns("a.png") == {"n": "9007199254740993"}


# ------------------------------------------------------------------------------------------ which row is whose


def owners(keys: list[str], paths: list[str], folder: str = "/data/photos") -> tuple[dict[str, str], SidecarMatch]:
    """Which image has which row, by the names that ingestion gives to the images of a folder."""
    images = [((path, path.rsplit("/", 1)[-1]), f"{folder}/{path}") for path in paths]
    match = SidecarMatch(Sidecar({key: {"key": key} for key in keys}), images)
    rows = {names[0]: match.row(names, path) for names, path in images}
    return {name: row.columns["key"] for name, row in rows.items() if row is not None}, match


@pytest.mark.parametrize(
    "key",
    [
        "cars/Red.png",
        "./cars/Red.png",
        "cars\\Red.png",
        "cars//Red.png",
        "/data/photos/cars/Red.png",
        "file:///data/photos/cars/Red.png",
        "photos/cars/Red.png",
        "../photos/cars/Red.png",
        "C:\\Users\\me\\photos\\cars\\Red.png",
        "/home/other/photos/cars/Red.png",
        "CARS/red.PNG",
        "Red.png",
        "RED.PNG",
        "cars/red",
        "Red",
        " Red.png ",
    ],
)
def test_the_names_of_one_image(key):
    found, match = owners([key], ["cars/Red.png", "blue.png"])
    assert found == {"cars/Red.png": key}
    assert match.notes == ()


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_names_from_a_mac_and_from_elsewhere(stored, written):
    name = unicodedata.normalize(stored, "Möbel/Müller.png")
    for key in ("Möbel/Müller.png", "Müller.png", "müller"):
        assert owners([unicodedata.normalize(written, key)], [name])[0].keys() == {name}


def test_a_name_that_several_images_have_is_not_guessed():
    found, match = owners(
        ["1.png", "2.png", "cat/3.png"], ["cat/1.png", "dog/1.png", "2.png", "cat/2.png", "cat/3.png"]
    )
    assert found == {"2.png": "2.png", "cat/3.png": "cat/3.png"}
    assert match.unused == ["1.png"]
    assert match.notes == ("sidecar: '1.png': several images fit; give their paths below the folder instead",)


def test_rows_that_fit_one_image_equally_well_are_not_guessed():
    found, match = owners(["A.PNG", "a.Png"], ["a.png"])
    assert found == {}
    assert any("several rows fit" in note for note in match.notes)
    assert owners(["A.png", "a.png"], ["a.png"])[0] == {"a.png": "a.png"}, "the exact name is better than another case"


def test_a_row_by_url_is_of_the_image_under_any_signature():
    """Presigned anew in each export; what is said of a row that fits nothing tells no signature."""
    plain = "https://cdn.example.com/a.png"
    for written, fetched in (
        (plain, f"{plain}?sig=1"),
        (f"{plain}?sig=2", plain),
        (f"{plain}?sig=2", f"{plain}?sig=1"),
    ):
        match = match_sidecar({written: {"n": 1}}, [fetched], None)
        [item] = items([fetched], lambda name, reason: None)
        assert match.row(item.sidecar_names, item.path).columns == {"n": 1}
        assert not match.notes
    [note] = match_sidecar({f"{plain}?sig=2": {"n": 1}}, [], None).notes
    assert "sig" not in note


def test_a_url_beside_the_file_name_is_a_column(tmp_path):
    """Where the image is on the web is no repetition of its name, as exiftool's FileName beside SourceFile is."""
    rows = [{"file_name": "a.png", "url": "https://cdn.example.com/a.png", "path": "x/a.png"}]
    assert read_sidecar(rows).columns("x/a.png", "a.png") == {"url": "https://cdn.example.com/a.png"}
    rows = [{"url": "https://cdn.example.com/a.png", "image_url": "https://cdn.example.com/a.png"}]
    assert read_sidecar(rows).columns("https://cdn.example.com/a.png") == {}


def test_another_path_is_not_a_match_by_name():
    """A row about `vans/red.png` says nothing about `cars/red.png`; it is counted instead."""
    found, match = owners(["vans/red.png", "x.png", "y.png", "z.png"], ["cars/red.png"])
    assert found == {}
    assert match.notes == ("sidecar: 4 of 4 rows match no image: 'vans/red.png', 'x.png', 'y.png' and 1 more",)


def test_where_nobody_knows_the_images_before_the_first_has_the_row():
    match = SidecarMatch(Sidecar({"1.png": {"n": 1}}), None)
    assert match.row(("/a/1.png", "1.png"), "/a/1.png").columns == {"n": 1}
    assert match.row(("/b/1.png", "1.png"), "/b/1.png") is None
    assert "several images fit" in match.notes[0]


def test_sidecars_lie_in_the_folder(tmp_path):
    """Hugging Face puts one into each split; one that is something else is said and not used."""
    for name, content in {
        "metadata.csv": "file_name,n\na.png,1\n",
        "train/metadata.jsonl": '{"file_name": "a.png", "text": "t", "n": 2}',
        "other/metadata.csv": "year\n2020\n",
        ".hidden/metadata.csv": "file_name,n\nb.png,1\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, content)
    sidecar = find_sidecars(str(tmp_path))
    assert {key: (row.text, row.columns) for key, row in sidecar.rows.items()} == {
        "a.png": ("", {"n": 1}),
        "train/a.png": ("t", {"n": 2}),
    }
    assert sidecar.notes[0] == "columns are taken from 'metadata.csv', 'train/metadata.jsonl', found in the folder"
    assert sidecar.notes[1].startswith("other/metadata.csv in the folder is not used: ")


def test_what_several_sidecars_in_the_folder_say_of_one_image_is_joined(tmp_path):
    """Captions in metadata.jsonl and prices in metadata.csv, or a file in the folder below: our choice is both."""
    (tmp_path / "sub").mkdir()
    write(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "a mug", "n": 1}')
    write(tmp_path, "metadata.csv", "file_name,caption,n,price\na.png,red,2,5\nsub/b.png,,3,6\n")
    write(tmp_path, "sub/metadata.csv", "file_name,brand\nb.png,acme\n")
    sidecar = find_sidecars(str(tmp_path))
    assert {key: (row.text, row.columns) for key, row in sidecar.rows.items()} == {
        "a.png": ("a mug\nred", {"n": 1, "price": 5}),
        "sub/b.png": ("", {"n": 3, "price": 6, "brand": "acme"}),
    }
    assert sidecar.notes[-1] == "1 images have rows in several files that differ, the first counts: 'a.png'"
