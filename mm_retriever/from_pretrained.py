"""What surrounds transformers' own loading: no bar, no random weights, no video processor.

Each is a context for the calling thread. Knows no model.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mm_retriever.errors import CheckpointError, one_line

_BAR_LOCK = threading.Lock()  # transformers has one hook for all threads
_VIDEO_LOCK = threading.RLock()


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """No bar from transformers in this thread. Other threads keep theirs."""
    from transformers.utils import logging as transformers_logging

    set_hook: Any = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:  # the first versions 5 have no such hook, and draw their bar
        yield
        return
    here = threading.get_ident()

    def hook(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if threading.get_ident() == here:
            return transformers_logging.EmptyTqdm(*args, **options)
        return bar(*args, **options) if others is None else others(bar, args, options)

    with _BAR_LOCK:
        others = set_hook(hook)
        try:
            yield
        finally:
            set_hook(others)


@contextmanager
def without_random_weights(name: str) -> Iterator[list[str]]:
    """Refuse weights that lack tensors; transformers fills them with random numbers and a line in its log.

    Its report of such tensors reaches no caller in any other way. Gives the names of tensors that the model has no
    place for, once the block is over.

    Args:
        name: of the model, for the error.

    Raises:
        CheckpointError: tensors are missing; when the block is over.
    """
    log = logging.getLogger("transformers.modeling_utils")
    here, reports, level = threading.get_ident(), [], log.level
    unexpected: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != here or "LOAD REPORT" not in (message := record.getMessage()):
            return True
        reports.append(message)
        return False

    log.addFilter(keep)
    if not log.isEnabledFor(logging.WARNING):
        log.setLevel(logging.WARNING)
    try:
        yield unexpected
    finally:
        log.removeFilter(keep)
        log.setLevel(level)
    rows = [line.split("|") for report in reports for line in report.splitlines() if "|" in line]
    missing = [row[0].strip() for row in rows if "MISSING" in row[1]]
    unexpected += [row[0].strip() for row in rows if "UNEXPECTED" in row[1]]
    if missing:
        raise CheckpointError(
            f"the weights of {name!r} lack {len(missing)} tensors that the model has, for example "
            f"{one_line(missing[0], 200)}: they are of another model, or not all of one"
        )


@contextmanager
def without_video_processor() -> Iterator[None]:
    """Load processors of models that take videos without the part for videos, where torchvision is missing.

    transformers loads every part of a processor, and the one for videos needs torchvision; images and texts do not.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    from transformers import ProcessorMixin

    every: Any = ProcessorMixin.__dict__["get_attributes"]

    def but_video(cls: type) -> list[str]:
        return [attribute for attribute in every.__func__(cls) if attribute != "video_processor"]

    with _VIDEO_LOCK:
        setattr(ProcessorMixin, "get_attributes", classmethod(but_video))  # noqa: B010
        try:
            yield
        finally:
            setattr(ProcessorMixin, "get_attributes", every)  # noqa: B010
