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
