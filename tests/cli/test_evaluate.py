"""`mm-retriever evaluate`: what it compares, says and refuses, and the figures of the bundled model's card."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import tiny_quality

from mm_retriever.demo.catalogue import PATTERNS, catalogue
from mm_retriever.embedders import registry
from mm_retriever.rerank import registry as rerankers
from tests.support.command_line import run
from tests.support.data_sets import write_circo, write_images


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a reranker of two small modules, which answer at once."""
    monkeypatch.setattr(registry, "FAMILIES", ("tests.support.mean_colour", *registry.FAMILIES))
    monkeypatch.setattr(rerankers, "FAMILIES", ("tests.support.colour_scorer", *rerankers.FAMILIES))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_images(folder, [f"{number}.png" for number in range(12)])
    lines = [
        {"image": f"{row % 12}.png", "text": "in red", "targets": [f"{(row * 5 + 1) % 12}.png"]}
        for row in range(24)
        if (row * 5 + 1) % 12 != row % 12
    ]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def test_models_rerankers_weights_and_prompts_stand_side_by_side(capfd, colours, photos, tmp_path):
    use = ("--model", "mean-colour", "--cache", tmp_path / "cache", "--rerank", "colour-distance", "--weights", "0,1")
    page = tmp_path / "page.html"
    code, out, err = run(
        capfd, "evaluate", photos, *use, "--prompt", "{text}", "--prompt", "{text} or blue", "--json", "--html", page
    )
    assert code == 0, err
    told = json.loads(out)
    names = ["mean-colour '{text}'", "mean-colour '{text} or blue'"]
    runs = [run for name in names for run in (name, f"{name} + colour-distance")]
    assert list(told["figures"]) == ["query image in the ranking", "query image removed"]
    for figures in told["figures"].values():
        assert list(figures) == runs
        assert list(figures[names[0]]) == ["nDCG@10", "MRR", "Recall@1", "Recall@5", "Recall@10", "Hit@10", "mAP@10"]
    assert told["figures"]["query image in the ranking"][names[0]]["Recall@1"]["queries"] == 24
    assert {one["verdict"] for one in told["differences"]} <= {"better", "worse", "no difference shown"}
    assert len(told["differences"]) == 2 * 3
    assert [one["run"] for one in told["fusion_weights"]] == [f"{name} + colour-distance" for name in names]
    assert set(told["cost_per_query"]) == set(runs)
    assert "embedding with mean-colour" in err
    assert page.read_text(encoding="utf-8").count("<table>") == 5
    assert any((tmp_path / "cache").iterdir()), "vectors are kept"


@pytest.mark.parametrize("columns", ["80", None])
def test_no_figure_is_cut_where_lines_are_short(capfd, colours, photos, tmp_path, monkeypatch, columns):
    """In a terminal of 80 columns an interval folds; in a pipe nothing does."""
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    use = ("--model", "mean-colour", "--cache", tmp_path / "cache")
    code, out, err = run(capfd, "evaluate", photos, *use)
    assert code == 0, err
    assert "Recall@10" in out and "…" not in out
    assert len(re.findall(r"\d\.\d{3} -\s", out)) == 2 * 7
    if columns is None:
        assert len(re.findall(r"(?:\d\.\d{3} - \d\.\d{3}\s+){7}", out)) == 2


def test_the_table_says_figures_costs_and_what_makes_it_worse(capfd, colours, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    use = ("--model", "mean-colour", "--cache", tmp_path / "cache", "--rerank", "colour-distance")
    code, out, err = run(capfd, "evaluate", photos, *use)
    assert code == 0, err
    assert "query image in the ranking" in out
    assert "query image removed, as published" in out
    assert "tokens/query" in out
    assert "mean-colour + colour-distance" in out
    assert "worst queries by nDCG@10" in out


def test_health_and_submissions(capfd, colours, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    use = ("--model", "mean-colour", "--cache", tmp_path / "cache")
    code, out, err = run(capfd, "evaluate", photos, *use, "--health")
    assert code == 0, err
    assert "12 images read, 0 unreadable" in out
    assert "text alone finds the same first image for" in out
    (photos / "queries.jsonl").unlink()
    code, out, err = run(capfd, "evaluate", photos, *use, "--health", "--json")
    assert (code, json.loads(out)[str(photos)]["images"]) == (0, 12), err
    circo = write_circo(tmp_path / "circo")
    code, out, err = run(capfd, "evaluate", circo, *use, "--split", "test", "--submit", tmp_path / "out")
    assert code == 0, err
    assert list(json.loads((tmp_path / "out" / "circo-mean-colour.json").read_text())) == ["0"]


def test_what_is_wrong_is_said_before_a_model_is_loaded(capfd, colours, photos, tmp_path, monkeypatch):
    """The embedder's module loads nothing here: whoever reaches `load` fails the test."""
    monkeypatch.setattr(import_module("tests.support.mean_colour"), "load", None)
    few = tmp_path / "few.jsonl"
    few.write_text((photos / "queries.jsonl").read_text().splitlines()[0])
    tiny = ("--model", "mean-colour")
    for arguments, message in (
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path,), "holds no data set that is known"),
        ((photos, *tiny, "--split", "val"), "a queries.jsonl has no splits"),
        ((photos, *tiny, "--weights", "0,x", "--rerank", "mean-colour"), "--weights '0,x': give numbers"),
        ((photos, *tiny, "--weights", "-1", "--rerank", "mean-colour"), "a weight is 0 or more"),
        ((photos, *tiny, "--weights", "1"), "give --rerank"),
        ((few, *tiny, "--weights", "1", "--rerank", "mean-colour", "--images", photos), "1 are too few, give 20"),
        ((photos, *tiny, "--prompt", "find {nothing}"), "no words for {nothing}"),
        ((photos, *tiny, "--prompt", "find"), "has no blank"),
        ((photos, *tiny, "--rerank", "nobody/nothing"), "nobody/nothing"),
        ((photos, *tiny, "--model", "nobody"), "nobody"),
        ((photos, *tiny, "--submit", tmp_path / "out"), "only CIRR and CIRCO take submissions"),
        ((photos, *tiny, "--make", "3", "--health"), "exclude each other"),
        ((photos, *tiny, "--health", "--prompt", "a {text}"), "--health takes one --model"),
        ((photos, *tiny, "--out", tmp_path / "x"), "--out goes with --make"),
        ((photos, *tiny, "--make", "3"), "exists, and may have been reviewed"),
        ((write_circo(tmp_path / "circo"), *tiny, "--split", "test"), "its answers are not published"),
    ):
        code, out, err = run(capfd, "evaluate", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert message in err, (arguments, err)


def test_queries_are_drafted_from_a_folder_for_review(capfd, colours, photos, tmp_path, llm_url):
    (photos / "queries.jsonl").unlink()
    shutil.copy(photos / "1.png", photos / "copy of 1.png")
    use = ("--model", "mean-colour", "--cache", tmp_path / "cache", "--rerank", "m", "--rerank-url", llm_url)
    code, out, err = run(capfd, "evaluate", photos, *use, "--make", 2, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["queries"], told["asked_for"], told["left_out"], told["unreadable"]) == (2, 2, [], [])
    assert len((photos / "queries.jsonl").read_text().splitlines()) == 2
    assert (photos / "queries.html").read_text(encoding="utf-8").count("data:image/") == 4
    code, out, err = run(capfd, "evaluate", photos, "--model", "mean-colour", "--cache", tmp_path / "cache", "--json")
    assert (code, json.loads(out)["data"][0]["queries"]) == (0, 2), err


@pytest.fixture
def llm_url():
    from tests.support.llm_server import ScriptedServer, completion

    with ScriptedServer() as script:
        script.reply = lambda _: completion("the same in blue")
        yield script.url


ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "mm_retriever" / "embedders" / "visualized_bge" / "tiny" / "README.md"


def drawn_queries(folder: Path) -> Path:
    """The catalogue of the card as files that lose no pixel, and the queries of the hardest row of its tables."""
    products = catalogue()
    for product in sorted(products, key=lambda one: PATTERNS.index(one.pattern)):
        path = (folder / "products" / product.file_name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        product.draw().save(path, compress_level=0)
    queries = tiny_quality.composed_queries(products, "colour", held_out=True, wording="held-out")
    (folder / "queries").mkdir()
    lines: dict[int, str] = {}
    for row, query in sorted(enumerate(queries), key=lambda one: PATTERNS.index(one[1].source.pattern)):
        query.image().save(folder / "queries" / f"{row}.png", compress_level=0)
        target = Path(products[query.wanted].file_name).with_suffix(".png").as_posix()
        image = str(folder / "queries" / f"{row}.png")
        lines[row] = json.dumps({"image": image, "text": query.text, "targets": [target]})
    file = folder / "queries.jsonl"
    file.write_text("\n".join(lines[row] for row in range(len(queries))), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_figures_of_the_bundled_models_card_are_those_of_the_command(capfd, tmp_path):
    """Truth: the card's own table, to its last digit."""
    file = drawn_queries(tmp_path)
    use = ("--images", tmp_path / "products", "--model", "tiny", "--device", "cpu", "--cache", tmp_path / "cache")
    code, out, err = run(capfd, "evaluate", file, *use, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["data"][0]["images"] == 900
    (figures,) = told["figures"].values()
    section = CARD.read_text(encoding="utf-8").split("**Held-out pairs, held-out wordings**", 1)[1]
    row = next(line for line in section.splitlines() if line.startswith("| product + colour"))
    count, at_1 = (row.split("|")[column].strip() for column in (2, 3))
    assert figures["tiny"]["Recall@1"]["queries"] == int(count)
    assert figures["tiny"]["Recall@1"]["mean"] == pytest.approx(float(at_1), abs=0.003), "one of 387 may flip"
    assert figures["tiny"]["Recall@10"]["mean"] == 1
