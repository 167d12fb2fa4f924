"""What a notebook displays: results with images, reports and stores, from untrusted words."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from IPython.core.formatters import HTMLFormatter
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from PIL import Image

from mm_retriever import show
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.ingest import IngestReport
from mm_retriever.ingest.report import ReindexReport, SkippedImage
from mm_retriever.notebook import MAX_BYTES
from mm_retriever.rerank.reranker import Reranking
from tests.support.drawn_store import draw_leopard, drawn_store

HOSTILE = "<script>alert(1)</script>\"'><img src=http://x.test/a onerror=x>\x1b[2J\u202e"


def html_of(shown: object) -> str:
    """What IPython takes of an object."""
    html = HTMLFormatter()(shown)
    assert isinstance(html, str)
    return html


@pytest.fixture
def hit(tmp_path):
    path = str(draw_leopard(tmp_path / "leopard.png"))
    return NodeWithScore(node=ImageNode(id_="a", image_path=path, metadata={"file_path": path}), score=0.5)


def test_results_are_shown_with_their_images(hit):
    html = html_of(show([hit, hit.node], "a leopard"))
    assert html.count("data:image/jpeg;base64,") == 2
    assert "a leopard" in html
    assert "0.500" in html
    assert "leopard.png" in str(show([hit]))


def test_no_word_is_markup_and_nothing_is_fetched(hit):
    hit.node.metadata |= {"label": HOSTILE, "rerank_reason": HOSTILE, "file_path": HOSTILE}
    url = ImageNode(id_=HOSTILE, image_url="http://x.test/a.png", text=HOSTILE)
    report = IngestReport(1, 0, 0, 0, 0, (SkippedImage(HOSTILE, HOSTILE),), 1.0, notes=(HOSTILE,))
    reindexed = ReindexReport("a", HOSTILE, HOSTILE, 1, 1.0, dropped=(SkippedImage(HOSTILE, HOSTILE),))
    shown = (show([hit, NodeWithScore(node=url)], HOSTILE), report, reindexed, Reranking([hit], (0,), caption=HOSTILE))
    for one in shown:
        html = html_of(one)
        assert "&lt;script&gt;" in html
        assert not re.search("<script|onerror=x>|<img src|[\x1b\u202e]", html.replace("&lt;img src", ""))
        assert {source[:5] for source in re.findall('src="([^"]*)"', html)} <= {"data:"}
    assert "fetching URLs is off" in html_of(shown[0])


def test_what_is_too_much_for_a_cell_is_counted(hit, tmp_path):
    html = html_of(show([hit] * 9, most=4))
    assert (html.count("<img "), "and 5 more" in html) == (4, True)
    assert "nothing found" in html_of(show([]))
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)  # takes the most room
    Image.fromarray(noise).save(tmp_path / "noise.png")
    many = html_of(show([ImageNode(image_path=str(tmp_path / "noise.png"))] * 100, most=100, side=512))
    assert MAX_BYTES / 2 < len(many) < MAX_BYTES + 100 * 1000
    assert "left out: the cell is full" in many


@pytest.mark.parametrize(("nodes", "options"), [(["text"], {}), ([], {"side": 5}), ([], {"most": 0})])
def test_what_cannot_be_shown_is_refused(nodes, options):
    with pytest.raises(QueryError):
        show(nodes, **options)


def test_a_text_and_a_missing_image_say_so(tmp_path):
    html = html_of(show([TextNode(text="only words"), ImageNode(image_path=str(tmp_path / "gone.png"))]))
    assert "only words" in html
    assert "image missing" in html


def test_a_store_shows_what_it_holds_and_says_when_it_is_closed(tmp_path):
    store = drawn_store(tmp_path, VisualizedBGEEmbedding("tiny"))
    html = html_of(store)
    assert "<td" in html
    assert ">12<" in html
    assert html.count("<img ") == 6
    store.close()
    assert "store" in html_of(store)


def test_the_package_loads_nothing_for_it():
    code = "import sys, mm_retriever; assert 'mm_retriever.notebook' not in sys.modules and 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
