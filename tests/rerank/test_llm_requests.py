"""Servers of vision models that fail: what is asked again, what is said, and what a reranking makes of it."""

from __future__ import annotations

import asyncio
import gc
import gzip
import logging
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import CompletionResponse, CompletionResponseGen, LLMMetadata
from llama_index.core.llms import ChatMessage, ChatResponse, CustomLLM

from mm_retriever.errors import RerankError
from mm_retriever.rerank import VisionLLMRerank
from mm_retriever.servers.failures import cause_of, explained
from tests.support.llm_server import QUERY, Reply, ScriptedServer, candidates, completion, facts, ranking

# ---------------------------------------------------------------------- servers that fail


def test_a_server_that_refuses_the_schema_is_asked_without(server: ScriptedServer, folder: Path) -> None:
    """Truth: the requests; what was refused once is not tried again."""

    def refusing(request: dict[str, Any]) -> Reply:
        if "response_format" in request or "guided_json" in request:
            return 400, b'{"error": {"message": "unknown field"}}'
        return ranking(2, 1, 3)

    server.reply = refusing
    for structured, field in (("auto", "response_format"), ("guided_json", "guided_json")):
        server.requests.clear()
        reranker = server.reranker(structured=structured)
        for _ in range(2):
            assert reranker.rerank(candidates(folder), QUERY).order == (1, 0, 2)
        assert [field in request for request in server.requests] == [True, False, False]
    server.requests.clear()
    server.reranker(structured="none").rerank(candidates(folder), QUERY)
    assert ["response_format" in request for request in server.requests] == [False]


def test_what_passes_is_asked_again_and_what_does_not_is_not(server: ScriptedServer, folder: Path) -> None:
    """Truth: the requests; overload and 5xx may pass, a wrong model name does not."""
    replies = [(503, b"{}"), (429, b"{}"), ranking(2, 1, 3)]
    server.reply = lambda _: replies.pop(0)
    result = server.reranker().rerank(candidates(folder), QUERY)
    assert (result.order, result.usage.passes) == ((1, 0, 2), 3)
    server.requests.clear()
    server.reply = lambda _: (503, b'{"error": {"message": "overloaded"}}')
    with pytest.raises(RerankError, match=r"'m' gave no answer in 2 requests .*overloaded.*is the server up"):
        server.reranker(attempts=2).rerank(candidates(folder), QUERY)
    assert len(server.requests) == 2
    server.requests.clear()
    server.reply = lambda _: (404, b'{"error": {"message": "no model m"}}')
    with pytest.raises(RerankError, match="no model m"):
        server.reranker(structured="none").rerank(candidates(folder), QUERY)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "requests", "says"),
    [
        (401, b'{"error": {"message": "bad key"}}', 1, r"refused the API key, status 401: .*bad key.*give the api_key"),
        (403, b'{"error": {"message": "not yours"}}', 1, r"refused the API key .*, status 403"),
        (404, b'{"error": {"message": "no model m"}}', 1, r"no such model or no such address, status 404.*base_url"),
        (429, b'{"error": {"message": "slow down"}}', 3, r"limits requests, status 429: .*slow down"),
        (500, b'{"error": {"message": "broken"}}', 3, r"the server failed, status 500: .*broken"),
        (200, b'{"error": {"message": "no credit left", "code": 402}}', 1, "answered with an error: no credit left"),
        (200, b'{"error": {"message": "upstream is overloaded"}}', 3, "answered with an error: upstream is overloaded"),
        (200, b'{"error": "invalid image"}', 1, "answered with an error: invalid image"),
        (200, b'{"choices": []}', 3, "answered without any choices"),
        (200, b'{"object": "error", "message": "image too large", "code": 400}', 2, "an error: image too large"),
        (200, b'{"detail": "no such model"}', 1, "answered with an error: no such model"),
        (200, b"<html>log in</html>", 3, "answered with what is no JSON"),
        (200, b'{"choices": [{"finish_reason": "stop"}]}', 3, "answered with None in place of a text"),
        (200, b'{"choices": [{"message": {"content": [{"text": "2"}]}}]}', 3, "answered with .* in place of a text"),
        (307, b"", 1, "redirects to '', which is not followed"),
    ],
)
def test_each_failure_of_a_server_has_its_own_words_and_number_of_requests(
    server: ScriptedServer, folder: Path, status: int, body: bytes, requests: int, says: str
) -> None:
    """Our choice: what may pass is asked three times, what does not is asked once, also where a schema is sent."""
    server.reply = lambda _: (status, body)
    with pytest.raises(RerankError, match=says) as caught:
        server.reranker().rerank(candidates(folder), QUERY)
    assert len(server.requests) == requests
    assert f"in {requests} request" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_asks_for_patience_gets_it(server: ScriptedServer, folder: Path) -> None:
    """Truth: the clock, and RFC 9110's Retry-After; one that asks for an hour is not asked again."""
    replies: list[Reply] = [(429, b"{}"), ranking(2, 1, 3)]
    server.reply = lambda _: replies.pop(0)
    server.headers = {"Retry-After": "0.7"}
    started = time.monotonic()
    assert server.reranker().rerank(candidates(folder), QUERY).order == (1, 0, 2)
    assert time.monotonic() - started >= 0.7
    server.reply, server.headers = lambda _: (503, b"{}"), {"Retry-After": "3600"}
    server.requests.clear()
    with pytest.raises(RerankError, match="asks for 3600 s of patience"):
        server.reranker().rerank(candidates(folder), QUERY)
    assert len(server.requests) == 1
    server.headers = {"Retry-After": "Fri, 01 Jan 2999 00:00:00 GMT"}
    with pytest.raises(RerankError, match="of patience"):
        server.reranker().rerank(candidates(folder), QUERY)
    server.headers = {}


UNRANKED = [
    (completion("I'm sorry, I can't rank these 3 images: 2, 1, 3"), "refused to rank: I'm sorry, I can't rank these 3"),
    (completion(None, refusal="I will not do 2 of them."), "refused to rank: I will not do 2 of them."),
    (completion("", "content_filter"), "a content filter stopped it"),
    (completion('{"ranking": [2, 1', "length"), "was cut off before its answer ended .length.: raise max_tokens"),
]


@pytest.mark.parametrize(("reply", "says"), UNRANKED)
def test_an_answer_that_is_no_ranking_is_named(server: ScriptedServer, folder: Path, reply: Reply, says: str) -> None:
    """Truth: what the server said; numbers in it are no ranking, whatever on_error is."""
    server.reply = lambda _: reply
    with pytest.raises(RerankError, match=says):
        server.reranker().rerank(candidates(folder), QUERY)
    assert len(server.requests) == 1
    kept = server.reranker(on_error="keep_order").rerank(candidates(folder), QUERY)
    assert kept.order == (0, 1, 2)
    assert re.search(says, kept.error)
    assert [node.score for node in kept.nodes] == [0.9, 0.89, 0.88]
    assert all(note.startswith("not reranked: ") for note in facts(kept.nodes, "rerank_note"))


@pytest.mark.parametrize("text", ["All 3 images are nice.", '{"wanted": "a mug"}', "", "[640, 480]"])
def test_without_proof_the_order_of_retrieval_stays(server: ScriptedServer, folder: Path, text: str) -> None:
    """Truth: the order given."""
    server.reply = lambda _: completion(text)
    result = server.reranker(window=3, stride=1).rerank(candidates(folder, "pptpp"), QUERY)
    assert result.order == (0, 1, 2, 3, 4)
    assert result.repairs
    assert facts(result.nodes, "rerank_note") == ["the model gave no ranking; the order is that of retrieval"] * 5
    assert facts(result.nodes, "rerank_model_score") == [None] * 5


def test_one_refused_window_keeps_its_order_and_the_others_are_ranked(server: ScriptedServer, folder: Path) -> None:
    """Our choice with on_error="keep_order": the last window is refused, the first puts its third to the front."""
    replies = [completion("I cannot help with that."), ranking(3, 1, 2)]
    server.reply = lambda _: replies.pop(0)
    result = server.reranker(on_error="keep_order", window=3, stride=2).rerank(candidates(folder, "ppppp"), QUERY)
    assert result.order == (2, 0, 1, 3, 4)
    assert "refused to rank: I cannot help with that; kept the order of retrieval" in result.repairs
    assert not result.error


@pytest.mark.parametrize(
    "body", [b"", b"<html>busy</html>", b"{}", b"[]", b"null", b'{"choices": []}', b'{"choices": null}', b"\xff\xfe",
             b'{"choices": [{"message": {"role": "assistant", "content": null}}]}', b'{"choices": [7]}', b"[" * 9999]
)  # fmt: skip
def test_a_server_that_does_not_speak_the_protocol(server: ScriptedServer, folder: Path, body: bytes) -> None:
    """Truth: our choice; an error in one line, or the order as it was with a note; never a wrong ranking."""
    server.reply = lambda _: (200, body)
    kept = server.reranker(on_error="keep_order", attempts=1).rerank(candidates(folder), QUERY)
    assert kept.order == (0, 1, 2)
    assert kept.error or kept.repairs == "no ranking in the answer; appended all in the order of retrieval"
    try:
        assert server.reranker(attempts=1).rerank(candidates(folder), QUERY).order == (0, 1, 2)
    except RerankError as error:
        assert "'m' gave no answer" in str(error)
        assert "\n" not in str(error)


def test_a_dead_server_is_an_error_or_keeps_the_order(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Truth: nobody listens at a port that was just closed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    options: dict[str, Any] = {"base_url": url, "model": "m", "attempts": 2, "retry_wait_s": 0.0}
    with pytest.raises(RerankError, match=r'in 2 requests .*is the server up.*on_error="keep_order"'):
        VisionLLMRerank(**options).rerank(candidates(folder), QUERY)
    with caplog.at_level(logging.WARNING, logger="mm_retriever"):
        result = VisionLLMRerank(**options, on_error="keep_order", top_n=2).rerank(candidates(folder), QUERY)
    assert "the order stays as retrieved" in caplog.text
    assert [(node.node.node_id, node.score) for node in result.nodes] == [("0", 0.9), ("1", 0.89)]
    assert all(note.startswith("not reranked: 'm' gave no answer") for note in facts(result.nodes, "rerank_note"))


def test_a_server_that_does_not_answer_is_given_up_in_time(server: ScriptedServer, folder: Path) -> None:
    """Truth: the clock; also for an LLM whose own client would wait for ever."""
    stop = threading.Event()

    def silent(_: dict[str, Any]) -> Reply:
        stop.wait(30)
        return ranking(1)

    server.reply = silent
    started = time.monotonic()
    with pytest.raises(RerankError, match=r"in 2 requests"):
        server.reranker(attempts=2, timeout_s=0.4).rerank(candidates(folder), QUERY)
    result = server.reranker(time_budget_s=0.5, timeout_s=60.0).rerank(candidates(folder), QUERY)
    assert result.order == (0, 1, 2)
    assert all("time budget" in note for note in facts(result.nodes, "rerank_note"))
    with pytest.raises(RerankError, match="no answer within"):
        VisionLLMRerank(Patient(stop), attempts=1, timeout_s=0.3).rerank(candidates(folder), QUERY)
    assert time.monotonic() - started < 20
    stop.set()


class Patient(CustomLLM):
    """An LLM with no timeout of its own."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._stop = stop

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="patient")

    def chat(self, messages: Any, **_: Any) -> ChatResponse:
        self._stop.wait(30)
        return ChatResponse(message=ChatMessage("[1]"))

    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        raise NotImplementedError

    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponseGen:
        raise NotImplementedError


def test_the_model_may_outlive_its_reranker(server: ScriptedServer) -> None:
    """Truth: the answer; an engine may be given `VisionLLMRerank(...).llm`."""
    server.reply = lambda _: completion("A red mug.")
    llm = server.reranker().llm
    gc.collect()
    assert llm.chat([ChatMessage(content="What is it?")]).message.content == "A red mug."


def test_the_model_may_be_asked_asynchronously(server: ScriptedServer) -> None:
    """Truth: the answers, of one event loop after another; a redirect and a compressed answer are refused as well."""
    llm = server.reranker().llm
    question = [ChatMessage(content="What is it?")]

    async def streamed() -> str:
        parts = [part.delta or "" async for part in await llm.astream_chat(question)]
        return "".join(parts)

    server.reply = lambda _: completion("A red mug.")
    for _ in range(2):
        assert asyncio.run(llm.achat(question)).message.content == "A red mug."
    event = b'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [%s]}\n\n'
    chunk = event % b'{"index": 0, "delta": {"role": "assistant", "content": "Red"}}' + b"data: [DONE]\n\n"
    server.reply, server.headers = (lambda _: (200, chunk)), {"Content-Type": "text/event-stream"}
    for _ in range(2):
        assert asyncio.run(streamed()) == "Red"
    server.reply, server.headers = (lambda _: (307, b"")), {"Location": "http://127.0.0.1:9/v1/chat/completions"}
    with pytest.raises(Exception) as caught:
        asyncio.run(llm.achat(question))
    assert "which is not followed" in str(cause_of(caught.value))
    server.reply, server.headers = (lambda _: (200, gzip.compress(b"{}"))), {"Content-Encoding": "gzip"}
    with pytest.raises(Exception) as caught:
        asyncio.run(llm.achat(question))
    assert "compressed answer" in explained(caught.value)
