"""Phi-3 Vision as shared by rerankings, and dialogues with it: prompts that grow, fork and get answers.

Owns the lock, the memory of image features, and the counting of tokens. Knows nothing of rankings.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Sequence

import torch
from cachetools import LRUCache
from PIL import Image
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, SuppressTokensLogitsProcessor

from mm_retriever.images import pixel_digest
from mm_retriever.phi3_vision.decoding import TOKENS_AT_ONCE, TextStream, ids_after, likelihoods
from mm_retriever.phi3_vision.model import Phi3Vision, Prefix
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor
from mm_retriever.phi3_vision.tower import with_its_crop
from mm_retriever.rerank.scorer import Meter
from mm_retriever.threads import ForkLock

IMAGES_AT_ONCE = 8  # through the processor: bounds the memory of their pixels
NO_REPEAT = 6  # tokens: no run of so many occurs twice in one sentence
BEGINNINGS_KEPT = 4


class FeatureMemory:
    """The latest image features, by content, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._features = LRUCache[tuple[str, int], Tensor](max_bytes, getsizeof=lambda features: features.nbytes)
        self._lock = ForkLock()

    def get(self, key: tuple[str, int]) -> Tensor | None:
        """The features, if they are still there."""
        with self._lock:
            return self._features.get(key)

    def put(self, key: tuple[str, int], features: Tensor) -> None:
        """Keep the features, unless they alone exceed the limit; the oldest make room."""
        if features.nbytes > self._features.maxsize:
            return
        with self._lock:
            # a copy: what the tower returns is a view that would keep a whole batch alive
            self._features[key] = features.clone()

    def __len__(self) -> int:
        return len(self._features)


class SharedModel:
    """A loaded model that any number of dialogues share; it computes one step at a time.

    Args:
        model: Phi-3 Vision.
        processor: of that model.
        lock: held during each step; to be shared by all users of the model.
        memory_bytes: for features of images.
    """

    def __init__(
        self, model: Phi3Vision, processor: Phi3VisionProcessor, lock: ForkLock | None, memory_bytes: int
    ) -> None:
        self.model, self.processor = model, processor
        self.lock = ForkLock(threading.RLock) if lock is None else lock
        self._memory = FeatureMemory(memory_bytes)
        self._beginnings = LRUCache[tuple[int, ...], Prefix](BEGINNINGS_KEPT)
        self._processors = {processor.num_crops: processor}

    def with_crops(self, num_crops: int) -> Phi3VisionProcessor:
        """Return the processor that cuts images into at most `num_crops` crops."""
        if num_crops not in self._processors:
            other = copy.copy(self.processor)
            other.num_crops = num_crops
            self._processors[num_crops] = other
        return self._processors[num_crops]

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], num_crops: int, meter: Meter) -> list[Tensor]:
        """Return token embeddings of images, (tokens, D) each, from memory where they are there."""
        if num_crops == 1 and self.processor.use_hd_transform:
            return [with_its_crop(whole) for whole in self.features(images, 0, meter)]
        keys = [(pixel_digest(image), num_crops) for image in images]
        features = {key: kept for key in set(keys) if (kept := self._memory.get(key)) is not None}
        meter.images_kept += len(features)
        missing = list({key: image for key, image in zip(keys, images, strict=True) if key not in features}.items())
        for start in range(0, len(missing), IMAGES_AT_ONCE):
            batch = missing[start : start + IMAGES_AT_ONCE]
            inputs = self.with_crops(num_crops).image_inputs([image for _, image in batch])
            with self.lock:
                computed = self.model.image_features(inputs.pixel_values, inputs.image_sizes)
            meter.images += len(batch)
            for (key, _), feature in zip(batch, computed, strict=True):
                features[key] = feature
                self._memory.put(key, feature)
        return [features[key] for key in keys]

    def prefill(self, ids: Sequence[int], features: Sequence[Tensor], total_length: int, meter: Meter) -> Prefix:
        """Compute the beginning of a dialogue."""
        meter.prefilled += len(ids)
        meter.passes += 1
        with self.lock:
            return self.model.prefill(list(ids), features, total_length=total_length)

    def beginning(self, ids: Sequence[int], total_length: int, meter: Meter) -> Prefix:
        """Return the prefix of a beginning without images; the latest are kept."""
        short = self.model.config.short_context
        key = (int(short is not None and total_length > short), *ids)
        with self.lock:
            kept = self._beginnings.get(key)
            if kept is None:
                kept = self._beginnings[key] = self.prefill(ids, (), total_length, meter)
            return kept

    def extend(self, prefix: Prefix, ids: Sequence[int] | Tensor, features: Sequence[Tensor], meter: Meter) -> Prefix:
        """Compute what follows a prefix; several rows (B, T) may follow one."""
        meter.prefilled += ids.numel() if isinstance(ids, Tensor) else len(ids)
        meter.passes += 1
        with self.lock:
            return self.model.extend(prefix, ids, features)

    @torch.inference_mode()
    def log_probs(
        self,
        prefix: Prefix,
        prompts: Sequence[Sequence[int]],
        features: Sequence[Sequence[Tensor]],
        targets: Sequence[Sequence[int]],
        meter: Meter,
    ) -> list[float]:
        """Return log P of each target after its prompt; all prompts follow one prefix."""
        meter.prefilled += sum(len(p) + len(t) - 1 for p, t in zip(prompts, targets, strict=True))
        meter.passes += 1
        with self.lock:
            rows = [self.model.embed(list(ids), own)[0] for ids, own in zip(prompts, features, strict=True)]
            scores: list[float] = likelihoods(self.model, prefix, rows, targets).tolist()
        return scores

    def following(self, text: str) -> list[int]:
        """Return the ids of a text in the middle of a line."""
        return ids_after(self.processor.encode_literal, "x", text)


class Counted:
    """The model for decoding. ``generated``: its input is its own output, which does not count as prompt."""

    def __init__(self, shared: SharedModel, meter: Meter, *, generated: bool = False) -> None:
        self._shared, self._meter, self._generated = shared, meter, generated

    def extend(self, prefix: Prefix, input_ids: Sequence[int] | Tensor, /) -> Prefix:
        """See `Phi3Vision.extend`."""
        prefilled = self._meter.prefilled
        extended = self._shared.extend(prefix, input_ids, (), self._meter)
        if self._generated:
            self._meter.prefilled = prefilled
        return extended


class Dialogue:
    """One growing prompt; each turn is computed once, for all later turns and for every fork.

    Args:
        shared: the model that answers.
        meter: counts tokens and limits the time.
        total_length: the most tokens that it and its forks will have; see `Phi3Vision.prefill`.
    """

    def __init__(self, shared: SharedModel, meter: Meter, total_length: int) -> None:
        self.shared, self.meter, self.total_length = shared, meter, total_length
        self._prefix: Prefix | None = None
        self._pending: list[int] = []  # decided, but not yet fed
        self._counted = 0  # of the pending: chosen by the model, and counted as that

    @property
    def prefix(self) -> Prefix:
        """The prefix of all turns so far."""
        if self._prefix is None or self._pending:
            self.say(())
        assert self._prefix is not None
        return self._prefix

    def say(self, ids: Iterable[int], features: Sequence[Tensor] = ()) -> None:
        """Add the next ids to the dialogue."""
        new = [*self._pending, *ids]
        if self._prefix is None:
            self._prefix = self.shared.prefill(new, features, self.total_length, self.meter)
        elif new:
            self._prefix = self.shared.extend(self._prefix, new, features, self.meter)
        self.meter.prefilled -= self._counted
        self._pending, self._counted = [], 0

    def write(self, opening: Sequence[int], *, stop_ids: Collection[int], max_new_tokens: int) -> list[int]:
        """Return the ids that the model writes after the opening, without the one that stops it."""
        self.say(opening)
        stream = self._stream(self.prefix, stop_ids, max_new_tokens)
        self._prefix, self._pending = stream.prefix, stream.pending[0].tolist()
        self._counted = len(self._pending)
        return stream.rows[0]

    def answers(
        self,
        turns: Sequence[Sequence[int]],
        features: Sequence[Sequence[Tensor]],
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Return the ids that the model writes to each of several alternative next turns.

        Turns of equal length are answered in one batch. The dialogue itself stays as it is.
        """
        written: list[list[int]] = [[] for _ in turns]
        for length in sorted({len(turn) for turn in turns}):
            same = [i for i, turn in enumerate(turns) if len(turn) == length]
            at_once = max(1, TOKENS_AT_ONCE // (self.prefix.length + length + max_new_tokens))
            for start in range(0, len(same), at_once):
                rows = same[start : start + at_once]
                if self.meter.out_of_time():
                    return written
                ids = torch.tensor([list(turns[i]) for i in rows])
                shown = [feature for i in rows for feature in features[i]]
                prefix = self.shared.extend(self.prefix, ids, shown, self.meter)
                for i, row in zip(rows, self._stream(prefix, stop_ids, max_new_tokens).rows, strict=True):
                    written[i] = row
        return written

    def _stream(self, prefix: Prefix, stop_ids: Collection[int], max_new_tokens: int) -> TextStream[Prefix]:
        """The finished text of the model after each row of a prefix."""
        control = sorted(self.shared.processor.special_ids - frozenset(stop_ids))
        stream = TextStream(
            Counted(self.shared, self.meter, generated=True),
            prefix,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            processors=[
                SuppressTokensLogitsProcessor(control, device=str(prefix.logits.device)),
                NoRepeatNGramLogitsProcessor(NO_REPEAT),
            ],
            should_stop=self.meter.out_of_time,
        )
        for _ in stream:
            pass
        self.meter.generated += sum(map(len, stream.rows))
        return stream

    def put(self, opening: Sequence[int], words: Sequence[int]) -> None:
        """Add a turn that the model wrote earlier; it is computed together with the next ids."""
        self._pending += [*opening, *words]

    def fork(self) -> Dialogue:
        """Return another dialogue with the same beginning, independent of this one."""
        other = Dialogue(self.shared, self.meter, self.total_length)
        other._prefix = self.prefix
        return other
