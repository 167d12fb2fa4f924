"""What a person adds to a query, through the bundled embedder and a real Milvus Lite store of drawn products."""

from __future__ import annotations

import numpy as np
import pytest
from llama_index.core.schema import QueryBundle

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.refinement import Refinement, avoiding, balanced, mean, rocchio, stored_vectors
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.search_tools import ImageSearch
from tests.support.drawn_store import draw_leopard, drawn_store


@pytest.fixture(scope="module")
def embed_model():
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory, embed_model):
    store = drawn_store(tmp_path_factory.mktemp("store"), embed_model)
    yield store
    store.close()


@pytest.fixture(scope="module")
def leopard(tmp_path_factory):
    return draw_leopard(tmp_path_factory.mktemp("query") / "leopard.png")


def labels(results) -> list[str]:
    return [one.node.metadata["label"] for one in results]


def found(store, embed_model, text, image=None, *, top_k=4, **changes):
    retriever = ComposedRetriever(store, embed_model, top_k=top_k, refinement=Refinement(**changes))
    return retriever.retrieve(embed_model.get_query_bundle(text, image))


def test_liked_and_disliked_results_move_the_query_by_rocchios_formula(store, embed_model):
    first = found(store, embed_model, "mug", top_k=12)
    liked, disliked = first[-1].node.node_id, first[0].node.node_id
    moved = found(store, embed_model, "mug", liked=(liked,), disliked=(disliked,), top_k=12)
    rows = stored_vectors(store, [liked, disliked])
    vector = rocchio(np.float32(embed_model.get_query_embedding("mug")), rows[liked][None], rows[disliked][None])
    scores = {one.node.node_id: one.score for one in moved}
    assert scores[liked] == pytest.approx(float(vector @ rows[liked]), abs=1e-5)
    before = {one.node.node_id: one.score for one in first}
    assert scores[liked] > before[liked]


def test_a_liked_result_alone_is_a_query(store, embed_model):
    (mug,) = found(store, embed_model, "red polka dot mug", top_k=1)
    answer = ImageSearch(store, embed_model).search(refinement=Refinement(liked=(mug.node.node_id,)), top_k=1)
    assert [result.id for result in answer.results] == [mug.node.node_id]


def test_words_to_avoid_push_their_images_down(store, embed_model):
    places = {}
    for avoid in ((), ("umbrella",)):
        ranked = labels(found(store, embed_model, "leopard umbrella and phone case", avoid=avoid, top_k=12))
        places[avoid] = [place for place, label in enumerate(ranked) if label == "umbrella"]
    assert sum(places[("umbrella",)]) > sum(places[()])


def test_the_balance_ends_at_the_image_and_at_the_words(store, embed_model, leopard):
    def order(text, image, **changes):
        return [one.node.node_id for one in found(store, embed_model, text, image, top_k=12, **changes)]

    assert order("mug", leopard, balance=0) == order(None, leopard)
    assert order("mug", leopard, balance=1) == order("mug", None)
    assert order("mug", leopard, balance=0.5) == order("mug", leopard)


def test_two_equal_images_are_one(store, embed_model, leopard):
    once = [one.node.node_id for one in found(store, embed_model, "mug", leopard)]
    assert [one.node.node_id for one in found(store, embed_model, "mug", leopard, images=(leopard,))] == once


def test_a_query_of_several_texts_or_of_a_vector_alone_stays_in_it(store, embed_model, leopard):
    """`custom_embedding_strs` of a query transform, and a bundle that is nothing but its vector: both were dropped."""

    def ranked(query, **changes):
        retriever = ComposedRetriever(store, embed_model, top_k=12, refinement=Refinement(**changes))
        return [(one.node.node_id, pytest.approx(one.score, abs=1e-5)) for one in retriever.retrieve(query)]

    several = QueryBundle("mug", custom_embedding_strs=["umbrella", "phone case"])
    texts, images = ["umbrella", "umbrella", "phone case", "phone case"], [leopard] * 4
    both = mean(np.array(embed_model.get_composed_embedding_batch(texts, images)))
    with_image = QueryBundle("mug", str(leopard), custom_embedding_strs=["umbrella", "phone case"])
    assert ranked(with_image, images=(leopard,)) == ranked(QueryBundle("", embedding=both.tolist()))
    words = mean(np.array([embed_model.get_query_embedding(text) for text in several.embedding_strs]))
    assert ranked(several, balance=0.9) == ranked(QueryBundle("", embedding=words.tolist()))
    vector = embed_model.get_query_embedding("umbrella")
    image = embed_model.get_image_embedding(leopard, query=True)
    middle = mean(np.array([vector, image])).tolist()
    assert ranked(QueryBundle("", embedding=vector), images=(leopard,)) == ranked(QueryBundle("", embedding=middle))


def test_what_cannot_be_meant_is_refused(store, embed_model):
    with pytest.raises(QueryError, match="balance 2"):
        Refinement(balance=2)
    for name, one in (
        ("avoid", "red"),
        ("liked", "an id"),
        ("disliked", "an id"),
        ("images", "a.png"),
        ("images", b""),
    ):
        with pytest.raises(QueryError, match=f"{name} is .*: give a list"):  # letter by letter it would mean others
            Refinement(**{name: one})
    with pytest.raises(QueryError, match="at most 64"):
        Refinement(avoid=("a",) * 65)
    with pytest.raises(QueryError, match="no image of the id 'nobody'"):
        found(store, embed_model, "mug", liked=("nobody",))
    words = ImageSearch(store, embed_model)
    with pytest.raises(QueryError, match="nothing to search for"):
        words.search(refinement=Refinement(avoid=("mug",)))


def test_lists_generators_and_numbers_of_numpy_are_taken():
    assert Refinement(avoid=[], liked=iter(())).is_empty
    assert Refinement(avoid=(word for word in ["red"]), balance=np.float32(0.5)) == Refinement(avoid=("red",))


def test_a_later_page_goes_on_where_the_earlier_ended(store, embed_model):
    search = ImageSearch(store, embed_model)
    whole = search.search("mug", top_k=8).results
    rest = search.search("mug", top_k=4, skip=4).results
    assert [(one.rank, one.id) for one in rest] == [(one.rank, one.id) for one in whole[4:]]


# --------------------------------------------- query vectors, against numbers worked out by hand

X, Y, Z = np.eye(3, dtype=np.float32)


def test_rocchio_is_the_formula_of_the_textbook():
    """q = x; liked y and z; disliked -z: x + 0.75 (0, .5, .5) - 0.15 (0, 0, -1) = (1, 0.375, 0.525), then length 1."""
    moved = rocchio(X, np.stack([Y, Z]), -Z[None])
    expected = np.array([1, 0.375, 0.525])
    np.testing.assert_allclose(moved, expected / np.sqrt(1 + 0.375**2 + 0.525**2), atol=1e-7)


def test_rocchio_without_feedback_is_the_query():
    none = np.empty((0, 3), np.float32)
    np.testing.assert_array_equal(rocchio(X, none, none), X)


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0, (1, 0, 0)),
        (0.25, (0.5, 0.5, 0)),
        (0.5, (0, 1, 0)),
        (0.75, (0, 0.5, 0.5)),
        (1, (0, 0, 1)),
    ],
)
def test_balance_goes_from_the_image_over_both_to_the_words(balance, expected):
    direction = np.array(expected) / np.linalg.norm(expected)
    np.testing.assert_allclose(balanced(X, Y, Z, balance), direction, atol=1e-7)


def test_words_to_avoid_take_away_half_of_their_mean():
    """x - 0.5 y has the length 1.118."""
    np.testing.assert_allclose(avoiding(X, Y[None]), np.array([1, -0.5, 0]) / np.sqrt(1.25), atol=1e-7)


def test_a_mean_has_length_one():
    np.testing.assert_allclose(mean(np.stack([X, Y])), [np.sqrt(0.5), np.sqrt(0.5), 0], atol=1e-7)
