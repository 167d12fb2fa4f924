"""Computes any torch embedder by OpenVINO on the CPU: in float32, bfloat16, or 8-bit integers by NNCF.

The `parts` of an embedder are the functions of tensors that compute its vectors. Each is traced once; the graphs
replace the functions, and are kept in the user's cache by the identity of the model. Only files that this module wrote
are read back. Telemetry of both libraries is off.

Needs the extra ``[openvino]``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from mm_retriever.devices import processor_name
from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.embedders.gate import Gate, Samples, measure
from mm_retriever.errors import CheckpointError, MissingExtraError, QueryError, one_line
from mm_retriever.files import cache_folder, read_own, write_atomically
from mm_retriever.packed_linear import unpack_linears

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "int8")
_FORMAT = 1  # of the files in the cache, and of what is traced
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}

Part: TypeAlias = Callable[..., Tensor]
Graphs: TypeAlias = dict[str, Any]
"""OpenVINO's models by the name of the part."""


def with_openvino(embedder: Embedder, dtype: str, samples: Callable[[], Samples]) -> Gate | None:
    """Let OpenVINO compute an embedder from now on; return the gate of an 8-bit form, else None.

    Args:
        embedder: on the CPU in float32. Its ``parts`` are the functions that `encode` calls, by name, from tensors
            with one row for each input to a tensor of rows; ``torch_model`` has their weights.
        dtype: one of `DTYPES`.
        samples: returns the contents that calibrate and measure an 8-bit form; called only if the cache has none.

    Raises:
        MissingExtraError: OpenVINO, or NNCF for "int8", is not installed.
        QueryError: the dtype is unknown, or this processor does not support it.
        CheckpointError: the model cannot be exported, or its 8-bit vectors are too far from its own.
    """
    if dtype not in DTYPES:
        raise QueryError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, which OpenVINO computes in")
    model = _exportable(embedder)
    core = _openvino().Core()
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and not has_bfloat16:
        raise QueryError("this processor does not compute in bfloat16; take float32 or int8")
    if dtype != "int8":
        key = _identity(model, "float")
        graphs, _ = _cached(core, key, model.name) or (None, None)
        if graphs is None:
            graphs = _exported(model)
            _keep(key, graphs, None)
        _take(model, core, graphs, _PRECISION[dtype])
        _release(model)
        model.note = f"{dtype} openvino"
        return None
    rest = "bf16" if has_bfloat16 else "f32"
    key = _identity(model, f"int8 {rest}")
    graphs, gate = _cached(core, key, model.name) or (None, None)
    if gate is None:
        graphs, gate = _quantised(model, core, rest, samples())
        _keep(key, graphs if gate.passes else {}, gate)
    if not gate.passes or not graphs:
        raise CheckpointError(
            f"{model.name!r} in 8 bits is too far from itself: {gate}; take dtype float32 or bfloat16, or other "
            f"calibration images after removing {_place(key)}"
        )
    _take(model, core, graphs, rest)
    _release(model)
    # the vectors depend on the calibration, so a vector cache must tell calibrations apart
    model.note = f"int8 openvino {hashlib.sha256(json.dumps(asdict(gate)).encode()).hexdigest()[:6]}"
    return gate


def _exportable(embedder: Embedder) -> Any:
    parts = getattr(embedder, "parts", None)
    if not parts:
        raise CheckpointError(
            f"{embedder.name!r} cannot be computed by OpenVINO: its inputs have no fixed form; take backend torch"
        )
    return embedder


# ------------------------------------------------------------------------------------------ the libraries


def _openvino() -> Any:
    """OpenVINO, with telemetry off."""
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # both libraries work without it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import openvino
    except ImportError as error:
        missing = MissingExtraError.of(error, "openvino", "openvino")
        raise MissingExtraError(f"{missing}, or take backend torch") from error
    return openvino


def _nncf() -> Any:
    _openvino()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ImportError as error:
        raise MissingExtraError.of(error, "nncf", "openvino") from error
    return nncf


@contextmanager
def _alone() -> Iterator[None]:
    """Silence the libraries: no warnings about their own code, no output, no telemetry."""
    telemetry = getattr(sys.modules.get("openvino_telemetry"), "Telemetry", None)  # the program imported OpenVINO first
    names = ("send_event", "start_session", "end_session", "send_error", "send_stack_trace")
    kept = {name: getattr(telemetry, name) for name in names} if telemetry is not None else {}
    loggers = [logging.getLogger(name) for name in ("nncf", "openvino")]
    levels = [library.level for library in loggers]
    rich = sys.modules.get("rich")  # draws NNCF's progress bars
    console: Any = SimpleNamespace(quiet=False) if rich is None else rich.get_console()
    was_quiet, console.quiet = console.quiet, True
    for name in kept:
        setattr(telemetry, name, lambda *_, **__: None)
    for library in loggers:
        library.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        console.quiet = was_quiet
        for name, method in kept.items():
            setattr(telemetry, name, method)
        for library, level in zip(loggers, levels, strict=True):
            library.setLevel(level)


# ------------------------------------------------------------------------------------------ export and quantisation


@contextmanager
def _failures_told(model: Any) -> Iterator[None]:
    """Say in one line that a library cannot export, quantise or compile a model: they raise a dozen kinds of errors."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{model.name!r} cannot be computed by OpenVINO ({one_line(error, 200)}); take backend torch"
        ) from error


class _Traced(nn.Module):
    """A part and its weights as one module, which tracing needs."""

    def __init__(self, model: nn.Module, part: Part) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.part(*inputs)


def _exported(model: Any) -> Graphs:
    """Every part as a graph for any number of rows, and texts of any length."""
    openvino = _openvino()
    unpack_linears(model.torch_model)
    graphs: Graphs = {}
    for name, examples in _recorded(model, _probes(model)).items():
        example = max(examples, key=lambda inputs: inputs[-1].numel())
        with _failures_told(model), _alone(), torch.no_grad():
            graph = openvino.convert_model(_Traced(model.torch_model, model.parts[name]), example_input=example)
            graph.reshape({place: _shape(tensor) for place, tensor in enumerate(example)})
        graphs[name] = graph
    return graphs


def _shape(tensor: Tensor) -> Any:
    """The shape of an input with any number of rows and, for ids and masks, of tokens; other sizes are fixed."""
    sizes = [-1, *tensor.shape[1:]]
    if not tensor.is_floating_point():
        sizes[1:] = [-1] * (len(sizes) - 1)
    return _openvino().PartialShape(sizes)


def _probes(model: Any) -> list[Content]:
    """Two rows of every kind that a model embeds, texts of different lengths."""
    images = [model.prepare(Image.new("RGB", (64, 48), colour)) for colour in ((200, 90, 30), (20, 140, 80))]
    return [
        *(Content(image=image) for image in images),
        *(Content(text) for text in ("a mug", "a red mug with white stars")),
        *(Content(text, image) for text, image in zip(("in red", "the same in dark blue"), images, strict=True)),
    ]


def _recorded(model: Any, contents: Sequence[Content]) -> dict[str, list[tuple[Tensor, ...]]]:
    """The inputs of the parts while contents are embedded, kind by kind."""
    inputs: dict[str, list[tuple[Tensor, ...]]] = {}
    parts = dict(model.parts)

    def recorder(name: str, part: Part) -> Part:
        def record(*given: Tensor) -> Tensor:
            inputs.setdefault(name, []).append(tuple(tensor.clone() for tensor in given))
            return part(*given)

        return record

    model.parts.update({name: recorder(name, part) for name, part in parts.items()})
    try:
        for kind in ((False, True), (True, False), (True, True)):
            of_kind = [content for content in contents if (bool(content.text), content.image is not None) == kind]
            try:
                model.encode(of_kind)
            except QueryError:  # not of this model
                continue
    finally:
        model.parts.update(parts)
    return {name: [tuple(tensor.clone() for tensor in row) for row in rows] for name, rows in inputs.items()}


def _quantised(model: Any, core: Any, rest: str, samples: Samples) -> tuple[Graphs, Gate]:
    """The parts in 8 bits, and their gate; if a whole model is too coarse, its outliers stay in float."""
    nncf = _nncf()
    logger.warning(
        "%s is quantised for OpenVINO on %d contents, with images of %s: once, for some minutes",
        model.name, len(samples.calibration), samples.source,
    )  # fmt: skip
    reference = model.encode(samples.held_out)
    inputs: dict[str, list[tuple[Tensor, ...]]] = {}
    for content in samples.calibration:
        for name, rows in _recorded(model, [content]).items():
            inputs.setdefault(name, []).extend(rows)
    best: tuple[Graphs, Gate] | None = None
    for in_float, kept in _RUNGS:
        graphs = _exported(model)
        for name, graph in graphs.items():
            if name in kept:
                continue
            items = [[tensor.numpy() for tensor in row] for row in inputs[name]]
            ignored = nncf.IgnoredScope(patterns=list(in_float), validate=False)
            with _failures_told(model), _alone():
                graphs[name] = nncf.quantize(
                    graph,
                    nncf.Dataset(items),
                    subset_size=len(items),
                    model_type=nncf.ModelType.TRANSFORMER,
                    ignored_scope=ignored,
                )
        parts = dict(model.parts)
        try:
            _take(model, core, graphs, rest)
            gate = measure(reference, model.encode(samples.held_out), samples.held_out, samples.source)
        finally:
            model.parts.update(parts)
        logger.info("%s in 8 bits, all but %s: %s", model.name, ", ".join((*in_float, *kept)), gate)
        if best is None or (gate.same_top, gate.least_cosine) > (best[1].same_top, best[1].least_cosine):
            best = graphs, gate
        if gate.passes:
            break
    assert best is not None
    return best


_PATCHES = (r".*patch_embed.*",)
_OUTLIERS = (*_PATCHES, r".*mlp\.w3.*", r".*mlp\.fc2.*", r".*\.output\.dense.*")
_RUNGS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (_PATCHES, ()),
    (_OUTLIERS, ()),
    (_OUTLIERS, ("text", "beside")),
)
"""Layers, by names in the graph, and parts that stay in float: first the layer that reads the pixels, which costs
nothing; then those that read the widest layer of each block, which has the outliers; then the whole text side too."""


# ------------------------------------------------------------------------------------------ computing


class _Compiled:
    """A graph that replaces a part; it computes one call at a time.

    A few rows are computed by all threads together. More are split into two halves, each with its own threads: threads
    that compute one layer together wait for each other at its end, which costs 8% on two cores.
    """

    def __init__(self, graph: Any, core: Any, precision: str) -> None:
        self._graph, self._core = graph, core  # its weights are those of what is compiled from it
        self._threads = torch.get_num_threads()
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self._threads,
            "ENABLE_CPU_PINNING": False,
        }
        self._requests = {1: self._compiled_for(1)}
        self._process = os.getpid()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._process != os.getpid():
            raise CheckpointError(
                "the model was compiled by OpenVINO before this process was forked, where it cannot compute; load it "
                "in each worker, or start workers by 'spawn'"
            )
        shares = 2 if self._threads > 1 and len(inputs[0]) >= _LEAST_ROWS else 1
        if shares not in self._requests:
            self._requests[shares] = self._compiled_for(shares)
        requests = self._requests[shares]
        parts = [np.array_split(tensor.contiguous().numpy(), shares) for tensor in inputs]
        with ExitStack() as ends:  # waits for all requests, also after a failure
            for request, given in zip(requests, zip(*parts, strict=True), strict=True):
                request.start_async(dict(enumerate(given)))
                ends.callback(request.wait)
        computed = np.concatenate([request.get_output_tensor(0).data for request in requests], dtype=np.float32)
        return torch.from_numpy(computed)

    def _compiled_for(self, shares: int) -> list[Any]:
        """One request for each of `shares` parallel shares."""
        compiled = self._core.compile_model(self._graph, "CPU", {**self._settings, "NUM_STREAMS": shares})
        return [compiled.create_infer_request() for _ in range(shares)]


_LEAST_ROWS = 4
"""The least rows that are computed in halves; one pass of the base size has as many."""


def _take(model: Any, core: Any, graphs: Mapping[str, Any], precision: str) -> None:
    """Replace the parts by graphs."""
    with _failures_told(model):
        compiled = {name: _Compiled(graph, core, precision) for name, graph in graphs.items()}
    model.parts.update(compiled)


def _release(model: Any) -> None:
    """Free torch's weights, which the graphs duplicate; functions that need them fail from now on."""
    if not getattr(model, "keeps_weights", False):
        model.torch_model.to("meta")


# ------------------------------------------------------------------------------------------ the cache


def _identity(model: Any, kind: str) -> str:
    """The name of a model's file; equal only for equal weights, inputs and libraries."""
    libraries = [version("openvino"), *([version("nncf")] if kind.startswith("int8") else ())]
    # integers saturate on some processors, so a gate holds only for its kind of processor
    facts = [_FORMAT, model.space, kind, *libraries, processor_name() if kind.startswith("int8") else ""]
    return f"{kind.split()[0]}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"


def _place(key: str) -> Path:
    return cache_folder("openvino") / f"{key}.safetensors"


def _cached(core: Any, key: str, name: str) -> tuple[Graphs, Gate | None] | None:
    """The graphs and the gate of a model that was exported before; files of other origin are not read."""
    place = _place(key)
    if not place.exists():
        return None
    try:
        content = read_own(place, place.stat().st_size, others_may=0o044)
        if content is None:
            raise ValueError("another user may have written it")
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("it is damaged")
        arrays = load_tensors(content)
        facts = json.loads(arrays.pop("facts").tobytes())
        if facts["key"] != key:
            raise ValueError("it is of another model")
        names = sorted({entry.rpartition(".")[0] for entry in arrays})
        graphs = {
            part: core.read_model(arrays[f"{part}.xml"].tobytes(), arrays[f"{part}.bin"].tobytes()) for part in names
        }
        return graphs, None if facts["gate"] is None else Gate(**facts["gate"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        logger.warning("%s: %s is not used (%s); the model is exported again", name, place, one_line(error, 200))
        return None


def _keep(key: str, graphs: Graphs, gate: Gate | None) -> None:
    """Write a model's graphs into the cache; log a failure."""
    openvino = _openvino()
    arrays: dict[str, NDArray[Any]] = {}
    facts = {"key": key, "gate": None if gate is None else asdict(gate)}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    place = _place(key)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # not among other temporary files, whose disk may have no room for a model
        with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as folder:
            for name, graph in graphs.items():
                xml = Path(folder, "graph.xml")
                with _alone():
                    openvino.save_model(graph, xml, compress_to_fp16=False)
                for suffix in ("xml", "bin"):
                    content = xml.with_suffix(f".{suffix}").read_bytes()
                    arrays[f"{name}.{suffix}"] = np.frombuffer(content, dtype=np.uint8)
        packed = save_tensors(arrays)
        write_atomically(place, hashlib.sha256(packed).digest() + packed, mode=0o600)
    except (OSError, RuntimeError) as error:  # OpenVINO has the latter where a disk is full
        logger.warning(
            "%s cannot be written (%s): the model is exported at every start",
            place, getattr(error, "strerror", None) or error,
        )  # fmt: skip
