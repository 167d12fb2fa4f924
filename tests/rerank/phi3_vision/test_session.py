"""`Phi3VisionRerank` against itself from scratch: what is computed once and kept changes no figure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core.schema import NodeWithScore, QueryBundle
from PIL import Image
from torch import Tensor

from mm_retriever.images import load_image
from mm_retriever.images.sheet import contact_sheet
from mm_retriever.phi3_vision.processor import Message, Slot
from mm_retriever.phi3_vision.prompts import (
    ANSWER_PICTURE,
    ANSWER_RANKING,
    ANSWER_WANTED,
    ASK_COMPOSED,
    ASK_FITS,
    ASK_REASON,
    DESCRIBE,
    RANK_SHEET,
)
from mm_retriever.rerank.phi3_vision.dialogue import FeatureMemory
from tests.support.phi3_vision_small import small_processor
from tests.support.rerank_small import MODES, STEPS, composed, draw_folder, image_nodes, make_plain, plain_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("pictures"))


class FromScratch:
    """The conversations of `prompts`, each computed in one piece with nothing reused."""

    def __init__(self, nodes: Sequence[NodeWithScore], bundle: QueryBundle) -> None:
        self.model, self.processor = plain_model(), copy.copy(small_processor())
        self.processor.num_crops = 1
        self.images = [load_image(node.node.image_path) for node in nodes]  # type: ignore[attr-defined]
        self.query = load_image(bundle.image_path or "")
        ask = ASK_COMPOSED.format(query=bundle.query_str)
        self.asked = Message("user", [self.slot(self.query), ask])
        start = self.encode([self.asked], answer=ANSWER_PICTURE)
        self.caption_ids = self.greedy(start, [self.query])
        self.opened = start + self.caption_ids + small_ids_after(ANSWER_WANTED)
        self.wanted_ids = self.greedy(self.opened, [self.query])
        self.understood = self.opened + self.wanted_ids
        self.wanted = self.processor.decode(self.wanted_ids)

    def encode(self, turns: list[Message], **options: Any) -> list[int]:
        return self.processor.encode_messages(turns, **options)

    def slot(self, image: Image.Image, num_crops: int = 1) -> Slot:
        processor = copy.copy(self.processor)
        processor.num_crops = num_crops
        return Slot(processor.image_tokens(*image.size))

    def features(self, images: Sequence[Image.Image], num_crops: int = 1) -> list[Tensor]:
        processor = copy.copy(self.processor)
        processor.num_crops = num_crops
        found = processor.image_inputs(images)
        with torch.inference_mode():
            return self.model.image_features(found.pixel_values, found.image_sizes)

    def logits(self, ids: list[int], features: Sequence[Tensor]) -> Tensor:
        """(T, V), from one forward over everything; images of later turns are numbered on."""
        numbered, image_number = [], 0
        for before, token in zip([0, *ids], ids, strict=False):
            image_number += (token < 0 and before != token) or (token < 0 and before >= 0)
            numbered.append(-image_number if token < 0 else token)
        with torch.inference_mode():
            embedded = self.model.embed(numbered, features)
            return self.model(inputs_embeds=embedded, use_cache=False).logits[0].float()

    def greedy(self, ids: list[int], images: Sequence[Image.Image], more: Sequence[Tensor] = ()) -> list[int]:
        features = [*self.features(images), *more]
        banned = sorted(self.processor.special_ids - set(self.processor.stop_ids))
        written: list[int] = []
        while len(written) < STEPS:
            logits = self.logits(ids + written, features)[-1].clone()
            logits[banned] = -torch.inf
            token = int(logits.argmax())
            if token in self.processor.stop_ids:
                break
            written.append(token)
        return written

    def log_likelihood(self, turn: Message, features: Sequence[Tensor]) -> float:
        prompt = self.encode([turn])
        whole = [*self.encode([turn], answer=self.wanted), self.processor.token_id("<|end|>")]
        scores = self.logits(whole, features).log_softmax(-1)
        return sum(float(scores[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))

    def continued(self, parts: list[str | Slot], answer: bool | str = True) -> list[int]:
        return self.understood + self.encode([Message("user", parts)], first=False, answer=answer)


def small_ids_after(text: str) -> list[int]:
    return small_processor().encode_literal("x" + text)[len(small_processor().encode_literal("x")) :]


@pytest.fixture(scope="module")
def scratch(folder: Path) -> FromScratch:
    return FromScratch(image_nodes(folder, 4), composed(folder))


@pytest.mark.parametrize(("mode", "crops"), [*((mode, None) for mode in MODES), ("likelihood", 1)])
def test_reusing_what_is_computed_changes_nothing(
    folder: Path, scratch: FromScratch, mode: str, crops: int | None
) -> None:
    """Truth: each conversation in one forward, with nothing cached: caption, description, values and reasons.

    By default an image is whole and in one crop, but for candidates that are only scored by likelihood.
    """
    result = make_plain(mode=mode, num_crops=crops, reasons="all").rerank(image_nodes(folder, 4), composed(folder))
    assert result.caption == " ".join(scratch.processor.decode(scratch.caption_ids).split())
    assert result.wanted == " ".join(scratch.wanted.split())
    query = scratch.features([scratch.query])
    expected: list[float] = []
    if mode == "sheet":
        ids, features = sheet_prompt(scratch)
        logits = scratch.logits(ids, [*query, *features])[-1]
        labels = [small_ids_after(f" {number},") for number in range(1, 5)]
        fork = next(i for i in range(9) if len({tuple(label[: i + 1]) for label in labels}) > 1)
        if fork:
            logits = scratch.logits(ids + labels[0][:fork], [*query, *features])[-1]
        expected = logits[[label[fork] for label in labels]].log_softmax(-1).tolist()
    for image in scratch.images:
        shown = scratch.features([image])
        if mode == "likelihood":
            scored = crops or 0
            turn = Message("user", [DESCRIBE, scratch.slot(image, scored)])
            expected.append(scratch.log_likelihood(turn, scratch.features([image], scored)))
        if mode == "pointwise":
            ids = scratch.continued([scratch.slot(image), ASK_FITS])
            space = small_processor().encode_literal("yes")[0]
            logits = scratch.logits([*ids, space], [*query, *shown])[-1]
            first = {
                word: small_processor().encode_literal(word)[1] for word in ("yes", "Yes", "YES", "no", "No", "NO")
            }
            yes, no = ({first[word] for word in words} for words in (("yes", "Yes", "YES"), ("no", "No", "NO")))
            expected.append(float(logits[sorted(yes)].logsumexp(0) - logits[sorted(no)].logsumexp(0)))
    found = {node.node.node_id: node.node.metadata for node in result.nodes}
    assert [found[f"p{i}"]["rerank_model_score"] for i in range(4)] == pytest.approx(expected, rel=1e-4, abs=2e-4)
    assert list(result.order) == sorted(range(4), key=lambda i: -expected[i])
    for i, image in enumerate(scratch.images):
        reason = scratch.greedy(
            scratch.continued([scratch.slot(image), ASK_REASON]), [scratch.query], scratch.features([image])
        )
        assert found[f"p{i}"]["rerank_reason"] == " ".join(scratch.processor.decode(reason).split())


def sheet_prompt(scratch: FromScratch) -> tuple[list[int], list[Tensor]]:
    sheet = contact_sheet(scratch.images, scratch.query)
    slot = Slot(small_processor(4).image_tokens(*sheet.size))
    return scratch.continued([slot, RANK_SHEET.format(count=4)], ANSWER_RANKING), scratch.features([sheet], 4)


def test_nothing_is_prefilled_twice(folder: Path, scratch: FromScratch) -> None:
    """Truth: the lengths of the conversations, each shared part counted once."""
    nodes, bundle = image_nodes(folder, 4), composed(folder)
    caption, wanted = len(scratch.caption_ids), len(scratch.wanted_ids)
    asked = len(scratch.understood) - caption - wanted
    order = make_plain(mode="sheet").rerank(nodes, bundle).order
    why = [scratch.slot(scratch.images[order[0]]), ASK_REASON]
    reason = scratch.greedy(scratch.continued(why), [scratch.query], scratch.features([scratch.images[order[0]]]))
    reranker = make_plain(mode="sheet")
    usage = reranker.rerank(nodes, bundle).usage
    ranked = len(sheet_prompt(scratch)[0]) - len(scratch.understood)
    # one token more: the space that all numbers start with in this tokenizer
    assert usage.prefilled == asked + ranked + 1 + len(scratch.continued(why)) - len(scratch.understood)
    assert usage.generated == caption + wanted + len(reason)
    assert (usage.images, usage.images_kept) == (3, 0)  # query, sheet, the first one
    assert reranker.last_usage == usage
    again = reranker.rerank(nodes, QueryBundle("in red", image_path=bundle.image_path)).usage
    assert again.images_kept >= 2  # query and sheet
    assert again.images + again.images_kept == 3
    assert again.generated == usage.generated - caption  # it is remembered by the image's content

    likelihood = make_plain(mode="likelihood", reasons="none")
    usage = likelihood.rerank(nodes, bundle).usage
    rows = [
        scratch.encode([Message("user", [DESCRIBE, scratch.slot(image, 0)])], answer=scratch.wanted)
        for image in scratch.images
    ]
    head = rows[0].index(-1)
    assert usage.prefilled == asked + head + sum(len(row) - head for row in rows)
    assert (usage.generated, usage.images) == (caption + wanted, 5)
    # the head of a description is the same for every query
    assert likelihood.rerank(nodes, bundle).usage.prefilled == usage.prefilled - head + caption
    assert likelihood.last_usage is not None
    assert likelihood.last_usage.images == 0
    assert likelihood.last_usage.images_kept == 5


def test_a_generated_list_counts_what_the_model_chose(folder: Path) -> None:
    """Truth: all but the last of four places are chosen, one token each; the rest of the list is fed."""
    nodes, bundle = image_nodes(folder, 4), composed(folder)
    single = make_plain(mode="sheet", reasons="none").rerank(nodes, bundle).usage
    generated = make_plain(mode="sheet", reasons="none", ranking="generated").rerank(nodes, bundle).usage
    assert generated.generated == single.generated + 3
    assert generated.prefilled == single.prefilled + 2 * 2  # a comma and a space, twice


def test_the_memory_of_features_has_a_limit_and_forgets_the_oldest() -> None:
    """Truth: our choice: bytes, not images."""
    memory = FeatureMemory(3 * 40)
    batch = torch.arange(40.0).view(4, 10)
    for i, feature in enumerate(batch):
        memory.put((str(i), 1), feature)
        assert memory.get(("0", 1)) is not None  # used: not the oldest
    assert memory.get(("1", 1)) is None
    assert [memory.get((str(i), 1)) is not None for i in (2, 3)] == [True, True]
    kept = memory.get(("3", 1))
    assert kept is not None
    assert kept.tolist() == batch[3].tolist()
    assert kept.untyped_storage().nbytes() == 40
    memory.put(("large", 1), torch.zeros(100))
    assert len(memory) == 3
