"""`embed` writes files of vectors, and `import` hands them to a server."""

from __future__ import annotations

import json

from tests.support.command_line import run


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


def test_a_run_that_goes_on_needs_no_option_again(capfd, images, tmp_path):
    """The files know their model and their size. An option that differs is refused in the words of the command."""
    out = tmp_path / "out"
    assert run(capfd, "embed", out, images, "--model", "tiny", "--rows-per-file", 4)[0] == 0
    (out / "shards" / "000001.parquet").unlink()
    code, said, _ = run(capfd, "embed", out, images)
    assert (code, "9 rows in 3 shards, 1 of them new" in said) == (0, True)
    code, said, _ = run(capfd, "embed", out)
    assert (code, "9 rows in 3 shards, 0 of them new" in said) == (0, True)
    code, _, err = run(capfd, "embed", out, images, "--rows-per-file", 3)
    assert (code, "planned for --rows-per-file 4, and 3 is asked for. Give the same to go on" in err) == (2, True)


def test_files_of_a_model_that_is_not_here_name_it(capfd, images, tmp_path):
    """No other model is downloaded for them."""
    out = tmp_path / "out"
    assert run(capfd, "embed", out, images, "--model", "tiny")[0] == 0
    facts = out / "plan" / "plan.json"
    facts.write_text(facts.read_text().replace("tiny, float32", "somebody/else, float32"))
    code, _, err = run(capfd, "embed", out)
    assert code == 2
    assert f"the files in {str(out)!r} hold vectors of the model 'somebody/else, float32', which is not on this" in err
