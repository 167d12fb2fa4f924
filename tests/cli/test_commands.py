"""The commands: what they do, what they say, and how a mistake is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from milvus_lite.server_manager import server_manager_instance
from PIL import Image
from pymilvus import MilvusClient
from tqdm import tqdm

from mm_retriever.cli import main
from mm_retriever.cli.options import REAL_MODEL
from mm_retriever.demo.catalogue import draw_product
from mm_retriever.embedding import DEFAULT_MODEL
from tests.support.command_line import run


def test_a_composed_search_prints_the_product_of_that_kind_and_pattern(capfd, db, leopard):
    """The published example: "phone case with this" and a leopard image."""
    code, out, _ = run(
        capfd, "search", "--db", db, "--model", "tiny", "-t", "phone case with this", "-i", leopard, "--json"
    )
    rows = json.loads(out)
    assert code == 0
    assert [row["rank"] for row in rows] == list(range(1, 10))
    assert rows[0]["file_name"] == "natural leopard.jpg"
    assert rows[0]["label"] == "phone case"


def test_a_tilde_is_the_home_folder_in_every_path(capfd, db, leopard, tmp_path, monkeypatch):
    """A shell replaces it; clients that start commands from JSON do not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.db").symlink_to(db)
    (tmp_path / "leopard.png").symlink_to(leopard)
    use = ("--db", "~/a.db", "--model", "tiny")
    code, out, err = run(capfd, "search", *use, "-i", "~/leopard.png", "-k", 1, "--json", "--png", "~/sheet.png")
    assert code == 0, err
    assert len(json.loads(out)) == 1
    assert (tmp_path / "sheet.png").exists()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(leopard)
    code, out, err = run(capfd, "index", "~/images", "--db", "~/b.db", "--model", "tiny", "--report", "~/report.json")
    assert code == 0, err
    assert (tmp_path / "b.db").is_dir()
    assert (tmp_path / "report.json").exists()
    code, _, err = run(capfd, "info", "--db", "~no-such-user/a.db")
    assert (code, err.count("\n")) == (2, 1)


def test_results_are_written_as_page_and_sheet(capfd, db, tmp_path, monkeypatch):
    """Results that a person looks at, on a terminal wide enough for whole paths."""
    monkeypatch.setenv("COLUMNS", "400")
    html, png = tmp_path / "results.html", tmp_path / "results.png"
    arguments = ("search", "--db", db, "--model", "tiny", "-t", "a red mug with polka dots", "-k", 3)
    code, out, _ = run(capfd, *arguments, "--html", html, "--png", png)
    assert code == 0
    assert "red polka dots.jpg" in out
    assert html.read_text(encoding="utf-8").count("data:image/") == 3
    with Image.open(png) as sheet:
        assert sheet.width >= 900


def test_a_condition_narrows_the_search(capfd, db):
    """`--where` becomes a metadata filter."""
    code, out, _ = run(capfd, "search", "--db", db, "--model", "tiny", "-t", "stars", "--where", "label=mug", "--json")
    assert code == 0
    assert {row["label"] for row in json.loads(out)} == {"mug"}


@pytest.mark.parametrize(
    "value", ['mug" or id != "', "mug' or id != '", 'x"] or id in ["', "\\", '" or true or "', "%"]
)
def test_a_condition_cannot_be_broken_out_of(capfd, db, value):
    """What stands behind the sign is a text, whatever is in it; what is no key is refused."""
    for condition, expected in ((f"label={value}", 0), (f"label!={value}", 9)):
        code, out, _ = run(capfd, "search", "--db", db, "--model", "tiny", "-t", "mug", "--where", condition, "--json")
        assert code == 0
        assert len(json.loads(out)) == expected
    for condition in (f"{value}=mug", f"year > 0 or {value}=1", "$meta=1", "_node_content=x", "embedding>0"):
        assert run(capfd, "search", "--db", db, "--model", "tiny", "-t", "mug", "--where", condition)[0] == 2


@pytest.mark.parametrize(
    ("condition", "years"),
    [
        ("year=2020", [2020]),
        ("year != 2020", [2019, 2021]),
        ("year == 2020.0", [2020]),
        ("year=>2020", [2020, 2021]),
        ("year < 2020", [2019]),
        ("year in 2019, 2021", [2019, 2021]),
        ("year not in (2019, 2021)", [2020]),
        ("code=007", [2020]),
        ("code != '007'", [2019, 2021]),
        ("taken>=2024-01-02", [2020, 2021]),
        ("taken<=2024-01-02", [2019, 2020]),  # all of that day
        ("taken = 2024-01-02", [2020]),
        ("taken < 2024-02", [2019, 2020]),
        ("title contains red", [2019]),
        ("title is empty", [2021]),
        ("title!=", [2019, 2020]),
        ("'title' = \"a red mug\"", [2019]),
    ],
)
def test_conditions_are_understood_as_people_write_them(capfd, years_db, condition, years):
    """Truth: by hand, on three rows."""
    options = ("--db", years_db, "--model", "tiny", "-t", "mug", "--json")
    code, out, err = run(capfd, "search", *options, "--where", condition)
    assert code == 0, err
    assert sorted(row["year"] for row in json.loads(out)) == years


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("Year=2020", "no column 'Year'; there are: "),
        ("Year=2020", "did you mean 'year'?"),
        ("colour!=red", "no column 'colour'"),
        ("title>5", "column 'title' holds text, which > does not compare with the number 5"),
        ("year>2024-01-01", "column 'year' holds numbers, which > does not compare with the text '2024-01-01'"),
        ("year=~20", "'=~' is none of"),
        ("year", "is not key=value"),
        ("year in", "values are missing"),
        ("year>", "a value is missing"),
    ],
)
def test_conditions_that_nothing_can_meet_are_refused(capfd, years_db, condition, says):
    """Our choice: nothing found, or everything, must not look like an answer."""
    code, out, err = run(capfd, "search", "--db", years_db, "--model", "tiny", "-t", "mug", "--where", condition)
    assert (code, out) == (2, "")
    assert says in err


def test_two_conditions_in_one_are_said(capfd, years_db):
    options = ("--db", years_db, "--model", "tiny", "-t", "mug", "--json")
    code, out, err = run(capfd, "search", *options, "--where", "title=a red mug and year>2000")
    assert (code, json.loads(out)) == (0, [])
    assert "repeat --where" in err


@pytest.fixture(scope="module")
def years_db(images, tmp_path_factory):
    """Three images with columns of every type, on Milvus Lite."""
    folder = tmp_path_factory.mktemp("years")
    sources = sorted(images.rglob("*.jpg"))[:3]
    (folder / "images").mkdir()
    for source in sources:
        (folder / "images" / source.name).write_bytes(source.read_bytes())
    facts = [
        {"year": 2019, "code": "7", "taken": "2024-01-01T23:59:59", "title": "a red mug"},
        {"year": 2020, "code": "007", "taken": "2024-01-02T10:00:00", "title": "a blue mug"},
        {"year": 2021, "code": "x", "taken": "2024-02-01T00:00:00"},
    ]
    sidecar = folder / "facts.json"
    sidecar.write_text(
        json.dumps({source.name: fact for source, fact in zip(sources, facts, strict=True)}), encoding="utf-8"
    )
    with pytest.raises(SystemExit):
        main(
            [
                "index",
                str(folder / "images"),
                "--db",
                str(folder / "a.db"),
                "--model",
                "tiny",
                "--sidecar",
                str(sidecar),
            ]
        )
    return folder / "a.db"


def test_words_beside_images_are_found_exactly_with_hybrid(capfd, images, db, tmp_path):
    """A code that no model knows, from a sidecar: only BM25 tells it from others."""
    sidecar, words = tmp_path / "facts.json", tmp_path / "words.db"
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    sidecar.write_text(json.dumps({name: {"sku": f"XK{2040 + i}"} for i, name in enumerate(names)}), encoding="utf-8")
    options = ("--db", words, "--model", "tiny", "--hybrid", "--json")
    assert run(capfd, "index", images, *options, "--sidecar", sidecar)[0] == 0
    for number in (0, 5, 8):
        code, out, _ = run(capfd, "search", *options, "-t", f"XK{2040 + number}")
        assert code == 0
        assert json.loads(out)[0]["sku"] == f"XK{2040 + number}"
    code, _, err = run(capfd, "search", "--db", db, "--model", "tiny", "-t", "XK2040", "--hybrid")
    assert code == 2
    assert "index FOLDER --db NEW.db --hybrid" in err


def test_a_second_index_embeds_nothing(capfd, images, db):
    """Our choice: run twice, embeds nothing, adds nothing."""
    code, out, _ = run(capfd, "index", images, "--db", db, "--model", "tiny", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["indexed"], report["unchanged"]) == (0, 9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "--model", "tiny"], "give words, --image, or both"),
        (["search", "-t", "x", "--model", "tiny", "--db", "missing.db"], "mm-retriever index FOLDER --db missing.db"),
        (["search", "-t", "x", "--top-k", "0"], "greater than or equal to 1"),
        (["search", "-t", "x", "--where", "label"], "is not key=value"),
        (["search", "-t", "x", "--where", "year>new"], "is not a number"),
        (["index", "no-such-folder", "--model", "tiny", "--db", "new.db"], "no-such-folder"),
        (["index", ".", "--model", "no-such-model", "--db", "new.db"], "no-such-model"),
        (["index", ".", "--db", "new.db"], "tiny"),
        (["demo", "archive.tar.gz"], "--amazon"),
        (["demo", "--amazon", "--photos", "."], "exclude each other"),
        (["demo", "--out", "a.png"], "--out 'a.png' is a file"),
        (["convert", "tiny", "a.png"], "OUT 'a.png' is a file"),
        (["index", "a.png", "--report", "."], "--report '.' is a folder"),
        (["index", "a.png", "--model", "tiny", "--revision", "x", "--db", "new.db"], "--revision x is of a hub"),
        (["index", "a.png", "--model", "weights.pth", "--db", "new.db"], "no file of tensors"),
        (["search", "-t", "x", "--rerank", "--rerank-url", "gpu:8000"], "--rerank-url 'gpu:8000': give the address"),
        (["serch"], "did you mean 'search'"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capfd, tmp_path, monkeypatch, arguments, says):
    """Our choice: errors are one line and exit code 2; a hub out of reach names a local path or `tiny`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    code, _, err = run(capfd, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("mm-retriever: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err


def test_a_run_that_is_interrupted_says_how_to_go_on(capfd, images, tmp_path, monkeypatch):
    """Ctrl-C after two images are stored: Python raises it in the main thread, wherever that is."""
    count, updates = tqdm.update, []

    def interrupted(bar: tqdm, number: float = 1) -> bool | None:
        updates.append(number)
        if len(updates) == 2:
            raise KeyboardInterrupt
        return count(bar, number)

    index = ("index", images, "--db", tmp_path / "a.db", "--model", "tiny", "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "update", interrupted)
        code, _, err = run(capfd, *index)
    assert code == 130, err
    assert "mm-retriever: stopped; what is done stays: run the same command again to go on" in err.splitlines()
    code, out, _ = run(capfd, *index, "--json")
    report = json.loads(out)
    assert (code, report["unchanged"] + report["indexed"]) == (0, 9)
    assert report["unchanged"] >= 2
    assert report["indexed"]


def test_info_verify_reads_every_row_and_names_those_that_are_not_what_was_stored(capfd, db, tmp_path):
    copy = tmp_path / "copy.db"
    shutil.copytree(db, copy)
    code, out, _ = run(capfd, "info", "--db", copy, "--verify")
    assert code == 0
    assert "9 rows read, 9 checked, 0 damaged" in out
    client = MilvusClient(str(copy))
    client.load_collection("mm_retriever")
    (row,) = client.query("mm_retriever", filter="width > 0", output_fields=["*"], limit=1)
    client.insert("mm_retriever", [{**row, "width": 17}])
    client.close()
    server_manager_instance.release_server(str(copy))
    code, out, err = run(capfd, "info", "--db", copy, "--verify")
    assert code == 2
    assert "9 rows read, 9 checked, 1 damaged" in out
    assert row["id"] in err
    code, _, err = run(capfd, "info", "--verify")
    assert (code, "--db" in err) == (2, True)


def test_the_default_model_is_the_librarys():
    """The command line has its own copy of the name: its help loads no torch."""
    assert REAL_MODEL == DEFAULT_MODEL


def test_info_names_versions_and_what_a_store_holds(capfd, db):
    """What a bug report needs."""
    code, out, _ = run(capfd, "info", "--db", db)
    assert code == 0
    assert "torch" in out
    assert "mm_retriever" in out
    assert not [line for line in out.splitlines() if line.endswith(" ")]  # piped, a blank is read by a program
    (columns,) = [line for line in out.splitlines() if "columns mm_retriever" in line]  # what a filter may name
    code, out, _ = run(capfd, "info", "--db", db, "--json", "--verify")
    told = json.loads(out)
    assert (code, told["collections"]["mm_retriever"]["rows"]) == (0, 9)
    assert told["verified"]["mm_retriever"]["rows"] == 9
    assert {"file_name", "label", "width"} <= set(told["columns"]["mm_retriever"])
    assert ", ".join(told["columns"]["mm_retriever"]) in columns
    assert "tiny" in told["bundled_models"]
    assert told["versions"]["torch"]


def test_images_are_embedded_into_files_and_a_second_run_has_nothing_to_do(capfd, images, tmp_path):
    """What is skipped is listed; the second run needs no source, and another source is refused."""
    (tmp_path / "photos").mkdir()
    for number, path in enumerate(sorted(images.rglob("*.jpg"))):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(path.read_bytes())
    (tmp_path / "photos" / "bad\x1b[31m.png").write_text("no picture")
    out = tmp_path / "out"
    code, said, _ = run(capfd, "embed", out, tmp_path / "photos", "--model", "tiny", "--rows-per-file", 4)
    assert code == 0
    assert "9 rows in 3 shards, 3 of them new, 1 skipped" in said
    assert "not an image in a supported format" in said
    assert "\x1b" not in said
    code, said, _ = run(capfd, "embed", out, "--model", "tiny", "--json")
    report = json.loads(said)
    assert (code, report["written"], report["rows"], len(report["skipped"])) == (0, 0, 9, 1)
    assert sorted(path.name for path in (out / "shards").iterdir()) == [f"{number:06d}.parquet" for number in range(3)]
    code, _, err = run(capfd, "embed", out, images, "--model", "tiny", "--rows-per-file", 4)
    assert code == 2
    assert "Give another folder" in err


def test_files_are_imported_by_a_server_only(capfd, images, tmp_path):
    """No Milvus Lite file is made on the way, and a folder without files is named."""
    code, _, err = run(capfd, "import", tmp_path / "out", "--db", tmp_path / "a.db")
    assert code == 2
    assert "there is no store" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = run(capfd, "import", tmp_path / "out", "--db", "http://127.0.0.1:9")
    assert code == 2
    assert "there are no shards in" in err
    code, _, err = run(capfd, "embed", tmp_path / "out", images, "--workers", 2)
    assert (code, err) == (2, "mm-retriever: --workers is taken only with --ray\n")


def test_columns_are_found_said_kept_and_dropped(capfd, tmp_path):
    """A Hugging Face folder: its metadata.jsonl is found; a column `rank` and the caption are in the results."""
    photos = tmp_path / "photos"
    photos.mkdir()
    draw_product("mug", "stars", "blue", seed=7, size=96).save(photos / "a.png")
    rows = [{"file_name": "A.png", "text": "a blue mug", "rank": 5}, {"file_name": "gone.png", "text": "x"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--db", tmp_path / "a.db", "--model", "tiny")
    code, said, _ = run(capfd, "index", photos, *options)
    assert code == 0
    assert "1 sidecar rows unused" in said
    assert "note: columns are taken from 'metadata.jsonl', found in the folder" in said
    assert "1 of 2 rows match no image: 'gone.png'" in said
    for arguments, kept in (((), True), (("--no-sidecar",), True), (("--no-sidecar", "--drop-columns"), False)):
        assert run(capfd, "index", photos, *options, *arguments)[0] == 0
        row = json.loads(run(capfd, "search", *options, "-t", "a mug", "--json")[1])[0]
        assert row["rank"] == 1
        assert (row.get("text"), row.get("metadata")) == (("a blue mug", {"rank": 5}) if kept else (None, None))
    code, _, err = run(capfd, "index", photos, *options, "--sidecar", "x.csv", "--no-sidecar")
    assert (code, "exclude each other" in err) == (2, True)


RUN_EACH = """
import json, sys
from mm_retriever.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        print(end.code)
    print("-----")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.slow
def test_a_terminal_of_few_letters_ends_no_command(encoding, db, tmp_path):
    """Truth: JSON reads back whole, and what cannot be shown is escaped, in results, tables and errors."""
    images, name = tmp_path / "\u7ea2", "\u676f\u5b50 \U0001f375.png"
    images.mkdir()
    draw_product("mug", "plain", "red", seed=1, size=64).save(images / name)
    one, sheet = str(tmp_path / "one.db"), str(tmp_path / "none.png")
    commands = [
        ["index", str(images), "--db", one],
        ["search", "-t", "\u7ea2\u8272\u7684\u676f\u5b50 \U0001f375", "--db", one],
        ["search", "-t", "\u676f", "--db", one, "--json"],
        ["search", "-t", "\u676f", "--db", str(tmp_path / "\u676f.db")],
        ["search", "-t", "a", "--db", str(db), "--min-score", "0.999", "--png", sheet],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps([[*command, "--model", "tiny"] for command in commands])],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"},
        encoding=encoding,
    )
    assert "Traceback" not in done.stderr, done.stderr
    parts = done.stdout.split("-----\n")[:-1]
    assert [part.split("\n")[-2] for part in parts] == ["0", "0", "0", "2", "0"], done.stderr
    assert json.loads(parts[2].rpartition("\n0")[0])[0]["file_name"] == name
    assert Path(sheet).is_file()


def test_a_single_image_is_indexed_without_calibrating_on_it(tmp_path, monkeypatch):
    """The truth is the way of every command that gives no folder: the drawn catalogue."""
    from mm_retriever import embedding
    from mm_retriever.cli import options

    given = []

    def made(*_, **settings):
        given.append(settings["calibration"])
        return SimpleNamespace(embedder=None)

    monkeypatch.setattr(embedding, "ComposedEmbedding", made)
    image = tmp_path / "one.png"
    Image.new("RGB", (8, 8)).save(image)
    for source in (image, tmp_path, None):
        options.embed_model("tiny", device=None, dtype="int8", backend="openvino", calibration=source)
    assert given == [None, tmp_path, None]
