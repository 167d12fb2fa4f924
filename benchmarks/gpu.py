"""What a GPU gives: embedding, training and reranking at full size, against the original loop on the same card.

    python benchmarks/gpu.py --json gpu.json                # at most 8 minutes
    python benchmarks/gpu.py --device cpu --small           # the same steps on a CPU, in seconds

This has never run on a GPU: none was at hand. `--device cpu --small` is how its steps are tested. It needs torch,
transformers, tokenizers, safetensors and Pillow, and a clone of this repository; nothing else of its dependencies.

Weights are random, since speed does not depend on them. Images are drawn at 1 megapixel and decoded beforehand. The
original loop is the original's example: one image a call in float32, prepared, copied, computed and copied back, one
step after the other. Ours takes the path of ingestion, from prepared images to vectors, in the dtype that is asked for.
The card's own rate is that of its fastest matrix product in the same run. Every figure is a median of five.
Reranking is one query with nine candidates in the default mode of Phi-3 Vision. Batches grow until the card is out of
memory or the list ends; what happened then is part of the result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import embedding_throughput as throughput
import numpy as np
import record
import rerank_cost
import torch
from PIL import Image

from mm_retriever.devices import as_dtype
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.visualized_bge.model import VisualizedBGEConfig

ROUNDS = 5
BATCHES = (1, 8, 32, 128, 512, 2048, 8192)
SMALL = {"width": 64, "layers": 2, "head_width": 32, "image_size": 32, "patch_size": 16}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="small models and few batches")
    parser.add_argument("--without-reranking", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), as_dtype(options.dtype)
    figures: dict[str, Any] = {"device": name_of(device), "dtype": options.dtype, "small": options.small}
    figures["gflop_per_image"] = throughput.gflop_per_image(config(options.small))
    figures["product_gflop_per_second"] = matrix_rate(dtype, device, options.small)
    figures |= embedding(dtype, device, options.small)
    figures["training"] = training(device, options.small)
    if not options.without_reranking:
        figures["reranking"] = reranking(dtype, device, options.small)
    for name, value in figures.items():
        print(f"{name}: {value}")
    record.write(options.json, figures, threads=torch.get_num_threads())


def config(small: bool) -> VisualizedBGEConfig:
    """The base size, or one that a test can run."""
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return VisualizedBGEConfig(vision=SMALL, text=text) if small else VisualizedBGEConfig()


def name_of(device: torch.device) -> str:
    """The card, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait_for(device: torch.device) -> None:
    """Have everything done that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of a run, after one to warm up."""
    times = []
    for _ in range(ROUNDS + 1):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return record.spread(times[1:])


@contextmanager
def peak_memory(device: torch.device, into: dict[str, Any]) -> Iterator[None]:
    """Puts the most memory that the device had in use, in GB, into a dict; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        into["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9


def matrix_rate(dtype: torch.dtype, device: torch.device, small: bool) -> float:
    """GFLOP/s of the fastest square product."""
    rates = []
    for side in (256,) if small else (2048, 4096, 8192):
        left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        seconds = timed(lambda a=left, b=right: torch.nn.functional.linear(a, b), device)["median"]
        rates.append(2 * side**3 / seconds / 1e9)
    return max(rates)


# ---------------------------------------------------------------------------------------------- embedding


def embedding(dtype: torch.dtype, device: torch.device, small: bool) -> dict[str, Any]:
    """Images per second: the original loop, then ours by batch."""
    images = [draw(seed) for seed in range(4 if small else 16)]
    figures: dict[str, Any] = {"original_images_per_second": original_rate(images, device, small), "batches": []}
    encoder = throughput.build(dtype, str(device), config(small))
    prepared = [Content(image=encoder.prepare(image)) for image in images]
    for batch in BATCHES[: 3 if small else len(BATCHES)]:
        contents = [prepared[row % len(prepared)] for row in range(batch)]
        row: dict[str, Any] = {"batch": batch}
        figures["batches"].append(row)
        try:
            with peak_memory(device, row):
                seconds = timed(lambda given=contents: encoder.encode(given), device)["median"]
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error).splitlines()[0]
            break
        row["images_per_second"] = batch / seconds
    rates = [row["images_per_second"] for row in figures["batches"] if "images_per_second" in row]
    figures["times_original"] = max(rates) / figures["original_images_per_second"]
    return figures


def draw(seed: int) -> Image.Image:
    """An image of a megapixel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((1152, 864), Image.Resampling.BICUBIC)


@torch.no_grad()
def original_rate(images: list[Image.Image], device: torch.device, small: bool) -> float:
    """Images per second, one a call, as the original's example embeds."""
    encoder = throughput.build(torch.float32, str(device), config(small))

    def loop() -> None:
        for image in images:
            pixel_values = encoder.processor.pixel_values([image]).to(device)
            encoder.model.encode_image(pixel_values).cpu()

    return len(images) / timed(loop, device)["median"]


# ---------------------------------------------------------------------------------------------- training


def training(device: torch.device, small: bool) -> dict[str, Any]:
    """Seconds and memory of one step: 32 pairs of (image, text) and image, gradients of all weights, AdamW."""
    encoder = throughput.build(torch.float32, str(device), config(small))
    encoder.network.train()
    optimizer = torch.optim.AdamW(encoder.network.parameters(), lr=1e-5)
    square = encoder.prepare(draw(0))
    count = 4 if small else 32
    queries = [Content("in red", square)] * count
    targets = [Content(image=square)] * count

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            scores = encoder.vectors(queries) @ encoder.vectors(targets).T
        loss = torch.nn.functional.cross_entropy(scores.float() / 0.02, torch.arange(count, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row: dict[str, Any] = {"pairs": count}
    try:
        with peak_memory(device, row):
            row["seconds"] = timed(step, device)
    except torch.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    return row


# ---------------------------------------------------------------------------------------------- reranking


def reranking(dtype: torch.dtype, device: torch.device, small: bool) -> dict[str, Any]:
    """Seconds and memory of one query with nine candidates, by the published flow and by ours."""
    model, phi_config = rerank_cost.build("small" if small else "full", "sdpa", dtype=dtype)
    model.to(device)
    bench = rerank_cost.Bench(model, phi_config, steps=2 if small else 8)
    figures: dict[str, Any] = {}
    for name, flow in rerank_cost.FLOWS.items():
        if small and name != "single pass":
            continue
        seconds = []
        row: dict[str, Any] = {}
        with peak_memory(device, row):
            for _ in range(1 if small else ROUNDS + 1):
                taken = rerank_cost.Flow(name)
                flow(bench, taken)
                seconds.append(sum(stage.seconds for stage in taken.stages))
        row["seconds"] = statistics.median(seconds[1:] or seconds)
        figures[name] = row
    return figures


if __name__ == "__main__":
    main()
