"""What the bundled tiny reranker learns to say: its tokenizer, and conversations in the reranker's own prompts.

Every conversation goes through ``Phi3VisionProcessor.encode_messages``, so that the ids of training are those of use.
Only answers are scored. What training never shows together is no evidence against it: the patterns of ``HELD_OUT`` are
left out of the softmax where their kind has been named, and their kinds where that pattern is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from phrases import Mode, compose_query, full_text, reason, vocabulary
from tiny_training import SEEN_PAIRS, random_colour, reworded
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mm_retriever.demo.catalogue import (
    COLOURS,
    HELD_OUT,
    KINDS,
    NATURAL,
    PATTERNS,
    Looks,
    caption,
    colours_of,
)
from mm_retriever.phi3_vision import prompts
from mm_retriever.phi3_vision.processor import Message, Phi3VisionProcessor, Slot

CONTROL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_MARKS = (",", ".", ":", "-", "'", "?", "!", "\n")
_ENDINGS = ("s", "es", "ed", "y", *"0123456789")
_CHATTER = (
    "please hello can you find we want i am looking for could have give me now thanks if possible my sister a friend "
    "today yes color colour favourite blank missing cannot be read these are before system assistant"
)
_UNKNOWN = "qqq"  # any word outside the vocabulary


def build_tokenizer() -> Tokenizer:
    """Lower-casing WordPiece over the words of captions, training wordings and prompts; an unknown word is one <unk>.

    A line break is a token; those beside control tokens are swallowed.
    """
    said = " ".join(value for name, value in vars(prompts).items() if name.isupper())
    words = {*vocabulary(), *_CHATTER.split(), *re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", said).lower())}
    tokens = ["<unk>", *CONTROL_TOKENS, *_MARKS, *(f"##{piece}" for piece in _ENDINGS), *"0123456789", *sorted(words)]
    entries = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(entries, unk_token="<unk>", max_input_chars_per_word=60))  # noqa: S106 - a piece of text, no password
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    closed_up = ((" \n", "\n"), ("\n ", "\n"), (" - ", "-"), (" ' ", "'"), *((f" {mark}", mark) for mark in ",.:?!"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(cleanup=False), decoders.Fuse(), *(decoders.Replace(*pair) for pair in closed_up)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=token != "<unk>") for token in ("<unk>", *CONTROL_TOKENS)]  # noqa: S105 - a piece of text, no password
    )
    return tokenizer


# ---------------------------------------------------------------------- what is left out of the softmax


class Absent:
    """Tokens that a position of an answer leaves out of its softmax, since training cannot show them there."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        self.first = {kind: encode(kind)[0] for kind in KINDS}
        self.plain, self.with_, self.article = (encode(word)[0] for word in ("plain", "with", "a"))
        self.articles = {self.article, encode("an")[0]}
        # a pattern's own words in a caption, after "with"
        self.named = {
            pattern: encode(caption(Looks("mug", pattern, colours_of(pattern)[0])).partition(" with ")[2])
            for pattern in PATTERNS
            if pattern != "plain"
        }

    def __call__(self, ids: Sequence[int], looks: Looks) -> list[tuple[int, int]]:
        """(position, token) pairs for an answer about these looks."""
        kind, pattern, _ = looks
        if kind is None:
            return []
        never = {p for k, p in HELD_OUT if k == kind}
        found: list[tuple[int, int]] = []
        for place, token in enumerate(ids):
            if token == self.first[kind]:
                found += [(place, self.first[k]) for k, p in HELD_OUT if p == pattern]
            if place and ids[place - 1] in self.articles and "plain" in never:
                found.append((place, self.plain))
            if place and ids[place - 1] == self.with_:
                found += [(place + depth, self.named[p][depth]) for p in never - {"plain"} for depth in self._fork(p)]
        return [(place, token) for place, token in found if place < len(ids) and ids[place] != token]

    def _fork(self, pattern: str) -> list[int]:
        """Where the name of a pattern parts from all others': behind its article, if it has one."""
        return [1] if self.named[pattern][0] == self.article else [0]


# ---------------------------------------------------------------------- conversations


@dataclass
class Conversation:
    """Ids with slots (below zero) for ``images``, in reading order. ``scored``: positions whose token is learned.

    ``absent``: (position, token) pairs that are left out of the softmax that predicts this position.
    """

    ids: list[int] = field(default_factory=list)
    images: list[Looks] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    absent: list[tuple[int, int]] = field(default_factory=list)


class Conversations:
    """Draws training conversations about products of seen pairs."""

    def __init__(self, processor: Phi3VisionProcessor, rng: np.random.Generator) -> None:
        self.processor, self.rng = processor, rng
        self.slot = Slot(processor.image_tokens(320, 320))
        self.end = processor.token_id("<|end|>")
        self.absent = Absent(processor.encode_literal)

    def _ask(self, talk: Conversation, parts: list[str | Slot], *images: Looks, opening: str = "") -> None:
        """A user's turn, and the words that open every answer to it."""
        talk.ids += self.processor.encode_messages([Message("user", parts)], first=not talk.ids)
        talk.images += images
        self._answer(talk, opening.lstrip(), None)  # a line break beside a control token is swallowed

    def _answer(self, talk: Conversation, text: str, looks: Looks | None, *, end: bool = False) -> None:
        start, ids = len(talk.ids), self.processor.encode_literal(text)
        if looks is not None:
            talk.absent += [(start + place, token) for place, token in self.absent(ids, looks)]
        talk.ids += ids
        talk.scored += range(start, len(talk.ids))
        if end:  # scored, and not fed: a turn that follows brings its own
            talk.ids.append(self.end)
            talk.scored.append(len(talk.ids) - 1)

    def looks(self) -> Looks:
        """Of a product whose pair training shows."""
        kind, pattern = SEEN_PAIRS[int(self.rng.integers(len(SEEN_PAIRS)))]
        return Looks(kind, pattern, random_colour(pattern, self.rng))

    def description(self) -> Conversation:
        """One candidate and its canonical description; a text now and then."""
        talk, looks, chance = Conversation(), self.looks(), self.rng.random()
        if chance < 0.04:
            text = reworded(full_text(looks, self.rng), self.rng).replace("[UNK]", _UNKNOWN)
            self._ask(talk, [prompts.DESCRIBE_TEXT.format(text=text)])
        else:
            looks = looks._replace(kind=None) if chance < 0.16 else looks
            self._ask(talk, [prompts.DESCRIBE, self.slot], looks)
        self._answer(talk, caption(looks), looks, end=True)
        return talk

    def query(self, *, more: float = 0.45) -> Conversation:
        """A query, its caption and what is wanted; with the chance ``more``, a product found and the reason for it."""
        chance = self.rng.random()
        if chance < 0.1:
            return self._text_query(more)
        if chance < 0.16:
            return self._image_query(more)
        mode: Mode = "theme" if chance < 0.43 else "kind" if chance < 0.63 else "pattern" if chance < 0.83 else "colour"
        query = None
        while query is None:
            query = compose_query(self.looks(), mode, self.rng, never=HELD_OUT)
        text = reworded(query.text, self.rng).replace("[UNK]", _UNKNOWN)
        talk = Conversation()
        self._ask(
            talk, [self.slot, prompts.ASK_COMPOSED.format(query=text)], query.source, opening=prompts.ANSWER_PICTURE
        )
        self._answer(talk, caption(query.source), query.source)
        self._answer(talk, prompts.ANSWER_WANTED, None)
        return self._wanted(talk, query.wanted, mode, more)

    def _text_query(self, more: float) -> Conversation:
        talk, looks = Conversation(), self.looks()
        text = reworded(full_text(looks, self.rng), self.rng).replace("[UNK]", _UNKNOWN)
        self._ask(talk, [prompts.ASK_TEXT.format(query=text)], opening=prompts.ANSWER_WANTED)
        return self._wanted(talk, looks, None, more)

    def _image_query(self, more: float) -> Conversation:
        talk, looks = Conversation(), self.looks()
        theme = self.rng.random() < 0.3
        looks = looks._replace(kind=None) if theme else looks
        self._ask(talk, [self.slot, prompts.ASK_PICTURE], looks, opening=prompts.ANSWER_PICTURE)
        self._answer(talk, caption(looks), looks)
        self._answer(talk, prompts.ANSWER_WANTED, None)
        return self._wanted(talk, looks, "theme", 0 if theme else more)

    def _wanted(self, talk: Conversation, wanted: Looks, mode: Mode | None, more: float) -> Conversation:
        self._answer(talk, caption(wanted), wanted, end=True)
        if self.rng.random() < more:
            talk.ids.pop()  # the next piece begins with this <|end|>
            if self.rng.random() < 0.35:
                self._fits(talk, wanted)
            else:
                self._reason(talk, wanted, mode)
        return talk

    def _fits(self, talk: Conversation, wanted: Looks) -> None:
        fits = self.rng.random() < 0.4
        shown = wanted if fits else self.unlike(wanted)
        self._ask(talk, [self.slot, prompts.ASK_FITS], shown)
        self._answer(talk, "yes" if fits else "no", None, end=True)

    def _reason(self, talk: Conversation, wanted: Looks, mode: Mode | None) -> None:
        """The reason says what is seen, also where the product found is not quite the one wanted."""
        shown = self.unlike(wanted) if self.rng.random() < 0.25 else wanted
        if mode == "colour" and shown.colour == NATURAL:
            shown = wanted
        text = reason(mode or "theme", shown)
        if mode is None:
            text = text.removesuffix(", like the picture")
        self._ask(talk, [self.slot, prompts.ASK_REASON], shown)
        self._answer(talk, text, shown, end=True)

    def unlike(self, looks: Looks) -> Looks:
        """A product of a seen pair that differs in one thing: kind, pattern or colour."""
        kind, pattern, colour = looks
        while True:
            other = self.looks()
            chance = self.rng.random()
            if chance < 0.3:
                other = Looks(other.kind, pattern, colour)
            elif chance < 0.7:
                other = Looks(kind, other.pattern, colour if colour in colours_of(other.pattern) else other.colour)
            else:
                shades = colours_of(pattern)
                other = Looks(kind, pattern, shades[int(self.rng.integers(len(shades)))])
            if other != looks and (other.kind, other.pattern) not in HELD_OUT:
                return other


assert set(COLOURS) >= {colour for pattern in PATTERNS for colour in colours_of(pattern)}
