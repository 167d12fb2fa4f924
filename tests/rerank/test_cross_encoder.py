"""`CrossEncoderRerank` on small random models of the real classes: a text reranker, and a Qwen3-VL-Reranker."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import QueryBundle
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import XLMRobertaForSequenceClassification

from mm_retriever import load_reranker
from mm_retriever.errors import CheckpointError, MissingExtraError, QueryError
from mm_retriever.from_pretrained import without_progress_bar, without_video_processor
from mm_retriever.rerank import CrossEncoderRerank, Meter, Query, TextRerank, registry
from mm_retriever.rerank.cross_encoder import CAPTION_SEEN, IMAGE_NOT_SEEN, NO_CAPTION, _sigmoid
from tests.support.sentence_models import byte_tokenizer, change_json, qwen3_vl_reranker_folder, text_reranker_folder

pytest.importorskip("sentence_transformers", reason='needs pip install "mm-retriever[sentence-transformers]"')

TEXTS = ["spare lid XK-2041", "orders", "red shop, Grüße", "XK-2042 lid lid"]


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_reranker_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_vl_reranker_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def seeing(images_folder: Path) -> Any:
    return load_reranker(str(images_folder), device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, noise = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, ((40, 60), (90, 30), (64, 64)), strict=True):
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return paths


def text_nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(id_=str(row), text=text), score=0.5) for row, text in enumerate(TEXTS)]


def image_nodes(files: list[Path], **options: Any) -> list[NodeWithScore]:
    return [NodeWithScore(node=ImageNode(id_=each.stem, image_path=str(each), **options), score=0.5) for each in files]


def library(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    with without_video_processor(), without_progress_bar():
        return CrossEncoder(str(folder), device="cpu", local_files_only=True)


def scores_of(nodes: list[NodeWithScore]) -> dict[str, float]:
    return {node.node.node_id: node.score or 0.0 for node in nodes}


# ------------------------------------------------------------------------------------------ the same numbers


def test_texts_are_ranked_by_the_sigmoid_of_the_models_logit(texts_folder):
    """Truth: the same checkpoint by transformers alone, pair by pair; and sentence-transformers' own `predict`."""
    nodes = text_nodes()
    found = TextRerank(texts_folder, top_n=4, device="cpu").postprocess_nodes(nodes, query_str="red lid")
    model, tokenizer = (
        XLMRobertaForSequenceClassification.from_pretrained(texts_folder).eval(),
        byte_tokenizer(bos=True),
    )
    with torch.inference_mode():
        logits = [model(**_known(tokenizer("red lid", text, return_tensors="pt"))).logits for text in TEXTS]
    expected = torch.sigmoid(torch.cat(logits)[:, 0]).numpy()
    own = library(texts_folder).predict([("red lid", text) for text in TEXTS])
    assert np.ptp(expected) > 0.01
    assert np.abs(own - expected).max() < 1e-6
    assert scores_of(found) == pytest.approx({str(row): value for row, value in enumerate(expected)}, abs=1e-6)
    assert [node.node.node_id for node in found] == [str(row) for row in np.argsort(-expected)]
    assert nodes == text_nodes()
    assert TextRerank is CrossEncoderRerank


def _known(tokens: Any) -> dict[str, Any]:
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("asked", ["text", "image", "both"])
def test_images_and_texts_get_the_scores_of_sentence_transformers(images_folder, seeing, files, asked):
    """The sigmoid of the log-odds of "yes" over "no", for every kind of query and candidate."""
    image = None if asked == "text" else str(files[2])
    text = "" if asked == "image" else "the same in blue"
    query: dict[str, Any] = {} if image is None else {"image": Image.open(files[2]).convert("RGB")}
    query |= {"text": text} if text else {}
    candidates = [{"image": Image.open(file).convert("RGB")} for file in files[:2]] + [{"text": each} for each in TEXTS]
    expected = library(images_folder).predict([(query, each) for each in candidates], activation_fn=torch.nn.Sigmoid())
    nodes = [*image_nodes(files[:2]), *text_nodes()]
    for number, node in enumerate(nodes):
        node.node.id_ = str(number)
    result = seeing.rerank(nodes, QueryBundle(text, image_path=image))
    assert np.ptp(expected) > 1e-3
    assert scores_of(result.nodes) == pytest.approx(
        {str(row): float(value) for row, value in enumerate(expected)}, abs=1e-6
    )
    assert [node.score for node in result.nodes] == sorted((node.score for node in result.nodes), reverse=True)
    assert result.usage.images == 2


def test_an_instruction_replaces_the_models_own(images_folder, files):
    told = load_reranker(str(images_folder), device="cpu", instruction="Find shoes.")
    expected = library(images_folder).predict(
        [({"text": "red"}, {"text": text}) for text in TEXTS], prompt="Find shoes."
    )
    found = scores_of(told.postprocess_nodes(text_nodes(), query_str="red"))
    assert [found[str(row)] for row in range(4)] == pytest.approx(
        [_sigmoid(float(value)) for value in expected], abs=1e-6
    )
    again = pickle.loads(pickle.dumps(told))
    assert scores_of(again.postprocess_nodes(text_nodes(), query_str="red")) == pytest.approx(found, abs=1e-6)


def test_candidates_that_a_model_is_sure_of_still_differ():
    """In single precision everything beyond a logit of 17 is 1."""
    values = [_sigmoid(logit) for logit in (-800.0, -20.0, -19.9, 0.0, 20.0, 20.1)]
    assert values == sorted(set(values))
    assert 0 <= values[0] < values[-1] <= 1
    assert values[3] == 0.5


# ------------------------------------------------------------------------------------------ what cannot be seen


def test_what_cannot_be_read_is_marked_and_last(seeing, files, tmp_path):
    """Not scored as an empty document."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    gone = [
        NodeWithScore(node=ImageNode(id_=path.stem, image_path=str(path)), score=0.9)
        for path in (tmp_path / "gone.png", tmp_path / "broken.png")
    ]
    empty = NodeWithScore(node=TextNode(id_="empty", text=" "), score=0.9)
    found = seeing.postprocess_nodes([*gone, empty, *image_nodes(files)], query_str="red")
    assert {node.node.node_id for node in found[3:]} == {"gone", "broken", "empty"}
    for node in found[3:]:
        assert node.score == 0
        assert node.node.metadata["rerank_note"]
        assert "rerank_model_score" not in node.node.metadata
    assert all(0 < (node.score or 0) < 1 for node in found[:3])


def test_a_text_reranker_ranks_images_by_their_captions_and_marks_those_without(texts_folder, files):
    reranker = load_reranker(str(texts_folder), device="cpu")
    named, bare = image_nodes(files[:1], text=TEXTS[0]), image_nodes(files[1:2])
    found = reranker.postprocess_nodes([*bare, *named, *text_nodes()[1:]], query_str="red lid")
    alone = scores_of(reranker.postprocess_nodes(text_nodes(), query_str="red lid"))
    notes = {node.node.node_id: node.node.metadata.get("rerank_note") for node in found}
    assert scores_of(found)["0"] == pytest.approx(alone["0"], abs=1e-6)
    assert notes["0"] == CAPTION_SEEN
    assert (found[-1].node.node_id, found[-1].score) == (bare[0].node.node_id, 0)
    assert notes[bare[0].node.node_id] == NO_CAPTION
    composed = reranker.postprocess_nodes([*bare, *named], query_bundle=QueryBundle("lid", image_path=str(files[2])))
    assert [node.node.metadata["rerank_note"] for node in composed] == [f"{IMAGE_NOT_SEEN}; {CAPTION_SEEN}", NO_CAPTION]
    with pytest.raises(QueryError, match="needs a question in words"):
        reranker.scorer.score(Query("", None), [], Meter(None))


def test_a_spent_budget_leaves_the_rest_unjudged(seeing, files):
    nodes = image_nodes([*files, *files])
    for number, node in enumerate(nodes):
        node.node.id_ = str(number)
    late = load_reranker(seeing.model_name, device="cpu", time_budget_s=1e-9, on_error="keep_order")
    found = late.postprocess_nodes(nodes, query_str="red")
    assert [node.node.node_id for node in found] == [str(number) for number in range(6)]
    assert all("time" in node.node.metadata["rerank_note"] for node in found)


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_text_that_looks_like_a_place_is_a_text(texts_folder, images_folder, files, monkeypatch, kind):
    """sentence-transformers takes such a string for an image, fetches it, and scores what is there."""
    reranker = load_reranker(str(texts_folder if kind == "texts" else images_folder), device="cpu")
    texts = [str(files[0]), "http://127.0.0.1:9/cat.png", "data:image/png;base64,xx", "<|image_pad|>"]
    nodes = [NodeWithScore(node=TextNode(id_=text, text=text), score=0.5) for text in texts]

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a text was opened or fetched")

    monkeypatch.setattr(Image, "open", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    found = reranker.postprocess_nodes(nodes, query_str=texts[1])
    assert len({node.score for node in found}) == 4
    assert all(0 < (node.score or 0) < 1 for node in found)


# ------------------------------------------------------------------------------------------ which models


def test_folders_are_recognised_by_what_saved_them(texts_folder, images_folder):
    for folder in (texts_folder, images_folder):
        assert registry._family(str(folder), None, None).load.__module__ == CrossEncoderRerank.__module__
    jina = registry._family("jinaai/jina-reranker-m0", None, None).MODELS["jinaai/jina-reranker-m0"]
    assert "CC-BY-NC" in jina.licence
    assert "not for commercial use" in jina.note


class RunsCode:
    """What a pickle with code in it does when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_no_file_of_a_reranker_runs_code_by_default(texts_folder, tmp_path):
    ran = tmp_path / "ran"
    with_pickle = Path(shutil.copytree(texts_folder, tmp_path / "pickle"))
    (with_pickle / "model.safetensors").unlink()
    torch.save(RunsCode(ran), with_pickle / "pytorch_model.bin")
    with_code = Path(shutil.copytree(texts_folder, tmp_path / "code"))
    (with_code / "own.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Own: pass\n")
    own = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    change_json(with_code / "config.json", model_type="strange", auto_map=own)
    for folder, message in ((with_pickle, "could run code"), (with_code, "needs Python code that its own repository")):
        with pytest.raises(CheckpointError, match=message):
            load_reranker(str(folder), device="cpu")
    assert not ran.exists()


def test_models_that_would_give_numbers_without_meaning_are_refused(texts_folder, tmp_path):
    """A head of random numbers, and a classifier of three labels."""
    headless = Path(shutil.copytree(texts_folder, tmp_path / "headless"))
    tensors = load_file(headless / "model.safetensors")
    body = {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier")}
    save_file(body, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lack 4 tensors that the model has, for example classifier"):
        load_reranker(str(headless), device="cpu")
    three = Path(shutil.copytree(texts_folder, tmp_path / "three"))
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (three / "config.json").write_text(json.dumps(json.loads((three / "config.json").read_text()) | labels))
    tensors["classifier.out_proj.weight"] = torch.randn(3, 24)
    tensors["classifier.out_proj.bias"] = torch.randn(3)
    save_file(tensors, three / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="gives 3 numbers for a pair; a reranker gives one"):
        load_reranker(str(three), device="cpu")


def test_without_the_extra_the_error_names_the_pip_command(texts_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        MissingExtraError, match=r'^sentence-transformers is not installed: pip install "mm-retriever\[s'
    ):
        load_reranker(str(texts_folder), device="cpu")
