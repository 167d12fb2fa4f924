"""What `search` takes and gives: words, images and conditions; pages, paths for other programs, links for people."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore
import pytest
from llama_index.core.schema import NodeWithScore, TextNode
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from mm_retriever import terminal
from mm_retriever.cli import main
from mm_retriever.report import Hit, SearchReport
from mm_retriever.search_tools.rows import result_rows
from tests.support.command_line import run


class Stdin:
    """What a pipe gives."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def test_stdin_is_an_image(capfd, db, leopard, monkeypatch):
    asked = ("search", "phone case with this", "--db", db, "-k", 3, "--json")
    by_path = json.loads(run(capfd, *asked, "-i", leopard)[1])
    monkeypatch.setattr(sys, "stdin", Stdin(leopard.read_bytes()))
    code, out, err = run(capfd, *asked, "-i", "-")
    assert (code, json.loads(out)) == (0, by_path), err
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    code, _, err = run(capfd, *asked, "-i", "-")
    assert (code, "stdin is empty" in err) == (2, True)
    monkeypatch.setattr(sys, "stdin", Stdin(b"no image"))
    code, _, err = run(capfd, *asked, "-i", "-")
    assert (code, "the image on stdin" in err or "not an image" in err) == (2, True), err


def test_a_url_is_fetched_and_a_private_address_is_not(capfd, db):
    """Truth: the address is this machine's own, which no URL may lead to; so it was tried."""
    code, _, err = run(capfd, "search", "--db", db, "-i", "http://127.0.0.1:9/a.png")
    assert (code, "no public address" in err, "ImagePolicy" in err) == (2, True, False), err


def test_a_url_gives_what_its_file_gives(capfd, db, leopard, monkeypatch):
    """Truth: the file that is served. The address is public; its connection is led to a server on this machine."""
    connect = httpcore.SyncBackend.connect_tcp

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(leopard.stat().st_size))
            self.end_headers()
            self.wfile.write(leopard.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        monkeypatch.setattr(
            httpcore.SyncBackend,
            "connect_tcp",
            lambda self, host, port, *given, **more: connect(self, "127.0.0.1", server.server_port, *given, **more),
        )
        asked = ("search", "phone case with this", "--db", db, "-k", 3, "--json")
        code, out, err = run(capfd, *asked, "-i", "http://8.8.8.8/leopard.png")
        server.shutdown()
    assert code == 0, err
    assert json.loads(out) == json.loads(run(capfd, *asked, "-i", leopard)[1])


def test_several_images_are_one_query(capfd, db, images):
    """Truth: the mean of an image with itself is the image; halfway between two, both are near."""
    mug, umbrella = images / "mug" / "blue stars.jpg", images / "umbrella" / "natural leopard.jpg"
    asked = ("search", "--db", db, "-k", 4, "--json")
    once, twice, both = ([*asked, "-i", mug, *more] for more in ((), ("-i", mug), ("-i", umbrella)))
    alone = json.loads(run(capfd, *once)[1])
    assert [row["id"] for row in json.loads(run(capfd, *twice)[1])] == [row["id"] for row in alone]
    code, out, err = run(capfd, *both)
    assert code == 0, err
    assert {Path(row["file_path"]) for row in json.loads(out)} >= {mug, umbrella}
    assert umbrella not in {Path(row["file_path"]) for row in alone}
    for option in ("--rerank", "--exclude-query"):
        assert run(capfd, "search", "--db", db, "-i", mug, "-i", umbrella, option)[0] == 2


def test_paths_are_for_other_programs(capfd, db, images):
    code, out, _ = run(capfd, "search", "a mug", "--db", db, "-k", 3, "--paths")
    assert code == 0
    assert all(Path(path).parent == images / "mug" for path in out.splitlines())
    assert len(out.splitlines()) == 3
    assert run(capfd, "search", "a mug", "--db", db, "-k", 3, "-0")[1] == out.replace("\n", "\0")
    code, _, err = run(capfd, "search", "a mug", "--db", db, "--paths", "--json")
    assert (code, "exclude each other" in err) == (2, True)


def test_a_path_with_a_line_break_is_counted_and_not_printed_as_two(capfdbinary):
    nodes = [
        NodeWithScore(node=TextNode(id_="a", metadata={"file_path": "/a\nb.png"}), score=0.5),
        NodeWithScore(node=TextNode(id_="b"), score=0.4),
        NodeWithScore(node=TextNode(id_="c", metadata={"file_path": "/\x1b[31m.png"}), score=0.3),
    ]
    terminal.show_rows(result_rows(nodes), lambda: SearchReport(), paths=True)
    out, err = capfdbinary.readouterr()
    assert out == b"/\x1b[31m.png\n"
    assert b"1 of the 3 results have no path" in err
    assert b"1 of the 3 results have a line break in their path: -0 prints them" in err
    terminal.show_rows(result_rows(nodes), lambda: SearchReport(), null=True)
    assert capfdbinary.readouterr()[0] == b"/a\nb.png\0/\x1b[31m.png\0"


def test_lines_are_folded_by_no_pipe(capfd, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = "/" + "long name/" * 40 + "a.png"
    terminal.print_search(SearchReport("x", None, (Hit(1, "a", 0.5, path, None, "label " * 30),)))
    out, _ = capfd.readouterr()
    assert any(line.rstrip().endswith(path) for line in out.splitlines())


def test_a_terminal_gets_links(monkeypatch):
    """Truth: OSC 8, `ESC ] 8 ; parameters ; URI ST`; the URI of a file is percent-encoded."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        terminal.print_search(SearchReport("x", None, (Hit(1, "a", 0.5, "/a b/\x1b]8;;x\x07.png"),)))
        stdout.flush()
        out = os.read(ours, 65_536)
    os.close(ours)
    assert b"file:///a%20b/%1B%5D8%3B%3Bx%07.png\x1b\\" in out
    assert b"\x07" not in out


def test_what_cannot_be_answered_is_refused_before_a_model_is_loaded(capfd, db, tmp_path):
    """Truth: the model does not exist, and the error is about something else."""
    wrong = ("--db", db, "--model", "no-such-model")
    (tmp_path / "text.png").write_text("no image")
    for arguments, says in (
        (("search", "-t", "x", "--collection", "other"), "other"),
        (("search", "-i", tmp_path / "gone.png"), "gone.png"),
        (("search", "-i", tmp_path / "text.png"), "not an image"),
        (("search", "-t", "x", "--where", "colour=red"), "colour"),
        (("search", "-t", "x", "--per-item"), "--per-item"),
        (("search", "-t", "x", "--min-score", "nan"), "--min-score"),
        (("search", "-t", "x", "--hybrid", "--min-score", "0.5"), "--min-score goes without --hybrid"),
        (("search", "x", "-t", "y"), "give the words once"),
        (("search", "x", "--exclude-query"), "--exclude-query leaves out the query image, and there is none"),
        (("search", "x", "--html", tmp_path), "is a folder"),
        (("index", tmp_path / "no folder"), "no folder"),
    ):
        code, _, err = run(capfd, *arguments, *wrong)
        assert (code, says in err, "no-such-model" in err) == (2, True, False), err


def test_reranking_decodes_the_query_image_once(capfd, db, leopard, monkeypatch):
    """Truth: how often Pillow decodes an image of that size."""
    decoded: list[tuple[int, int]] = []
    really = PngImageFile.load_prepare

    def counted(image: PngImageFile) -> None:
        decoded.append(image.size)
        really(image)

    with Image.open(leopard) as image:
        image.resize((161, 163)).save(leopard.with_name("odd.png"))
    monkeypatch.setattr(PngImageFile, "load_prepare", counted)
    code, _, err = run(
        capfd,
        "search",
        "phone case with this",
        "-i",
        leopard.with_name("odd.png"),
        "--db",
        db,
        "-k",
        2,
        "--rerank",
        "--json",
    )
    assert code == 0, err
    assert decoded.count((161, 163)) == 1


ENDS = """
import atexit, sys
class TakenApart:
    def __del__(self):
        print("taken apart", file=sys.stderr)
kept = TakenApart()
from mm_retriever.cli import main
try:
    main()
finally:
    print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
    atexit.register(print, "the end", file=sys.stderr)
"""


def test_a_search_by_words_loads_and_ends_with_nothing_it_does_not_need(db):
    """Our promise: it answers soon. Truth: Python's own list of modules; no object is taken apart, all handlers ran."""
    command = [sys.executable, "-c", ENDS, "search", "a red mug", "--db", str(db), "-k", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert json.loads(done.stdout)[0]["label"] == "mug", done.stderr
    *_, modules, end = done.stderr.splitlines()
    assert {"llama_index", "pymilvus"} <= set(loaded := modules.split())
    assert {"transformers", "huggingface_hub", "httpx", "sympy"}.isdisjoint(loaded)
    alone = os.cpu_count() == 1 or not hasattr(os, "fork")
    assert ("torch" in loaded) == alone  # else in a process of its own, at the same time
    assert end == "the end"


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
    """The value after the sign is text, whatever it contains; an invalid key is refused."""
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
        ("taken in 2024-01-02", [2020]),
        ("taken in 2024-01-01, 2024-02-01", [2019, 2021]),
        ("taken not in 2024-01-02", [2019, 2021]),
        ("taken = 2024-01", [2019, 2020]),  # all of that month
        ("taken != 2024-01", [2021]),
        ("part = 2024-01", []),  # "2024-01-2" is no day of that month
        ("taken not in 2024-01, 2024-03", [2021]),
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
        ("year=$5", "column 'year' holds numbers, which == does not compare with the text '$5'; give a number"),
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


def test_an_image_is_named_by_its_file_url(capfd, db, images):
    """As file managers and other programs give it."""
    image = sorted(images.rglob("*.jpg"))[0]
    asked = ("search", "--db", db, "--model", "tiny", "--json", "-i")
    assert run(capfd, *asked, image.as_uri())[:2] == run(capfd, *asked, image)[:2]


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
        {"year": 2020, "code": "007", "taken": "2024-01-02T10:00:00", "part": "2024-01-2", "title": "a blue mug"},
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
