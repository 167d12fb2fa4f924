"""A small model of every family, made by the test: real classes, random weights, seconds.

A family that is added to the registry is tested by the shared suite as soon as it has a maker here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPModel

from mm_retriever.embedders.clip import clip_config
from mm_retriever.embedders.magiclens.encoder import MagicLens, MagicLensConfig
from mm_retriever.embedders.registry import load_embedder
from tests.support.golden import small_config, small_model, word_tokenizer
from tests.support.model_server import serving
from tests.support.sentence_models import qwen3_vl_embedding_folder, siglip2_folder

WORDS = ["red", "green", "blue", "white", "a", "mug", "phone", "case", "with", "this", "in", "and", "the"]


@dataclass(frozen=True)
class SmallModel:
    """A model as users name it.

    Args:
        name: for `load_embedder`.
        options: of its family.
        where: it runs: the device, or the address of its server.
        refuses: what it cannot embed, of "text", "image", "pair".
        weights: its weight file; None where no file on this machine is read.
        least_cosine: of a vector in bfloat16 with that in float32; None where there is one float format only.
        instructed: whether queries are told something that documents are not.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=lambda: {"device": "cpu"})
    refuses: frozenset[str] = frozenset()
    weights: Path | None = None
    least_cosine: float | None = 0.99
    instructed: bool = False


Maker = Callable[[Path, int], AbstractContextManager[SmallModel]]
"""Makes a model in an empty folder from a seed; equal seeds make equal models. Leaving the context ends its server."""


@contextmanager
def visualized_bge(folder: Path, seed: int) -> Iterator[SmallModel]:
    small_model(seed).save_pretrained(folder)
    word_tokenizer(small_config(), WORDS).save(str(folder / "tokenizer.json"))
    yield SmallModel(str(folder), weights=folder / "model.safetensors")


@contextmanager
def bge_vl(folder: Path, seed: int) -> Iterator[SmallModel]:
    content = {**CLIP_SHAPE, "model_type": "clip", "auto_map": {"AutoModel": "modeling_MMRet_CLIP.CLIPModel"}}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(
        random_state(lambda: CLIPModel(clip_config(CLIP_SHAPE, "")), seed),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    clip_words(CLIP_SHAPE["text_config"]["vocab_size"]).save(str(folder / "tokenizer.json"))
    yield SmallModel(str(folder), weights=folder / "model.safetensors")


@contextmanager
def magiclens(folder: Path, seed: int) -> Iterator[SmallModel]:
    content = {**CLIP_SHAPE, "num_layers": 2, "num_heads": 4, "ff_hidden_size": 72}
    config = MagicLensConfig(clip=clip_config(content, ""), num_layers=2, num_heads=4, ff_hidden_size=72)
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "magiclens"}))
    save_file(random_state(lambda: MagicLens(config), seed), folder / "model.safetensors", metadata={"format": "pt"})
    clip_words(CLIP_SHAPE["text_config"]["vocab_size"]).save(str(folder / "tokenizer.json"))
    yield SmallModel(str(folder), refuses=frozenset({"text"}), weights=folder / "model.safetensors")


@contextmanager
def qwen3_vl_embedding(folder: Path, seed: int) -> Iterator[SmallModel]:
    yield SmallModel(str(qwen3_vl_embedding_folder(folder, seed=seed)), instructed=True)


@contextmanager
def siglip2(folder: Path, seed: int) -> Iterator[SmallModel]:
    yield SmallModel(str(siglip2_folder(folder, seed=seed)))


@contextmanager
def on_a_server(folder: Path, seed: int) -> Iterator[SmallModel]:
    with visualized_bge(folder, seed) as model, serving(load_embedder(model.name, device="cpu"), f"m{seed}") as served:
        yield SmallModel(served.name, where={"base_url": served.url}, least_cosine=None)


MAKERS: dict[str, Maker] = {
    "visualized_bge": visualized_bge,
    "bge_vl": bge_vl,
    "magiclens": magiclens,
    "sentence_transformers": qwen3_vl_embedding,
    "sentence_transformers.siglip2": siglip2,
    "remote": on_a_server,
}
"""By the word in `registry.FAMILIES`, and a model on a server; more of the same family after a dot."""


# odd, distinct sizes: a swapped axis cannot pass
CLIP_SHAPE: dict[str, Any] = {
    "projection_dim": 40,
    "text_config": {
        "vocab_size": 90,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 19,
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 56,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 16,
    },
}


def random_state(build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """Tensors of a model, large enough to tell inputs apart."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        z = torch.randn(shape, generator=generator)
        if len(shape) >= 2 and "position" not in key:
            state[key] = z / math.sqrt(math.prod(shape[1:])) if "embedding" not in key else z * 0.3
        else:
            state[key] = 1 + 0.1 * z if "norm.weight" in key or "_ln.weight" in key else z * 0.1
    return state


def clip_words(size: int) -> Tokenizer:
    """One id a word; as in CLIP, start and end are the last two, and words are in small letters."""
    names = [*WORDS, "[UNK]"]
    names += [f"unused{number}" for number in range(size - len(names) - 2)]
    vocabulary = {name: number for number, name in enumerate([*names, "<start>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, vocabulary[name]) for name in ("<start>", "<end>")]
    )
    return tokenizer
