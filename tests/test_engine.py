"""Query engines over a real store: the whole one, and the parts in LlamaIndex's own."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import QueryBundle, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.chat_engine.multi_modal_context import MultiModalContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate, RichPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.schema import ImageNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from PIL import Image

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.engine import ImageSynthesizer, image_query_engine
from mm_retriever.errors import FilterError, QueryError
from mm_retriever.images import ImagePolicy
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.search_tools import read_filters
from mm_retriever.store import ImageStore, open_store
from tests.support.drawn_store import ScriptedLLM, calls, draw_leopard, drawn_store, images_of, says, texts_of


@pytest.fixture(scope="module")
def embed_model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def store(folder, embed_model):
    store = drawn_store(folder, embed_model)
    yield store
    store.close()


@pytest.fixture(scope="module")
def leopard(tmp_path_factory) -> Path:
    return draw_leopard(tmp_path_factory.mktemp("query") / "leopard.png")


@pytest.fixture
def query(leopard) -> QueryBundle:
    return QueryBundle("phone case with this", image_path=str(leopard))


def sizes(blocks) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(base64.b64decode(block.image))).size for block in blocks]


# ---------------------------------------------------------------------------------------------- the whole engine


def test_the_model_is_shown_the_query_image_and_what_was_found(store, embed_model, query):
    """LlamaIndex's own engine leaves the query image out."""
    llm = ScriptedLLM.of(says("Number 1."))
    engine = image_query_engine(store, embed_model, llm=llm, top_k=3, image_side=80)
    response = engine.query(query)
    assert str(response) == "Number 1."
    assert response.source_nodes[0].node.metadata["label"] == "phone case"
    assert isinstance(response.source_nodes[0].node, ImageNode)
    assert response.metadata[response.source_nodes[0].node_id]["file_name"] == "natural leopard.jpg"
    (message,) = llm.asked[0]
    assert sizes(images_of([message])) == [(80, 80)] * 4
    words = texts_of([message])
    assert words.startswith("Query image:")
    assert "1. label: phone case" in words
    assert "Question: phone case with this" in words


async def test_the_asynchronous_engine_says_the_same(store, embed_model, query):
    llm = ScriptedLLM.of(says("Number 1."))
    response = await image_query_engine(store, embed_model, llm=llm, top_k=2).aquery(query)
    assert str(response) == "Number 1."
    assert len(images_of(llm.asked[0])) == 3
    assert len(response.source_nodes) == 2


async def test_the_answer_can_be_streamed(store, embed_model, query):
    engine = image_query_engine(store, embed_model, llm=ScriptedLLM.of(says("One."), says("Two.")), streaming=True)
    response = engine.query(query)
    assert isinstance(response, StreamingResponse)
    assert "".join(response.response_gen) == "One."
    assert len(response.source_nodes) == 9
    later = await engine.aquery(query)
    assert isinstance(later, AsyncStreamingResponse)
    assert "".join([piece async for piece in later.response_gen]) == "Two."


def test_without_a_model_the_answer_lists_what_was_found(store, embed_model, query):
    """No remote model is looked for, as LlamaIndex would."""
    response = image_query_engine(store, embed_model, top_k=2).query(query)
    assert str(response).startswith("1. label: phone case")
    assert "natural leopard.jpg" in str(response)
    assert "2. " in str(response)


def test_filters_postprocessors_and_the_number_of_images_are_kept_to(store, embed_model, query):
    llm = ScriptedLLM.of(says("ok"))
    engine = image_query_engine(
        store,
        embed_model,
        llm=llm,
        filters=read_filters({"label": "mug"}),
        rerank=[SimilarityPostprocessor(similarity_cutoff=-1.0)],
        max_images=1,
    )
    response = engine.query(query)
    assert {node.node.metadata["label"] for node in response.source_nodes} == {"mug"}
    assert len(images_of(llm.asked[0])) == 2
    assert "4. label: mug" in texts_of(llm.asked[0])


def test_a_model_that_takes_no_images_is_shown_none(store, embed_model, query):
    llm = ScriptedLLM.of(says("ok"))
    image_query_engine(store, embed_model, llm=llm, max_images=0).query(query)
    assert not images_of(llm.asked[0])


def test_an_image_alone_is_a_question_too(store, embed_model, leopard):
    llm = ScriptedLLM.of(says("ok"))
    image_query_engine(store, embed_model, llm=llm).query(QueryBundle("", image_path=str(leopard)))
    assert "most like the query image" in texts_of(llm.asked[0])


def test_nothing_found_is_said_without_asking_the_model(store, embed_model):
    engine = image_query_engine(store, embed_model, llm=ScriptedLLM.of(), filters=read_filters({"label": "kettle"}))
    assert str(engine.query("kettle")) == "Nothing was found."


def test_an_image_that_must_not_be_read_is_shown_as_words(store, embed_model, tmp_path):
    """And no URL is ever fetched to answer, as LlamaIndex's own synthesizer would."""
    llm = ScriptedLLM.of(says("ok"))
    engine = image_query_engine(store, embed_model, llm=llm, top_k=2, image_policy=ImagePolicy(roots=(tmp_path,)))
    assert str(engine.query("mug")) == "ok"
    assert not images_of(llm.asked[0])
    assert "the image cannot be read: outside the folders" in texts_of(llm.asked[0])


def test_the_words_round_the_images_can_be_changed(store, embed_model):
    llm = ScriptedLLM.of(says("ok"))
    engine = image_query_engine(store, embed_model, llm=llm, top_k=1)
    engine.update_prompts({"response_synthesizer:answer_template": PromptTemplate("Say {query_str}!")})
    engine.query("mug")
    assert texts_of(llm.asked[0]).endswith("Say mug!")


def test_every_kind_of_template_is_taken_and_a_name_that_nobody_reads_is_refused(store, embed_model):
    """LlamaIndex's own engines have a text_qa_template: the question was asked without it, unsaid."""
    llm = ScriptedLLM.of(says("ok"))
    engine = image_query_engine(store, embed_model, llm=llm, top_k=1)
    engine.update_prompts({"response_synthesizer:answer_template": RichPromptTemplate("Tell {{ query_str }}!")})
    engine.query("mug")
    assert texts_of(llm.asked[0]).endswith("Tell mug!")
    with pytest.raises(QueryError, match=r"no prompts \['text_qa_template'\]; there is answer_template"):
        engine.update_prompts({"response_synthesizer:text_qa_template": PromptTemplate("{query_str}")})


def test_numbers_and_filters_are_checked_when_the_engine_is_made(store, embed_model):
    with pytest.raises(QueryError, match="top_k"):
        image_query_engine(store, embed_model, top_k=0)
    with pytest.raises(QueryError, match="image_side"):
        image_query_engine(store, embed_model, image_side=0)
    for llm, name in (("default", "'default'"), (MockLLM(), "MockLLM")):
        with pytest.raises(QueryError, match=f"llm={name}: give a chat model"):
            image_query_engine(store, embed_model, llm=llm)
    with pytest.raises(FilterError):
        image_query_engine(store, embed_model, filters=read_filters([{"key": "a b;", "value": 1}]))


def test_the_synthesizer_answers_over_texts_alone():
    llm = ScriptedLLM.of(says("ok"))
    assert ImageSynthesizer(llm).get_response("why?", ["because", "so"]) == "ok"
    assert "2. so" in texts_of(llm.asked[0])


# ---------------------------------------------------------------------------------------------- the parts elsewhere


def test_the_retriever_works_in_llamaindexs_own_engine(store, embed_model, query):
    llm = ScriptedLLM.of(says("ok"), says("ok"))  # it asks again for each image that does not fit beside the others
    retriever = ComposedRetriever(store, embed_model, top_k=2)
    engine = RetrieverQueryEngine.from_args(retriever=retriever, llm=llm, multimodal=True)
    response = engine.query(query)
    assert str(response) == "ok"
    assert sum(len(images_of(messages)) for messages in llm.asked) == 2
    assert response.source_nodes[0].node.metadata["label"] == "phone case"


def test_a_bundle_with_our_vector_is_composed_in_any_index(store, embed_model, leopard):
    """`VectorStoreIndex` knows nothing of composed queries; the vector in the bundle does it."""
    index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model)
    nodes = index.as_retriever(similarity_top_k=2).retrieve(
        embed_model.get_query_bundle("phone case with this", str(leopard))
    )
    assert [node.node.metadata["label"] for node in nodes] == ["phone case", "phone case"]
    assert nodes[0].node.metadata["file_name"] == "natural leopard.jpg"


def test_a_router_sends_questions_about_images_to_the_engine(store, embed_model):
    llm = ScriptedLLM.of(says('[{"choice": 2, "reason": "images"}]'), says("a mug"))
    images = image_query_engine(store, embed_model, llm=llm, top_k=1)
    words = image_query_engine(store, embed_model, top_k=1)
    router = RouterQueryEngine(
        selector=LLMSingleSelector.from_defaults(llm=llm),
        query_engine_tools=[
            QueryEngineTool.from_defaults(words, name="list", description="lists"),
            QueryEngineTool.from_defaults(images, name="images", description="answers about images"),
        ],
        llm=llm,
    )
    assert str(router.query("which mug is red?")) == "a mug"


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211")
async def test_the_engine_is_a_tool_of_an_agent(store, embed_model):
    from llama_index.core.agent.workflow import FunctionAgent

    tool = QueryEngineTool.from_defaults(
        image_query_engine(store, embed_model, top_k=2), name="images", description="Finds images."
    )
    llm = ScriptedLLM.of(calls("images", input="a mug"), says("found"))
    assert str(await FunctionAgent(tools=[tool], llm=llm).run("find a mug")).strip() == "found"
    assert "1. label: mug" in texts_of(llm.asked[1])


def test_chat_engines_take_the_retriever_and_the_engine(store, embed_model):
    """LlamaIndex's four: over the retriever (with and without images), and over the engine."""
    retriever = ComposedRetriever(store, embed_model, top_k=2)

    def own() -> dict[str, Any]:
        """A model and a memory; LlamaIndex's default memory leaves a database connection open."""
        llm = ScriptedLLM.of(says("ok"), says("ok"))
        return {"llm": llm, "memory": ChatMemoryBuffer.from_defaults(llm=llm)}

    for chat in (
        ContextChatEngine.from_defaults(retriever=retriever, **own()),
        CondensePlusContextChatEngine.from_defaults(retriever=retriever, **own()),
        CondenseQuestionChatEngine.from_defaults(
            query_engine=image_query_engine(store, embed_model, top_k=2, llm=ScriptedLLM.of(says("ok"))),
            **(own() | {"llm": ScriptedLLM.of(says("a mug"))}),
        ),
    ):
        answer = chat.chat("a mug")
        assert str(answer) == "ok"
        assert answer.source_nodes[0].node.metadata["label"] == "mug"
    llm = ScriptedLLM.of(says("ok"))
    memory = ChatMemoryBuffer.from_defaults(llm=llm)
    engine = MultiModalContextChatEngine.from_defaults(retriever=retriever, multi_modal_llm=llm, memory=memory)
    seen = engine.chat("a mug")
    assert str(seen) == "ok"
    assert len(images_of(llm.asked[0])) == 2


def test_a_store_that_is_closed_and_opened_again_answers_the_same(tmp_path, embed_model, query):
    store = drawn_store(tmp_path, embed_model)
    before = [node.node_id for node in image_query_engine(store, embed_model).query(query).source_nodes]
    store.close()
    with open_store(tmp_path / "drawn.db", embed_model) as again:
        after = [node.node_id for node in image_query_engine(again, embed_model).query(query).source_nodes]
    assert before == after


def test_an_index_that_was_persisted_is_loaded_with_the_store(tmp_path, embed_model, store: ImageStore):
    index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model)
    index.storage_context.persist(str(tmp_path / "index"))
    context = StorageContext.from_defaults(vector_store=store, persist_dir=str(tmp_path / "index"))
    again = load_index_from_storage(context, embed_model=embed_model)
    nodes = again.as_retriever(similarity_top_k=1).retrieve("a mug with blue stars")
    assert nodes[0].node.metadata["label"] == "mug"
