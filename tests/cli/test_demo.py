"""`mm-retriever demo` on drawings, on a folder and on the published archive."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mm_retriever import demo as scenes
from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.errors import MMRetrieverError
from tests.support.command_line import run


def tar_of(path: Path, members: dict[str, bytes | str]) -> Path:
    """A gzipped tar; a string value makes a symbolic link."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small archive of the published layout."""
    products = {
        f"images_folder/images/{i}.jpg": jpeg(draw_product(kind, pattern, "red", seed=i, size=128))
        for i, (kind, pattern) in enumerate([("mug", "stars"), ("phone case", "polka dots"), ("cap", "stripes")])
    }
    theme = jpeg(draw_theme("leopard", "natural", seed=5, size=128))
    return tar_of(
        tmp_path / "amazon.tar.gz", {**products, "images_folder/leopard.jpg": theme, "images_folder/._x.jpg": b"x"}
    )


def test_the_demo_runs_on_an_archive_of_the_published_layout(capfd, archive, tmp_path):
    """The layout of amazon_reviews_2023_subset.tar.gz, in small."""
    out = tmp_path / "out"
    code, printed, _ = run(capfd, "demo", "--amazon", archive, "--model", "tiny", "--out", out)
    assert code == 0
    assert "phone case with this" in printed
    assert (out / "results.html").exists()
    assert len(list((out / "amazon" / "images_folder" / "images").glob("*.jpg"))) == 3


def test_the_demo_runs_on_a_folder_of_ones_own(capfd, images, tmp_path):
    """`demo --photos DIR`."""
    out = tmp_path / "out"
    code, printed, _ = run(capfd, "demo", "--photos", images, "--model", "tiny", "--out", out, "--text", "a blue mug")
    assert code == 0
    assert "a blue mug" in printed
    assert (out / "composed.png").exists()


@pytest.mark.parametrize("name", ["../evil.jpg", "images_folder/../../evil.jpg", "/tmp/evil.jpg"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, name):
    """Archives from the internet are hostile."""
    hostile = tar_of(tmp_path / "hostile.tar.gz", {name: jpeg(Image.new("RGB", (8, 8)))})
    with pytest.raises(MMRetrieverError, match="climbs out"):
        scenes.extract_amazon(hostile, tmp_path / "in" / "side")
    assert not list(tmp_path.rglob("evil.jpg"))


def test_links_in_an_archive_are_not_followed(tmp_path):
    """A link out of the folder, then a file through it."""
    image = jpeg(Image.new("RGB", (8, 8)))
    members = {"images_folder/images": str(tmp_path / "outside"), "images_folder/images/a.jpg": image}
    (tmp_path / "outside").mkdir()
    with pytest.raises(MMRetrieverError, match="layout"):
        scenes.extract_amazon(tar_of(tmp_path / "hostile.tar.gz", members), tmp_path / "in")
    assert not list((tmp_path / "outside").iterdir())


def test_a_damaged_archive_is_an_error_that_names_it(tmp_path):
    """A download that broke off."""
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00nonsense")
    with pytest.raises(MMRetrieverError, match=r"broken\.tar\.gz"):
        scenes.extract_amazon(path, tmp_path / "in")


@pytest.mark.slow
def test_the_whole_demo_puts_the_leopard_phone_case_among_the_nine(tmp_path):
    """`make demo`, as its own process."""
    command = [sys.executable, "-m", "mm_retriever.cli", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=True)
    assert "phone case with this" in done.stdout
    for name in ("composed.png", "text.png", "image.png", "edit.png", "results.html"):
        assert (tmp_path / "demo" / name).stat().st_size > 10_000
