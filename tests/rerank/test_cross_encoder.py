"""`TextRerank` on a small random cross-encoder of the real architecture, loaded by FlagEmbedding."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import QueryBundle
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from transformers import (
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from mm_retriever.errors import QueryError, RerankError
from tests.support.colour_embedding import paint
from tests.support.flag_small import SIZES, word_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("FlagEmbedding") is None, reason='needs pip install "mm-retriever[hybrid]"'
)


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(5)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(**SIZES, num_labels=1, initializer_range=0.5))
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


TEXTS = ["spare lid XK-2041", "orders", "red shop", "XK-2042 lid lid"]


def text_nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(id_=str(row), text=text), score=0.5) for row, text in enumerate(TEXTS)]


def test_texts_are_ranked_by_the_cross_encoders_logits(reranker_folder):
    """Truth: the same checkpoint by transformers alone, pair by pair."""
    from mm_retriever.rerank import TextRerank

    nodes = text_nodes()
    found = TextRerank(reranker_folder, top_n=3, device="cpu").postprocess_nodes(nodes, query_str="red lid")
    model = XLMRobertaForSequenceClassification.from_pretrained(reranker_folder).eval()
    tokenizer = word_tokenizer()
    with torch.inference_mode():
        logits = [float(model(**tokenizer("red lid", text, return_tensors="pt")).logits) for text in TEXTS]
    best = np.argsort(logits)[::-1][:3]
    assert np.ptp(logits) > 0.01
    assert [one.node.node_id for one in found] == [str(row) for row in best]
    assert [one.node.metadata["rerank_model_score"] for one in found] == pytest.approx(
        [logits[row] for row in best], abs=1e-4
    )
    shares = np.exp(logits) / np.exp(logits).sum()
    assert [one.score for one in found] == pytest.approx([shares[row] for row in best], abs=1e-4)
    assert nodes == text_nodes()


def test_pictures_and_wordless_questions_are_refused_or_left_as_they_are(reranker_folder, tmp_path):
    from mm_retriever.rerank import TextRerank
    from mm_retriever.rerank.cross_encoder import IMAGE_NOT_SEEN

    picture: Any = NodeWithScore(node=ImageNode(image_path=str(paint(tmp_path / "red.png", "red"))), score=0.9)
    reranker = TextRerank(reranker_folder, device="cpu")
    with pytest.raises(RerankError, match="1 of 5 candidates are images"):
        reranker.postprocess_nodes([picture, *text_nodes()], query_str="red lid")
    with pytest.raises(QueryError):
        reranker.postprocess_nodes(text_nodes(), query_bundle=QueryBundle(""))
    image = picture.node.image_path
    composed = reranker.postprocess_nodes(text_nodes(), query_bundle=QueryBundle("red lid", image_path=image))
    assert {one.node.metadata["rerank_note"] for one in composed} == {IMAGE_NOT_SEEN}
    patient = TextRerank(reranker_folder, device="cpu", on_error="keep_order", top_n=2)
    kept = patient.postprocess_nodes([picture, *text_nodes()], query_str="red lid")
    assert [one.node.node_id for one in kept] == [picture.node.node_id, "0"]
    assert "are images" in kept[0].node.metadata["rerank_note"]
