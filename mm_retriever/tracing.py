"""Spans of LlamaIndex's instrumentation, which tracers such as OpenTelemetry's show."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]

F = TypeVar("F", bound=Callable[..., Any])


def spanned(function: F) -> F:
    """A function or method with a span around each call; unlike LlamaIndex's own decorator, it can be pickled."""
    traced = get_dispatcher(function.__module__).span(function)
    is_method = "." in function.__qualname__

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_method:
            return traced(*args, **kwargs)
        return traced.__get__(args[0], type(args[0]))(*args[1:], **kwargs)

    return cast("F", call)
