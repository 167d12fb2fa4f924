"""Embedder, pipeline and reranker through `mteb.evaluate`, on a made-up task of drawn products. No network is asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from datasets import Dataset
from mteb import CrossEncoderProtocol, EncoderProtocol, ResultCache, SearchProtocol, evaluate
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.errors import IngestError, QueryError
from mm_retriever.evaluation.mteb import MTEBEncoder, MTEBPipeline, MTEBReranker
from mm_retriever.rerank import ScorerRerank
from tests.support.colour_embedding import ColourEmbedder
from tests.support.colour_scorer import MeanColour

KINDS = ("phone case", "mug", "umbrella")
LOOKS = (("leopard", "natural"), ("polka dots", "red"), ("stars", "blue"), ("stripes", "green"))
SIDE = 96


def facts(name: str, **more: Any) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="Drawn products.",
        reference="https://example.org",
        dataset={"path": "none", "revision": "none"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2026-01-01", "2026-01-02"),
        domains=["Web"],
        task_subtypes=[],
        license="mit",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
        **{"type": "Any2AnyRetrieval", "category": "it2i", "modalities": ["image", "text"], **more},
    )


@cache
def drawn() -> tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, dict[str, int]]]:
    """Corpus, queries and relevant documents; the right product gains 3, others of its kind 1."""
    products = [(kind, *look) for kind in KINDS for look in LOOKS]
    corpus = {
        "id": [f"{kind}/{pattern}" for kind, pattern, _ in products],
        "image": [draw_product(*product, seed=7, size=SIDE) for product in products],
    }
    queries: dict[str, list[Any]] = {"id": [], "image": [], "text": []}
    relevant = {}
    for number, (kind, pattern, colour) in enumerate(products):
        queries["id"].append(f"q{number}")
        queries["image"].append(draw_theme(pattern, colour, seed=90 + number, size=SIDE))
        queries["text"].append(f"{kind} with this")
        same_kind = {f"{kind}/{other}": 1 for other, _ in LOOKS}
        relevant[f"q{number}"] = {**same_kind, f"{kind}/{pattern}": 3}
    return corpus, queries, relevant


class DrawnProducts(AbsTaskRetrieval):
    """An image of a pattern and the name of a kind of product ask for that product."""

    metadata = facts("DrawnProducts")
    top_ranked: ClassVar[dict[str, list[str]] | None] = None

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        corpus, queries, relevant = drawn()
        split = {"corpus": Dataset.from_dict(corpus), "queries": Dataset.from_dict(queries)}
        split |= {"relevant_docs": relevant, "top_ranked": self.top_ranked}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class DrawnReranking(DrawnProducts):
    """The same queries, each with four documents in an order that is wrong."""

    metadata = facts("DrawnReranking", type="Reranking")
    top_ranked: ClassVar = {
        f"q{number}": [f"{KINDS[(row + shift) % 3]}/{LOOKS[(look + shift) % 4][0]}" for shift in (3, 1, 0, 2)]
        for number, (row, look) in enumerate((row, look) for row in range(3) for look in range(4))
    }


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Truth: the names that anybody looks up; nobody may, but for this machine's own."""
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def noted(host: Any, *rest: Any, **more: Any) -> Any:
        asked.append(str(host))
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    yield
    assert set(asked) <= {"localhost", "127.0.0.1", "::1", "None"}


@pytest.fixture(scope="module")
def encoder() -> MTEBEncoder:
    return MTEBEncoder("tiny", device="cpu")


def figures(model: Any, task: AbsTaskRetrieval, cache: ResultCache | None = None) -> dict[str, Any]:
    result = evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


def ndcg_at_10(scores: np.ndarray, gains: np.ndarray) -> float:
    """By hand: (Q, N) scores and gains to the mean over queries of DCG / ideal DCG, with linear gains.

    What has the score -inf is not in the ranking, and in the ideal one all the same.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    discounts = 1 / np.log2(np.arange(2, 12))
    dcg = (np.take_along_axis(np.where(scores > -np.inf, gains, 0), order, axis=1) * discounts).sum(1)
    ideal = (-np.sort(-gains, axis=1)[:, :10] * discounts).sum(1)
    return float((dcg / ideal).mean())


@pytest.fixture(scope="module")
def by_hand(encoder: MTEBEncoder) -> float:
    """nDCG@10 of the embedder, without mteb: LlamaIndex's calls and numpy."""
    (corpus, asked, relevant), model = drawn(), encoder.embed_model
    documents = np.array(model.get_image_embedding_batch(corpus["image"]))
    queries = np.array(model.get_composed_embedding_batch(asked["text"], asked["image"]))
    gains = np.array([[relevant[query].get(id_, 0) for id_ in corpus["id"]] for query in asked["id"]])
    return ndcg_at_10(queries @ documents.T, gains)


def test_the_encoders_ndcg_is_the_one_worked_out_by_hand(encoder, by_hand):
    assert isinstance(encoder, EncoderProtocol)
    assert 0.5 < by_hand < 1, "neither trivial nor chance"
    assert figures(encoder, DrawnProducts())["ndcg_at_10"] == pytest.approx(by_hand, abs=1e-5)


def test_the_pipelines_ndcg_is_the_encoders_as_milvus_lite_is_exact(encoder, by_hand):
    with MTEBPipeline(encoder.embed_model) as pipeline:
        assert isinstance(pipeline, SearchProtocol)
        assert not isinstance(pipeline, EncoderProtocol)
        found = figures(pipeline, DrawnProducts())
    assert found["ndcg_at_10"] == pytest.approx(by_hand, abs=1e-5)
    assert found["recall_at_20"] == 1.0, "no document is lost"


@pytest.mark.slow
def test_a_reranker_in_the_pipeline_changes_the_order_and_loses_nobody(encoder, by_hand):
    reranker = ScorerRerank(MeanColour("mean-colour", calibrated=True), top_n=2)
    with MTEBPipeline(encoder.embed_model, rerank=reranker, rerank_depth=5) as pipeline:
        found = figures(pipeline, DrawnProducts())
    assert found["recall_at_20"] == 1.0
    assert found["ndcg_at_10"] != pytest.approx(by_hand, abs=1e-3)


def test_a_reranker_ranks_the_documents_of_each_query():
    """By mean colour alone; truth: the same distances by numpy, on the same images."""
    reranker = MTEBReranker(ScorerRerank(MeanColour("colour-distance", calibrated=False)))
    assert isinstance(reranker, CrossEncoderProtocol)
    corpus, queries, relevant = drawn()
    means = dict(zip(corpus["id"] + queries["id"], map(mean_colour, corpus["image"] + queries["image"]), strict=True))
    candidates = DrawnReranking.top_ranked
    scores = [[near(means[q], means[d]) if d in candidates[q] else -np.inf for d in corpus["id"]] for q in candidates]
    gains = [[relevant[q].get(d, 0) for d in corpus["id"]] for q in candidates]
    expected = ndcg_at_10(np.array(scores), np.array(gains))
    assert 0.4 < expected < 1
    assert figures(reranker, DrawnReranking())["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)


def near(colour: np.ndarray, other: np.ndarray) -> float:
    return -float(np.abs(colour - other).mean())


def mean_colour(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64).mean((0, 1))


@pytest.mark.slow
def test_the_pipeline_ranks_only_the_documents_that_a_reranking_task_gives(encoder):
    with MTEBPipeline(encoder.embed_model) as pipeline:
        found = figures(pipeline, DrawnReranking())
    assert found["ndcg_at_10"] == pytest.approx(figures(encoder, DrawnReranking())["ndcg_at_10"], abs=1e-5)


@pytest.mark.slow
def test_results_are_kept_apart_by_weights_and_settings(encoder, tmp_path):
    """mteb skips what its cache holds under the same name: another model there would be given these figures."""
    cache = ResultCache(tmp_path)
    figures(encoder, DrawnProducts(), cache)
    assert encoder.mteb_model_meta.name == "mm-retriever/tiny"
    other = MTEBEncoder(ColourEmbedder("tiny"))
    assert other.mteb_model_meta.name == encoder.mteb_model_meta.name
    assert other.mteb_model_meta.revision != encoder.mteb_model_meta.revision
    assert figures(other, DrawnProducts(), cache) != figures(encoder, DrawnProducts(), cache)
    fused = [ScorerRerank(MeanColour("mean-colour", calibrated=True), fusion_weight=weight) for weight in (0.1, 0.2)]
    pipelines = [MTEBPipeline(encoder.embed_model, **options) for options in ({}, {"hybrid": True})]
    pipelines += [MTEBPipeline(encoder.embed_model, rerank=reranker) for reranker in fused]
    folders = {pipeline.mteb_model_meta.experiment_name for pipeline in pipelines}
    assert len(folders) == 4
    assert None not in folders


def test_what_cannot_be_embedded_is_refused(encoder):
    where: Any = {"task_metadata": DrawnProducts.metadata, "hf_split": "test", "hf_subset": "default"}
    with pytest.raises(QueryError, match="DrawnProducts gives audio, text: texts and images"):
        encoder.encode([{"audio": [b""], "text": ["a"]}], **where)
    with pytest.raises(QueryError, match="precision 'int8'"):
        encoder.encode([], **where, precision="int8")
    assert encoder.encode([], **where).shape == (0, encoder.embed_model.dimension)
    with pytest.raises(QueryError, match="nothing is indexed"):
        MTEBPipeline(encoder.embed_model).search(None, **where, top_k=1, encode_kwargs={})
    with pytest.raises(QueryError, match="takes no options"):
        MTEBEncoder(encoder.embed_model, dtype="bfloat16")


def test_a_document_that_cannot_be_stored_ends_the_run(encoder):
    corpus = Dataset.from_dict({"id": ["a", "b"], "text": ["a mug", " "]})
    where: Any = {"task_metadata": facts("Words", category="t2t", modalities=["text"]), "hf_split": "test"}
    with (
        MTEBPipeline(encoder.embed_model) as pipeline,
        pytest.raises(IngestError, match="1 of 2 documents of Words: document 1: it has neither text nor an image"),
    ):
        pipeline.index(corpus, **where, hf_subset="default", encode_kwargs={})
