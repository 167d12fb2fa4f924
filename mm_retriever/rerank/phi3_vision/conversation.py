"""Talking with Phi-3 Vision without computing anything twice: prompts that grow, fork, and are answered.

Owns the locks, the memory of pictures already seen, and the counting of tokens. Knows nothing of rankings.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from mm_retriever.forks import ForkLock
from mm_retriever.images import pixel_digest
from mm_retriever.phi3_vision.decoding import (
    TOKENS_AT_ONCE,
    LogitFilter,
    NoRepeat,
    Suppress,
    TextStream,
    finite,
    ids_behind,
    likelihoods,
)
from mm_retriever.phi3_vision.model import Phi3Vision, Prefix
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor
from mm_retriever.rerank.scorer import Meter

PICTURES_AT_ONCE = 8  # through the processor: bounds the memory of their pixels
NO_REPEAT = 6  # tokens: longer runs do not come twice in one sentence
BEGINNINGS_KEPT = 4


class PictureMemory:
    """Features of pictures by content, the latest of them, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._features: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._turn = ForkLock()

    def get(self, key: tuple[str, int]) -> Tensor | None:
        """The features, if they are still there."""
        with self._turn:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

    def put(self, key: tuple[str, int], features: Tensor) -> None:
        """Keep the features; the oldest go where there is no room."""
        size = features.nbytes
        if size > self._max_bytes:
            return
        with self._turn:
            if key not in self._features:
                self._bytes += size
            # a copy: what the tower returns is a view that would keep a whole batch alive
            self._features[key] = features.clone()
            while self._bytes > self._max_bytes:
                self._bytes -= self._features.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        return len(self._features)


class SharedModel:
    """A loaded model that any number of conversations share; it takes one step at a time, whoever asks.

    Args:
        model: Phi-3 Vision.
        processor: Of that model.
        lock: Held during each step; share it with whoever else uses the model.
        memory_bytes: For features of pictures.
    """

    def __init__(
        self, model: Phi3Vision, processor: Phi3VisionProcessor, lock: ForkLock | None, memory_bytes: int
    ) -> None:
        self.model, self.processor = model, processor
        self.lock = ForkLock(threading.RLock) if lock is None else lock
        self._memory = PictureMemory(memory_bytes)
        self._beginnings: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._processors = {processor.num_crops: processor}

    def with_crops(self, num_crops: int) -> Phi3VisionProcessor:
        """The processor that cuts pictures into so many crops at most."""
        if num_crops not in self._processors:
            other = copy.copy(self.processor)
            other.num_crops = num_crops
            self._processors[num_crops] = other
        return self._processors[num_crops]

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], num_crops: int, meter: Meter) -> list[Tensor]:
        """Token embeddings of pictures, (tokens, D) each; those still in memory are not computed again."""
        keys = [(pixel_digest(image), num_crops) for image in images]
        found = {key: kept for key in set(keys) if (kept := self._memory.get(key)) is not None}
        meter.pictures_kept += len(found)
        wanted = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        todo = list(wanted.items())
        for start in range(0, len(todo), PICTURES_AT_ONCE):
            some = todo[start : start + PICTURES_AT_ONCE]
            pictures = self.with_crops(num_crops).pictures([image for _, image in some])
            with self.lock:
                features = self.model.image_features(pictures.pixel_values, pictures.image_sizes)
            meter.pictures += len(some)
            for (key, _), feature in zip(some, features, strict=True):
                found[key] = feature
                self._memory.put(key, feature)
        return [found[key] for key in keys]

    def prefill(self, ids: Sequence[int], features: Sequence[Tensor], total_length: int, meter: Meter) -> Prefix:
        """The beginning of a conversation."""
        meter.prefilled += len(ids)
        meter.passes += 1
        with self.lock:
            return self.model.prefill(list(ids), features, total_length=total_length)

    def beginning(self, ids: Sequence[int], total_length: int, meter: Meter) -> Prefix:
        """A beginning of words only, which is kept for the next time."""
        short = self.model.config.short_context
        key = (int(short is not None and total_length > short), *ids)
        with self.lock:
            kept = self._beginnings.get(key)
            if kept is None:
                kept = self._beginnings[key] = self.prefill(ids, (), total_length, meter)
            self._beginnings.move_to_end(key)
            while len(self._beginnings) > BEGINNINGS_KEPT:
                self._beginnings.popitem(last=False)
            return kept

    def extend(self, prefix: Prefix, ids: Sequence[int] | Tensor, features: Sequence[Tensor], meter: Meter) -> Prefix:
        """What follows a beginning; several rows (B, T) may follow one."""
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
        """Log P of each target behind its prompt, all of which follow one beginning."""
        meter.prefilled += sum(len(p) + len(t) - 1 for p, t in zip(prompts, targets, strict=True))
        meter.passes += 1
        with self.lock:
            rows = [self.model.embed(list(ids), own)[0] for ids, own in zip(prompts, features, strict=True)]
            scores: list[float] = likelihoods(self.model, prefix, rows, targets).tolist()
        return scores

    def following(self, text: str) -> list[int]:
        """Ids of a text in the middle of a line."""
        return ids_behind(self.processor.encode_literal, "x", text)


class Conversation:
    """One growing prompt. What has been said is computed once, for whatever is said next and for every fork.

    Args:
        shared: The model that answers.
        meter: Counts tokens and watches the time.
        total_length: Most tokens that it and its forks will have; see `Phi3Vision.prefill`.
    """

    def __init__(self, shared: SharedModel, meter: Meter, total_length: int) -> None:
        self.shared, self.meter, self.total_length = shared, meter, total_length
        self._prefix: Prefix | None = None
        self._pending: list[int] = []  # decided, but not yet fed
        self._counted = 0  # of the pending: chosen by the model, and counted as that

    @property
    def prefix(self) -> Prefix:
        """All that has been said, computed."""
        if self._prefix is None or self._pending:
            self.say(())
        assert self._prefix is not None
        return self._prefix

    def say(self, ids: Iterable[int], features: Sequence[Tensor] = ()) -> None:
        """Feed what follows."""
        new = [*self._pending, *ids]
        if self._prefix is None:
            self._prefix = self.shared.prefill(new, features, self.total_length, self.meter)
        else:
            self._prefix = self.shared.extend(self._prefix, new, features, self.meter)
        self.meter.prefilled -= self._counted
        self._pending, self._counted = [], 0

    def write(self, opening: Sequence[int], *, stop_ids: Collection[int], max_new_tokens: int) -> list[int]:
        """Ids that the model writes behind the opening; what stops it is not part of them."""
        if opening or self._pending or self._prefix is None:
            self.say(opening)
        stream = TextStream(
            _Uncounted(self.shared),
            self.prefix,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            filters=self._filters(stop_ids),
            should_stop=self.meter.out_of_time,
        )
        written = list(stream)
        self._prefix = stream.prefix
        self._pending = written[-1:]
        self._counted = len(self._pending)
        self.meter.generated += len(written)
        self.meter.passes += max(0, len(written) - 1)
        return written

    def answers(
        self,
        turns: Sequence[Sequence[int]],
        features: Sequence[Sequence[Tensor]],
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Ids that the model writes to each of several turns, any of which may come next.

        Turns of one length are answered side by side. The conversation itself stays as it is.
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
                self._write_rows(prefix, [written[i] for i in rows], frozenset(stop_ids), max_new_tokens)
        return written

    def _write_rows(self, prefix: Prefix, rows: list[list[int]], stop_ids: frozenset[int], limit: int) -> None:
        """Greedy text of several rows; one that has ended is fed on with what nobody reads."""
        filters = self._filters(stop_ids)
        going = set(range(len(rows)))
        while True:
            logits = finite(prefix.logits)
            chosen = []
            for row, words in enumerate(rows):
                scores = logits[row]
                for apply in filters if row in going else ():
                    scores = apply(scores, words)
                chosen.append(int(scores.argmax()))
            going -= {row for row in going if chosen[row] in stop_ids}
            for row in going:
                rows[row].append(chosen[row])
            self.meter.generated += len(going)
            going -= {row for row in going if len(rows[row]) >= limit}
            if not going or self.meter.out_of_time():
                return
            prefix = _Uncounted(self.shared).extend(prefix, torch.tensor(chosen)[:, None])
            self.meter.passes += 1

    def _filters(self, stop_ids: Collection[int]) -> list[LogitFilter]:
        return [Suppress(self.shared.processor.special_ids - frozenset(stop_ids)), NoRepeat(NO_REPEAT)]

    def put(self, opening: Sequence[int], words: Sequence[int]) -> None:
        """Into the model's mouth: what it said another time. Fed with what comes next."""
        self._pending += [*opening, *words]

    def fork(self) -> Conversation:
        """Another conversation with the same beginning; neither hears of what is said in the other."""
        other = Conversation(self.shared, self.meter, self.total_length)
        other._prefix = self.prefix
        return other


class _Uncounted:
    """The model's own words, fed back to it: they are counted as generated, not as prompt."""

    def __init__(self, shared: SharedModel) -> None:
        self._shared = shared

    def extend(self, prefix: Prefix, input_ids: Sequence[int] | Tensor, /) -> Prefix:
        with self._shared.lock:
            return self._shared.model.extend(prefix, input_ids)
