"""What reranking nine candidates costs: tokens, seconds per stage, peak memory, for five ways to do it.

    python benchmarks/rerank_cost.py                     # Phi-3 Vision's full size, random weights, bfloat16: 8.3 GB
    python benchmarks/rerank_cost.py --size small        # the same paths in a minute
    python benchmarks/rerank_cost.py --flows "single pass" --json cost.json
    python benchmarks/rerank_cost.py --layers 2 4 --rounds 5     # full width; the time of all 32 layers follows
    python benchmarks/rerank_cost.py --flows likelihood --crops 1     # candidates whole and in one crop

`--layers` runs the model twice, with so many of the 32 layers of its language model and of the 24 of its vision tower,
and computes the seconds of each stage and the memory for all of them: both are linear in the number of layers.

Speed does not depend on the weights, so they are random. Texts are runs of arbitrary ids of the lengths in `LENGTHS`;
what the model would write is of fixed length. Only `--steps` words are written by the clock; the others count the same.

published     two calls, nothing shared: caption of the query image, then the list for the sheet; 16 crops an image; on
              a CPU with the layers and the attention of transformers, which the original uses, the others with ours
likelihood    the default: the query image once, caption, wanted description; nine candidates scored on one cached
              beginning; a reason for the first
no sentences  the same with caption=False, reasons="none"
generated     mode "sheet", ranking "generated": the same beginning, one sheet at 4 crops, list under constraint, reason
single pass   mode "sheet" with caption=False, reasons="none": wanted description, the order from the sheet's first slot

In all but the published one, the query image and candidates have `--crops` crops; by default, as in the reranker, one,
and none where a candidate is only scored by likelihood.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import record
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from mm_retriever.phi3_vision.decoding import TextStream, likelihoods, rank_at_once, rank_by_generation
from mm_retriever.phi3_vision.load import quick_on_cpu
from mm_retriever.phi3_vision.model import Phi3Vision, Prefix
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor, processor_for
from mm_retriever.phi3_vision.tower import Phi3VisionConfig, with_its_crop

CANDIDATES = 9
LAYERS, TOWER_LAYERS = 32, 24  # of the full size
LENGTHS = {"instruction": 60, "caption": 30, "list request": 60, "list": 28, "wanted": 12, "reason": 40}
LENGTHS |= {"description request": 14, "reason request": 20}
SHORT_FACTORS = [1.05 + 0.04 * i for i in range(48)]
LONG_FACTORS = [1.03 + 1.35 * i for i in range(48)]


@dataclass
class Stage:
    """One timed step of a flow."""

    name: str
    seconds: float
    prefilled: int = 0
    generated: int = 0


@dataclass
class Flow:
    """One way to rerank, stage by stage."""

    name: str
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, *, prefilled: int = 0) -> Iterator[Stage]:
        """Times what is done inside."""
        stage = Stage(name, 0.0, prefilled)
        start = time.perf_counter()
        yield stage
        stage.seconds += time.perf_counter() - start
        self.stages.append(stage)


def build(
    size: str, attention: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Phi3Vision, Phi3VisionConfig]:
    """A model of this size with random weights, filled by repeating one block of noise."""
    rope = {"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
    scale = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "rope_scaling": rope}
    if size == "small":
        scale |= {"hidden_size": 384, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 1024}
        scale["vision_config"] = {"num_hidden_layers": 3, "intermediate_size": 512}
    if layers is not None:
        scale |= {"num_hidden_layers": layers, "vision_config": {"num_hidden_layers": layers}}
    config = Phi3VisionConfig(vocab_size=32064, pad_token_id=32000, **scale)
    config._attn_implementation = attention
    with torch.device("meta"):
        skeleton = Phi3Vision(config)
    noise = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weights = {name: repeat(noise, tensor) for name, tensor in skeleton.state_dict().items()}
    return Phi3Vision.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval(), config


def repeat(noise: Tensor, like: Tensor) -> Tensor:
    count = like.numel()
    return noise.repeat(-(-count // len(noise)))[:count].view(like.shape)


def make_processor(config: Phi3VisionConfig, num_crops: int) -> Phi3VisionProcessor:
    """The real image side; a vocabulary of control tokens on the word side."""
    names = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))  # noqa: S106 - a piece of text, no password
    tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return processor_for(config, tokenizer, num_crops=num_crops)


def words(name: str) -> list[int]:
    return [100 + i % 5000 for i in range(LENGTHS[name])]


def image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Bench:
    """The five flows over one query image, one sheet of nine candidates, and the nine images themselves."""

    def __init__(self, model: Phi3Vision, config: Phi3VisionConfig, steps: int, crops: int | None = None) -> None:
        self.model, self.config, self.steps = model, config, steps
        self.seen_crops, self.scored_crops = (1, 0) if crops is None else (crops, crops)
        self.query, self.sheet = image(300, 300, 0), image(1200, 900, 1)
        self.candidates = [image(300, 300, 2 + i) for i in range(CANDIDATES)]
        self.labels = [(29871, 29896 + i, 29892) for i in range(CANDIDATES)]

    def features(self, flow: Flow, name: str, images: list[Image.Image], num_crops: int) -> list[Tensor]:
        """Token embeddings of images: crops, then tower."""
        with flow.stage(f"{name}: crops"):
            inputs = make_processor(self.config, num_crops).image_inputs(images)
        with flow.stage(f"{name}: tower, {len(inputs.pixel_values)} crops"), torch.inference_mode():
            return self.model.image_features(inputs.pixel_values, inputs.image_sizes)

    def read(self, flow: Flow, name: str, text: str, feature: Tensor | None, prefix: Prefix | None = None) -> Prefix:
        """An image and a text, computed from the beginning or after `prefix`."""
        ids = ([1] if prefix is None else []) + ([] if feature is None else [-1] * len(feature) + [1]) + words(text)
        given = [] if feature is None else [feature]
        with flow.stage(f"{name}: prefill", prefilled=len(ids)):
            if prefix is None:
                return self.model.prefill(ids, given, total_length=4096)
            return self.model.extend(prefix, ids, given)

    def write(self, flow: Flow, name: str, prefix: Prefix) -> Prefix:
        """`steps` words by the clock, the rest at the same price; all of them are in the prefix afterwards."""
        count = LENGTHS[name]
        steps = min(self.steps, count)
        with flow.stage(f"{name}: write") as stage:
            stream = TextStream(self.model, prefix, stop_ids=(), max_new_tokens=steps + 1)
            list(stream)
        stage.seconds *= count / steps
        stage.generated = count
        return self.model.extend(stream.prefix, words(name)[: count - steps] or [100])

    def published(self, flow: Flow) -> None:
        """Caption call, then list call."""
        feature = self.features(flow, "query image", [self.query], 16)[0]
        self.write(flow, "caption", self.read(flow, "caption call", "instruction", feature))
        feature = self.features(flow, "sheet", [self.sheet], 16)[0]
        self.write(flow, "reason", self.write(flow, "list", self.read(flow, "list call", "list request", feature)))

    def understood(self, flow: Flow, *, caption: bool = True) -> Prefix:
        """The query image and what is wanted, in words."""
        feature = self.features(flow, "query image", [self.query], self.seen_crops)[0]
        asked = self.read(flow, "query image and instruction", "instruction", feature)
        return self.write(flow, "wanted", self.write(flow, "caption", asked) if caption else asked)

    def first_reason(self, flow: Flow, told: Prefix, feature: Tensor) -> None:
        """Why the first candidate fits."""
        self.write(flow, "reason", self.read(flow, "the first one", "reason request", feature, told))

    def generated(self, flow: Flow) -> None:
        """Caption, list and reason in one conversation."""
        told = self.understood(flow)
        feature = self.features(flow, "sheet", [self.sheet], 4)[0]
        prefix = self.read(flow, "sheet", "list request", feature, told)
        with flow.stage("list under constraint") as stage:
            rank_by_generation(self.model, prefix, self.labels)
            stage.generated = sum(map(len, self.labels))
        first = self.features(flow, "the first one", self.candidates[:1], self.seen_crops)[0]
        self.first_reason(flow, told, first)

    def single_pass(self, flow: Flow) -> None:
        """One look at the sheet."""
        told = self.understood(flow, caption=False)
        feature = self.features(flow, "sheet", [self.sheet], 4)[0]
        prefix = self.read(flow, "sheet", "list request", feature, told)
        with flow.stage("order from the first slot"):
            rank_at_once(self.model, prefix, self.labels)

    def likelihood(self, flow: Flow, *, sentences: bool = True) -> None:
        """How well each candidate explains the wanted description."""
        told = self.understood(flow, caption=sentences)
        features = self.features(flow, "candidates", self.candidates, self.scored_crops)
        start = self.read(flow, "candidates' shared beginning", "description request", None)
        prompts = [self.model.embed([*[-1] * len(row), 1], [row])[0] for row in features]
        with flow.stage("nine likelihoods") as stage:
            likelihoods(self.model, start, prompts, [words("wanted")] * CANDIDATES)
            stage.prefilled = sum(len(prompt) + LENGTHS["wanted"] - 1 for prompt in prompts)
        if sentences:
            whole = features[0]
            repeated = self.scored_crops == 0 and self.seen_crops == 1  # as `SharedModel.features` does
            self.first_reason(flow, told, with_its_crop(whole) if repeated else whole)

    def without_sentences(self, flow: Flow) -> None:
        """The same with caption=False, reasons="none"."""
        self.likelihood(flow, sentences=False)


FLOWS = {
    "published": Bench.published,
    "likelihood": Bench.likelihood,
    "no sentences": Bench.without_sentences,
    "generated": Bench.generated,
    "single pass": Bench.single_pass,
}


def peak_gigabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def show(flow: Flow, seconds: dict[str, float], peak: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{flow.name}: peak memory so far {peak:.1f} GB")
    for column in ("stage", "tokens prefilled", "tokens written", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in flow.stages:
        table.add_row(stage.name, str(stage.prefilled or ""), str(stage.generated or ""), f"{stage.seconds:.2f}")
    totals = [sum(getattr(stage, name) for stage in flow.stages) for name in ("prefilled", "generated")]
    table.add_section()
    whole = f"{seconds['median']:.2f} ({seconds['least']:.2f}-{seconds['most']:.2f})"
    table.add_row("all", str(totals[0]), str(totals[1]), whole)
    Console().print(table)


@dataclass
class Measured:
    """The rounds of one flow, and the memory that was in use at most by then."""

    rounds: list[Flow]
    peak: float

    def whole(self, other: Measured | None, layers: list[int]) -> Measured:
        """What all layers take, by the two numbers of layers that were measured; `other` has more of them."""
        if other is None:
            return self
        share, of_tower = ((count - layers[0]) / (layers[1] - layers[0]) for count in (LAYERS, TOWER_LAYERS))
        rounds = []
        for few, more in zip(self.rounds, other.rounds, strict=True):
            pairs = zip(few.stages, more.stages, strict=True)
            stages = [
                replace(
                    a,
                    seconds=max(0.0, a.seconds + (of_tower if "tower" in a.name else share) * (b.seconds - a.seconds)),
                )
                for a, b in pairs
            ]
            rounds.append(Flow(few.name, stages))
        return Measured(rounds, self.peak + share * (other.peak - self.peak))


def measured(arguments: argparse.Namespace, layers: int | None) -> dict[str, Measured]:
    """Every flow of one model."""
    start = time.perf_counter()
    dtype = getattr(torch, arguments.dtype)
    model, config = build(arguments.size, arguments.attention, layers=layers, dtype=dtype)
    model.to(arguments.device)
    print(
        f"{arguments.size} size, {config.num_hidden_layers} layers, "
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters, {arguments.dtype}, "
        f"{arguments.threads} threads, ready in {time.perf_counter() - start:.0f} s"
    )
    bench = Bench(model, config, arguments.steps, arguments.crops)
    bench.single_pass(Flow("warm up"))
    found = {}
    for name in sorted(arguments.flows, key="published".__ne__):
        rounds = [Flow(name) for _ in range(arguments.rounds)]
        if name != "published" and arguments.device == "cpu":
            quick_on_cpu(model)
            model.prefill([1])  # lays out the weights: once after loading, no part of a query
        for flow in rounds:
            FLOWS[name](bench, flow)
        found[name] = Measured(rounds, peak_gigabytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--layers", type=int, nargs=2, help="two numbers of layers, from which all are computed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--flows", nargs="+", choices=list(FLOWS), default=list(FLOWS))
    parser.add_argument(
        "--crops", type=int, help="of the query image and of candidates; default: those of the reranker"
    )
    parser.add_argument("--steps", type=int, default=8, help="words of each text written by the clock")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = sorted(arguments.layers or [])
    first = measured(arguments, layers[0] if layers else None)
    second = measured(arguments, layers[1]) if layers else {}
    report = []
    for name, few in first.items():
        whole = few.whole(second.get(name), layers)
        seconds = record.spread([sum(stage.seconds for stage in flow.stages) for flow in whole.rounds])
        show(whole.rounds[0], seconds, whole.peak)
        report.append(asdict(whole.rounds[0]) | {"seconds": seconds, "peak_gigabytes": whole.peak})
    note = f"computed from runs with {layers[0]} and {layers[1]} of {LAYERS} layers" if layers else ""
    figures = {"size": arguments.size, "dtype": arguments.dtype, "crops": arguments.crops, "flows": report}
    record.write(arguments.json, figures, threads=arguments.threads, note=note)


if __name__ == "__main__":
    main()
