"""Runs, rerankings and what one has over another. Truth: rankings and values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError, RerankError
from mm_retriever.evaluation.comparison import (
    check_halves,
    chosen_weight,
    difference_of,
    differences,
    fused_rankings,
    part_values,
)
from mm_retriever.evaluation.datasets import EvaluationSet
from mm_retriever.evaluation.metrics import KEPT, REMOVED
from mm_retriever.evaluation.results import results_of
from mm_retriever.evaluation.runs import Cost, Run, model_runs, reranked, retrieved, ways_of
from mm_retriever.evaluation.tables import write_evaluation
from mm_retriever.rerank.reranker import ScorerRerank
from mm_retriever.rerank.scorer import Candidate, Meter, Query
from tests.support.data_sets import colour_set, scores_of
from tests.support.mean_colour import MeanColour


class ByName:
    """Scores candidates by their names: "good" puts high numbers first, "bad" low ones; counts what it is asked."""

    calibrated = False

    def __init__(self, name: str, sign: float = 1.0, fails: frozenset[int] = frozenset()) -> None:
        self.name, self.sign, self.fails, self.asked = name, sign, fails, 0

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        self.asked += 1
        meter.prefilled += 10
        if self.asked in self.fails or -1 in self.fails:
            raise ValueError("out of paper")
        return [self.sign * int(one.node.node.node_id.removesuffix(".png")) for one in candidates]


def ranker(scorer: ByName, **options: object) -> ScorerRerank:
    return ScorerRerank(scorer, top_n=10, on_error="keep_order", **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    """40 queries of three query images; the right image of each is one of the other nine."""
    return colour_set(tmp_path_factory.mktemp("colours"), 40)


def run_of(data: EvaluationSet, *, name: str = "model", second: bool = False) -> Run:
    """Finds the query image first, then (or after another one) the right one."""
    best = []
    for query in data.queries:
        wrong = next(name for name in data.gallery[3:] if name not in query.targets)
        best.append([query.image, *([wrong] if second else []), *query.targets])
    part = retrieved(
        data, np.eye(len(data.gallery), dtype=np.float32), np.float32(scores_of(data, best)), ways_of([data])
    )
    return Run(name, "{text}", [part], Cost(embedding=[0.1, 0.3]))


def test_both_ways_are_kept_apart(data):
    """The query image is first wherever it may be: MRR 1/2 with it in the ranking, 1 with it removed."""
    run = run_of(data)
    assert run.ways == (KEPT, REMOVED)
    assert part_values(run.parts[0], KEPT, "MRR").mean() == 0.5
    assert part_values(run.parts[0], REMOVED, "MRR").mean() == 1
    results = results_of([run])
    assert results.way == REMOVED
    assert set(results.figures) == {KEPT, REMOVED}
    alone = replace(data, queries=tuple(replace(query, image="") for query in data.queries))
    assert ways_of([alone]) == (KEPT,)


def test_equal_scores_stay_in_the_order_of_the_gallery_and_are_said(data):
    vectors = np.ones((len(data.gallery), 1), np.float32)
    part = retrieved(data, vectors, np.ones((len(data.queries), 1), np.float32), (KEPT,))
    assert part.rankings[KEPT]["q0"] == list(data.gallery)
    (note,) = results_of([Run("model", "{text}", [part], Cost())]).notes
    assert note == "model: 40 queries found images of equal scores; the one that the gallery names first is first"


def test_a_reranker_that_makes_it_worse_is_said_to(data):
    """It puts low numbers first, the query images among them."""
    run = run_of(data)
    after = reranked(run, ranker(ByName("bad", -1.0)), "bad", 10)
    gain = difference_of(run, after, REMOVED)
    assert gain.verdict == "worse"
    assert gain.figure.high < 0
    assert str(gain).startswith("model + bad makes it worse than model: MRR -0.")
    same = difference_of(run, reranked(run, ranker(ByName("none", 0.0)), "none", 10), REMOVED)
    assert (same.verdict, same.figure.mean) == ("no difference shown", 0)
    assert "shows no difference from model" in str(same)
    weak = run_of(data, name="weak", second=True)
    assert [(one.before, one.after, one.verdict) for one in differences([run, weak]) if one.way == REMOVED] == [
        ("model", "weak", "worse")
    ]


def test_a_ranking_is_reranked_once_where_both_ways_begin_alike(data):
    """The query image is among the first ten in one way only, so each query is asked twice; beyond them, once."""
    scorer = ByName("good")
    reranked(run_of(data), ranker(scorer), "good", 10)
    assert scorer.asked == 80
    outside = replace(data, queries=tuple(replace(query, image="") for query in data.queries))
    scorer = ByName("good")
    after = reranked(run_of(outside), ranker(scorer), "good", 10)
    assert scorer.asked == 40
    assert after.cost.tokens_a_query == 10
    assert after.cost.seconds >= 0.2, "the median of embedding a query, and reranking"
    assert after.cost.peak_mib > 0


def test_failures_are_counted_and_keep_the_order_of_retrieval(data):
    run = run_of(data)
    after = reranked(run, ranker(ByName("bad", -1.0, frozenset({1, 2}))), "bad", 10)
    assert after.parts[0].rankings[REMOVED]["q0"] == run.parts[0].rankings[REMOVED]["q0"]
    assert after.parts[0].rankings[REMOVED]["q1"] != run.parts[0].rankings[REMOVED]["q1"]
    (note,) = results_of([run, after]).notes
    assert note.startswith("model + bad: no ranking for 1 queries, whose order is that of retrieval; colours, q0: ")
    with pytest.raises(RerankError, match=r"'bad' ranked for none of 40 queries: .*out of paper"):
        reranked(run, ranker(ByName("bad", fails=frozenset({-1}))), "bad", 10)


@pytest.mark.parametrize("weight", [0.0, 0.4, 3.0])
def test_fusing_kept_scores_is_what_the_reranker_would_do(data, weight):
    run = run_of(data)
    kept = reranked(run, ranker(ByName("good")), "good", 10)
    asked = reranked(run, ranker(ByName("good"), fusion_weight=weight), "good", 10)
    for way in run.ways:
        assert fused_rankings(kept.parts[0], way, weight) == asked.parts[0].rankings[way]


def test_a_weight_is_chosen_on_one_half_and_reported_on_the_other(data):
    """The reranker is bad and retrieval is right: the largest weight wins, and the other half says what it reaches."""
    run = run_of(data)
    after = reranked(run, ranker(ByName("bad", -1.0)), "bad", 10)
    fusion = chosen_weight(after, run, [0.0, 0.1, 50.0])
    assert (fusion.weight, fusion.way, fusion.chosen_on, fusion.fused.queries) == (50.0, REMOVED, 20, 20)
    assert (fusion.retrieval.mean, fusion.fused.mean, fusion.gain.mean) == (1, 1, 0)
    assert fusion.model.mean < 1
    check_halves([data])
    with pytest.raises(QueryError, match="19 are too few, give 20"):
        check_halves([replace(data, queries=data.queries[:19])])


def test_a_model_embeds_the_gallery_once_for_all_prompts(data, tmp_path):
    """Mean colours: a query of an image and the word "red" is their mean. Truth: the nearest colour by numpy."""
    model = ComposedEmbedding(MeanColour(), cache_dir=tmp_path)
    first, second = model_runs(model, [data], ["{text}", "{text} now"])
    assert first.parts[0].rankings == second.parts[0].rankings, "the second prompt adds no colour"
    assert (first.name, second.name) == ("mean-colour '{text}'", "mean-colour '{text} now'")
    gallery = model.embed(images=[str(data.pictures[name]) for name in data.gallery])
    query = model.embed(["red"], [str(data.pictures["1.png"])], query=True)[0]
    best = [data.gallery[row] for row in np.argsort(-(gallery @ query), kind="stable")]
    assert first.parts[0].rankings[KEPT]["q1"] == best
    assert len(first.cost.embedding) == 16


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.images = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += tag == "img"

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_the_worst_queries_and_no_word_becomes_markup(data, tmp_path):
    """What was wanted, what was found and by whom; words and names may be untrusted."""
    evil = "<script>alert(1)</script>\u202e"
    queries = (replace(data.queries[0], words={"text": evil}), *data.queries[1:])
    asked = replace(data, queries=queries, name=evil)
    runs = [run_of(asked), run_of(asked, name="<b>weak", second=True)]
    results = results_of(runs)
    html = write_evaluation(tmp_path / "new" / "page.html", results).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "b"} & set(page.tags)
    assert "\u202e" not in html
    assert "<script>alert(1)</script>" in page.words
    assert "number 1 by model" in page.words
    assert "number 2 by <b>weak" in page.words
    assert "Found by <b>weak" in page.words
    assert page.images == 12 * (1 + 1 + 5 + 5), "query image, wanted, and five found by each of two"
    assert html.count("Content-Security-Policy") == 1
    worst = results.to_dict()["worst"]
    assert [one["value"] for one in worst] == [0.75] * 12
    assert worst[0]["wanted"] == {"3.png": {"model": 1, "<b>weak": 2}}


def test_results_of_answers_that_are_not_published_have_no_figures(data):
    hidden = replace(data, queries=tuple(replace(query, targets=()) for query in data.queries))
    results = results_of([run_of_hidden(hidden)])
    assert results.to_dict()["figures"] == {}
    assert "answers are not published" in results.notes[-1]


def run_of_hidden(data: EvaluationSet) -> Run:
    scores = np.float32(scores_of(data, [[query.image] for query in data.queries]))
    part = retrieved(data, np.eye(len(data.gallery), dtype=np.float32), scores, ways_of([data]))
    return Run("model", "{text}", [part], Cost())
