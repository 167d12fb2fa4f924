"""Lines of stdin that are no message of the protocol: repaired where they can be, and answered where they cannot.

The SDK passes them over, and a client that sent one waits for its answer for ever.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp_types import INVALID_REQUEST, PARSE_ERROR, ErrorData, JSONRPCError, jsonrpc_message_adapter
from pydantic import ValidationError

Item: TypeAlias = SessionMessage | Exception
"""What the SDK reads: a message, or why a line is none."""


async def pass_on(
    lines: AsyncIterable[Item],
    messages: MemoryObjectSendStream[Item],
    answer: Callable[[SessionMessage], Awaitable[None]],
) -> None:
    """Pass on messages until there are no more lines, and answer lines that are none."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # the server has ended
        async with messages:
            async for item in lines:
                understood = repaired(item) if isinstance(item, ValidationError) else item
                if isinstance(understood, JSONRPCError):
                    await answer(SessionMessage(understood))
                elif understood is not None:
                    await messages.send(understood)


def repaired(error: ValidationError) -> SessionMessage | JSONRPCError | None:
    """Return the message of a line with halves of surrogate pairs, the refusal of any other request, or None.

    None is for what nobody waits for: blank lines, and notifications and responses that are not of the protocol.
    """
    inputs = [part["input"] for part in error.errors(include_url=False)]  # the line, or what it holds
    given: Any = next((part for part in inputs if isinstance(part, dict)), inputs[0])
    if isinstance(given, str):
        if not given.strip():
            return None
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as reason:
            return _refusal(None, PARSE_ERROR, f"the line is not JSON: {str(reason)[:200]}")
        whole = json.dumps(given, ensure_ascii=False).encode("utf-8", "replace")  # half a pair becomes "?"
        with suppress(ValidationError):
            return SessionMessage(jsonrpc_message_adapter.validate_json(whole, by_name=False))
    if not isinstance(given, dict):
        return _refusal(None, INVALID_REQUEST, "the line is not a JSON object: send one request on each line")
    if "id" not in given or ("method" not in given and ("result" in given or "error" in given)):
        return None
    id_ = given["id"] if isinstance(given["id"], str | int) and not isinstance(given["id"], bool) else None
    id_ = id_.encode("utf-8", "replace").decode() if isinstance(id_, str) else id_
    form = 'a request has "jsonrpc": "2.0", an id that is a text or a whole number, a method, and params by name'
    return _refusal(id_, INVALID_REQUEST, form)


def _refusal(id_: str | int | None, code: int, reason: str) -> JSONRPCError:
    return JSONRPCError(jsonrpc="2.0", id=id_, error=ErrorData(code=code, message=reason))
