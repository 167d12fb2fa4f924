"""The backends of a model: torch, OpenVINO, or the faster of the two on this machine that keeps the vectors."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mm_retriever.devices import processor_name
from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.embedders.gate import Images, Samples, measure, samples
from mm_retriever.embedders.openvino import DTYPES, with_openvino
from mm_retriever.errors import CheckpointError, MissingExtraError, QueryError, one_line
from mm_retriever.files import cache_folder, read_own, write_atomically

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "openvino", "auto")
_TIMED = 8  # images
_ROUNDS = 3

Load: TypeAlias = Callable[[str, Any], Embedder]
"""Loads a model by torch, from dtype and device."""


def load_with(backend: str, load: Load, *, dtype: str | None, device: Any, calibration: Images) -> Embedder:
    """Return a model with a backend.

    Args:
        backend: "openvino" or "auto".
        load: loads the model in torch.
        dtype: default: float32; with "auto", the fastest.
        device: OpenVINO computes on the CPU; with "auto", any other device means torch.
        calibration: as of `samples`.

    Raises:
        QueryError: the options do not go together.
        MissingExtraError: OpenVINO is not installed.
        CheckpointError: the backend cannot compute the model, or its vectors are too far from the model's own.
    """
    if backend not in BACKENDS:
        raise QueryError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _fastest(load, dtype, device, calibration)
    if device is not None and torch.device(device).type != "cpu":
        raise QueryError(f"device {str(device)!r}: OpenVINO computes on the CPU; leave it out, or take backend torch")
    embedder = load("float32", "cpu")
    return _by_openvino(embedder, dtype or "float32", partial(samples, embedder, calibration))


def _by_openvino(embedder: Embedder, dtype: str, made: Callable[[], Samples]) -> Embedder:
    gate = with_openvino(embedder, dtype, made)
    return embedder if gate is None else _with_remark(embedder, f"{embedder.name} in int8 by OpenVINO: {gate}")


def _with_remark(embedder: Any, words: str) -> Embedder:
    """The embedder, with a remark that commands print."""
    embedder.remark = words
    logger.info("%s", words)
    result: Embedder = embedder
    return result


def _fastest(load: Load, dtype: str | None, device: Any, calibration: Images) -> Embedder:
    plain = load("float32", device)
    if torch.device(getattr(plain, "device", "cpu")).type != "cpu":
        return _with_remark(load(dtype, device) if dtype else plain, f"backend auto: torch, on {device or 'the GPU'}")
    choices = _choices(dtype)
    place = _note(plain, choices)
    made = cache(partial(samples, plain, calibration))
    if (known := _remembered(place, choices)) is not None:
        with suppress(CheckpointError, QueryError):
            return _with_remark(_made(load, *known, made), f"backend auto: {' '.join(known)}, as measured here before")
    reference = plain.encode(made().held_out)
    images = [content for content in made().held_out if content.image is not None and not content.text][:_TIMED]
    rates: dict[tuple[str, str], float] = {}
    fastest, facts = plain, []
    for choice in choices:
        try:
            embedder = _made(load, *choice, made)
            gate = measure(reference, embedder.encode(made().held_out), made().held_out, made().source)
        except (CheckpointError, QueryError, MissingExtraError) as error:
            facts.append(f"{' '.join(choice)} not: {one_line(error, 300)}")
            continue
        if not gate.passes:
            facts.append(f"{' '.join(choice)} not: {gate}")
            continue
        rates[choice] = _rate(embedder, images)
        facts.append(f"{' '.join(choice)} {rates[choice]:.2f} images/s")
        if rates[choice] == max(rates.values()):
            fastest = embedder
    if not rates:
        raise CheckpointError(f"backend auto: nothing computes {plain.name!r} here: {'; '.join(facts)}")
    best = max(rates, key=rates.__getitem__)
    _remember(place, best)
    return _with_remark(fastest, f"backend auto: {' '.join(best)} is the fastest here ({'; '.join(facts)})")


def _choices(dtype: str | None) -> list[tuple[str, str]]:
    """The backends and dtypes to try, in order."""
    choices = [("torch", "float32"), ("torch", "bfloat16"), ("torch", "float16")]
    choices = [choice for choice in choices if choice[1] == (dtype or choice[1]) and (dtype or choice[1] != "float16")]
    if find_spec("openvino") is not None:
        choices += [("openvino", choice) for choice in DTYPES if dtype in (None, choice)]
    if not choices:
        raise QueryError(
            f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, or needs OpenVINO, which is not installed"
        )
    return choices


def _made(load: Load, backend: str, dtype: str, made: Callable[[], Samples]) -> Embedder:
    return load(dtype, "cpu") if backend == "torch" else _by_openvino(load("float32", "cpu"), dtype, made)


def _rate(embedder: Embedder, images: Sequence[Content]) -> float:
    """Images per second: the median of some rounds, after one to warm up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        embedder.encode(images)
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds[1:])


# ------------------------------------------------------------------------------------------ earlier measurements


def _note(embedder: Embedder, choices: Sequence[tuple[str, str]]) -> Path:
    """The file that remembers the fastest choice for this model on this machine."""
    machine = [processor_name(), torch.get_num_threads(), torch.__version__, *map(list, choices)]
    digest = hashlib.sha256(json.dumps([embedder.space, machine]).encode()).hexdigest()[:24]
    return cache_folder("openvino") / f"auto-{digest}.json"


def _remembered(place: Path, choices: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    try:
        content = json.loads(read_own(place, 4096, others_may=0o044) or b"null")
    except ValueError:
        content = None
    return next((choice for choice in choices if content == list(choice)), None)


def _remember(place: Path, choice: tuple[str, str]) -> None:
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(place, json.dumps(choice).encode(), mode=0o600)
    except OSError as error:
        logger.warning("%s cannot be written (%s): it is measured again next time", place, error.strerror or error)
