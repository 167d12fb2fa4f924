"""Calls of many threads go through a model together, and nobody notices but by the time it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from mm_retriever.embedders.batching import BatchedEmbedder
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.errors import QueryError
from tests.support.mean_colour import MeanColour
from tests.support.processes import python

INTERRUPTED = """
import signal, threading, time
from mm_retriever.embedders.batching import BatchedEmbedder
from mm_retriever.embedders.embedder import Content
from tests.embedders.test_batching import Gated

model = Gated()
batched = BatchedEmbedder(model)
first = threading.Thread(target=batched.encode, args=([Content("first")],))
first.start()
assert model.started.wait(30)

def interrupt():
    while not batched.waiting:
        time.sleep(0.01)
    time.sleep(0.5)  # a signal that comes just before a thread blocks does not wake it
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    batched.encode([Content("given up")])
except KeyboardInterrupt:
    model.may_go_on.set()
first.join()
batched.encode([Content("last")])
print(model.passes)
"""


class Gated(MeanColour):
    """A model whose first pass waits for a signal, so that a test knows who arrives meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[list[str]] = []
        self.started, self.may_go_on = threading.Event(), threading.Event()

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        self.passes.append([content.text for content in contents])
        self.started.set()
        assert self.may_go_on.wait(30)
        if any(content.text == "bad" for content in contents):
            raise QueryError("not this one")
        return super().encode(contents, query=query)


def together(model: Gated, batched: BatchedEmbedder, texts: Sequence[str], queries: Sequence[bool] = ()):
    """The results of one call each: the first is in the model while the others arrive, one after another."""
    with ThreadPoolExecutor(len(texts)) as threads:
        results = []
        for place, text in enumerate(texts):
            query = queries[place] if queries else True
            results.append(threads.submit(batched.encode, [Content(text)], query=query))
            if place == 0:
                assert model.started.wait(30)
            else:
                while batched.waiting < place:
                    time.sleep(0.001)
        model.may_go_on.set()
    return results


def test_calls_that_arrive_while_the_model_works_share_the_next_pass():
    model = Gated()
    results = together(model, BatchedEmbedder(model), ["red", "blue", "green", "grey"])
    assert model.passes[0] == ["red"]
    assert sorted(model.passes[1]) == ["blue", "green", "grey"]
    assert len(model.passes) == 2
    for text, result in zip(["red", "blue", "green", "grey"], results, strict=True):
        np.testing.assert_array_equal(result.result(), MeanColour().encode([Content(text)], query=True))


def test_an_error_reaches_only_the_call_that_caused_it():
    model = Gated()
    results = together(model, BatchedEmbedder(model), ["red", "blue", "bad", "green"])
    with pytest.raises(QueryError, match="not this one"):
        results[2].result()
    for place, text in ((0, "red"), (1, "blue"), (3, "green")):
        np.testing.assert_array_equal(results[place].result(), MeanColour().encode([Content(text)], query=True))


def test_queries_and_documents_never_share_a_pass():
    """Models with instructions embed them differently."""
    model = Gated()
    together(model, BatchedEmbedder(model), ["a", "b", "c"], queries=[True, False, True])
    assert sorted(model.passes[1:]) == [["b"], ["c"]]


def test_a_pass_takes_no_more_contents_than_allowed():
    model = Gated()
    together(model, BatchedEmbedder(model, most=2), ["a", "b", "c", "d"])
    assert [len(texts) for texts in model.passes] == [1, 2, 1]


def test_a_call_that_was_interrupted_while_it_waited_is_not_computed():
    """In a process of its own: other packages put their handlers of the signal in the place of Python's."""
    ran = python("-c", INTERRUPTED)
    assert (ran.communicate(timeout=60)[0], ran.returncode) == ("[['first'], ['last']]\n", 0)


def test_the_others_of_a_pass_that_was_interrupted_are_computed():
    class Interrupted(Gated):
        def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
            vectors = super().encode(contents, query=query)
            if len(self.passes) == 2:
                raise KeyboardInterrupt
            return vectors

    model = Interrupted()
    results = together(model, BatchedEmbedder(model), ["red", "blue", "green", "grey"])
    with pytest.raises(KeyboardInterrupt):
        results[1].result()
    for place, text in ((0, "red"), (2, "green"), (3, "grey")):
        np.testing.assert_array_equal(results[place].result(), MeanColour().encode([Content(text)], query=True))
    assert model.passes[2] == ["green", "grey"]


def test_vectors_of_many_threads_are_those_of_single_calls():
    """Up to the rounding of another batch size, which the model itself has."""
    model = load_embedder("tiny", device="cpu")
    batched = BatchedEmbedder(model)
    texts = [f"a {colour} mug number {number}" for number in range(8) for colour in ("red", "blue", "grey")]
    alone = np.concatenate([model.encode([Content(text)], query=True) for text in texts])
    with ThreadPoolExecutor(12) as threads:
        vectors = np.concatenate(list(threads.map(lambda text: batched.encode([Content(text)], query=True), texts)))
    np.testing.assert_allclose(vectors, alone, atol=1e-6)
    assert (batched.space, batched.note, batched.dimension) == (model.space, model.note, model.dimension)
