"""One generated token in place of a written ranking: candidates by the log-probability of their number as that token.

Owns what is asked of a server for that, and what is taken for the log-probability of a number. A number that the server
says nothing of has none. Source: FIRST, arXiv:2406.15657.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mm_retriever.errors import ModelServerError
from mm_retriever.rerank.llm_requests import field, first

MOST = 9  # candidates whose numbers are one token in every vocabulary
_TOP = 20  # as many as OpenAI's protocol allows, and vLLM's default
_LEAST_SHARE = 0.5  # of the first token's probability that goes to numbers; with less the model begins something else


def options(token_ids: Iterable[int] = ()) -> dict[str, Any]:
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
    found: dict[int, float] = {}
    for token, logprob in dict(_tokens(raw)).items():
        word = token.strip().lstrip("Ġ▁")
        if len(word) == 1 and word in "123456789" and int(word) <= count:
            found[int(word)] = float(np.logaddexp(found.get(int(word), -math.inf), logprob))
    return found


def problem(found: Mapping[int, float], count: int) -> str:
    """Return why these are no ranking of `count` candidates; empty if they are one."""
    if not found:
        return "the server gave no log-probabilities of numbers"
    if missing := [str(number) for number in range(1, count + 1) if number not in found]:
        return f"the server gave no log-probability of {', '.join(missing)}"
    if sum(map(math.exp, found.values())) < _LEAST_SHARE:
        return "the model did not mean to begin with a number"
    return ""


def number_ids(
    base_url: str, model: str, api_key: str | None, *, timeout_s: float, left: Callable[[], float | None]
) -> tuple[int, ...]:
    """Return the token of each number from 1 to 9, as vLLM's ``/tokenize`` gives it; empty where there is none.

    Args:
        base_url: of the server.
        model: the name it serves the model under.
        api_key: if it wants one.
        timeout_s: for one request.
        left: seconds that are left for all of them; None: as many as it takes.
    """
    from mm_retriever.servers.json_server import JSONServer

    server = JSONServer(base_url.rstrip("/").removesuffix("/v1"), model, api_key=api_key)
    ids: list[int] = []
    for number in range(1, MOST + 1):
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
        # -9999 is what servers write for a token that they know nothing of
        if isinstance(token, str) and type(logprob) in (int, float) and -9000 < logprob < 1e-3:
            yield token, float(logprob)
