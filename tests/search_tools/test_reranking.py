"""Results that were shown already, ranked by real rerankers over a real store of drawn products."""

from __future__ import annotations

import pytest

from mm_retriever.errors import QueryError
from mm_retriever.rerank.reranker import ScorerRerank
from mm_retriever.rerank.scorer import Meter
from mm_retriever.search_tools.reranking import rerank_results
from tests.support.colour_scorer import MeanColour


class Stopped:
    """A scorer that ends where its meter says so, as those of the package do."""

    name, calibrated = "stopped", True

    def score(self, query, candidates, meter):
        return [None if meter.out_of_time() else 0.5 for _ in candidates]


@pytest.fixture
def colours(search):
    return ScorerRerank(MeanColour("mean-colour", calibrated=True), top_n=3, image_policy=search.stored_policy)


@pytest.fixture
def found(search):
    return search.search("mug", top_k=6).results


def test_results_come_back_in_the_order_of_the_model(search, store, colours, found):
    """By mean colour, the image nearest to a result is that result."""
    ids = [one.id for one in found]
    ranked = rerank_results(search, store, colours, ids, image=ids[4])
    assert ranked[0].id == ids[4]
    assert ranked[0].score == 1.0
    assert [one.score for one in ranked[:3]] == sorted((one.score for one in ranked[:3]), reverse=True)


def test_what_the_model_keeps_no_place_for_follows(search, store, colours, found):
    """`top_n` is 3: the other three come back too."""
    ids = [one.id for one in found]
    ranked = rerank_results(search, store, colours, ids, image=ids[0])
    assert sorted(one.id for one in ranked) == sorted(ids)


def test_a_meter_stops_the_model_and_the_order_stays(search, store, found):
    ids = [one.id for one in found]
    meter = Meter(None)
    meter.stop()
    ranked = rerank_results(search, store, ScorerRerank(Stopped()), ids, text="mug", meter=meter)
    assert [one.id for one in ranked] == ids
    assert all(one.score is None and "time" in one.note for one in ranked)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "", "image": None}, "nothing to rank by"),
        ({"ids": ["nobody"]}, "no image of the id 'nobody'"),
        ({"scores": [0.5]}, "6 ids and 1 scores"),
        ({"image": "/etc/hostname.png"}, "no image is known"),
    ],
)
def test_what_cannot_be_ranked_is_refused(search, store, colours, found, change, said):
    asked = {"ids": [one.id for one in found], "text": "mug", **change}
    with pytest.raises(QueryError, match=said):
        rerank_results(search, store, colours, **asked)
