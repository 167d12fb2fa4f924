"""Constrained decoding: a ranking is a permutation whatever the model says, and says what the model meant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, SuppressTokensLogitsProcessor

from mm_retriever.phi3_vision.decoding import (
    Sampler,
    TextStream,
    finite,
    ids_after,
    label_sequences,
    likelihoods,
    rank_at_once,
    rank_by_generation,
)
from tests.support.effort import EFFORT
from tests.support.phi3_vision_small import small_model, small_processor, small_tokenizer

ODD_VALUES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-45]


@dataclass(frozen=True)
class Said:
    """A beginning of a scripted model: everything fed so far, and the next logits."""

    ids: tuple[tuple[int, ...], ...]
    logits: Tensor


class ScriptedModel:
    """Emits whatever `speak` makes of the ids fed so far; counts calls. Stands at the seam that decoding defines."""

    def __init__(self, speak: Any, vocabulary: int = 32064) -> None:
        self.speak, self.vocabulary = speak, vocabulary
        self.calls: list[tuple[int, int]] = []

    def begin(self, *ids: int) -> Said:
        return self._said((ids,))

    def extend(self, prefix: Said, input_ids: Sequence[int] | Tensor, /) -> Said:
        rows = torch.as_tensor(input_ids)
        rows = rows[None] if rows.dim() == 1 else rows
        before = prefix.ids * len(rows) if len(prefix.ids) == 1 else prefix.ids
        self.calls.append((len(rows), rows.shape[1]))
        return self._said(tuple((*a, *b) for a, b in zip(before, rows.tolist(), strict=True)))

    def _said(self, ids: tuple[tuple[int, ...], ...]) -> Said:
        return Said(ids, torch.stack([self.speak(row) for row in ids]))


def encode_sentencepiece(text: str) -> list[int]:
    return small_processor().encode_literal(text)


@cache
def byte_level() -> Tokenizer:
    """A GPT-2-like tokenizer, in which a number's space is part of its first token and ` 12` may be one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "1"), ("Ġ1", "2"), ("Ġ", "3"), ("1", "0"), ("Ġ1", "0")]
    words = [*alphabet, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encode_bytes(text: str) -> list[int]:
    ids: list[int] = byte_level().encode(text).ids
    return ids


def numbers(count: int) -> list[str]:
    return [str(i + 1) for i in range(count)]


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("encode", [encode_sentencepiece, encode_bytes])
@pytest.mark.parametrize("count", [1, 9, 10, 50, 120])
def test_labels_are_told_apart_by_any_tokenizer(encode: Any, count: int) -> None:
    """Truth: decoded, every sequence is its label as an item of a list, and none is the beginning of another."""
    sequences = label_sequences(encode, numbers(count))
    tokenizer = byte_level() if encode is encode_bytes else small_tokenizer()
    for label, sequence in zip(numbers(count), sequences, strict=True):
        assert tokenizer.decode([*encode(","), *sequence]).strip().replace(" ", "") == f",{label},"
    for sequence in sequences:
        assert sum(other[: len(sequence)] == sequence for other in sequences) == 1


def test_labels_that_a_tokenizer_confuses_are_an_error() -> None:
    """Truth: our choice."""
    with pytest.raises(ValueError, match="'2'"):
        label_sequences(encode_sentencepiece, ["1", "2", "2"])
    with pytest.raises(ValueError, match="apart"):
        label_sequences(lambda text: [1] * len(text), ["1", "2"])


def test_ids_after_are_those_of_the_whole_text() -> None:
    """Truth: the whole text tokenised at once; at the beginning of a text the same word has a space before it."""
    before, text = "Picture: a cat", "\nWanted:"
    whole = encode_sentencepiece(before + text)
    assert encode_sentencepiece(before) + ids_after(encode_sentencepiece, before, text) == whole
    assert ids_after(encode_sentencepiece, before, text) != encode_sentencepiece(text)


# ---------------------------------------------------------------- permutations


def arbitrary_speaker(seed: int, odd: float) -> Any:
    """Logits as a function of everything said before, a share of them nan, infinite or extreme."""
    generator, shape = torch.Generator().manual_seed(seed), (32, 512)
    logits = torch.randn(shape, generator=generator) * 30
    strange = torch.rand(shape, generator=generator) < odd
    pick = torch.randint(len(ODD_VALUES), shape, generator=generator)
    rows = torch.where(strange, torch.tensor(ODD_VALUES)[pick], logits)
    return lambda row: rows[hash(row) % len(rows)]


@pytest.mark.slow
@settings(
    max_examples=1_000 * EFFORT,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 2**31),
    odd=st.sampled_from([0.0, 0.3, 1.0]),
    opened=st.booleans(),
)
@example(count=0, seed=0, odd=0.0, opened=True)
@example(count=1, seed=0, odd=1.0, opened=True)
def test_a_ranking_is_a_permutation_whatever_the_logits(
    tried: Counter[str], count: int, seed: int, odd: float, opened: bool
) -> None:
    """Truth: the definition of a ranking; both ways, so two thousand cases."""
    tried["model answers"] += 2
    model = ScriptedModel(arbitrary_speaker(seed, odd))
    sequences = label_sequences(encode_bytes, numbers(count))
    opening = encode_bytes("Ranking:") if opened else []
    ranked = rank_by_generation(model, model.begin(7), sequences, opening=opening)
    assert sorted(ranked.order) == list(range(count))
    written = [*ranked.prefix.ids[0], *ranked.pending]
    assert written == [7, *opening, *(token for i in ranked.order for token in sequences[i])]
    assert len(model.calls) <= 3 * count
    scores = rank_at_once(model, model.begin(7), sequences, opening=opening)
    assert scores.shape == (count,)
    assert sorted(scores.argsort(descending=True, stable=True).tolist()) == list(range(count))
    assert not scores.isnan().any()
    assert count == 0 or scores.exp().sum().item() == pytest.approx(1)


def prefers(encode: Any, wanted: Sequence[int], count: int, vocabulary: int) -> ScriptedModel:
    """A model that writes one particular list, and wants to write something else in between."""
    sequences = label_sequences(encode, numbers(count))
    text = [token for i in wanted for token in sequences[i]]

    def speak(row: tuple[int, ...]) -> Tensor:
        logits = torch.zeros(vocabulary)
        logits[5] = 50.0  # what it would rather say
        said = row[1:]
        if list(said) == text[: len(said)] and len(said) < len(text):
            logits[text[len(said)]] = 9.0
        return logits

    return ScriptedModel(speak, vocabulary)


@pytest.mark.parametrize(("encode", "vocabulary"), [(encode_sentencepiece, 32064), (encode_bytes, 512)])
@pytest.mark.parametrize("wanted", [[2, 0, 1], [11, 0, 10, 9, 1, 2, 8, 7, 3, 6, 5, 4], [0, 9, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_the_ranking_is_the_one_the_model_would_write(encode: Any, vocabulary: int, wanted: list[int]) -> None:
    """Truth: the list the scripted model wants; 1, 10, 11 and 12 share their first digit."""
    model = prefers(encode, wanted, len(wanted), vocabulary)
    ranked = rank_by_generation(model, model.begin(1), label_sequences(encode, numbers(len(wanted))))
    assert list(ranked.order) == wanted


def test_only_choices_cost_a_step_and_forced_text_comes_in_one_piece() -> None:
    """Truth: nine candidates leave eight choices; the separator and the space are never a step of their own."""
    model = ScriptedModel(arbitrary_speaker(1, 0.0))
    sequences = label_sequences(encode_sentencepiece, numbers(9))
    small = [tuple(token % 512 for token in sequence) for sequence in sequences]
    ranked = rank_by_generation(model, model.begin(7), small, opening=[1, 2, 3])
    assert len(model.calls) == 8
    assert model.calls[0] == (1, 3 + 1)
    assert all(call == (1, 3) for call in model.calls[1:])
    assert len(ranked.pending) == 5  # the last choice and its separator, then all of the one that is left


def test_single_pass_is_the_order_of_first_logits_and_one_step() -> None:
    """Truth: FIRST: candidates sorted by the logit of their label at the first slot; softmax over the candidates."""
    sequences = label_sequences(encode_sentencepiece, numbers(9))
    logits = torch.linspace(-3, 4, 32064)[torch.randperm(32064, generator=torch.Generator().manual_seed(5))]
    model = ScriptedModel(lambda row: logits)
    scores = rank_at_once(model, model.begin(7), sequences, opening=[1])
    first = logits[[sequence[1] for sequence in sequences]]
    torch.testing.assert_close(scores, first.double().log_softmax(-1))
    assert model.calls == [(1, 2)]


def test_scores_of_longer_numbers_are_the_probabilities_of_constrained_sampling() -> None:
    """Truth: every label's path written out, fork by fork."""
    sequences = label_sequences(encode_bytes, numbers(30))
    model = ScriptedModel(arbitrary_speaker(11, 0.0))
    scores = rank_at_once(model, model.begin(7), sequences)
    for sequence, score in zip(sequences, scores, strict=True):
        expected = 0.0
        for depth in range(len(sequence)):
            siblings = sorted({other[depth] for other in sequences if other[:depth] == sequence[:depth]})
            said = model.extend(model.begin(7), sequence[:depth]) if depth else model.begin(7)
            shares = said.logits[0, siblings].double().log_softmax(-1)
            expected += shares[siblings.index(sequence[depth])].item()
        assert score.item() == pytest.approx(expected, abs=1e-6)


def test_both_ways_agree_on_the_first_place_with_the_real_model() -> None:
    """Truth: the first greedy choice is the most likely fork at each step; for single digits the best score."""
    model, processor = small_model(), small_processor()
    prefix = model.prefill(processor.encode_messages([]))
    sequences = label_sequences(processor.encode_literal, numbers(9))
    opening = processor.encode_literal("Ranking:")
    ranked = rank_by_generation(model, prefix, sequences, opening=opening)
    scores = rank_at_once(model, prefix, sequences, opening=opening)
    assert ranked.order[0] == int(scores.argmax())
    assert sorted(ranked.order) == list(range(9))
    many = label_sequences(processor.encode_literal, numbers(50))
    assert sorted(rank_by_generation(model, prefix, many).order) == list(range(50))
    assert rank_at_once(model, prefix, many).exp().sum().item() == pytest.approx(1)


# ---------------------------------------------------------------- likelihood


@pytest.mark.parametrize("tokens_at_once", [1, 150, 100_000])
def test_likelihoods_do_not_depend_on_the_batch(tokens_at_once: int) -> None:
    """Truth: log-softmax of a forward over each row alone."""
    model, processor = small_model(), small_processor()
    prefix = model.prefill([1, 32010, 29871, 13])
    prompts = [torch.randn(length, 24, generator=torch.Generator().manual_seed(length)) for length in (9, 30, 17, 5)]
    targets = [processor.encode_literal(text) for text in ("a mug", "a red mug", "stars", "x")]
    scores = likelihoods(model, prefix, prompts, targets, tokens_at_once=tokens_at_once)
    for score, prompt, target in zip(scores, prompts, targets, strict=True):
        start = model.embed([1, 32010, 29871, 13])[0]
        embedded = torch.cat([start, prompt, model.embed(target)[0]])[None]
        with torch.inference_mode():
            logits = model(inputs_embeds=embedded).logits[0].log_softmax(-1)
        expected = sum(float(logits[i - len(target) - 1, token]) for i, token in enumerate(target))
        assert score.item() == pytest.approx(expected, abs=1e-3)
    assert likelihoods(model, prefix, [], []).shape == (0,)


# ---------------------------------------------------------------- bounded text


def test_text_ends_at_a_stop_id_at_its_limit_or_when_told() -> None:
    """Truth: our choice; the stop id is not part of the text."""
    countdown = ScriptedModel(lambda row: torch.nn.functional.one_hot(torch.tensor(row[-1] - 1), 32).float())

    def stream(**options: Any) -> TextStream[Said]:
        return TextStream(countdown, countdown.begin(9), stop_ids={5}, **options)

    stopped = stream(max_new_tokens=20)
    assert (list(stopped), stopped.finish_reason) == ([8, 7, 6], "stop")
    assert list(stopped) == []
    assert (stopped.prefix.ids, stopped.pending.tolist()) == (((9, 8, 7, 6),), [[]])
    long = stream(max_new_tokens=2)
    assert (list(long), long.finish_reason, long.prefix.ids) == ([8, 7], "length", ((9, 8),))
    assert long.pending.tolist() == [[7]]
    told = stream(max_new_tokens=20, should_stop=lambda: True)
    assert (list(told), told.finish_reason) == ([], "interrupted")


def test_rows_end_one_by_one_and_are_what_they_are_alone() -> None:
    """Truth: each row alone; one that has ended is fed on, and nobody reads what."""
    countdown = ScriptedModel(lambda row: torch.nn.functional.one_hot(torch.tensor(max(row[-1] - 1, 0)), 32).float())
    prefix = countdown.extend(countdown.begin(1), torch.tensor([[9], [7], [20]]))
    stream = TextStream(countdown, prefix, stop_ids={5}, max_new_tokens=4)
    assert len(list(stream)) == 4
    assert stream.rows == [[8, 7, 6], [6], [19, 18, 17, 16]]
    assert stream.finish_reason == "length"


def test_suppressed_ids_are_never_written_even_if_they_alone_are_finite() -> None:
    """Truth: our choice."""

    def speak(row: tuple[int, ...]) -> Tensor:
        logits = torch.full((16,), -math.inf)
        logits[3] = 1.0
        return logits

    model = ScriptedModel(speak)
    written = list(
        TextStream(
            model, model.begin(1), stop_ids=(), max_new_tokens=5, processors=[SuppressTokensLogitsProcessor([0, 3])]
        )
    )
    assert len(written) == 5
    assert not {0, 3} & set(written)


def test_no_run_is_written_twice() -> None:
    """Truth: the definition; without the filter this model says the same for ever."""
    model = ScriptedModel(lambda row: torch.arange(6.0).roll(row[-1]))
    written = list(
        TextStream(model, model.begin(1), stop_ids=(), max_new_tokens=60, processors=[NoRepeatNGramLogitsProcessor(3)])
    )
    runs = [tuple(written[i : i + 3]) for i in range(len(written) - 2)]
    assert len(set(runs)) == len(runs)
    free = list(TextStream(model, model.begin(1), stop_ids=(), max_new_tokens=60))
    assert len({tuple(free[i : i + 3]) for i in range(58)}) < 10


def test_sampling_is_greedy_at_zero_reproducible_and_bounded_by_top_p() -> None:
    """Truth: the definitions of temperature, seed and nucleus sampling (arXiv:1904.09751)."""
    logits = torch.tensor([[0.0, 3.0, 2.9, -5.0]])
    assert Sampler()(logits).tolist() == [1]
    first = [int(Sampler(1.0, seed=4)(logits)) for _ in range(3)]
    assert len(set(first)) == 1
    sampler = Sampler(1.0, top_p=0.6, seed=1)
    assert {int(sampler(logits)) for _ in range(200)} == {1, 2}
    assert {int(Sampler(1.0, top_p=1e-6, seed=i)(logits)) for i in range(20)} == {1}
    for temperature, top_p in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ValueError, match="top_p"):
            Sampler(temperature, top_p)


def test_finite_keeps_the_order() -> None:
    """Truth: the order of the extended reals, nan below all."""
    values = torch.tensor([math.nan, -math.inf, -1.0, 0.0, 5.0, math.inf])
    tamed = finite(values)
    assert torch.isfinite(tamed).all()
    assert (tamed[1:] >= tamed[:-1]).all()
