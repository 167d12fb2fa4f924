"""How fast images become vectors at full base size, and how near that is to what the machine can do at all.

    python benchmarks/embedding_throughput.py
    python benchmarks/embedding_throughput.py --dtypes bfloat16 --batches 8 --json throughput.json

The model is EVA02-CLIP-B-16 with bge-base-en-v1.5 and random weights (speed does not depend on them), run through the
path that ingestion takes, from cropped images to vectors. The yardstick is the machine's own matrix product, measured
right before and after every row: the fastest of two large square products and of the model's own shapes, so that 100%
cannot be reached. Operations are counted by torch from the shapes of all products (a multiply-add counts as two).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, processors
from torch.utils.flop_counter import FlopCounterMode

from mm_retriever.devices import as_dtype, default_device
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEEncoder, VisualizedBGEProcessor
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig

SQUARE = [(2048, 2048, 2048), (4096, 4096, 4096)]
OWN = [(1576, 768, 768), (1576, 768, 2048), (1576, 2048, 768), (1576, 768, 3072), (1576, 3072, 768)]  # of batch 8


def seconds(run: Callable[[], Any], *, repeats: int, device: str) -> float:
    """Median time of one run, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def product_rate(dtype: torch.dtype, device: str) -> dict[str, float]:
    """GFLOP/s of plain products, by shape."""
    rates = {}
    for rows, inner, columns in SQUARE + OWN:
        left = torch.randn(rows, inner, dtype=dtype, device=device)
        right = torch.randn(columns, inner, dtype=dtype, device=device)
        taken = seconds(lambda a=left, b=right: torch.nn.functional.linear(a, b), repeats=5, device=device)
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / taken / 1e9
    return rates


def gflop_per_image() -> float:
    """Counted on tensors without data."""
    with torch.device("meta"):
        model = VisualizedBGE(VisualizedBGEConfig())
        pixels = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(pixels)
    return counter.get_total_flops() / 1e9


def build(dtype: torch.dtype, device: str) -> VisualizedBGEEncoder:
    """The full-size model with random weights, and a tokenizer that knows no words."""
    torch.manual_seed(0)
    config = VisualizedBGEConfig()
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, "[UNK]": 100}, unk_token="[UNK]"))  # noqa: S106 - a piece of text, no password
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    model = VisualizedBGE(config).to(device=device, dtype=dtype)
    model.train(False)
    return VisualizedBGEEncoder(model, VisualizedBGEProcessor(config, tokenizer))


def measure(batch: int, encoder: VisualizedBGEEncoder, gflop: float, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    device, dtype = encoder.model.device.type, encoder.model.dtype
    noise = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    contents = [Content(image=square) for square in noise]
    before = product_rate(dtype, device)
    taken = seconds(lambda: encoder.encode(contents), repeats=repeats, device=device)
    after = product_rate(dtype, device)
    rates = {shape: max(before[shape], after[shape]) for shape in before}
    rate = gflop * batch / taken
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "ms_per_image": 1e3 * taken / batch,
        "images_per_second": batch / taken,
        "gflop_per_second": rate,
        "product_gflop_per_second": max(rates.values()),
        "percent": 100 * rate / max(rates.values()),
        "products": rates,
    }


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU cores to use")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gflop = gflop_per_image()
    rows = []
    for name in arguments.dtypes:
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
    for name in arguments.dtypes:
        of_dtype = [row["products"] for row in rows if row["dtype"] == name]
        best = {shape: max(rates[shape] for rates in of_dtype) for shape in of_dtype[0]}
        print(f"products in {name}, GFLOP/s:", ", ".join(f"{shape} {rate:.0f}" for shape, rate in best.items()))
    if arguments.json is not None:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**machine, "threads": arguments.threads, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
