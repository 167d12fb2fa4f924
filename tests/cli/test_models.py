"""`models`, the names that the shell completes, and `info`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from milvus_lite.server_manager import server_manager_instance
from pymilvus import MilvusClient

from mm_retriever.checkpoint import ModelEntry
from mm_retriever.cli import models as model_table
from mm_retriever.cli.models import model_rows, print_models
from mm_retriever.embedders import registry
from mm_retriever.rerank import published
from mm_retriever.rerank.registry import published_rerankers
from tests.support.command_line import run
from tests.support.processes import ROOT

ENTRY = ModelEntry(
    repo="no-such-owner/no-such-model",
    licence="MIT",
    note="for tests",
    dimension=512,
    parameters=150_000_000,
    languages="English and Welsh",
    composed="sum",
    figures=("CIRCO mAP@5 34.3, zero-shot, query image left out of the ranking, long protocol (arXiv:1, table 2)",),
    needs="no-such-extra",
)


def test_every_model_that_has_a_name_is_in_the_table_with_what_is_known_of_it(capfd):
    """Our choice: what the registries know is what people see; memory is parameters times bytes of the format."""
    code, out, _ = run(capfd, "models", "--json")
    rows = json.loads(out)
    named = [(kind, name) for kind, models in _published() for name in models]
    assert (code, [(row["kind"], row["name"]) for row in rows]) == (0, named)
    for row in rows:
        if row["parameters"]:
            assert row["bytes_float32"] == 2 * row["bytes_bfloat16"] == 4 * row["parameters"]
    assert {row["here"] for row in rows if row["name"] == "tiny"} == {True}
    code, out, _ = run(capfd, "models")
    lines = out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for _, name in named)


def test_the_table_says_what_a_model_gives_and_needs(capfd, monkeypatch):
    """Where an extra is missing, the line that installs it; where it is piped, no line is broken."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "tests.support.mean_colour"))
    monkeypatch.setitem(registry._family("tests.support.mean_colour").MODELS, ENTRY.repo, ENTRY)
    rows = [row for row in model_rows() if row["name"] == ENTRY.repo]
    print_models(rows)
    out, _ = capfd.readouterr()
    row = next(line for line in out.splitlines() if line.startswith(ENTRY.repo))
    assert row.split()[1:] == ["512", "150", "M", "600", "MB", "300", "MB", "sum"]
    assert f"    {ENTRY.figures[0]}\n" in out
    assert 'needs the extra [no-such-extra]: pip install "mm-retriever[no-such-extra]"' in out
    assert "not on this machine yet" in out


def test_a_terminal_of_80_columns_holds_every_line(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_models([model_table._row("embedding", ENTRY.repo, ENTRY), *model_rows()])
    out, _ = capfd.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "(arXiv:1, table 2)" in " ".join(out.split())


@pytest.mark.parametrize("option", ["--model", "--rerank-model"])
def test_the_shell_completes_names_without_loading_a_model(option):
    """Our promise: a press of Tab loads neither torch nor LlamaIndex, and offers every name of the registry."""
    code = (
        "import sys\nfrom mm_retriever.cli import main\ntry:\n    main([])\nfinally:\n"
        "    print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    asked = {
        "_MM_RETRIEVER_COMPLETE": "complete_bash",
        "COMP_WORDS": f"mm-retriever search {option} ",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, cwd=ROOT
    )
    loaded = done.stderr.split()
    assert {"torch", "llama_index", "transformers", "pymilvus"}.isdisjoint(loaded), loaded
    embedders, rerankers = (list(names) for _, names in _published())
    assert done.stdout.split() == (embedders if option == "--model" else rerankers)


def test_the_names_to_complete_are_those_of_the_registry():
    """A family whose entries are elsewhere than in `rerank/published.py` would not be completed."""
    assert list(published.NAMES) == [name for name, _ in published_rerankers()]


def _published() -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    embedders = [name for name, _ in registry.published_models()]
    return ("embedding", embedders), ("reranker", [name for name, _ in published_rerankers()])


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
