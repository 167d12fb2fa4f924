"""Pickles, copies and dicts of every public class: the whole object comes back, or one line says why not."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import MockLLM
from llama_index.core.prompts import PromptTemplate, RichPromptTemplate
from llama_index.core.schema import NodeWithScore

import mm_retriever
from mm_retriever import errors
from mm_retriever.bulk import ImportReport, ShardReport
from mm_retriever.embedding import ComposedEmbedding, VisualizedBGEEmbedding
from mm_retriever.engine import image_query_engine
from mm_retriever.errors import CopyError, ImageLoadError, MMRetrieverError, QueryError, StoreError
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import IngestReport, ReindexReport
from mm_retriever.phi3_vision.llm import Phi3VisionLLM
from mm_retriever.rerank import Phi3VisionRerank, VisionLLMRerank
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.search_tools import Conversation, ImageSearch
from mm_retriever.store import ImageStore, open_store
from mm_retriever.tools import ImageSearchToolSpec
from tests.support.drawn_store import ScriptedLLM, draw_leopard, drawn_store, says

SERVER = "http://127.0.0.1:9/v1"
POLICY = ImagePolicy(roots=(Path("/photos"),), max_bytes=1000)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of everything, and what tells that another one is its equal."""
    folder = tmp_path_factory.mktemp("copies")
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    llm = Phi3VisionLLM("tiny", device="cpu", max_new_tokens=3, image_policy=POLICY)
    store = drawn_store(folder, model)
    search = ImageSearch(store, model)
    return {
        "VisualizedBGEEmbedding": model,
        "ComposedEmbedding": ComposedEmbedding("tiny", device="cpu", compose_nodes=True),
        "ImageStore": store,
        "Phi3VisionLLM": llm,
        "Phi3VisionRerank": Phi3VisionRerank("tiny", device="cpu", top_n=2, mode="likelihood", reasons="none"),
        "Phi3VisionRerank of an LLM": Phi3VisionRerank(llm, top_n=2, reasons="none", image_policy=ImagePolicy()),
        "VisionLLMRerank": VisionLLMRerank(base_url=SERVER, model="m", window=5, image_policy=POLICY),
        "ComposedRetriever": ComposedRetriever(store, model, top_k=3, exclude_query_image=True),
        "image_query_engine": image_query_engine(store, model, top_k=2),
        "ImageSearch": search,
        "ImageSearchToolSpec": ImageSearchToolSpec(search),
        "Conversation": Conversation(),
        "ImagePolicy": POLICY,
        "ReindexReport": ReindexReport(collection="c", model="b", before="a", rows=1, seconds=1.0),
        "IngestReport": IngestReport(indexed=1, replaced=0, updated=0, unchanged=0, removed=0, skipped=(), seconds=1.0),
        "leopard": draw_leopard(folder / "leopard.png"),
    }


def found(nodes: list[NodeWithScore]) -> list[tuple[str, float]]:
    return [(node.node.node_id, round(node.score, 4)) for node in nodes]


def behaviour(name: str, thing: Any, parts: dict[str, Any]) -> Any:
    """What a caller gets from it."""
    if name in ("VisualizedBGEEmbedding", "ComposedEmbedding"):
        return thing.model_id, thing.get_text_embedding("a mug")
    if name == "ImageStore":
        return thing.count(), thing.model_id, thing.uri, thing.index_type
    if name == "Phi3VisionLLM":
        return str(thing.complete("a mug")), thing.metadata, thing.image_policy
    if name.startswith("Phi3VisionRerank"):
        nodes = parts["ComposedRetriever"].retrieve("a mug")
        return found(thing.postprocess_nodes(nodes, query_str="a mug")), thing.image_policy, thing.mode
    if name == "VisionLLMRerank":
        return thing.model_name, thing._server, thing.window, thing.image_policy, thing.get_prompts().keys()
    if name == "ComposedRetriever":
        return found(thing.retrieve("a red mug"))
    if name == "image_query_engine":
        return str(thing.query("a red mug")), found(thing.query("a red mug").source_nodes)
    if name == "ImageSearch":
        return thing.search("a red mug").text
    if name == "ImageSearchToolSpec":
        (search, *_) = thing.to_tool_list()
        return search.call(text="a red mug").content.partition(":")[2]  # after the number of the search
    if name == "Conversation":
        return thing.attachments
    return thing


NAMES = [
    *("VisualizedBGEEmbedding", "ComposedEmbedding", "ImageStore", "Phi3VisionLLM", "Phi3VisionRerank"),
    "Phi3VisionRerank of an LLM",
    *("VisionLLMRerank", "ComposedRetriever", "image_query_engine", "ImageSearch", "ImageSearchToolSpec"),
    *("Conversation", "ImagePolicy", "IngestReport", "ReindexReport"),
]


def test_every_public_class_is_in_this_file():
    """A class that is added is tried here, or named with the reason why not."""
    elsewhere = {
        "BGEM3SparseEmbedding": "tests/embedders/test_bge_m3.py: needs weights",
        "CrossEncoderRerank": "tests/rerank/test_cross_encoder.py: needs weights",
        "TextRerank": "the same",
        "RemoteEmbedding": "tests/embedders/test_remote.py: needs a server",
        "RemoteRerank": "tests/rerank/test_remote.py: needs a server",
        "ImportReport": "below",
        "ShardReport": "below",
        "MMRetrieverError": "below",
    }
    public = [name for name in mm_retriever.__all__ if inspect.isclass(getattr(mm_retriever, name))]
    assert not set(public) - {*NAMES, *elsewhere}


@pytest.mark.parametrize(
    "how", [pickle, cloudpickle, "deepcopy", "copy"], ids=["pickle", "cloudpickle", "deepcopy", "copy"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_and_a_copy_are_the_whole_object(parts, name, how):
    """LlamaIndex's own pickles leave out what cannot be pickled, and come back without it."""
    thing = parts[name]
    other = getattr(copy, how)(thing) if isinstance(how, str) else how.loads(how.dumps(thing))
    assert type(other) is type(thing)
    assert behaviour(name, other, parts) == behaviour(name, thing, parts)
    if isinstance(other, ImageStore):
        other.close()
        assert thing.count(), "closing a copy leaves the store open"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("V", "ImageStore", "Phi"))])
def test_from_dict_makes_what_to_dict_describes(parts, name):
    """Truth: LlamaIndex's own components. The policy, which limits what is read, must not get lost on the way."""
    thing = parts[name]
    other = type(thing).from_dict(thing.to_dict())
    assert behaviour(name, other, parts) == behaviour(name, thing, parts)
    again = type(thing).from_json(thing.to_json())
    assert behaviour(name, again, parts) == behaviour(name, thing, parts)


def test_prompts_and_options_that_were_changed_come_along(parts):
    reranker = copy.deepcopy(parts["VisionLLMRerank"])
    reranker.update_prompts({"rank": PromptTemplate("Which of the {count}?")})
    reranker.update_prompts({"query": RichPromptTemplate("Wanted: {{ query }}")})
    reranker.top_n = 4
    for other in (pickle.loads(pickle.dumps(reranker)), type(reranker).from_dict(reranker.to_dict())):
        assert other.get_prompts()["rank"].get_template() == "Which of the {count}?"
        assert other.get_prompts()["query"].format(query="a mug") == "Wanted: a mug"
        assert other.top_n == 4
    assert parts["VisionLLMRerank"].get_prompts()["rank"].get_template() != "Which of the {count}?"


def test_a_copy_shares_the_model_and_a_pickle_loads_it_again(parts):
    for name in ("VisualizedBGEEmbedding", "Phi3VisionLLM", "Phi3VisionRerank"):
        thing = parts[name]
        model = (lambda one: one.encoder.model) if name == "VisualizedBGEEmbedding" else (lambda one: one.model)
        assert model(copy.deepcopy(thing)) is model(thing)
        assert model(pickle.loads(pickle.dumps(thing))) is not model(thing)


def test_tools_of_one_conversation_share_it_after_a_pickle(parts):
    spec = ImageSearchToolSpec(parts["ImageSearch"])
    spec.attach("photo.png", parts["leopard"])
    search, similar, describe = pickle.loads(pickle.dumps(spec.to_tool_list()))
    search.call(text="a red mug")
    assert not similar.call(result="result 1").is_error
    assert not describe.call(image="photo.png").is_error
    assert search.metadata.name == "search_images"


# ------------------------------------------------------------------------------------------ what is refused


def test_what_a_pickle_cannot_hold_is_refused_in_one_line(parts):
    llm = parts["Phi3VisionLLM"]
    loaded = {"model": llm.model, "processor": llm.processor}
    refused = {
        "made from a loaded model": [Phi3VisionLLM(**loaded), Phi3VisionRerank((llm.model, llm.processor))],
        "no place for one": [VisionLLMRerank(base_url=SERVER, model="m", api_key="secret")],
        "cannot be pickled: its": [
            VisionLLMRerank(ScriptedLLM.of(says("x"))),
            image_query_engine(parts["ImageStore"], parts["VisualizedBGEEmbedding"], llm=ScriptedLLM.of(says("x"))),
        ],
    }
    for reason, things in refused.items():
        for thing in things:
            with pytest.raises(CopyError, match=reason) as caught:
                pickle.dumps(thing)
            assert "\n" not in str(caught.value)
            copy.deepcopy(thing)
    for thing, missing in (
        (Phi3VisionLLM(**loaded), "model"),
        (Phi3VisionRerank((llm.model, llm.processor)), "model"),
        (VisionLLMRerank(MockLLM()), "llm"),
        (VisionLLMRerank(base_url=SERVER, model="m", api_key="secret"), "api_key"),
    ):
        assert "secret" not in str(thing.to_dict())
        with pytest.raises(CopyError, match=f"which a dict does not hold: .*, {missing}=..."):
            type(thing).from_dict(thing.to_dict())


def test_a_store_with_a_password_is_not_pickled(parts, tmp_path):
    model = parts["VisualizedBGEEmbedding"]
    with open_store(tmp_path / "a.db", model, token="user:secret") as store:
        with pytest.raises(CopyError, match="no place for one: open it again"):
            pickle.dumps(store)
        assert "secret" not in str(store.to_dict())
        copy.deepcopy(store).close()


def test_a_store_that_is_gone_does_not_come_back_empty(parts, tmp_path):
    """A pickle of yesterday and a file that was moved: an empty collection would find nothing, and say nothing."""
    with open_store(tmp_path / "a.db", parts["VisualizedBGEEmbedding"]) as store:
        data, described = pickle.dumps(store), store.to_dict()
    (tmp_path / "a.db").rename(tmp_path / "b.db")
    with pytest.raises(StoreError, match=r"there is no store"):
        pickle.loads(data)
    with pytest.raises(StoreError, match=r"there is no store"):
        ImageStore.from_dict(described)
    with pytest.raises(StoreError, match="it lacks uri, dimension, model_id, collection"):
        ImageStore.from_dict({})
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["b.db"]


# ------------------------------------------------------------------------------------------ small things


def test_reports_and_errors():
    reports = [
        kind(**{field.name: () if "tuple" in str(field.type) else 0 for field in dataclasses.fields(kind)})
        for kind in (ImportReport, ShardReport)
    ]
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MMRetrieverError)]
    for thing in [*reports, *(kind("what was given, and what to do") for kind in kinds)]:
        for other in (pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)):
            assert (type(other), str(other)) == (type(thing), str(thing))
    error = ImageLoadError("photo.png: too large")
    error.reason = "too large"
    assert pickle.loads(pickle.dumps(error)).reason == "too large"


def test_handlers_of_callbacks_stay_where_they_are(parts):
    """Our choice: they belong to a process, and hold files and locks."""
    model = copy.copy(parts["VisualizedBGEEmbedding"])
    model.callback_manager = CallbackManager([])
    assert pickle.loads(pickle.dumps(model)).callback_manager.handlers == []
    with pytest.raises(QueryError, match="nothing to search for"):
        pickle.loads(pickle.dumps(parts["ComposedRetriever"])).retrieve("")
