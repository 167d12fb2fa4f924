"""Measures and intervals. Truth: values worked out by hand, ir-measures, scikit-learn, and the papers' definitions."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.metrics import difference, evaluate, figure, ranked

RUN = {"q": {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.5}}
WANTED = {"q": {"b": 1, "d": 1, "z": 1}}


def value(measure: str, run=RUN, wanted=WANTED, **options) -> float:
    return evaluate(run, wanted, [measure], **options).figures[measure].mean


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("Recall@1", 0),
        ("Recall@2", 1 / 3),  # b of b, d, z
        ("Recall@5", 2 / 3),
        ("Hit@1", 0),
        ("Hit@2", 1),
        ("MRR", 1 / 2),
        ("mAP@2", (1 / 2) / 2),  # of three right ones two fit
        ("mAP@5", (1 / 2 + 2 / 4) / 3),
        ("nDCG@5", (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / math.log2(4))),
    ],
)
def test_values_worked_out_by_hand(measure, expected):
    assert value(measure) == pytest.approx(expected, abs=1e-9)


def test_names_that_are_no_valid_unicode_are_names():
    """Linux has files whose names are bytes: trec_eval, which computes the values, ended the process over one."""
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert value("Recall@1", {"q": {name: 0.9, "b": 0.8}}, {"q": {name: 1}}) == 1
    assert value("MRR", {name: {"a": 0.9, "b": 0.8}}, {name: {"b": 1}}) == 1 / 2


def test_gains_count_in_ndcg_alone():
    graded = {"q": {"b": 1, "d": 3}}
    ideal = 3 + 1 / math.log2(3)
    assert value("nDCG@5", wanted=graded) == pytest.approx((1 / math.log2(3) + 3 / math.log2(5)) / ideal)
    assert value("mAP@5", wanted=graded) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_the_reference_is_left_in_and_removed_and_both_are_said():
    """CIRR leaves it out, FashionIQ and mteb leave it in: on one query the two differ by half."""
    found = evaluate(RUN, WANTED, ["MRR", "Recall@1"], references={"q": "a"})
    assert {name: one.mean for name, one in found.figures.items()} == pytest.approx(
        {"MRR": 0.5, "MRR, query image removed": 1.0, "Recall@1": 0.0, "Recall@1, query image removed": 1 / 3}
    )
    with pytest.raises(QueryError, match="reference of 'q' is one of its right documents"):
        evaluate(RUN, WANTED, ["MRR"], references={"q": "b"})


def test_the_recall_of_a_subset_ranks_its_members_alone_without_the_reference():
    """CIRR's R_subset: the members but the reference; a, b and c are outside."""
    options = {"subsets": {"q": ["a", "c", "d", "e"]}, "references": {"q": "a"}}
    assert value("R_subset@1", wanted={"q": {"d": 1}}, **options) == 0
    assert value("R_subset@2", wanted={"q": {"d": 1}}, **options) == 1
    with pytest.raises(QueryError, match="subsets: 1 queries are missing, such as 'q'"):
        value("R_subset@1")
    with pytest.raises(QueryError, match="references, which R_subset leaves out"):
        value("R_subset@1", subsets={"q": ["a"]})


def test_equal_scores_stay_in_the_order_of_the_run_and_are_counted():
    """trec_eval would sort them by name, backwards: the result would hang on what documents are called."""
    assert ranked({"b": 1.0, "z": 1.0, "a": 1.0, "c": 2.0}) == ["c", "b", "z", "a"]
    run = {"q": {"b": 1.0, "z": 1.0}, "r": {"a": 1.0, "b": 0.5}}
    found = evaluate(run, {"q": {"b": 1}, "r": {"a": 1}}, ["Hit@1"])
    assert (found.figures["Hit@1"].mean, found.tied) == (1.0, 1)


def random_case(generator: np.random.Generator) -> tuple[dict[str, float], dict[str, int]]:
    documents = [f"d{number}" for number in range(int(generator.integers(1, 30)))]
    scores = generator.permutation(len(documents)).astype(float)  # no ties: the libraries break them otherwise
    right = generator.choice([*documents, "x", "y"], size=int(generator.integers(1, 6)), replace=True)
    found = [document for document in documents if generator.random() < 0.8]
    return {one: scores[documents.index(one)] for one in found}, {one: int(generator.integers(1, 4)) for one in right}


def test_a_thousand_random_cases_are_as_other_implementations_have_them():
    """ir-measures, scikit-learn where a ranking is whole, and CIRCO's formula written out."""
    generator = np.random.default_rng(5)
    cases = [random_case(generator) for _ in range(1000)]
    run = {f"q{number}": scores for number, (scores, _) in enumerate(cases)}
    wanted = {f"q{number}": gains for number, (_, gains) in enumerate(cases)}
    names = {"Recall@5": "R@5", "Hit@5": "Success@5", "nDCG@10": "nDCG@10", "MRR": "RR"}
    found = evaluate(run, wanted, [*names, "mAP@5", "mAP@50", "nDCG@50"])
    for ours, theirs in names.items():
        measured = ir_measures.iter_calc([ir_measures.parse_measure(theirs)], wanted, run)
        other = {one.query_id: one.value for one in measured}
        assert found.values[ours] == pytest.approx([other.get(query, 0) for query in run], abs=1e-9)
    for row, (scores, gains) in enumerate(cases):
        order = ranked(scores)[:5]
        hits = [order[: rank + 1] for rank, one in enumerate(order) if one in gains]
        circo = sum(sum(one in gains for one in top) / len(top) for top in hits) / min(len(gains), 5)
        assert found.values["mAP@5"][row] == pytest.approx(circo, abs=1e-9)
        if gains.keys() <= scores.keys() and len(scores) > 1:
            truth = [gains.get(one, 0) for one in scores]
            given = list(scores.values())
            exact = average_precision_score([gain > 0 for gain in truth], given)
            assert found.values["mAP@50"][row] == pytest.approx(exact, abs=1e-9)
            assert found.values["nDCG@50"][row] == pytest.approx(ndcg_score([truth], [given]), abs=1e-9)


# ------------------------------------------------------------------------------------------ intervals


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    """200 samples of 100 queries from a known rate: 95% intervals that held it less than 90% of the time would lie."""
    generator = np.random.default_rng(0)
    samples = (generator.random((200, 100)) < 0.3).astype(float)
    figures = [figure((sample, range(100)), resamples=500) for sample in samples]
    held = np.mean([one.low <= 0.3 <= one.high for one in figures])
    assert 0.9 <= held <= 0.99


def test_queries_of_one_group_are_one_piece_of_evidence():
    """Ten equal queries for each of twenty products say no more than one for each."""
    values = np.array([1.0, 0.0] * 10)
    alone = figure((values, range(20)))
    together = figure((values.repeat(10), np.arange(20).repeat(10).tolist()))
    assert (together.mean, together.low, together.high) == pytest.approx((alone.mean, alone.low, alone.high))
    apart = figure((values.repeat(10), range(200)))
    assert apart.high - apart.low < (alone.high - alone.low) / 2


def test_the_mean_of_several_parts_is_that_of_their_means_over_the_same_draws():
    """One of three groups has nothing in the second part: draws without the other two leave that part empty."""
    first, second = (np.array([1.0, 0.0, 0.0]), ["a", "b", "c"]), (np.array([1.0, 1.0]), ["b", "c"])
    both = figure(first, second)
    assert (both.mean, both.queries) == (pytest.approx((1 / 3 + 1) / 2), 5)
    assert 0.5 <= both.low < both.mean < both.high <= 1


def test_a_difference_is_paired():
    """Every query gains a little: far apart as the queries are, the gain is certain. Against itself there is none."""
    wanted = {f"q{number}": {"a": 1} for number in range(60)}
    before = {f"q{number}": {f"x{rank}": -rank for rank in range(number % 12 + 1)} | {"a": -99} for number in range(60)}
    after = {query: {one: score for one, score in scores.items() if one != "x0"} for query, scores in before.items()}
    groups = {query: number // 2 for number, query in enumerate(wanted)}
    first, second = (evaluate(run, wanted, ["MRR"], groups=groups) for run in (before, after))
    gain = difference(first, second, "MRR")
    assert gain.mean == pytest.approx(second.figures["MRR"].mean - first.figures["MRR"].mean)
    assert gain.low > 0
    assert second.figures["MRR"].low < first.figures["MRR"].high, "unpaired, they could be the same"
    nothing = difference(first, first, "MRR")
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)
    with pytest.raises(QueryError, match="different queries or groups"):
        difference(first, evaluate(before, wanted, ["MRR"]), "MRR")
    with pytest.raises(QueryError, match="measure 'MRR, query image removed' was not taken; there are MRR"):
        difference(first, second, "MRR, query image removed")


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("run", "wanted", "measure", "message"),
    [
        ({}, WANTED, "MRR", "the run: 1 queries are missing, such as 'q'"),
        ({**RUN, "other": {}}, WANTED, "MRR", "1 queries without right documents, such as 'other'"),
        (RUN, {}, "MRR", "no queries"),
        (RUN, {"q": {}}, "MRR", "give right documents"),
        (RUN, {"q": {"a": 0}}, "MRR", "a whole number above 0"),
        ({"q": {"a": math.nan}}, WANTED, "MRR", "NaN or infinite"),
        (RUN, WANTED, "precision", "measure 'precision': give Recall@k"),
        (RUN, WANTED, "Recall@0", "measure 'Recall@0'"),
    ],
)
def test_what_would_give_a_wrong_figure_is_refused(run, wanted, measure, message):
    with pytest.raises(QueryError, match=message):
        evaluate(run, wanted, [measure])


def test_a_query_that_found_nothing_counts_as_nothing():
    found = evaluate({"q": {}, "r": {"a": 1.0}}, {"q": {"a": 1}, "r": {"a": 1}}, ["Recall@1", "mAP@5", "MRR"])
    assert [one.mean for one in found.figures.values()] == [0.5, 0.5, 0.5]
    assert str(found.figures["MRR"]) == "0.500 (0.000 to 1.000)"
