"""Train the bundled tiny reranker from scratch on drawn products: about an hour on one CPU core.

    python examples/training/train_tiny_reranker.py --out tiny-reranker

Three stages of one ``Phi3Vision``. First the CLIP tower learns to name kind, pattern and colour of an image; then the
decoder learns captions, wanted descriptions and reasons on what the finished tower sees; at last all of it learns
together on fresh images. The (kind, pattern) pairs of ``mm_retriever.demo.catalogue.HELD_OUT`` appear in no image
and no text of the training.

``python benchmarks/rerank_quality.py --reranker tiny-reranker`` measures the result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_conversations import Conversation, Conversations, build_tokenizer
from tiny_training import (
    HEADS,
    SEEN_PAIRS,
    LayerCache,
    Stage,
    attribute_loss,
    augmented,
    enlarged_crops,
    labels_of,
    named,
    normalised,
    train_naming,
)
from torch import Tensor, nn

from mm_retriever.demo.catalogue import PATTERNS, Looks, all_looks, catalogue
from mm_retriever.phi3_vision import prompts
from mm_retriever.phi3_vision.model import Phi3Vision
from mm_retriever.phi3_vision.processor import Message, Phi3VisionProcessor, Slot, processor_for
from mm_retriever.phi3_vision.tower import Phi3VisionConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-reranker"), help="folder for weights, config, tokenizer")
    parser.add_argument("--cache", type=Path, default=Path("tiny-layers"), help="folder for the drawn layers")
    parser.add_argument("--size", type=int, default=128, help="pixels of an image's side")
    parser.add_argument("--shapes", type=int, default=112, help="drawings of each kind")
    parser.add_argument("--textures", type=int, default=240, help="windows on each pattern")
    parser.add_argument("--sets", type=int, default=2, help="sets of drawings, 1.1 GB each")
    parser.add_argument("--batch", type=int, default=64, help="images a step in the first stage")
    parser.add_argument("--eyes-steps", type=int, default=7000)
    parser.add_argument("--eyes-lr", type=float, default=2e-3)
    parser.add_argument("--crops", type=float, default=0.35, help="share of enlarged crops in the first stage")
    parser.add_argument("--images", type=int, default=16, help="of each product that the second stage sees")
    parser.add_argument("--words-steps", type=int, default=1200)
    parser.add_argument("--words-lr", type=float, default=2e-3)
    parser.add_argument("--words-batch", type=int, default=24, help="queries a step, and as many descriptions")
    parser.add_argument("--joint-steps", type=int, default=3000)
    parser.add_argument("--joint-lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, nargs=3, default=(None,) * 3, help="length of each stage, not steps")
    parser.add_argument("--report", type=int, default=450, help="products to describe after the last two stages")
    parser.add_argument("--hd-transform", action="store_true", help="show each image twice, as Phi-3 Vision is trained")
    parser.add_argument("--start", type=Path, help="a checkpoint.pt to go on from; its finished stages are skipped")
    return parser.parse_args()


def build_model(size: int, vocab_size: int, *, hd_transform: bool = False) -> Phi3Vision:
    """An untrained tiny model: a tower of four layers and a decoder of four, 128 wide.

    Args:
        size: Pixels of an image's side.
        vocab_size: Of the tokenizer.
        hd_transform: Whether an image is one crop and the whole, as Phi-3 Vision sees it, or one view.
    """
    control = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    config = Phi3VisionConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=336, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, original_max_position_embeddings=4096,
        sliding_window=None, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, tie_word_embeddings=False,
        embd_layer={"use_hd_transform": hd_transform},
        vision_config={
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": size, "patch_size": 16, "feature_layer": -1, "hidden_act": "gelu", "projection_dim": 128,
        },
        **control,
    )  # fmt: skip
    # twice as fast to train on a CPU in bfloat16 as the fused kernel
    config._attn_implementation = config.vision_config._attn_implementation = "eager"
    return Phi3Vision(config)


# ---------------------------------------------------------------------- first stage: eyes


def one_of(sets: Sequence[LayerCache], rng: np.random.Generator) -> LayerCache:
    """Any of the sets of drawings: the model learns a single set's shapes by heart."""
    return sets[int(rng.integers(len(sets)))]


def train_eyes(
    model: Phi3Vision,
    sets: Sequence[LayerCache],
    arguments: argparse.Namespace,
    rng: np.random.Generator,
    seconds: float | None,
) -> nn.Module:
    """Kind, pattern and colour of an image from the tower's tokens; returns the heads that name them."""
    tower = model.model.vision_embed_tokens.img_processor
    head = nn.Linear(2 * model.config.vision_config.hidden_size, sum(HEADS))
    parameters = [*tower.parameters(), *head.parameters()]
    rates = [(parameters, arguments.eyes_lr)]
    train_naming(
        Stage("eyes", rates, steps=arguments.eyes_steps, seconds=seconds, weight_decay=0.03),
        lambda pixel_values: named(tower(pixel_values.contiguous()), head),
        lambda labels: one_of(sets, rng).render(labels, rng),
        batch=arguments.batch,
        crops=arguments.crops,
        adjust=True,
        rng=rng,
    )
    return head


# ---------------------------------------------------------------------- second stage: words


class Seen:
    """What the finished tower sees in many images of everything that training may show: merged patches in half."""

    def __init__(self, model: Phi3Vision, sets: Sequence[LayerCache], each: int, rng: np.random.Generator) -> None:
        shown = [looks for looks in all_looks() if (looks.kind, looks.pattern) in SEEN_PAIRS]
        themes = {looks._replace(kind=None) for looks in all_looks()}
        everything = [*shown * each, *sorted(themes, key=str) * (4 * each)]
        self.rows: dict[Looks, list[int]] = {}
        for row, looks in enumerate(everything):
            self.rows.setdefault(looks, []).append(row)
        embeddings = model.model.vision_embed_tokens
        parts = []
        for start in range(0, len(everything), 128):
            labels = labels_of(everything[start : start + 128])
            pixels = photographed(one_of(sets, rng), labels, rng)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                parts.append(embeddings._merge(embeddings.img_processor(pixels)).half())
        self.merged = torch.cat(parts)

    def __call__(self, looks: Sequence[Looks], rng: np.random.Generator) -> Tensor:
        """(N, g/2, g/2, 4C) of one image of each."""
        rows = [self.rows[look][int(rng.integers(len(self.rows[look])))] for look in looks]
        return self.merged[rows].float()


def photographed(layers: LayerCache, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """``pixel_values`` of fresh images, half of them a little closer than drawn: few shapes, many places."""
    images = layers.render(labels, rng)
    closer = torch.from_numpy(rng.random(len(labels)) < 0.5)
    images[closer] = enlarged_crops(images[closer], rng, smallest=0.85)
    return normalised(augmented(images, rng)).contiguous()


def projected(model: Phi3Vision, merged: Tensor) -> Tensor:
    """(N, g/2, g/2, 4C) -> (N, tokens, D), as ``Phi3VisionEmbeddings`` lays out one view per image, or one crop."""
    embeddings = model.model.vision_embed_tokens
    ends = embeddings.sub_GN.expand(len(merged), merged.shape[1], 1, -1).to(merged.dtype)
    rows = torch.cat((merged, ends), dim=2).flatten(1, 2)
    if embeddings.use_hd_transform:  # the crop, the separator, and the whole, which is the same
        rows = torch.cat((rows, embeddings.glb_GN.expand(len(rows), 1, -1).to(rows.dtype), rows), dim=1)
    laid_out: Tensor = embeddings.img_projection(rows)
    return laid_out


def answers_loss(model: Phi3Vision, talks: Sequence[Conversation], images: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy of the answers' tokens, and the share of them that is the most likely one.

    ``images``: (images of all talks, tokens, D).
    """
    longest = max(len(talk.ids) for talk in talks)
    ids = torch.tensor([talk.ids + [0] * (longest - len(talk.ids)) for talk in talks])
    embedded = model.model.embed_tokens(ids.clamp(min=0))
    embedded = embedded.masked_scatter((ids < 0)[..., None], images.to(embedded.dtype))
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    row, place, absent_at, absent, count = [], [], [], [], 0
    for number, talk in enumerate(talks):
        at = {position: count + index for index, position in enumerate(talk.scored)}
        row += [number] * len(at)
        place += talk.scored
        for position, token in talk.absent:
            absent_at.append(at[position])
            absent.append(token)
        count += len(at)
    logits = model.lm_head(hidden[row, torch.tensor(place) - 1]).float()
    if absent:
        logits = logits.index_put((torch.tensor(absent_at), torch.tensor(absent)), torch.tensor(-1e4))
    targets = ids[row, place]
    return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).float().mean().item()


def talks_of(conversations: Conversations, count: int) -> Iterator[list[Conversation]]:
    """Queries, then descriptions: apart, since descriptions are half as long."""
    yield [conversations.query() for _ in range(count)]
    yield [conversations.description() for _ in range(count)]


def train_words(
    model: Phi3Vision,
    conversations: Conversations,
    sets: Sequence[LayerCache],
    arguments: argparse.Namespace,
    rng: np.random.Generator,
    seconds: float | None,
) -> None:
    """Projector and decoder, on images that went through the tower once."""
    started = time.monotonic()
    seen = Seen(model, sets, arguments.images, rng)
    print(f"{len(seen.merged)} images seen in {time.monotonic() - started:.0f} s", flush=True)
    frozen = {id(parameter) for parameter in model.model.vision_embed_tokens.img_processor.parameters()}
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in frozen]
    stage = Stage("words", [(parameters, arguments.words_lr)], steps=arguments.words_steps, seconds=seconds)
    for step in stage:
        losses = []
        for talks in talks_of(conversations, arguments.words_batch):
            looks = [look for talk in talks for look in talk.images]
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = answers_loss(model, talks, projected(model, seen(looks, rng)))
            losses += [loss, right]
        stage.update(losses[0] + losses[2])
        stage.note(step, query=losses[0].item(), right=losses[1], described=losses[2].item(), words=losses[3])


# ---------------------------------------------------------------------- third stage: all of it


def train_jointly(
    model: Phi3Vision,
    head: nn.Module,
    conversations: Conversations,
    sets: Sequence[LayerCache],
    arguments: argparse.Namespace,
    rng: np.random.Generator,
    seconds: float | None,
) -> None:
    """Tower and decoder together on fresh images, the first stage's task beside them."""
    parameters = [*model.parameters(), *head.parameters()]
    stage = Stage("joint", [(parameters, arguments.joint_lr)], steps=arguments.joint_steps, seconds=seconds)
    embeddings = model.model.vision_embed_tokens
    for step in stage:
        batches = list(talks_of(conversations, arguments.words_batch))
        looks = [look for talks in batches for talk in talks for look in talk.images]
        labels = labels_of(looks)
        pixels = photographed(one_of(sets, rng), labels, rng)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = embeddings.img_processor(pixels)
            images = projected(model, embeddings._merge(tokens))
            second = attribute_loss(named(tokens, head), labels, adjust=True)
            first = sum(len(talk.images) for talk in batches[0])
            query, right = answers_loss(model, batches[0], images[:first])
            described, words = answers_loss(model, batches[1], images[first:])
        stage.update(query + described + 0.3 * second)
        stage.note(step, query=query.item(), right=right, described=described.item(), words=words, second=second.item())


# ---------------------------------------------------------------------- figures and files


@torch.inference_mode()
def describe(model: Phi3Vision, processor: Phi3VisionProcessor, images: Sequence[Image.Image]) -> list[str]:
    """Canonical descriptions of images, greedily, 64 at a time."""
    texts = []
    for start in range(0, len(images), 64):
        inputs = processor.image_inputs(images[start : start + 64])
        turn = Message("user", [prompts.DESCRIBE, Slot(inputs.token_counts[0])])
        ids = torch.tensor([processor.encode_messages([turn])] * len(inputs))
        prefix = model.prefill(ids, model.image_features(inputs.pixel_values, inputs.image_sizes))
        written = [prefix.logits.argmax(1)]
        for _ in range(15):
            prefix = model.extend(prefix, written[-1][:, None])
            written.append(prefix.logits.argmax(1))
        for row in torch.stack(written, 1).tolist():
            stops = [place for place, token in enumerate(row) if token in processor.stop_ids]
            texts.append(processor.decode(row[: stops[0]] if stops else row))
    return texts


def report(model: Phi3Vision, processor: Phi3VisionProcessor, stage: str, count: int) -> None:
    """Prints how many products, drawn by the catalogue's own code, are described exactly right."""
    model.eval()
    products = sorted(catalogue(count, seed=1), key=lambda product: PATTERNS.index(product.pattern))
    texts = describe(model, processor, [product.draw() for product in products])
    for name, wanted in (("seen", False), ("held out", True)):
        right = [t == p.description for t, p in zip(texts, products, strict=True) if p.held_out == wanted]
        print(f"{stage}: {np.mean(right):.3f} of {len(right)} {name} products described exactly right", flush=True)
    model.train()


def save(model: Phi3Vision, processor: Phi3VisionProcessor, folder: Path) -> None:
    """Writes weights in half precision, config and tokenizer, as ``load_phi3_vision`` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.float16
    model.config.save_pretrained(folder)
    processor.tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    started = time.monotonic()
    sets = [
        LayerCache.load(
            arguments.cache,
            arguments.size,
            shapes=arguments.shapes,
            textures=arguments.textures,
            seed=7 + arguments.seed + number,
            resample=int(Image.Resampling.BILINEAR),
        )
        for number in range(arguments.sets)
    ]
    print(f"layers after {time.monotonic() - started:.0f} s; {vars(arguments)}", flush=True)
    tokenizer = build_tokenizer()
    model = build_model(arguments.size, tokenizer.get_vocab_size(), hd_transform=arguments.hd_transform).train()
    processor = processor_for(model.config, tokenizer, num_crops=1)
    conversations = Conversations(processor, rng)
    head = nn.Linear(2 * model.config.vision_config.hidden_size, sum(HEADS))
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = 0
    if arguments.start:
        checkpoint: dict[str, Any] = torch.load(arguments.start, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        head.load_state_dict(checkpoint["head"])
        done = checkpoint["done"]
    for stage, seconds in enumerate(arguments.seconds):
        if stage < done:
            continue
        if stage == 0:
            head = train_eyes(model, sets, arguments, rng, seconds)
        elif stage == 1:
            train_words(model, conversations, sets, arguments, rng, seconds)
        else:
            train_jointly(model, head, conversations, sets, arguments, rng, seconds)
        checkpoint = {"model": model.state_dict(), "head": head.state_dict(), "done": stage + 1}
        torch.save(checkpoint, arguments.out / "checkpoint.pt")
        if stage and arguments.report:
            report(model, processor, ("eyes", "words", "joint")[stage], arguments.report)
    save(model, processor, arguments.out)
    print(f"wrote {arguments.out} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
