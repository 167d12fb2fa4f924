"""How fast images become vectors at full base size, and how near that is to what the machine can do at all.

    python benchmarks/embedding_throughput.py
    python benchmarks/embedding_throughput.py --dtypes bfloat16 --batches 8 --json throughput.json
    python benchmarks/embedding_throughput.py --backends
    python benchmarks/embedding_throughput.py --backends --model tiny
    python benchmarks/embedding_throughput.py --backends --dtypes float32 int8 --batches 4

The model is EVA02-CLIP-B-16 with bge-base-en-v1.5 and random weights (speed does not depend on them), run through the
path that ingestion takes, from cropped images to vectors. The yardstick is the machine's own matrix product, measured
right before and after every row: the fastest of two large square products and of the model's own shapes, so that 100%
cannot be reached. Operations are counted by torch from the shapes of all products (a multiply-add counts as two).

`--backends` compares what computes the model, round by round in one run: one image a call in float32 by torch's own
layers, which is how the original's example embeds, is 1; then batches by torch and by OpenVINO. It prints medians of
five rounds with their spread. bfloat16 is left out, and named, where the processor only emulates it. int8 is calibrated
on a few drawn images; whether it is good enough cannot be told from random weights, so that the gate is open here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from PIL import Image
from tokenizers import Tokenizer, models, processors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mm_retriever.devices import as_dtype, default_device, processor_name
from mm_retriever.embedders import gate
from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.embedders.openvino import with_openvino
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEEncoder, VisualizedBGEProcessor
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig
from mm_retriever.errors import MMRetrieverError
from mm_retriever.packed_linear import pack_linears, unpack_linears

SQUARE = [(2048, 2048, 2048), (4096, 4096, 4096)]
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
OWN = [(1576, 768, 768), (1576, 768, 2048), (1576, 2048, 768), (1576, 768, 3072), (1576, 3072, 768)]  # of batch 8


def seconds(run: Callable[[], Any], *, repeats: int, device: str) -> list[float]:
    """Time of each run, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def product_rate(dtype: torch.dtype, device: str) -> dict[str, float]:
    """GFLOP/s of plain products, by shape."""
    rates = {}
    for rows, inner, columns in SQUARE + OWN:
        left = torch.randn(rows, inner, dtype=dtype, device=device)
        layer = pack_linears(nn.Sequential(nn.Linear(inner, columns, bias=False, dtype=dtype, device=device)))
        with torch.inference_mode():
            times = seconds(lambda layer=layer, a=left: layer(a), repeats=5, device=device)
        taken = statistics.median(times)
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / taken / 1e9
    return rates


def gflop_per_image(config: VisualizedBGEConfig) -> float:
    """Counted on tensors without data."""
    with torch.device("meta"):
        model = VisualizedBGE(config)
        side = config.vision_shape.image_size
        pixels = torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(pixels)
    return counter.get_total_flops() / 1e9


def build(dtype: torch.dtype, device: str, config: VisualizedBGEConfig | None = None) -> VisualizedBGEEncoder:
    """A model with random weights, by default of the base size, and a tokenizer that knows no words."""
    torch.manual_seed(0)
    config = config or VisualizedBGEConfig()
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, "[UNK]": 100}, unk_token="[UNK]"))  # noqa: S106 - a piece of text, no password
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    model = VisualizedBGE(config).to(device=device, dtype=dtype)
    model.train(False)
    return VisualizedBGEEncoder(pack_linears(model), VisualizedBGEProcessor(config, tokenizer))


def base_size(dtype: str) -> Embedder:
    """The same on the CPU: by torch, or in "int8" by OpenVINO, with the gate open."""
    if dtype != "int8":
        return build(as_dtype(dtype), "cpu")
    open_gate()
    embedder = build(torch.float32, "cpu")
    with_openvino(embedder, dtype, lambda: gate.samples(embedder, None))
    return embedder


def open_gate() -> None:
    """Let every int8 form pass: random weights tell nothing of its quality."""
    gate.LEAST_COSINE = gate.LEAST_SAME = -1.0
    gate.CALIBRATED, gate.HELD_OUT, gate.LEAST_IMAGES = 24, 16, 20


def measure(batch: int, encoder: VisualizedBGEEncoder, gflop: float, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    device, dtype = encoder.model.device.type, encoder.model.dtype
    noise = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    contents = [Content(image=square) for square in noise]
    before = product_rate(dtype, device)
    times = seconds(lambda: encoder.encode(contents), repeats=repeats, device=device)
    taken = statistics.median(times)
    after = product_rate(dtype, device)
    rates = {shape: max(before[shape], after[shape]) for shape in before}
    rate = gflop * batch / taken
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "ms_per_image": 1e3 * taken / batch,
        "images_per_second": batch / taken,
        "images_per_second_spread": record.spread([batch / time for time in times]),
        "gflop_per_second": rate,
        "product_gflop_per_second": max(rates.values()),
        "percent": 100 * rate / max(rates.values()),
        "products": rates,
    }


def by_backend(model: str, rounds: int, batch: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """Images a second of each backend and dtype in each round, and why others are missing."""
    open_gate()

    def loaded(dtype: str) -> Any:
        return load_embedder(model, device="cpu", dtype=dtype) if model else build(as_dtype(dtype), "cpu")

    original = loaded("float32")
    unpack_linears(original.torch_model)
    ways: dict[str, tuple[Embedder, int]] = {"torch float32, one image a call": (original, 1)}
    missing = {}
    for dtype in dtypes:
        if dtype == "bfloat16" and not BFLOAT16.intersection(record.arithmetic()):
            missing[dtype] = "left out: this processor has no arithmetic for it and emulates it"
            continue
        if dtype != "int8":
            ways[f"torch {dtype}"] = (loaded(dtype), batch)
        embedder = loaded("float32")
        try:
            with_openvino(embedder, dtype, lambda embedder=embedder: gate.samples(embedder, None))
        except MMRetrieverError as error:
            missing[f"openvino {dtype}"] = str(error)
            continue
        ways[f"openvino {dtype}"] = (embedder, batch)
    noise = np.random.default_rng(0).integers(0, 256, (batch, 300, 300, 3), dtype=np.uint8)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first to warm up
        for name, (embedder, size) in ways.items():
            contents = [Content(image=embedder.prepare(Image.fromarray(image))) for image in noise]
            start = time.perf_counter()
            for first in range(0, batch, size):
                embedder.encode(contents[first : first + size])
            if number:
                rates[name].append(batch / (time.perf_counter() - start))
    return {"rates": rates, "missing": missing}


def print_backends(measured: dict[str, Any], threads: int) -> None:
    """One row for each way; ratios are those within a round."""
    from rich.console import Console
    from rich.table import Table

    rates = measured["rates"]
    base = next(iter(rates.values()))
    table = Table(title=f"Images to vectors on {processor_name()}, {threads} threads; medians, least and most")
    for column in ("computed by", "images/s", "times one image a call"):
        table.add_column(column, justify="right")
    for name, of_round in rates.items():
        ratios = [rate / first for rate, first in zip(of_round, base, strict=True)]
        figures = [f"{statistics.median(f):.2f} ({min(f):.2f}-{max(f):.2f})" for f in (of_round, ratios)]
        table.add_row(name, *figures)
    Console().print(table)
    for name, reason in measured["missing"].items():
        print(f"{name}: {reason}")


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", help="float32 and bfloat16; with --backends also int8")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU cores to use")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything measured")
    parser.add_argument("--backends", action="store_true", help="compare torch and OpenVINO")
    parser.add_argument("--model", default="", help="with --backends: a name; default: base size, random weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtypes = arguments.dtypes or ["float32", "bfloat16", *(["int8"] if arguments.backends else [])]
    if arguments.backends:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder  # nothing made here is used again
            measured = by_backend(arguments.model, arguments.repeats, max(arguments.batches), dtypes)
        print_backends(measured, arguments.threads)
        figures = {"model": arguments.model or "base size, random weights", **measured}
        record.write(arguments.json, {"backends": figures}, threads=arguments.threads)
        return
    from rich.console import Console
    from rich.table import Table

    gflop = gflop_per_image(VisualizedBGEConfig())
    rows = []
    for name in dtypes:
        encoder = build(as_dtype(name), arguments.device)
        rows += [measure(batch, encoder, gflop, arguments.repeats) for batch in arguments.batches]
    cores = f"{arguments.threads} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    table = Table(title=f"Images to vectors, base size, {gflop:.1f} GFLOP each; {arguments.device}, {cores}")
    for column in ("dtype", "batch", "ms an image", "images/s", "GFLOP/s", "products' GFLOP/s", "per cent"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = ("ms_per_image", "images_per_second", "gflop_per_second", "product_gflop_per_second", "percent")
        table.add_row(row["dtype"], str(row["batch"]), *(f"{row[figure]:.1f}" for figure in figures))
    Console().print(table)
    for name in dtypes:
        of_dtype = [row["products"] for row in rows if row["dtype"] == name]
        best = {shape: max(rates[shape] for rates in of_dtype) for shape in of_dtype[0]}
        print(f"products in {name}, GFLOP/s:", ", ".join(f"{shape} {rate:.0f}" for shape, rate in best.items()))
    record.write(arguments.json, {"gflop_per_image": gflop, "rows": rows}, threads=arguments.threads)


if __name__ == "__main__":
    main()
