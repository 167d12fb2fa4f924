"""One request to a vision LLM: sent in bounded time, repeated where that helps, its answer checked.

Owns the client for servers that speak OpenAI's protocol, and the request for one generated token in place of a written
ranking: the log-probabilities of the candidates' numbers as that token (FIRST, arXiv:2406.15657). A number that the
server does not report has no log-probability. Knows nothing of candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.llms import LLM

from mm_retriever.errors import MissingExtraError, ModelServerError, RerankError, one_line
from mm_retriever.rerank.scorer import Meter
from mm_retriever.servers.failures import (
    advice,
    cause_of,
    explained,
    is_schema_refusal,
    refuse_errors,
    refuse_errors_later,
    retrying,
    short,
    status_of,
)
from mm_retriever.threads import within

logger = logging.getLogger(__name__)

WITHOUT_IT = 'on_error="keep_order" goes on without it'
_CUT_OFF = frozenset({"length", "max_tokens", "max_output_tokens"})
_FILTERED = frozenset({"content_filter", "refusal", "safety", "recitation", "blocklist", "prohibited_content", "spii"})


class UnrankedError(RerankError):
    """An answer without a ranking: a refusal, a filtered answer, or one that was cut off."""


class Requests:
    """Requests of one reranking to an LLM.

    Args:
        llm: the model.
        name: of the model, for messages.
        meter: counts requests and tokens, and watches the time.
        timeout_s: limit for one request, from sending to the last byte.
        attempts: most requests for one answer.
        retry_wait_s: wait before the second attempt; doubles with each, up to a minute.
    """

    def __init__(
        self, llm: LLM, name: str, meter: Meter, *, timeout_s: float, attempts: int, retry_wait_s: float
    ) -> None:
        self._llm, self._name, self._meter = llm, name, meter
        self._timeout_s, self._attempts, self._retry_wait_s = timeout_s, attempts, retry_wait_s
        self.schema_refused = False

    def ask(self, messages: list[ChatMessage], options: Mapping[str, Any]) -> ChatResponse:
        """Return the answer; if the server refuses the options, which hold a JSON schema, that of a request without."""
        try:
            response = self._retried(messages, options)
        except Exception as error:
            if not options or not is_schema_refusal(error):
                raise
            logger.info("%s takes no JSON schema (%s); going on without", self._name, short(error))
            response = self._retried(messages, {})
            self.schema_refused = True  # without it the request was accepted
        return self._counted(response)

    def first_token(self, messages: list[ChatMessage], options: Mapping[str, Any]) -> ChatResponse | None:
        """Return the answer's first token with its log-probabilities; None if the server refuses such a request.

        Args:
            messages: of the request.
            options: from `token_options`.
        """
        try:
            return self._counted(self._retried(messages, options, needed=True))
        except Exception as error:
            if not is_schema_refusal(error):
                raise
            logger.info("%s gives no log-probabilities (%s); going on without", self._name, short(error))
            return None

    def _counted(self, response: ChatResponse) -> ChatResponse:
        prompt, answer = _token_counts(response)
        self._meter.prefilled += prompt
        self._meter.generated += answer
        return response

    def _retried(
        self, messages: list[ChatMessage], options: Mapping[str, Any], *, needed: bool = False
    ) -> ChatResponse:
        """The answer to one request, repeated where that may help; without the options only if not `needed`."""
        meter, server_failed = self._meter, False

        def once() -> ChatResponse:
            nonlocal server_failed
            # a server that fails on the schema alone is asked without it the next time
            fields = {} if server_failed and not needed else options
            meter.passes += 1
            left = meter.left()
            limit = self._timeout_s if left is None else min(self._timeout_s, left)
            try:
                return within(lambda: self._llm.chat(messages, **fields), limit)
            except Exception as error:
                cause = cause_of(error)
                server_failed = server_failed or status_of(cause) in (500, 501)
                if cause is not error:
                    raise cause from error
                raise

        try:
            return retrying(self._attempts, self._retry_wait_s, meter.left)(once)
        except Exception as error:
            if options and is_schema_refusal(error):
                raise
            requests = "1 request" if meter.passes == 1 else f"{meter.passes} requests"
            raise RerankError(
                f"{self._name!r} gave no answer in {requests} (last: {explained(error)}); {advice(error, WITHOUT_IT)}"
            ) from error


def check_ending(response: ChatResponse, refusal: str, name: str, window: int, max_tokens: int) -> None:
    """Raise for an answer that ended before it was a ranking.

    Args:
        response: of the model.
        refusal: the sentence of its text in which it refuses, "" without one.
        name: of the model.
        window: candidates in one request, for the message of an answer that was cut off.
        max_tokens: limit of an answer, for the same message.

    Raises:
        UnrankedError: the model refused, a content filter stopped it, or the answer was cut off.
    """
    ended, refused = _ending(response)
    if refused or (refusal and ended not in _CUT_OFF):
        raise UnrankedError(f"{name!r} refused to rank: {one_line(refused or refusal, 300)}")
    if ended in _FILTERED:
        text = one_line(response.message.content or "", 300)
        words = f": {text}" if text else ""
        raise UnrankedError(f"{name!r} gave no ranking: a content filter stopped it ({ended}){words}")
    if ended in _CUT_OFF:
        raise UnrankedError(
            f"{name!r} was cut off before its answer ended ({ended}): raise max_tokens, now {max_tokens} with a "
            f"base_url, or rank fewer candidates at a time (window={window})"
        )


def openai_like(
    base_url: str, model: str, api_key: str | None, *, timeout_s: float, max_tokens: int
) -> tuple[LLM, Any]:
    """Return LlamaIndex's client for servers that speak OpenAI's protocol, without retries, and its connections.

    Raises:
        QueryError: the address is none.
    """
    try:
        from llama_index.llms.openai_like import OpenAILike

        from mm_retriever.servers.failures import bounded_clients
    except ImportError as error:
        raise MissingExtraError.of(error, "llama-index-llms-openai-like", "remote") from error
    from mm_retriever.servers.json_server import checked_address

    address = checked_address(base_url)
    connections, threaded = bounded_clients(timeout_s)
    connections.event_hooks["response"].append(refuse_errors)
    threaded.event_hooks["response"].append(refuse_errors_later)
    llm: LLM = OpenAILike(
        model=model,
        api_base=address,
        api_key=api_key or "none",
        is_chat_model=True,
        temperature=0.0,
        max_tokens=max_tokens,
        timeout=timeout_s,
        max_retries=0,
        http_client=connections,  # type: ignore[call-arg]
        async_http_client=threaded,
    )
    return llm, connections


def _ending(response: ChatResponse) -> tuple[str, str]:
    """Why the answer ended, lower-cased, and the words of a refusal; "" where the client does not say."""
    raw = response.raw
    choice = first(field(raw, "choices")) or first(field(raw, "candidates"))
    message = field(choice, "message")
    refusal = field(message, "refusal") or response.message.additional_kwargs.get("refusal")
    for holder, name in ((choice, "finish_reason"), (raw, "stop_reason"), (raw, "finish_reason"), (raw, "done_reason")):
        reason = field(holder, name)
        if reason:
            ended = str(getattr(reason, "name", reason)).lower()
            return ended, refusal if isinstance(refusal, str) else ""
    return "", refusal if isinstance(refusal, str) else ""


def field(holder: Any, name: str) -> Any:
    """Return an attribute of an object or an entry of a mapping; None if it is missing."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def first(items: Any) -> Any:
    """Return the first item of a list; None if there is none."""
    return items[0] if isinstance(items, list | tuple) and items else None


def _token_counts(response: ChatResponse) -> tuple[int, int]:
    """The numbers of tokens of prompt and answer, 0 where the client does not say."""
    usage = getattr(response.raw, "usage", None) or response.additional_kwargs
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        count = usage.get(name) if isinstance(usage, dict) else getattr(usage, name, None)
        counts.append(count if isinstance(count, int) else 0)
    return counts[0], counts[1]


MOST_NUMBERED = 9  # candidates whose numbers are one token in every vocabulary
_TOP = 20  # as many as OpenAI's protocol allows, and vLLM's default
_LEAST_SHARE = 0.5  # of the first token's probability that goes to numbers; with less the model begins something else


def token_options(token_ids: Iterable[int] = ()) -> dict[str, Any]:
    """Return what makes a client of OpenAI's protocol ask for one token and its log-probabilities.

    Args:
        token_ids: whose log-probabilities are wanted whatever the most probable ones are; vLLM's field.
    """
    ids = list(token_ids)
    body: dict[str, Any] = {"max_tokens": 1}  # in the body, where the client's own limit does not replace it
    return {"logprobs": True, "top_logprobs": _TOP, "extra_body": body | ({"logprob_token_ids": ids} if ids else {})}


def number_logprobs(raw: Any, count: int) -> dict[int, float]:
    """Return the log-probability that the answer begins with each number from 1, of those that the server tells.

    Args:
        raw: the client's answer, with OpenAI's fields.
        count: of candidates.
    """
    logprobs: dict[int, float] = {}
    for token, logprob in dict(_tokens(raw)).items():
        word = token.strip().lstrip("Ġ▁")
        if len(word) == 1 and word in "123456789" and int(word) <= count:
            logprobs[int(word)] = float(np.logaddexp(logprobs.get(int(word), -math.inf), logprob))
    return logprobs


def logprobs_problem(logprobs: Mapping[int, float], count: int) -> str:
    """Return why these are no ranking of `count` candidates; empty if they are one."""
    if not logprobs:
        return "the server gave no log-probabilities of numbers"
    if missing := [str(number) for number in range(1, count + 1) if number not in logprobs]:
        return f"the server gave no log-probability of {', '.join(missing)}"
    if sum(map(math.exp, logprobs.values())) < _LEAST_SHARE:
        return "the model did not mean to begin with a number"
    return ""


def number_ids(
    base_url: str, model: str, api_key: str | None, *, timeout_s: float, left: Callable[[], float | None]
) -> tuple[int, ...]:
    """Return the token of each number from 1 to 9, as vLLM's ``/tokenize`` gives it; empty where there is none.

    Args:
        base_url: of the server.
        model: the name it serves the model under.
        api_key: if the server needs one.
        timeout_s: limit for one request.
        left: returns the seconds left for all of them, or None without a limit.
    """
    from mm_retriever.servers.json_server import JSONServer

    server = JSONServer(base_url.rstrip("/").removesuffix("/v1"), model, api_key=api_key)
    ids: list[int] = []
    for number in range(1, MOST_NUMBERED + 1):
        body = {"model": model, "prompt": str(number), "add_special_tokens": False}
        try:
            answer = server.post("tokenize", body, timeout_s=timeout_s, attempts=1, retry_wait_s=0, left=left)
        except ModelServerError:  # only vLLM has it
            return ()
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or len(tokens) != 1 or type(tokens[0]) is not int or tokens[0] < 0:
            return ()
        ids += tokens
    return tuple(ids)


def _tokens(raw: Any) -> Iterator[tuple[str, float]]:
    """The first token and those it was chosen from, with their log-probabilities."""
    chosen = first(field(field(first(field(raw, "choices")), "logprobs"), "content"))
    tops = field(chosen, "top_logprobs")
    for item in [chosen, *(tops if isinstance(tops, list | tuple) else ())]:
        token, logprob = field(item, "token"), field(item, "logprob")
        # servers write -9999 for a token without a log-probability
        if isinstance(token, str) and type(logprob) in (int, float) and -9000 < logprob < 1e-3:
            yield token, float(logprob)
