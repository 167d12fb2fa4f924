"""Rerankers by name: a scorer that is added by one word works wherever the others do."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode

from mm_retriever import load_reranker
from mm_retriever.cli import main
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.engine import image_query_engine
from mm_retriever.errors import ModelNotFoundError, QueryError, RerankError
from mm_retriever.images import ImagePolicy
from mm_retriever.rerank import Candidate, Meter, Query, ScorerRerank, TextRerank, VisionLLMRerank, registry
from mm_retriever.search_tools import ImageSearch
from mm_retriever.store import ImageStore, open_store
from tests.support.colour_embedding import paint
from tests.support.drawn_store import draw_leopard, drawn_store

NAMES = ("mean-colour", "colour-distance")


@pytest.fixture(autouse=True)
def one_more_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one word."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "tests.support.colour_scorer"))


@pytest.fixture(scope="module")
def embed_model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory, embed_model: VisualizedBGEEmbedding) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    drawn_store(folder, embed_model).close()
    return folder / "drawn.db"


@pytest.fixture(scope="module")
def store(db: Path, embed_model: VisualizedBGEEmbedding) -> Any:
    store: ImageStore = open_store(db, embed_model)
    yield store
    store.close()


@pytest.fixture(scope="module")
def leopard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_leopard(tmp_path_factory.mktemp("query") / "leopard.png")


def assert_scores(scores: list[float], name: str) -> None:
    """Calibrated scores are near 1 for every candidate of about this colour; shares of a list are together 1."""
    assert scores == sorted(scores, reverse=True)
    if name == "mean-colour":
        assert sum(scores) > len(scores) / 2
        assert scores[0] <= 1
    else:
        assert 0 < sum(scores) < 1.001


# ------------------------------------------------------------------------------------------ scores


def colours(folder: Path, *names: str) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=ImageNode(id_=name, image_path=str(paint(folder / f"{name}.png", name))), score=0.5)
        for name in names
    ]


def test_calibrated_scores_survive_and_others_become_shares(tmp_path: Path) -> None:
    """Truth: distances of colours, by hand; a text has no colour and is not judged, and a missing file is last."""
    white, grey, black = colours(tmp_path, "white", "grey", "black")
    text = NodeWithScore(node=TextNode(id_="text", text="white"), score=0.9)
    gone = NodeWithScore(node=ImageNode(id_="gone", image_path=str(tmp_path / "gone.png")), score=0.9)
    nodes = [gone, text, black, grey, white]
    query = QueryBundle("", image_path=str(tmp_path / "white.png"))
    by_share, kept = [load_reranker(name).rerank(nodes, query) for name in ("colour-distance", "mean-colour")]
    for result in (by_share, kept):
        assert [node.node.node_id for node in result.nodes] == ["white", "grey", "black", "text", "gone"]
        assert "not judged by" in result.nodes[3].node.metadata["rerank_note"]
        assert "gone.png" in result.nodes[4].node.metadata["rerank_note"]
        assert [node.score for node in result.nodes[3:]] == [0, 0]
        assert result.usage.passes == 1
    near = [1, 1 - 122 / 255, 1 - 245 / 255]
    assert [node.score for node in kept.nodes[:3]] == pytest.approx(near)
    shares = np.exp([0.0, -122, -245])
    assert [node.score for node in by_share.nodes[:3]] == pytest.approx(list(shares / shares.sum()))
    assert [node.node.metadata["rerank_model_score"] for node in by_share.nodes[:3]] == [0, -122, -245]


def test_scores_that_are_fused_with_the_retrieval_become_shares(tmp_path: Path) -> None:
    """Our choice: the sum of two normalised scores is no longer calibrated; the scorer's own is in the metadata."""
    nodes = colours(tmp_path, "white", "grey", "black")
    query = QueryBundle("", image_path=str(tmp_path / "white.png"))
    result = load_reranker("mean-colour", fusion_weight=0.5).rerank(nodes, query)
    assert sum(node.score or 0 for node in result.nodes) == pytest.approx(1)
    assert result.nodes[0].node.metadata["rerank_model_score"] == 1


class Wrong:
    """A scorer that gives what it was told to."""

    name = "wrong"

    def __init__(self, scores: Any, calibrated: bool) -> None:
        self.scores, self.calibrated = scores, calibrated

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> Any:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "calibrated", "message"),
    [
        ([1.0], True, "1 scores for 2 candidates"),
        ([0.5, 1.5], True, r"the score 1.5; calibrated scores go from 0 to 1"),
        ([0.5, float("nan")], True, "the score nan; calibrated"),
        ([0.5, float("inf")], False, "the score inf; a score is a finite number or None"),
        ([0.5, "0.7"], False, "the score '0.7'; a score is a finite number or None"),
        ([0.5, [0.7]], False, r"the score \[0.7\]; a score is a finite number or None"),
        ({0: 0.2, 1: 0.9}, False, "a scorer gives a list with a score for each candidate"),  # its keys were the scores
        (None, False, "a scorer gives a list with a score for each candidate"),
    ],
)
def test_scores_that_cannot_be_right_are_an_error(tmp_path: Path, scores: Any, calibrated: bool, message: str) -> None:
    """A wrong answer that looks right would be worse."""
    nodes = colours(tmp_path, "white", "black")
    with pytest.raises(RerankError, match=f"'wrong' gave .*{message}"):
        ScorerRerank(Wrong(scores, calibrated)).rerank(nodes, "which")
    kept = ScorerRerank(Wrong(scores, calibrated), on_error="keep_order").rerank(nodes, "which")
    assert kept.order == (0, 1)
    assert "'wrong' gave" in kept.error


# ------------------------------------------------------------------------------------------ by name, everywhere


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_takes_the_name(capfd: pytest.CaptureFixture[str], db: Path, leopard: Path, name: str) -> None:
    options = ["--model", "tiny", "--rerank-model", name, "--device", "cpu", "--top-k", "4", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--db", str(db), "--image", str(leopard), *options])
    rows = json.loads(capfd.readouterr().out)
    assert not stopped.value.code
    assert_scores([row["score"] for row in rows], name)


@pytest.mark.parametrize("name", NAMES)
def test_the_query_engine_takes_the_name(
    store: ImageStore, embed_model: VisualizedBGEEmbedding, leopard: Path, name: str
) -> None:
    engine = image_query_engine(store, embed_model, rerank=name, top_k=4)
    nodes = engine.query(QueryBundle("", image_path=str(leopard))).source_nodes
    assert_scores([node.score or 0 for node in nodes], name)
    assert "rerank_rank" in nodes[0].node.metadata


@pytest.mark.parametrize("name", NAMES)
def test_tools_and_the_mcp_server_take_the_name(
    store: ImageStore, embed_model: VisualizedBGEEmbedding, db: Path, leopard: Path, name: str
) -> None:
    """The server ranks by any scorer, and describes with what can be asked about images: a scorer cannot."""
    search = ImageSearch(store, embed_model, rerank=name, image_policy=ImagePolicy(roots=(leopard.parent,)))
    found = search.search(image=str(leopard), top_k=4)
    assert_scores([each.score for each in found.pictures], name)

    pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
    from mcp.client.client import Client
    from mcp_server_mm_retriever import create_server, image_search

    served = image_search(store, embed_model, vision_model=name, roots=[leopard.parent, db.parent], device="cpu")

    async def ask() -> Any:
        async with Client(create_server(served, structured=True)) as client:
            return await client.call_tool("search_images", {"image": str(leopard), "top_k": 4})

    answer = asyncio.run(ask())
    assert not answer.is_error
    assert_scores([each["score"] for each in answer.structured_content["results"]], name)


def test_a_wrong_name_is_told_before_any_model_is_loaded_and_anything_is_searched(
    capfd: pytest.CaptureFixture[str], store: ImageStore, embed_model: VisualizedBGEEmbedding, db: Path, leopard: Path
) -> None:
    """Truth: the embedding model named beside it does not exist either, and would be the error of whoever loads it."""
    wrong = ["--db", str(db), "--model", "/nowhere/at/all"]
    demo = ["demo", "--photos", str(leopard.parent), "--out", str(leopard.parent / "out"), "--model", "/nowhere/at/all"]
    commands = [
        ["search", "--text", "red", *wrong, "--rerank-model", "nobody/nothing"],
        [*demo, "--rerank-model", "nobody/nothing"],
    ]
    if importlib.util.find_spec("mcp"):
        commands.append(["mcp", *wrong, "--vision-model", "nobody/nothing"])
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            main(command)
        said = capfd.readouterr().err
        assert stopped.value.code == 2
        assert "'nobody/nothing' is no folder here" in said
        assert "/nowhere" not in said
    for make in (image_query_engine, ImageSearch):
        with pytest.raises(ModelNotFoundError, match="'nobody/nothing' is no folder here"):
            make(store, embed_model, rerank="nobody/nothing")


# ------------------------------------------------------------------------------------------ which family


def test_each_family_recognises_its_own(tmp_path: Path) -> None:
    """A remote model by its address, the bundled one by its name, folders by their config.json."""
    remote = load_reranker("Qwen/Qwen2.5-VL-7B", base_url="http://127.0.0.1:9/v1", top_n=3, attempts=1)
    assert isinstance(remote, VisionLLMRerank)
    assert (remote.model_name, remote.top_n, remote.attempts) == ("Qwen/Qwen2.5-VL-7B", 3, 1)
    tiny = load_reranker("tiny", device="cpu", mode="pointwise")
    assert (tiny.class_name(), tiny.fusion_weight) == ("Phi3VisionRerank", 0.3)
    assert tiny.llm is not None
    assert load_reranker("tiny", device="cpu", fusion_weight=0).fusion_weight == 0
    (tmp_path / "config.json").write_text('{"architectures": ["XLMRobertaForSequenceClassification"]}')
    assert registry._family(str(tmp_path), None, None).load.__module__ == TextRerank.__module__


def test_a_name_that_no_family_knows_names_those_there_are(tmp_path: Path) -> None:
    """One line: what was given, what there is."""
    (tmp_path / "config.json").write_text('{"model_type": "resnet\\n"}')
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path): "is a model of type 'resnet', which is no reranker",
        str(tmp_path / "empty"): "has no config.json",
        "nobody/nothing": r"config.json cannot be downloaded from the hub",
        "a b": r"config.json cannot be downloaded from the hub",
    }
    for name, message in cases.items():
        with pytest.raises(ModelNotFoundError, match=f"{message}.*'tiny', .*'mean-colour'") as caught:
            load_reranker(name)
        assert "\n" not in str(caught.value)


def test_an_option_that_is_changed_later_is_checked_as_one_that_is_given(tmp_path: Path) -> None:
    """A top_n of -1 left out the last of the candidates, unsaid."""
    nodes = colours(tmp_path, "white", "grey", "black")
    reranker = ScorerRerank(Wrong([0.1, 0.2, 0.3], True), top_n=2)
    for option, value, message in (
        ("top_n", -1, "top_n=-1: input should be greater"),
        ("on_error", "ignore", "on_error='ignore': input should be 'raise' or 'keep_order'"),
        ("topn", 1, "topn=1: object has no attribute"),
    ):
        with pytest.raises(QueryError, match=message):
            setattr(reranker, option, value)
    assert len(reranker.rerank(nodes, "which").nodes) == 2
    reranker.top_n = 1
    assert [node.node.metadata["rerank_model_score"] for node in reranker.rerank(nodes, "which").nodes] == [0.3]


def test_scores_may_come_from_a_generator_and_as_numpy_arrays(tmp_path: Path) -> None:
    nodes = colours(tmp_path, "white", "grey", "black")
    for scores in ((score for score in (0.25, 0.5, 0.75)), np.float32([0.25, 0.5, 0.75])):
        assert ScorerRerank(Wrong(scores, True)).rerank(nodes, "which").order == (2, 1, 0)  # type: ignore[arg-type]


def test_an_option_that_a_reranker_lacks_is_named() -> None:
    with pytest.raises(QueryError, match=r"ScorerRerank has no option 'window'; there are .*fusion_weight"):
        load_reranker("mean-colour", window=3)
    with pytest.raises(QueryError, match="top_n=0: input should be greater than or equal to 1"):
        load_reranker("mean-colour", top_n=0)
