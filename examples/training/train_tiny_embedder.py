"""Train the bundled tiny embedder from scratch on drawn products: about half an hour on one free CPU core.

    python examples/training/train_tiny_embedder.py --out tiny-embedder

Two stages. First the vision tower learns to name kind, pattern and colour of an image; then tower and text encoder
learn together to place an image, a text, or an image with a text where the wanted product lies (multi-positive
InfoNCE, and kind, pattern and colour of every vector as a second task). The (kind, pattern) pairs of
``mm_retriever.demo.catalogue.HELD_OUT`` appear in no image, source or text of the training.

``python benchmarks/tiny_quality.py --model tiny-embedder`` measures the result.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from phrases import ComposedQuery, compose_query, full_text
from safetensors.torch import save_file
from tiny_training import (
    HEADS,
    SEEN_PAIRS,
    SPECIAL_TOKENS,
    LayerCache,
    Stage,
    attribute_loss,
    augmented,
    build_tokenizer,
    correct,
    labels_of,
    named,
    normalised,
    random_colour,
    reworded,
    train_naming,
)
from torch import Tensor, nn

from mm_retriever.demo.catalogue import COLOURS, HELD_OUT, KINDS, PATTERNS, Looks, catalogue
from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEProcessor, crop_square
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig

TEMPERATURE = 0.05


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-embedder"), help="folder for weights, config, tokenizer")
    parser.add_argument("--cache", type=Path, default=Path("tiny-layers"), help="folder for the drawn layers")
    parser.add_argument("--size", type=int, default=128, help="pixels of an image's side")
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--shapes", type=int, default=64, help="drawings of each kind")
    parser.add_argument("--textures", type=int, default=96, help="windows on each pattern")
    parser.add_argument("--tower-steps", type=int, default=4000)
    parser.add_argument("--tower-batch", type=int, default=64)
    parser.add_argument("--tower-lr", type=float, default=2e-3)
    parser.add_argument("--crops", type=float, default=0.35, help="share of enlarged crops in the first stage")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64, help="wanted products a step")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="of the text side; the tower gets --tower-share of it")
    parser.add_argument("--tower-share", type=float, default=0.33)
    parser.add_argument("--adjust", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tower-from", type=Path, help="skip the first stage and start from this tower.pt")
    parser.add_argument("--report", type=int, default=450, help="products drawn to see what the tower has learnt")
    parser.add_argument("--seconds", type=float, help="length of each stage, instead of steps")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace, vocab_size: int) -> VisualizedBGE:
    """An untrained tiny model of width 128 with three text layers."""
    patches = (arguments.size // 16) ** 2
    vision = {
        "image_size": arguments.size, "patch_size": 16, "width": 128, "layers": arguments.tower_layers,
        "head_width": 32, "rope_sequence_length": 8,
    }  # fmt: skip
    text = {
        "vocab_size": vocab_size, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 512, "max_position_embeddings": patches + 48,
        **{f"{name}_token_id": SPECIAL_TOKENS.index(f"[{name.upper()}]") for name in ("pad", "cls", "sep")},
    }  # fmt: skip
    return VisualizedBGE(VisualizedBGEConfig(vision=vision, text=text))


def train_tower(
    model: VisualizedBGE, layers: LayerCache, arguments: argparse.Namespace, rng: np.random.Generator
) -> None:
    """First stage: kind, pattern and colour of an image from its tokens."""
    head = nn.Linear(2 * model.config.dimension, sum(HEADS))
    parameters = [*model.model_visual.parameters(), *model.visual_proj.parameters(), *head.parameters()]
    rates = [(parameters, arguments.tower_lr)]
    train_naming(
        Stage("tower", rates, steps=arguments.tower_steps, seconds=arguments.seconds, weight_decay=0.03),
        lambda pixel_values: named(model.image_tokens(pixel_values), head),
        lambda labels: layers.render(labels, rng),
        batch=arguments.tower_batch,
        crops=arguments.crops,
        adjust=arguments.adjust,
        rng=rng,
    )
    report_tower(model, head, arguments.report)


@torch.inference_mode()
def report_tower(model: VisualizedBGE, head: nn.Module, count: int) -> None:
    """Prints how many products, drawn by the catalogue's own code, the tower names rightly."""
    model.eval()
    products = catalogue(count, seed=1)
    side = model.config.vision_shape.image_size
    pixels = torch.from_numpy(np.stack([np.asarray(crop_square(product.draw(), side)) for product in products]))
    batches = pixels.permute(0, 3, 1, 2).float().split(64)
    logits = torch.cat([named(model.image_tokens(normalised(batch)), head) for batch in batches])
    right = correct(logits, labels_of([product.looks for product in products])).float()
    held_out = torch.tensor([product.held_out for product in products])
    for name, rows in (("seen", ~held_out), ("held out", held_out)):
        figures = [f"{share:.3f}" for share in [*right[rows].mean(0).tolist(), right[rows].prod(1).mean().item()]]
        print(f"tower on {int(rows.sum())} {name} products: kind, pattern, colour, all", *figures, flush=True)
    model.train()


def draw_queries(count: int, rng: np.random.Generator) -> list[ComposedQuery]:
    """Queries for products of seen pairs; every second batch from a small grid, where products differ in one thing."""
    hard = rng.random() < 0.5
    kinds = set(rng.permutation(KINDS)[: 6 if hard else None])
    patterns = set(rng.permutation(PATTERNS)[: 6 if hard else None])
    colours = {COLOURS[0], *rng.permutation(COLOURS[1:])[: 3 if hard else None]}
    pairs = [pair for pair in SEEN_PAIRS if pair[0] in kinds and pair[1] in patterns]
    queries: list[ComposedQuery] = []
    while len(queries) < count:
        kind, pattern = pairs[int(rng.integers(len(pairs)))]
        colour = random_colour(pattern, rng)
        if colour not in colours and rng.random() < 0.8:
            continue
        chance = rng.random()
        mode = "theme" if chance < 0.34 else "kind" if chance < 0.56 else "pattern" if chance < 0.8 else "colour"
        query = compose_query(Looks(kind, pattern, colour), mode, rng, never=HELD_OUT)
        if query is not None:
            queries.append(query)
    return queries


def multi_positive(left: Tensor, right: Tensor, same: Tensor) -> Tensor:
    """InfoNCE where every column of ``same`` is right: -log of the probability mass on all of them."""
    logits = left @ right.T / TEMPERATURE
    return (logits.logsumexp(1) - logits.masked_fill(~same, -1e4).logsumexp(1)).mean()


class Joint(nn.Module):
    """The model with the heads of the second task: kind, pattern and colour by their own directions."""

    def __init__(self, model: VisualizedBGE, processor: VisualizedBGEProcessor) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.directions = nn.Linear(model.config.dimension, sum(HEADS), bias=False)

    def encode(self, tokens: Tensor | None, texts: list[str]) -> Tensor:
        """As ``VisualizedBGE.encode_*`` from the tower's tokens, normalised in float32."""
        words = self.processor.tokens(texts, beside_image=tokens is not None)
        mask = words["attention_mask"].bool()
        if tokens is not None:
            mask = torch.cat((mask[:, :1], mask.new_ones(tokens.shape[:2]), mask[:, 1:]), dim=1)
        embedded = self.model.bge_embeddings(words["input_ids"], tokens)
        return F.normalize(self.model.bge_encoder(embedded, mask[:, None, None]).float(), dim=-1)

    def attributes(self, vectors: Tensor) -> Tensor:
        """Logits of the second task."""
        return self.directions(vectors) * 8


def train_together(joint: Joint, layers: LayerCache, arguments: argparse.Namespace, rng: np.random.Generator) -> None:
    """Second stage: images, texts and composed queries into one space."""
    tower = [*joint.model.model_visual.parameters(), *joint.model.visual_proj.parameters()]
    known = {id(parameter) for parameter in tower}
    rest = [parameter for parameter in joint.parameters() if id(parameter) not in known]
    rates = [(rest, arguments.lr), (tower, arguments.lr * arguments.tower_share)]
    stage = Stage("joint", rates, steps=arguments.steps, seconds=arguments.seconds)
    empty = [""] * (2 * arguments.batch)
    for step in stage:
        queries = draw_queries(arguments.batch, rng)
        wanted = labels_of([query.wanted for query in queries])
        sources = labels_of([query.source for query in queries])
        colourless = [rng.random() < 0.15 for _ in queries]
        full = [full_text(q.wanted, rng, with_colour=not bare) for q, bare in zip(queries, colourless, strict=True)]
        bare = torch.tensor(
            [
                b and q.wanted.colour != COLOURS[0] and q.wanted.pattern != "plain"
                for b, q in zip(colourless, queries, strict=True)
            ]
        )
        images = augmented(layers.render(torch.cat((wanted, sources)), rng), rng)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = joint.model.image_tokens(normalised(images))
            shown = joint.encode(tokens, empty)  # the wanted products, then the query images as more to tell apart
            composed = joint.encode(tokens[len(wanted) :], [reworded(query.text, rng) for query in queries])
            text = joint.encode(None, [reworded(phrase, rng) for phrase in full])
        labels = torch.cat((wanted, sources))
        same = (wanted[:, None] == labels[None]).all(-1)
        same_text = torch.where(bare[:, None], (wanted[:, None, :2] == labels[None, :, :2]).all(-1), same)
        contrast = multi_positive(composed, shown, same) + multi_positive(text, shown, same_text)
        targets = shown[: len(wanted)]
        contrast = contrast + 0.5 * multi_positive(targets, composed, same[:, : len(wanted)])
        second = attribute_loss(joint.attributes(shown), labels, adjust=arguments.adjust)
        second = second + attribute_loss(joint.attributes(composed), wanted, adjust=arguments.adjust)
        second = second + attribute_loss(
            joint.attributes(text), wanted, adjust=arguments.adjust, scored=(None, None, (~bare).float())
        )
        stage.update(contrast + 0.5 * second)
        with torch.no_grad():
            first = same[torch.arange(len(same)), (composed @ shown.T).argmax(1)].float().mean().item()
            kind, pattern, colour = correct(joint.attributes(composed), wanted).float().mean(0).tolist()
        stage.note(
            step, contrast=contrast.item(), second=second.item(), first=first, kind=kind, pattern=pattern, colour=colour
        )
        if step % 200 == 199:
            save(joint.model, joint.processor, arguments.out)


def save(model: VisualizedBGE, processor: VisualizedBGEProcessor, folder: Path) -> None:
    """Writes weights in half precision, config and tokenizer, as ``load_visualized_bge`` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        name: tensor.detach().to(torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    processor.tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.room(),
        "do_lower_case": True,
    }
    settings |= {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    started = time.monotonic()
    layers = LayerCache.load(
        arguments.cache, arguments.size, shapes=arguments.shapes, textures=arguments.textures, seed=arguments.seed
    )
    print(f"layers after {time.monotonic() - started:.0f} s; {vars(arguments)}", flush=True)
    tokenizer = build_tokenizer()
    model = build_model(arguments, tokenizer.get_vocab_size()).to(memory_format=torch.channels_last)
    processor = VisualizedBGEProcessor(model.config, tokenizer)
    parts = {"tower": model.model_visual, "text": nn.ModuleList([model.bge_embeddings, model.bge_encoder])}
    print({name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}, flush=True)
    model.train()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tower = nn.ModuleList([model.model_visual, model.visual_proj])
    if arguments.tower_from:
        tower.load_state_dict(torch.load(arguments.tower_from, weights_only=True))
    else:
        train_tower(model, layers, arguments, rng)
        torch.save(tower.state_dict(), arguments.out / "tower.pt")
    if arguments.steps:
        torch.manual_seed(arguments.seed + 1)  # the second stage does not depend on where the first one came from
        rng = np.random.default_rng(arguments.seed + 1)
        train_together(Joint(model, processor), layers, arguments, rng)
    save(model, processor, arguments.out)
    print(f"wrote {arguments.out} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
