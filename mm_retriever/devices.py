"""Devices and dtypes: which one a model runs on, and how many inputs at a time. Plain torch; knows no model.

The one place that both models, the rerankers and the command line ask.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm_retriever.errors import CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    """The fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available_devices() -> list[str]:
    """Every device of this machine, graphics cards with their names."""
    cards = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def as_device(device: torch.device | str | None) -> torch.device:
    """A device that can be used here, by name or as it is; by default the fastest.

    Raises:
        CheckpointError: torch does not know the device, or this machine does not have it.
    """
    try:
        chosen = torch.device(device or default_device())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for "not here"
        reason = str(error).strip().splitlines()[0]
        here = ", ".join(dict.fromkeys(["cpu", default_device()]))
        raise CheckpointError(
            f"device {str(device)!r} cannot be used here ({reason}); this machine has {here}"
        ) from error
    return chosen


def as_dtype(dtype: torch.dtype | str | None, *, default: torch.dtype = torch.float32) -> torch.dtype:
    """One of :data:`DTYPES`, by name or as it is.

    Raises:
        CheckpointError: it is another type.
    """
    chosen = default if dtype is None else DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise CheckpointError(f"dtype={str(dtype)!r} is not one of {', '.join(DTYPES)}")
    return chosen


def stored_dtype(stored: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """What weights are computed in by default: as stored, and float32 where that is float16 on a CPU, which is slow."""
    dtype = getattr(torch, stored, None) if isinstance(stored, str) else stored
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        return torch.float32
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def input_device(parameter: Tensor) -> torch.device:
    """Where a module expects its inputs; one that is offloaded moves them itself, from anywhere real."""
    return torch.device("cpu") if parameter.device.type == "meta" else parameter.device


class _Unfilled(TorchFunctionMode):
    """Leaves tensors without their first random values."""

    _FILLING = (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in self._FILLING:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def without_memory() -> Iterator[None]:
    """Make tensors on the meta device: names, shapes and dtypes alone.

    There, torch fills a tensor with random values by Python code that loads its compiler, which takes longer than all
    else of loading a small model, and changes nothing.
    """
    with torch.device("meta"), _Unfilled():
        yield


def processor_name() -> str:
    """The processor, as the system calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


logger = logging.getLogger(__name__)

PASS_VALUES = {"cpu": 2_500_000, "other": 160_000_000}
"""Values of the widest layer that one pass may make. On a CPU 10 MB: more would be fetched from memory, and fresh pages
from the system, layer after layer (a batch of 32 images in one pass took a tenth longer than in passes of four)."""


def passes(lengths: Sequence[int], widest: int, device: str) -> Iterator[range]:
    """Ranges of rows that go through the model together.

    Args:
        lengths: tokens of every row, ascending.
        widest: values that the widest layer makes of one token.
        device: the kind of device that the model is on.
    """
    most = PASS_VALUES["cpu" if device == "cpu" else "other"] // widest  # tokens
    start = 0
    for row, length in enumerate(lengths):
        if row > start and (row + 1 - start) * length > most:
            yield range(start, row)
            start = row
    if start < len(lengths):
        yield range(start, len(lengths))


def in_passes(parts: Iterable[range], run: Callable[[range], None]) -> None:
    """Run passes in their order; one that the device has no memory for is run in halves.

    Raises:
        torch.OutOfMemoryError: there is none for a single row.
    """
    waiting = list(parts)[::-1]
    while waiting:
        part = waiting.pop()
        try:
            run(part)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        logger.warning("the device has no memory for %d inputs at once: they are computed in halves", len(part))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = part.start + len(part) // 2
        waiting += [range(middle, part.stop), range(part.start, middle)]
