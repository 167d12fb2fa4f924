"""Ranking by one token: its log-probabilities are the scores, and a number without one is never ranked by a guess."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.schema import QueryBundle

from mm_retriever.errors import QueryError
from mm_retriever.rerank import VisionLLMRerank
from tests.support.llm_server import QUERY, Reply, ScriptedServer, candidates, completion, facts, ranking

SCORES = {"1": 0.2, "2": 0.5, "3": 0.1}


def token(*tops: tuple[str, float], chosen: str = "") -> Reply:
    """One token with those it was chosen from, by their probabilities."""
    items = [{"token": word, "logprob": math.log(share), "bytes": None} for word, share in tops]
    first = next((item for item in items if item["token"] == chosen), items[0])
    status, body = completion(first["token"], "length")
    answer = json.loads(body)
    answer["choices"][0]["logprobs"] = {"content": [first | {"top_logprobs": items}]}
    return status, json.dumps(answer).encode()


def asked_for(request: dict[str, Any]) -> str:
    return "token" if request.get("max_tokens") == 1 else "ids" if "prompt" in request else "answer"


def test_candidates_are_ranked_by_the_log_probability_of_their_numbers(server: ScriptedServer, folder: Path) -> None:
    """Truth: the probabilities that the server gave; shares of them are the scores."""
    server.reply = lambda _: token(("2", 0.3), (" 2", 0.2), ("1", 0.2), ("3", 0.1), ("The", 0.1), ("22", 0.05))
    query = QueryBundle(QUERY, image_path=str(folder / "0.png"))
    result = server.reranker(single_pass=True).rerank(candidates(folder, "pptm"), query)
    assert result.order == (1, 0, 2, 3)
    assert [node.score for node in result.nodes] == pytest.approx([0.5 / 0.8, 0.2 / 0.8, 0.1 / 0.8, 0])
    assert facts(result.nodes, "rerank_model_score")[:3] == pytest.approx([math.log(s) for s in (0.5, 0.2, 0.1)])
    assert (result.repairs, result.caption, result.usage.passes) == ("", "", 1)
    [request] = server.requests
    assert (request["logprobs"], request["top_logprobs"], request["max_tokens"]) == (True, 20, 1)
    assert "response_format" not in request
    assert "with the number of the one that fits best" in server.parts()[-1]["text"]


def test_a_sheet_is_ranked_by_one_token_too(server: ScriptedServer, folder: Path) -> None:
    server.reply = lambda _: token(*SCORES.items())
    result = server.reranker(single_pass=True, mode="sheet").rerank(candidates(folder, "ptp"), QUERY)
    assert result.order == (1, 0, 2)


def test_numbers_among_the_less_probable_are_asked_for_by_their_tokens(server: ScriptedServer, folder: Path) -> None:
    """Truth: vLLM's `logprob_token_ids`, with the ids of its `/tokenize`, which is asked once."""

    def reply(request: dict[str, Any]) -> Reply:
        if "prompt" in request:
            assert request["path"] == "/tokenize"
            return 200, json.dumps({"count": 1, "tokens": [40 + int(request["prompt"])]}).encode()
        if "logprob_token_ids" in request:
            assert request["logprob_token_ids"] == [41, 42, 43]
            return token(*SCORES.items())
        return token(("2", 0.5), ("1", 0.2))

    server.reply = reply
    reranker = server.reranker(single_pass=True)
    for asked in (["token", *["ids"] * 9, "token"], ["token"]):
        server.requests.clear()
        result = reranker.rerank(candidates(folder), QUERY)
        assert (result.order, result.repairs) == ((1, 0, 2), "")
        assert [asked_for(request) for request in server.requests] == asked


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (token(("2", 0.5), ("1", 0.2)), "no log-probability of 3"),
        (token(("2", 0.9)), "no log-probability of 1, 3"),
        (token(("<think>", 0.99), ("2", 1e-4), ("1", 1e-5), ("3", 1e-6)), "did not mean to begin with a number"),
        (completion("2"), "no log-probabilities of numbers"),
        ((400, b'{"error": {"message": "logprobs are not supported"}}'), "no log-probabilities of numbers"),
        ((500, b'{"error": {"message": "logprobs"}}'), ""),
    ],
)
def test_where_a_number_has_none_an_answer_is_asked_for_and_that_is_said(
    server: ScriptedServer, folder: Path, reply: Reply, says: str
) -> None:
    """Our choice: nothing is guessed. Later windows of the same list are asked for an answer at once."""

    def replies(request: dict[str, Any]) -> Reply:
        kind = asked_for(request)
        return {"token": reply, "ids": (404, b"{}"), "answer": ranking(3, 1, 2)}[kind]

    server.reply = replies
    reranker = server.reranker(single_pass=True, window=3, stride=1, attempts=2, on_error="keep_order")
    result = reranker.rerank(candidates(folder, "pppp"), QUERY)
    if not says:  # a server that fails is no server without log-probabilities
        assert "the server failed" in result.error
        return
    assert says in result.repairs
    assert "ranked by a written answer instead" in result.repairs
    assert [asked_for(request) for request in server.requests].count("token") == 1
    assert [asked_for(request) for request in server.requests].count("answer") == 2
    assert result.order == (1, 0, 3, 2)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": None}, {"content": []}, {"content": [{}]}, {"content": [7]}, {"content": {"0": 1}}, "none", 7, [],
        {"content": [{"token": "2", "logprob": "x", "top_logprobs": [{"token": 2, "logprob": -1}]}]},
        {"content": [{"token": "2", "logprob": 3.0, "top_logprobs": [{"token": "1", "logprob": None}, 5, None]}]},
        {"content": [{"token": "2", "logprob": -9999.0, "top_logprobs": {"token": "1", "logprob": -1}}]},
    ],
)  # fmt: skip
def test_log_probabilities_that_are_none_are_not_taken_for_some(
    server: ScriptedServer, folder: Path, logprobs: Any
) -> None:
    def replies(request: dict[str, Any]) -> Reply:
        if asked_for(request) != "token":
            return ranking(3, 1, 2) if asked_for(request) == "answer" else (404, b"{}")
        status, body = completion("2", "length")
        answer = json.loads(body)
        answer["choices"][0]["logprobs"] = logprobs
        return status, json.dumps(answer).encode()

    server.reply = replies
    result = server.reranker(single_pass=True, attempts=1).rerank(candidates(folder), QUERY)
    assert result.order == (2, 0, 1)
    assert "ranked by a written answer instead" in result.repairs


def test_more_candidates_than_nine_are_ranked_by_windows(server: ScriptedServer, folder: Path) -> None:
    """Truth: windows of 9 from the end, 4 apart, by hand; each puts its last candidate to its front."""
    server.reply = lambda request: token(("9", 0.4), *((str(n), 0.07 - n / 1000) for n in range(1, 9)))
    result = server.reranker(single_pass=True).rerank(candidates(folder, "p" * 13), QUERY)
    assert result.order == (7, 0, 1, 2, 3, 12, 4, 5, 6, 8, 9, 10, 11)
    assert result.usage.passes == 2
    with pytest.raises(QueryError, match="window=12: single_pass ranks 9 at a time at most"):
        server.reranker(single_pass=True, window=12)


def test_an_llm_of_another_protocol_writes_its_ranking(folder: Path) -> None:
    result = VisionLLMRerank(MockLLM(), top_n=99, single_pass=True).rerank(candidates(folder, "ttt"), "which")
    assert sorted(result.order) == [0, 1, 2]
    assert "does not speak OpenAI's protocol; ranked by a written answer instead" in result.repairs
