"""What a reranker sees of a node, and from where; windows, fusion and scores, which are plain arithmetic."""

from __future__ import annotations

import base64
import io
import random
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.llms import MockLLM
from llama_index.core.schema import ImageDocument, ImageNode, MediaResource, Node, NodeWithScore, TextNode
from PIL import Image

from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.rerank import VisionLLMRerank
from mm_retriever.rerank.scorer import (
    LONGEST_SIDE,
    best_first,
    fuse,
    rank_scores,
    read_candidates,
    shares,
    text_card,
    windows,
)
from tests.support.rerank_small import QUERY, draw_folder, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("pictures"))


def test_images_come_from_path_bytes_or_resource_and_never_from_a_url_unasked(folder: Path, tmp_path: Path) -> None:
    """Truth: the same pixels; LlamaIndex's resolve_image would fetch any URL."""
    path = folder / "1.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    shown = [
        ImageNode(image_path=str(path)),
        ImageNode(image=encoded),
        ImageNode(image=f"data:image/png;base64,{encoded}"),
        ImageNode(image_url=f"data:image/png;base64,{encoded}"),
        ImageNode(image_path=str(folder / "gone.png"), image=encoded),
        ImageDocument(image=encoded),
        ImageDocument(image_path=str(path)),
        Node(image_resource=MediaResource(path=path)),
        Node(image_resource=MediaResource(data=path.read_bytes())),
    ]
    nodes = [NodeWithScore(node=node) for node in shown]
    assert {candidate.image.tobytes() for candidate in read_candidates(nodes, ImagePolicy()) if candidate.image} == {
        load_image(path).tobytes()
    }
    assert not any(candidate.missing for candidate in read_candidates(nodes, ImagePolicy()))
    assert sorted(make(reasons="none").rerank(nodes, QUERY).order) == list(range(9))
    elsewhere = ImagePolicy(roots=(tmp_path,))
    [outside, url, nonsense] = read_candidates(
        [
            NodeWithScore(node=node)
            for node in (
                ImageNode(image_path=str(path)),
                ImageNode(image_url="http://127.0.0.1:9/a.png"),
                ImageNode(image="no base64 !"),
            )
        ],
        elsewhere,
    )
    assert "outside the folders" in outside.note
    assert "fetching URLs is off" in url.note
    assert outside.missing
    assert url.missing
    assert nonsense.missing


def test_large_images_are_shrunk_and_texts_cut() -> None:
    """Truth: our choice; fifty photographs must fit into memory, and a book into a prompt."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 1000), "red").save(file, "PNG")
    nodes = [
        NodeWithScore(node=ImageNode(image=base64.b64encode(file.getvalue()).decode())),
        NodeWithScore(node=TextNode(text="word " * 9999)),
    ]
    seen, text = read_candidates(nodes, ImagePolicy())
    assert seen.image is not None
    assert seen.image.size == (LONGEST_SIDE, LONGEST_SIDE // 4)
    assert len(text.text) < 700
    card = text_card(text.text)
    assert card.size == (300, 300)
    assert card.tobytes() != text_card("other").tobytes()
    assert np.asarray(card)[:50].min() == 255  # room for the number


def test_reading_ends_with_the_time_that_is_left(folder):
    """Fifty large photographs, or URLs, take longer than any model's pass: reading is part of the budget."""
    nodes = [NodeWithScore(node=ImageNode(image_path=str(path)), score=1.0) for path in sorted(folder.glob("*.png"))]
    left = iter([5.0, *[0.0] * len(nodes)])
    with pytest.raises(TimeoutError):
        read_candidates(nodes * 9, ImagePolicy(), lambda: next(left, 0.0))
    assert len(read_candidates(nodes, ImagePolicy(), lambda: 60.0)) == len(nodes)


def test_a_server_of_images_that_never_answers_takes_no_longer_than_the_budget():
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        nodes = [NodeWithScore(node=ImageNode(image_url=f"{url}/{n}.jpg"), score=1.0 - n / 10) for n in range(6)]
        policy = ImagePolicy(allow_urls=True, allow_private_addresses=True, url_timeout=30.0)
        reranker = VisionLLMRerank(MockLLM(is_chat_model=True), time_budget_s=0.5, image_policy=policy)
        started = time.monotonic()
        result = reranker.rerank(nodes, "a hat")
    assert time.monotonic() - started < 15  # one image after the other would take three minutes
    assert result.order == tuple(range(6))
    assert all("time budget was spent" in node.node.metadata["rerank_note"] for node in result.nodes)


@given(st.integers(0, 60), st.integers(2, 20), st.integers(1, 19))
def test_windows_cover_a_list_and_bring_the_best_to_the_front(count: int, size: int, stride: int) -> None:
    """Truth: a perfect judge; as many of the best arrive at the front as two windows share (RankGPT)."""
    stride = min(stride, size - 1)
    order = list(range(count))
    random.Random(count * 31 + size).shuffle(order)
    seen: set[int] = set()
    for start, end in windows(count, size, stride):
        assert 0 <= start <= end <= count
        assert end - start <= size
        order[start:end] = sorted(order[start:end])
        seen |= set(range(start, end))
    assert seen == set(range(count))
    assert sorted(order) == list(range(count))
    assert order[: size - stride] == list(range(count))[: size - stride]


def test_orders_and_scores_by_hand() -> None:
    """Truth: worked out by hand; reciprocal ranks as in Cormack et al. 2009."""
    assert rank_scores([2, 0, 3]) == pytest.approx({2: np.log(1 / 61), 0: np.log(1 / 62), 3: np.log(1 / 63)})
    assert best_first([1.0, None, 3.0, 1.0, 9.0], [False, False, False, False, True]) == [2, 0, 3, 1, 4]
    assert shares([0.0, None, np.log(3), 5.0], [False, False, False, True]) == pytest.approx([0.25, 0, 0.75, 0])
    assert fuse([1, 3], [None, 0.5], 2) == [-1, 1]  # None counts as the least, so both scores are equal
    assert fuse([1, 3], [0.1, 0.5], 2) == pytest.approx([-3, 3])
    assert fuse([1, 3, 5], [0.1, float("nan"), 0.7], 0) == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert fuse([], [], 2) == []


def test_nodes_may_come_from_a_generator(folder: Path) -> None:
    """It can be read once: events must not use it up before the model sees it."""
    nodes = [NodeWithScore(node=ImageNode(id_=str(n), image_path=str(folder / f"{n}.png")), score=0.5) for n in (1, 2)]
    reranker = make()
    expected = reranker.postprocess_nodes(nodes, query_str=QUERY)
    found = reranker.postprocess_nodes((node for node in nodes), query_str=QUERY)
    assert [hit.node.node_id for hit in found] == [hit.node.node_id for hit in expected] != []
