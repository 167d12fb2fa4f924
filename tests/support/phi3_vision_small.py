"""A small Phi-3 Vision with seeded random weights, and a small tokenizer built like the original's.

The tokenizer is byte-fallback BPE with the same normaliser, post-processor and control tokens, and the original's ids
for the words of the golden prompts; other text falls apart into characters and bytes, and ids without a use of their
own are words such as w4711. Sizes are odd and distinct, so that a swapped axis cannot pass.
"""

from __future__ import annotations

import json
import string
from functools import cache

import torch
from tokenizers import Tokenizer

from mm_retriever.phi3_vision.model import Phi3Vision
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor, processor_for
from mm_retriever.phi3_vision.tower import Phi3VisionConfig

GOLDEN_WORDS = {
    "▁": 29871, "?": 29973, ".": 29889, ",": 29892, "What": 5618, "▁is": 338, "▁the": 278, "▁capital": 7483,
    "▁of": 310, "▁France": 3444, "▁Answer": 673, "▁in": 297, "▁one": 697, "▁word": 1734, "Des": 4002, "cribe": 29581,
    "▁image": 1967, "▁detail": 9493, "▁diff": 2923, "ers": 414, "▁between": 1546, "▁these": 1438, "▁images": 4558,
}  # fmt: skip
CONTROL_TOKENS = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 32000, "<|assistant|>": 32001, "<|placeholder1|>": 32002,
    "<|system|>": 32006, "<|end|>": 32007, "<|user|>": 32010, "<|image|>": 32044,
}  # fmt: skip
SWALLOW_SPACE = {"</s>", "<|assistant|>", "<|placeholder1|>", "<|image|>"}
SHORT_CONTEXT = 300


@cache
def small_tokenizer() -> Tokenizer:
    """See the module's docstring."""
    vocabulary = dict(CONTROL_TOKENS)
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | GOLDEN_WORDS
    free = iter(range(20_000, 29_000))
    merges: list[tuple[str, str]] = []
    for character in string.ascii_letters + string.digits + string.punctuation:
        vocabulary.setdefault(character, next(free))
    for word in sorted(GOLDEN_WORDS, key=len, reverse=True):
        for cut in range(1, len(word)):
            merges.append((word[:cut], word[cut]))
            vocabulary.setdefault(word[: cut + 1], next(free))
    taken = set(vocabulary.values())
    vocabulary |= {f"▁w{i}": i for i in range(3, 32_000) if i not in taken}  # so that whatever it writes is words
    added = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": name in SWALLOW_SPACE,
         "normalized": False, "special": name != "</s>"}
        for name, i in CONTROL_TOKENS.items()
    ]  # fmt: skip
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": list(dict.fromkeys(merges))},
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(definition))


def small_config(**changes: object) -> Phi3VisionConfig:
    """LongRoPE from position 300 on, grouped heads, three tower layers of which two are used."""
    settings: dict[str, object] = {
        "vocab_size": 32064, "hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "original_max_position_embeddings": SHORT_CONTEXT, "bos_token_id": 1, "pad_token_id": 32000,
        "rope_scaling": {"type": "su", "short_factor": [1.05, 1.4, 2.0], "long_factor": [1.1, 6.0, 30.0]},
        "rope_theta": 10000.0, "sliding_window": 4096,
        "vision_config": {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3,
                          "num_attention_heads": 2, "image_size": 32, "patch_size": 4},
    }  # fmt: skip
    return Phi3VisionConfig(**{**settings, **changes})


@cache
def small_model(seed: int = 0) -> Phi3Vision:
    """Weights large enough that wrong positions, images or masks move the logits."""
    return seeded(small_config(), seed)


def seeded(config: Phi3VisionConfig, seed: int = 0) -> Phi3Vision:
    """A model of this shape with normal weights of standard deviation 0.3."""
    model = Phi3Vision(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 and name.endswith("weight") else noise)
    return model


@cache
def small_processor(num_crops: int = 4) -> Phi3VisionProcessor:
    """The processor that fits `small_model`."""
    return processor_for(small_config(), small_tokenizer(), num_crops=num_crops)
