"""Phi-3 Vision: images and words in, logits of the next word out. Knows nothing of prompts' meaning or LlamaIndex.

transformers' own CLIP tower and Phi-3 decoder, and the original's glue between them: crops laid out as one image,
separators, projector. Module attributes keep the checkpoint's names, so that ``Phi3Vision.from_pretrained`` reads
microsoft/Phi-3-vision-128k-instruct and Phi-3.5-vision-instruct as they are, without ``trust_remote_code``, and
``generate``, ``device_map``, quantisation and adapters work as for any model.

A prompt that several calls share is computed once: :meth:`Phi3Vision.prefill` returns a :class:`Prefix`, which
:meth:`Phi3Vision.extend` continues as often as wanted and never changes.

Source: ``modeling_phi3_v.py`` and ``image_embedding_phi3_v.py`` of microsoft/Phi-3-vision-128k-instruct (MIT; technical
report arXiv:2404.14219), rewritten; checked against their outputs. Rotary factors: LongRoPE, arXiv:2402.13753.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import (
    Phi3Model,
    Phi3PreTrainedModel,
    Phi3RotaryEmbedding,
    eager_attention_forward,
)

from mm_retriever.devices import input_device
from mm_retriever.errors import PromptError
from mm_retriever.phi3_vision.tower import Phi3VisionConfig, Phi3VisionEmbeddings

CACHE = "cache" if "cache" in inspect.signature(Phi3Model.forward).parameters else "past_key_values"
"""What transformers calls the keys and values of earlier calls: another name from 5.24 on."""

_LONG_ROPE: ContextVar[bool | None] = ContextVar("long_rope", default=None)


@contextmanager
def _rope(long: bool) -> Iterator[None]:
    token = _LONG_ROPE.set(long)
    try:
        yield
    finally:
        _LONG_ROPE.reset(token)


class Phi3VisionRotaryEmbedding(Phi3RotaryEmbedding):
    """Cosine and sine from the factors that were chosen for the whole sequence.

    transformers (and the original) choose by the largest position of each call: keys cached with short factors then
    meet queries with long ones as soon as generation crosses the boundary, and the text turns to garbage.
    """

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> (B, T, head) each, in the dtype of ``x``."""
        if self.rope_type != "longrope":
            default: tuple[Tensor, Tensor] = super().forward(x, position_ids)
            return default
        chosen = _LONG_ROPE.get()
        long = int(position_ids.max()) >= self.config.short_context if chosen is None else chosen
        with torch.no_grad():
            angles = position_ids[..., None].float() * self._frequencies(long, x.device)
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _frequencies(self, long: bool, device: torch.device) -> Tensor:
        """(head / 2,) float32, worked out afresh: a buffer would lose digits when the model is cast to bfloat16."""
        rope: dict[str, Any] = self.config.rope
        factors = torch.tensor(rope["long_factor" if long else "short_factor"], device=device)
        exponents = torch.arange(0, 2 * len(factors), 2, dtype=torch.float, device=device) / (2 * len(factors))
        frequencies: Tensor = 1.0 / (factors * rope["rope_theta"] ** exponents)
        return frequencies


class Phi3VisionModel(Phi3Model):
    """The decoder with the image embeddings beside its word embeddings, as the checkpoint has them."""

    config_class = Phi3VisionConfig

    def __init__(self, config: Phi3VisionConfig) -> None:
        super().__init__(config)
        self.rotary_emb = Phi3VisionRotaryEmbedding(config=config)
        self.vision_embed_tokens = Phi3VisionEmbeddings(config)
        self.post_init()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Prefix:
    """A computed beginning that any number of continuations can start from. Never changed by one.

    ``logits`` (B, V): of the next token, float32. ``long_rope``: which rotary factors the cached keys have.
    """

    cache: DynamicCache
    length: int
    logits: Tensor
    long_rope: bool

    def expand(self, rows: int) -> Prefix:
        """The same beginning for ``rows`` continuations at once; costs no memory until one is made."""
        return Prefix(_fork(self.cache, rows), self.length, self.logits.expand(rows, -1), self.long_rope)


class Phi3Vision(Phi3PreTrainedModel, GenerationMixin):
    """Phi-3 Vision with a language head. ``input_ids`` below zero are slots of images: -1 of the first, and so on."""

    config_class = Phi3VisionConfig
    config: Phi3VisionConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers does
    _no_split_modules = ["Phi3DecoderLayer", "Phi3VisionEmbeddings"]  # noqa: RUF012 - the same
    _can_compile_fullgraph = False

    def __init__(self, config: Phi3VisionConfig) -> None:
        super().__init__(config)
        self.model = Phi3VisionModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # in the checkpoint, never used: a second name of the word embeddings, and the layers above the features
        vision: Any = config.vision_config
        above = "|".join(str(layer) for layer in range(vision.layers_used, vision.num_hidden_layers))
        self._keys_to_ignore_on_load_unexpected = [
            r"vision_embed_tokens\.wte\.weight$",
            rf"vision_model\.encoder\.layers\.({above or '(?!)'})\.",
        ]
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, Phi3VisionEmbeddings):
            for separator in (module.sub_GN, getattr(module, "glb_GN", None)):
                if separator is not None:
                    initialization.normal_(separator, std=self.config.initializer_range)

    # ------------------------------------------------------------------ images and words to embeddings

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """Token embeddings of images, (tokens, D) each; compute once, use in as many prompts as wanted.

        Args:
            pixel_values: (crops of all images, 3, S, S) from the processor, or the original's padded
                (images, crops, 3, S, S), whose padding crops are skipped.
            image_sizes: (images, 2), height and width in pixels after padding.
        """
        embeddings = self.model.vision_embed_tokens
        if pixel_values.dim() == 5:
            grids = (image_sizes // embeddings.image_size).tolist()
            pixel_values = torch.cat([crops[: 1 + h * w] for crops, (h, w) in zip(pixel_values, grids, strict=True)])
        home = embeddings.sub_GN
        features: list[Tensor] = embeddings(pixel_values.to(input_device(home), home.dtype), image_sizes)
        return features

    def embed(self, input_ids: Tensor | Sequence[int], features: Sequence[Tensor] = ()) -> Tensor:
        """(B, T) ids, or (T,) for a batch of one -> (B, T, D), images in their slots.

        Args:
            input_ids: Slots of a row's k-th image are ``-k``.
            features: From :meth:`image_features`, in reading order over all rows.

        Raises:
            PromptError: Slots and images do not match in number, order or size.
        """
        words = self.model.embed_tokens
        ids = torch.as_tensor(input_ids, device=input_device(words.weight))
        ids = ids[None] if ids.dim() == 1 else ids
        slots = ids < 0
        embedded: Tensor = words(ids.clamp(min=0))
        if not len(features) and not bool(slots.any()):
            return embedded
        self._check_slots(ids, features)
        images = torch.cat(list(features)).to(embedded.device, embedded.dtype)
        return embedded.masked_scatter(slots[..., None], images)

    def _check_slots(self, ids: Tensor, features: Sequence[Tensor]) -> None:
        slots: list[int] = []
        for row in ids:
            numbers, counts = torch.unique_consecutive(-row[row < 0], return_counts=True)
            if numbers.tolist() != list(range(1, len(numbers) + 1)):
                raise PromptError(f"images {numbers.tolist()} in a prompt; expected 1, 2, ... once each, in order")
            slots += counts.tolist()
        if slots != [len(feature) for feature in features]:
            raise PromptError(
                f"the prompt has slots for images of {slots} tokens, the images given have "
                f"{[len(feature) for feature in features]}; use the processor's token_counts for these images"
            )

    # ------------------------------------------------------------------ forward and generate

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        long_rope: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, as from any causal model.

        Args:
            input_ids: (B, T); -k is a slot of the row's k-th image.
            pixel_values: See :meth:`image_features`.
            image_sizes: See :meth:`image_features`.
            attention_mask: (B, T) with the past, or (B, 1, T, S).
            position_ids: (B, T).
            past_key_values: Made by earlier calls; grows in place.
            inputs_embeds: (B, T, D) instead of ids.
            labels: (B, T), -100 where no loss is wanted, at image slots among others.
            use_cache: Whether to return a cache; the config's choice by default.
            logits_to_keep: Only the last so many, or these positions; 0 for all.
            long_rope: Which rotary factors the sequence gets, chosen once, when its cache is empty: True if it will
                grow past ``config.short_context``. By default, True if it is already longer.
            cache: ``past_key_values`` as transformers 5.24 calls it.
            **kwargs: ``output_hidden_states`` and what else the decoder understands.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds given; pass one of them")
            features: list[Tensor] = []
            if pixel_values is not None:
                if image_sizes is None:
                    raise PromptError("pixel_values without image_sizes; pass both, as the processor returns them")
                features = self.image_features(pixel_values, image_sizes)
            inputs_embeds = self.embed(input_ids, features)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        long = self._choose_rope(cache, inputs_embeds.shape[1], long_rope)
        with _rope(long):
            outputs = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _choose_rope(self, cache: Cache | None, new: int, wanted: bool | None) -> bool:
        """The rotary factors of this call: what the cached keys have, or else what is wanted or needed."""
        short_context = self.config.short_context
        if short_context is None:
            return False
        past = int(cache.get_seq_length()) if cache is not None else 0
        made: bool | None = getattr(cache, "long_rope", None) if past else None
        if made is None:
            made = past + new > short_context if wanted is None else wanted
        if not made and past + new > short_context:
            raise PromptError(
                f"position {past + new} is beyond the {short_context} for which this sequence's short rotary factors "
                "hold; compute its beginning with long_rope=True"
            )
        if cache is not None:
            cache.long_rope = made  # type: ignore[attr-defined]
        return made

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and right across ``config.short_context``.

        Rotary factors are chosen once, by the prompt and ``max_new_tokens`` together. Image slots come back as the
        padding id.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        pixel_values, image_sizes = kwargs.pop("pixel_values", None), kwargs.pop("image_sizes", None)
        if ids is not None and kwargs.get("inputs_embeds") is None and bool((ids < 0).any()):
            features = [] if pixel_values is None else self.image_features(pixel_values, image_sizes)
            kwargs["inputs_embeds"] = self.embed(ids, features)
            ids = ids.masked_fill(ids < 0, self.config.pad_token_id or 0)
        prompt = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        short_context = self.config.short_context
        if short_context is not None and prompt is not None and "long_rope" not in kwargs:
            config = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
            new = kwargs.get("max_new_tokens") or config.max_new_tokens
            longest = kwargs.get("max_length") or config.max_length or 0
            length = prompt.shape[1]
            kwargs["long_rope"] = (length + new if new else max(length + 20, longest)) > short_context
        return super().generate(ids, *args, **kwargs)  # type: ignore[misc]

    # ------------------------------------------------------------------ a beginning computed once

    @torch.inference_mode()
    def prefill(
        self, input_ids: Tensor | Sequence[int], features: Sequence[Tensor] = (), *, total_length: int | None = None
    ) -> Prefix:
        """The computed beginning of a prompt.

        Args:
            input_ids: (B, T) or (T,), image slots below zero.
            features: Of its images, from :meth:`image_features`.
            total_length: Most tokens that the beginning and any continuation will have together; decides the rotary
                factors. By default nothing beyond ``config.short_context``, unless the beginning is longer.
        """
        embedded = self.embed(input_ids, features)
        short_context = self.config.short_context
        longest = max(embedded.shape[1], total_length or 0)
        return self._advance(embedded, None, short_context is not None and longest > short_context)

    @torch.inference_mode()
    def extend(self, prefix: Prefix, input_ids: Tensor | Sequence[int], features: Sequence[Tensor] = ()) -> Prefix:
        """`prefix` and what follows it, as a new prefix. A batch of rows may follow a prefix of one."""
        return self._advance(self.embed(input_ids, features), prefix, prefix.long_rope)

    @torch.inference_mode()
    def continuation_log_probs(
        self, prefix: Prefix, prompts: Sequence[Tensor], targets: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Log P of every token of each target, (len(target),) each, given `prefix`, its prompt, and the tokens before.

        One batch, padded on the right; no padding is attended to.

        Args:
            prefix: A beginning of one row, shared by all.
            prompts: (T, D) each, from :meth:`embed`; may be empty.
            targets: Ids whose probability is wanted, at least one each.
        """
        words = [self.embed(list(target[:-1]) or [0])[0, : len(target) - 1] for target in targets]
        rows = [torch.cat([prompt, word]) for prompt, word in zip(prompts, words, strict=True)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = padded[:, :0]
        if padded.shape[1]:
            hidden = self._hidden(padded, _fork(prefix.cache, len(rows)), prefix.long_rope)
        scores: list[Tensor] = []
        for row, prompt, target in zip(hidden, prompts, targets, strict=True):
            start = len(prompt) - 1  # the position whose output predicts the target's first token; -1: the prefix's
            logits = self.lm_head(row[max(start, 0) : start + len(target)]).float()
            if start < 0:
                logits = torch.cat([prefix.logits, logits])
            scores.append(logits.log_softmax(-1).gather(1, torch.tensor([target], device=logits.device).T)[:, 0])
        return scores

    def _advance(self, embedded: Tensor, prefix: Prefix | None, long: bool) -> Prefix:
        cache = DynamicCache(config=self.config) if prefix is None else _fork(prefix.cache, len(embedded))
        logits = self.lm_head(self._hidden(embedded, cache, long)[:, -1]).float()
        return Prefix(cache, (prefix.length if prefix else 0) + embedded.shape[1], logits, long)

    def _hidden(self, embedded: Tensor, cache: DynamicCache, long: bool) -> Tensor:
        with _rope(self._choose_rope(cache, embedded.shape[1], long)):
            outputs = self.model(inputs_embeds=embedded, use_cache=True, **{CACHE: cache})
        hidden: Tensor = outputs.last_hidden_state
        return hidden


def _fork(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache that starts where `cache` ends: shares its tensors, which growing replaces and never writes to."""
    forked = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    forked.layers = layers
    for layer in layers:
        if layer.keys is not None and len(layer.keys) != rows:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return forked


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' "sdpa" computes it, but for one word at a time as its "eager" does."""
    alone = query.shape[2] == 1 and attention_mask is None
    attend = eager_attention_forward if alone else sdpa_attention_forward
    attended: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **options)
    return attended


CPU_ATTENTION = "phi3_vision_cpu"
"""The attention for CPUs, by the name under which transformers knows it: torch's fused attention takes three times as
long as two products where a single word looks back in bfloat16, and half as long again in float32."""
AttentionInterface.register(CPU_ATTENTION, _attend)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)

# transformers' Auto classes know the model as soon as this module is imported
AutoModelForCausalLM.register(Phi3VisionConfig, Phi3Vision, exist_ok=True)
AutoModelForImageTextToText.register(Phi3VisionConfig, Phi3Vision, exist_ok=True)
