"""A reranking model on a server: its ranking is that of the same scorer here, and no other answer is taken for one.

The real server is Starlette around the bundled embedder; the scripted one says what no real one would.
"""

from __future__ import annotations

import json
import logging
import pickle
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode

from mm_retriever import load_reranker
from mm_retriever.cli import main
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import CopyError, QueryError, RerankError
from mm_retriever.rerank import CHAT_TEMPLATE, RemoteRerank, ScorerRerank, VisionLLMRerank
from tests.support.drawn_store import draw_images, draw_leopard, drawn_store
from tests.support.llm_server import Reply, ScriptedServer, candidates
from tests.support.model_server import CosineScorer, ModelServer, serving

KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def running() -> Iterator[ModelServer]:
    with serving(load_embedder("tiny", device="cpu")) as served:
        yield served


@pytest.fixture
def served(running: ModelServer) -> ModelServer:
    running.requests.clear()
    return running


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_images(folder)
    draw_leopard(folder / "leopard.png")
    return folder


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as script:
        yield script


def nodes_of(folder: Path) -> list[NodeWithScore]:
    """Twelve products, a text, and two that have nothing to show."""
    nodes: list[Any] = [ImageNode(id_=str(path), image_path=str(path)) for path in sorted(folder.rglob("*.jpg"))]
    nodes.insert(3, TextNode(id_="text", text="a red mug with polka dots"))
    nodes.insert(5, ImageNode(id_="gone", image_path=str(folder / "gone.png")))
    return [NodeWithScore(node=node, score=0.5 - 0.01 * place) for place, node in enumerate(nodes)]


def remote(url: str, **options: Any) -> RemoteRerank:
    return RemoteRerank(url, "served", **{"top_n": 99, "retry_wait_s": 0.0, "timeout_s": 20.0} | options)


@pytest.mark.parametrize("api", ["rerank", "score"])
@pytest.mark.parametrize("query", ["text", "image", "both"])
def test_the_ranking_is_that_of_the_same_scorer_here(served: ModelServer, drawn: Path, api: str, query: str) -> None:
    """Truth: the local scorer; images travel as JPEG, so that scores differ a little, and ranks where two are equal."""
    bundle = QueryBundle(
        "" if query == "image" else "a red mug", image_path=None if query == "text" else str(drawn / "leopard.png")
    )
    here = ScorerRerank(CosineScorer(served.embedder), top_n=99).rerank(nodes_of(drawn), bundle)
    there = remote(served.url, api=api, batch_size=5).rerank(nodes_of(drawn), bundle)
    expected, found = [{node.node.node_id: node.score for node in result.nodes} for result in (here, there)]
    assert found == pytest.approx(expected, abs=5e-3)
    ranked = [expected[node.node.node_id] for node in there.nodes]
    assert all(first > second - 5e-3 for first, second in pairwise(ranked))
    assert there.nodes[0].node.node_id == here.nodes[0].node.node_id
    assert sorted(there.order) == list(range(14))
    assert there.nodes[-1].node.node_id == "gone"
    assert "gone.png" in there.nodes[-1].node.metadata["rerank_note"]
    assert [len(request["documents"]) for request in served.requests] == [5, 5, 3]
    assert (there.usage.passes, there.usage.images, there.usage.prefilled) == (3, 12, 210)


def test_texts_are_sent_as_they_are_and_images_as_parts_of_a_message(served: ModelServer, drawn: Path) -> None:
    """Truth: the shapes that Cohere's and Jina's servers take, and vLLM's; an instruction only where one is given."""
    text = NodeWithScore(node=TextNode(id_="long", text="mug " * 500))
    remote(served.url).rerank([text], "which")
    assert served.requests[0]["query"] == "which"
    assert served.requests[0]["documents"] == ["mug " * 500]
    assert "instruction" not in served.requests[0]
    remote(served.url, instruction="Find the same").rerank(nodes_of(drawn)[:1], "which")
    assert served.requests[1]["instruction"] == "Find the same"
    [part] = served.requests[1]["documents"][0]["content"]
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_by_name_from_python_and_the_command_line(
    served: ModelServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Our choice: `api` says what the server is asked; a vision LLM is the default."""
    assert isinstance(load_reranker("m", base_url=served.url), VisionLLMRerank)
    assert isinstance(load_reranker("m", base_url=served.url, api="chat"), VisionLLMRerank)
    score = load_reranker("served", base_url=served.url, api="score", top_n=3)
    assert isinstance(score, RemoteRerank)
    assert (score.api, score.top_n, score.llm) == ("score", 3, None)
    with pytest.raises(QueryError, match="api='rerank' is of a server: give its base_url"):
        load_reranker("tiny", api="rerank")
    with pytest.raises(QueryError, match="there are 'chat', 'rerank' and 'score'"):
        load_reranker("m", base_url=served.url, api="rank")  # type: ignore[arg-type]

    store = drawn_store(tmp_path, VisualizedBGEEmbedding("tiny", device="cpu"))
    store.close()
    leopard = draw_leopard(tmp_path / "leopard.png")
    search = ["search", "--db", str(tmp_path / "drawn.db"), "--image", str(leopard), "--top-k", "4", "--json"]
    rerank = ["--rerank-url", served.url, "--rerank-model", "served", "--rerank-api", "rerank"]
    with pytest.raises(SystemExit) as stopped:
        main([*search, "--model", "tiny", "--device", "cpu", *rerank])
    rows = json.loads(capfd.readouterr().out)
    assert not stopped.value.code
    assert len(served.requests) == 1
    assert rows[0]["score"] == max(row["score"] for row in rows) > 0.5
    for wrong, says in (
        (["--rerank-api", "rerank"], "--rerank-api rerank is asked of a server: give --rerank-url"),
        (["--rerank-url", served.url, "--rerank-api", "x"], "--rerank-api x: there are chat, rerank and score"),
        (["--rerank-url", served.url, "--rerank-api", "score"], "--rerank-api needs --rerank-model"),
        (["--model-url", served.url], "--device: the server of --model-url chooses for itself"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*search, "--model", "tiny", "--device", "cpu", *wrong])
        assert stopped.value.code == 2
        assert says in capfd.readouterr().err


# ------------------------------------------------------------------------------------------ a server that says anything


def scores(*pairs: Any, name: str = "relevance_score") -> Reply:
    return 200, json.dumps({"results": [{"index": index, name: score} for index, score in pairs]}).encode()


def test_scores_are_put_in_order_by_their_index(scripted: ScriptedServer, tmp_path: Path) -> None:
    """Truth: the protocol; a server sorts its results."""
    nodes = [NodeWithScore(node=TextNode(id_=f"{i}", text=f"mug {i}"), score=1.0) for i in range(3)]
    for reply in (
        scores((2, 0.9), (0, 0.6), (1, 0.1)),
        (200, b'[{"index": 2, "score": 0.9}, {"index": 0, "score": 0.6}, {"index": 1, "score": 0.1}]'),
    ):
        scripted.reply = lambda _, reply=reply: reply
        result = remote(scripted.url).rerank(nodes, "mug")
        assert [(node.node.node_id, node.score) for node in result.nodes] == [("2", 0.9), ("0", 0.6), ("1", 0.1)]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (scores((0, 0.9), (1, 0.1)), "2 scores in the answer for 3 candidates"),
        (scores((0, 0.9), (1, 0.1), (1, 0.2)), "an index 1 among 3 candidates"),
        (scores((0, 0.9), (1, 0.1), (3, 0.2)), "an index 3"),
        (scores((0, 0.9), (1, 0.1), (-1, 0.2)), "an index -1"),
        (scores((0, 0.9), (1, 0.1), (True, 0.2)), "an index True"),
        (scores((0, 0.9), (1, 0.1), (2, "0.2")), "a score is a finite number, not '0.2'"),
        (scores((0, 0.9), (1, 0.1), (2, None)), "a score is a finite number, not None"),
        (scores((0, 0.9), (1, 0.1), (2, True)), "a score is a finite number, not True"),
        (scores((0, 0.9), (1, 0.1), (2, float("nan"))), "a score is a finite number, not nan"),
        (scores((0, 0.9), (1, 0.1), (2, 10**400)), "a score is a finite number"),
        (scores((0, 0.9), (1, 0.1), (2, 3.5)), "the score 3.5; calibrated scores go from 0 to 1"),
        (scores((0, 0.9), (1, 0.1), (2, 0.5), name="rank"), "a score is a finite number, not None"),
        ((200, b'{"results": 3}'), "no scores in the answer"),
        ((200, b"null"), "no scores in the answer"),
        ((200, b'{"results": ' + b"[" * 200_000), "no JSON"),
        ((404, b'{"detail": "Not Found"}'), "no such model or no such address.*usually in /v1"),
        ((401, json.dumps({"error": KEY}).encode()), r"refused the API key.*\*\*\*"),
    ],
)
def test_an_answer_that_is_not_the_scores_is_an_error(
    scripted: ScriptedServer, folder: Path, reply: Reply, says: str
) -> None:
    """A wrong ranking that looks right would be worse; `on_error` keeps the order of retrieval, and says why."""
    scripted.reply = lambda _: reply
    reranker = remote(scripted.url, api_key=KEY, attempts=1)
    with pytest.raises(RerankError, match=says) as caught:
        reranker.rerank(candidates(folder), "mug")
    assert "\n" not in str(caught.value)
    assert KEY not in f"{caught.value} {caught.value.__cause__} {reranker!r}"
    assert scripted.requests[0]["authorization"] == f"Bearer {KEY}"
    kept = remote(scripted.url, attempts=1, on_error="keep_order").rerank(candidates(folder), "mug")
    assert kept.order == (0, 1, 2)
    assert kept.error


def test_scores_that_are_logits_become_shares_where_that_is_said(scripted: ScriptedServer, folder: Path) -> None:
    scripted.reply = lambda _: scores((0, -1.5), (1, 3.5), (2, 0.5))
    result = remote(scripted.url, calibrated=False).rerank(candidates(folder), "mug")
    assert result.order == (1, 2, 0)
    assert sum(node.score or 0 for node in result.nodes) == pytest.approx(1)


def test_scores_that_are_all_one_half_are_said_to_be_of_a_model_without_its_template(
    scripted: ScriptedServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truth: what vLLM's Qwen3-VL-Reranker gives without one."""
    scripted.reply = lambda _: scores((0, 0.503), (1, 0.499), (2, 0.501))
    with caplog.at_level(logging.WARNING, logger="mm_retriever"):
        remote(scripted.url).rerank(candidates(folder), "mug")
    [warned] = [record.getMessage() for record in caplog.records]
    assert "a score of about 0.5" in warned
    assert str(CHAT_TEMPLATE) in warned
    caplog.clear()
    scripted.reply = lambda _: scores((0, 0.503), (1, 0.499), (2, 0.7))
    remote(scripted.url).rerank(candidates(folder), "mug")
    assert not caplog.records


def test_time_that_is_spent_leaves_the_rest_in_the_order_of_retrieval(scripted: ScriptedServer, folder: Path) -> None:
    """Truth: the first request is answered, the second not in time."""
    over = threading.Event()

    def slowing(request: dict[str, Any]) -> Reply:
        if len(scripted.requests) > 1:
            over.wait(60)
        return scores((0, 0.1), (1, 0.2))

    scripted.reply = slowing
    result = remote(scripted.url, batch_size=2, time_budget_s=2.0).rerank(candidates(folder, "tttt"), "mug")
    over.set()
    assert result.order == (1, 0, 2, 3)
    assert "time budget" in result.nodes[2].node.metadata["rerank_note"]


def test_a_key_is_in_no_pickle_or_dict_and_without_one_copies_ask_the_same_server(served: ModelServer) -> None:
    reranker = remote(served.url, api="score", instruction="Find", batch_size=3)
    for copied in (pickle.loads(pickle.dumps(reranker)), RemoteRerank.from_dict(reranker.to_dict())):
        assert (copied.api, copied.instruction, copied.batch_size, copied.top_n) == ("score", "Find", 3, 99)
        node = NodeWithScore(node=TextNode(text="mug"))
        assert copied.rerank([node], "mug").nodes[0].score == reranker.rerank([node], "mug").nodes[0].score
    keyed = remote(served.url, api_key=KEY)
    with pytest.raises(CopyError, match="api_key"):
        pickle.dumps(keyed)
    assert KEY not in f"{keyed.to_dict()} {keyed!r}"
    with pytest.raises(CopyError, match="api_key="):
        RemoteRerank.from_dict(keyed.to_dict())


# ------------------------------------------------------------------------------------------ the chat template

QUERY_IMAGE = [{"type": "image_url"}, {"type": "text", "text": "in red"}]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("query", "document", "more", "instruct", "said"),
    [
        ("a mug", "blue", {}, "Given a search query, retrieve relevant candidates that answer the query.",
         "<Query>:a mug\n<Document>:blue"),
        (QUERY_IMAGE, [{"type": "image"}], {"instruction": "Find it."}, "Find it.",
         f"<Query>:{VISION}in red\n<Document>:{VISION}"),
        ("a\n mug ", VISION, {"system": "Look."}, "Look.", f"<Query>:a\n mug \n<Document>:{VISION}"),
    ],
)  # fmt: skip
def test_the_template_writes_the_prompt_that_the_model_was_trained_on(
    query: Any, document: Any, more: dict[str, str], instruct: str, said: str
) -> None:
    """Truth: the prompt of Qwen3-VL-Reranker as its authors and vLLM publish it, character by character."""
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    if "system" in more:
        messages.insert(0, {"role": "system", "content": more["system"]})
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )  # as vLLM and transformers have it
    template = environment.from_string(CHAT_TEMPLATE.read_text())
    given = {"instruction": more["instruction"]} if "instruction" in more else {}
    assert template.render(messages=messages, add_generation_prompt=True, **given) == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {instruct}{said}<|im_end|>\n<|im_start|>assistant\n"
    )
