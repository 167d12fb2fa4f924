"""Image search as LlamaIndex tools: real agents with a scripted model, through the real tools on a real store."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.tools import ToolMetadata
from llama_index.core.tools.calling import call_tool
from llama_index.core.workflow import Context
from PIL import Image

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.search_tools import Conversation, ImageSearch, SearchLimits
from mm_retriever.tools import ImageSearchToolSpec, ImageTool
from tests.support.drawn_store import ScriptedLLM, calls, draw_leopard, drawn_store, images_of, says, texts_of

# What LlamaIndex does to itself: its agents use deprecated ways into pydantic, and its memory is not serialised
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of known unserializable key"),
]


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> ImageSearch:
    embed_model = VisualizedBGEEmbedding("tiny", device="cpu")
    store = drawn_store(tmp_path_factory.mktemp("store"), embed_model)
    yield ImageSearch(store, embed_model, limits=SearchLimits(top_k=3, thumbnail_side=64))
    store.close()


@pytest.fixture(scope="module")
def leopard(tmp_path_factory) -> Path:
    return draw_leopard(tmp_path_factory.mktemp("query") / "leopard.png")


@pytest.fixture
def spec(search, leopard) -> ImageSearchToolSpec:
    spec = ImageSearchToolSpec(search)
    spec.attach("photo.png", leopard)
    return spec


def tool(spec: ImageSearchToolSpec, name: str) -> ImageTool:
    return next(one for one in spec.to_tool_list() if one.metadata.name == name)


def opened(block: ImageBlock) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(block.image)))


# ---------------------------------------------------------------------------------------------- what a model reads


def test_docstrings_and_types_are_the_schema(spec):
    """What an agent's model is told about each tool."""
    tools = {one.metadata.name: one.metadata for one in spec.to_tool_list()}
    assert list(tools) == ["search_images", "find_similar", "describe_image"]
    properties = tools["search_images"].get_parameters_dict()["properties"]
    assert list(properties) == ["text", "image", "filters", "top_k"]
    assert "attachment" in properties["image"]["description"]
    assert tools["find_similar"].get_parameters_dict()["required"] == ["result"]
    assert tools["search_images"].description.startswith("Find images by words")
    for one in tools.values():
        described = one.to_openai_tool()["function"]  # refuses what is too long for a remote model
        assert all("description" in parameter for parameter in described["parameters"]["properties"].values())
        json.dumps(described)


def test_some_tools_and_other_descriptions_can_be_asked_for(spec):
    other = ToolMetadata(name="look", description="Look.", fn_schema=None)
    (only,) = spec.to_tool_list(["describe_image"], {"describe_image": other})
    assert only.metadata.name == "look"
    assert not only.call(image="photo.png").is_error


# ---------------------------------------------------------------------------------------------- outputs


def test_a_result_is_a_line_of_text_with_its_thumbnail_after_it(spec):
    output = tool(spec, "search_images").call(text="phone case with this", image="photo.png")
    assert [type(block) for block in output.blocks] == [TextBlock] + [TextBlock, ImageBlock] * 3
    assert opened(output.blocks[2]).size == (64, 64)
    assert output.content.split("\n")[1].startswith('result 1: "phone case"')
    assert output.raw_output["results"][0]["metadata"]["file_name"] == "natural leopard.jpg"
    assert output.model_dump_json()


def test_the_functions_can_be_called_as_they_are(spec):
    """Plain typed functions, for programs."""
    assert len(spec.search_images("mug", top_k=2).results) == 2
    assert spec.describe_image("result 1").id == spec.search_images("mug").results[0].id


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("search_images", {}, "nothing to search for"),
        ("search_images", {"image": "/etc/passwd"}, "no image is known"),
        ("search_images", {"image": "http://10.0.0.1/a.png"}, "URLs is off"),
        ("search_images", {"image": "data:image/png;base64,AAAA"}, "cannot load"),
        ("search_images", {"text": "x", "filters": "nonsense"}, "not JSON"),
        ("search_images", {"text": "x", "colour": "red"}, "search_images takes text, image, filters, top_k"),
        ("find_similar", {}, "find_similar takes result, change"),
        ("find_similar", {"result": "result 7"}, "nothing was found yet"),
        ("describe_image", {"image": None}, "give a name as text"),
    ],
)
async def test_an_error_is_an_output_that_says_what_to_do(spec, name, arguments, message):
    """Synchronous, asynchronous, and through LlamaIndex's own caller."""
    one = tool(spec, name)
    for output in (one.call(**arguments), await one.acall(**arguments), call_tool(one, arguments)):
        assert output.is_error
        assert output.content.startswith("Error: ")
        assert message in output.content


def test_an_unexpected_failure_tells_no_secrets(search, caplog):
    """What is no fault of the arguments is logged for the host, and named to the model by its kind only."""

    class Broken:
        def search(self, *args, **kwargs):
            raise RuntimeError("password=secret")

    output = tool(ImageSearchToolSpec(Broken()), "search_images").call(text="x")  # type: ignore[arg-type]
    assert output.is_error
    assert "RuntimeError" in output.content
    assert "secret" not in output.content
    assert "password=secret" in caplog.text


def test_a_model_that_takes_no_images_is_given_none(spec):
    words = ImageSearch(spec.search._store, spec.search._embed_model, limits=SearchLimits(thumbnails=0))
    output = tool(ImageSearchToolSpec(words, spec.conversation), "search_images").call(image="photo.png")
    assert not images_of([ChatMessage(blocks=output.blocks)])
    assert "result 9" in output.content


# ---------------------------------------------------------------------------------------------- agents

TURNS = ("find phone cases like this photo [photo.png]", "the third one but red", "describe it")
CALLS = (
    ("search_images", {"text": "phone case with this", "image": "photo.png"}),
    ("find_similar", {"result": "result 3", "change": "in red", "top_k": 2}),
    ("describe_image", {"image": "result 1"}),
)
ANSWERS = ("Here are three.", "And this in red.", "It is a red phone case.")


def assert_three_turns(
    asked: Sequence[Sequence[ChatMessage]], answers: Sequence[str], spec: ImageSearchToolSpec
) -> None:
    """The model saw the results of each turn as text and as images, and the last is about the one before."""
    assert list(answers) == list(ANSWERS)
    assert len(asked) == 6
    seen = [images_of(asked[after]) for after in (1, 3, 5)]
    assert [opened(block).size for block in seen[0]] == [(64, 64)] * 3
    assert len(seen[1]) >= 2
    assert len(seen[2]) >= 1
    second = spec.conversation.result(1, 2)
    (node,) = spec.search._store.get_nodes([second])
    assert node.metadata["file_name"].startswith("red")
    assert second in texts_of(asked[5][-1:])
    third = spec.conversation.result(3, 1)
    assert third not in {spec.conversation.result(rank, 2) for rank in (1, 2)}


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_holds_the_conversation_of_three_turns(spec, streaming):
    """ "find phone cases like this photo", "the third one but red", "describe it"."""
    script = [
        line for (name, given), said in zip(CALLS, ANSWERS, strict=True) for line in (calls(name, **given), says(said))
    ]
    llm = ScriptedLLM.of(*script)
    agent = FunctionAgent(tools=spec.to_tool_list(), llm=llm, streaming=streaming)
    context = Context(agent)
    answers = [str(await agent.run(turn, ctx=context)).strip() for turn in TURNS]
    assert_three_turns(llm.asked, answers, spec)
    message = next(one for one in llm.asked[1] if one.role is MessageRole.TOOL)
    assert [type(block) for block in message.blocks] == [TextBlock] + [TextBlock, ImageBlock] * 3


def thinks(name: str, arguments: dict[str, object]) -> ChatMessage:
    return says(f"Thought: I need a tool.\nAction: {name}\nAction Input: {json.dumps(arguments)}")


async def test_a_react_agent_holds_the_conversation_of_three_turns(spec):
    """LlamaIndex reduces observations to text; the formatter puts the images back."""
    script = [
        line
        for (name, given), said in zip(CALLS, ANSWERS, strict=True)
        for line in (thinks(name, given), says(f"Thought: I know.\nAnswer: {said}"))
    ]
    llm = ScriptedLLM.of(*script)
    agent = ReActAgent(
        tools=spec.to_tool_list(), llm=llm, formatter=spec.react_formatter(), system_prompt="You sell {things}."
    )
    context = Context(agent)
    answers = [str(await agent.run(turn, ctx=context)).strip() for turn in TURNS]
    assert_three_turns(llm.asked, answers, spec)
    assert "You sell" in texts_of(llm.asked[0][:1])
    observation = llm.asked[1][-1]
    assert [type(block) for block in observation.blocks[:4]] == [TextBlock, TextBlock, TextBlock, ImageBlock]


async def test_a_react_agent_without_the_formatter_reads_the_results_as_text(spec):
    llm = ScriptedLLM.of(thinks(*CALLS[0]), says("Thought: I know.\nAnswer: done"))
    agent = ReActAgent(tools=spec.to_tool_list(), llm=llm)
    assert str(await agent.run(TURNS[0])).strip() == "done"
    assert not images_of(llm.asked[1])
    assert "result 3: " in texts_of(llm.asked[1])


async def test_an_agent_can_mend_its_own_wrong_call(spec):
    """The error is what its model reads next, and the loop goes on."""

    def mend(messages: Sequence[ChatMessage]) -> ChatMessage:
        assert "attached are 'photo.png'" in texts_of(messages[-1:])
        return calls("search_images", image="photo.png")

    llm = ScriptedLLM.of(calls("search_images", image="photo.jpeg"), mend, says("found"))
    agent = FunctionAgent(tools=spec.to_tool_list(), llm=llm)
    result = await agent.run("find this")
    assert str(result).strip() == "found"
    assert [call.tool_output.is_error for call in result.tool_calls] == [True, False]


async def test_an_agent_workflow_runs_the_tools(spec):
    llm = ScriptedLLM.of(calls("search_images", text="mug", top_k=1), says("a mug"))
    workflow = AgentWorkflow.from_tools_or_functions(spec.to_tool_list(), llm=llm)
    assert str(await workflow.run("find a mug")).strip() == "a mug"
    assert len(images_of(llm.asked[1])) == 1


async def test_conversations_at_the_same_time_stay_apart(search):
    """One spec for each; "result 1" is each one's own."""

    async def talk(kind: str) -> str:
        spec = ImageSearchToolSpec(search, Conversation())
        llm = ScriptedLLM.of(
            calls("search_images", text=f"a {kind}"), calls("describe_image", image="result 1"), says("done")
        )
        await FunctionAgent(tools=spec.to_tool_list(), llm=llm).run("go")
        return texts_of(llm.asked[2][-1:])

    kinds = ["mug", "umbrella", "phone case"]
    for kind, said in zip(kinds, await asyncio.gather(*map(talk, kinds)), strict=True):
        assert f'label "{kind}"' in said


async def test_parallel_calls_of_one_turn_all_come_back(spec):
    both = calls("search_images", text="mug", top_k=1)
    both.blocks += calls("find_similar", result="photo.png", top_k=1).blocks
    llm = ScriptedLLM.of(both, says("done"))
    await FunctionAgent(tools=spec.to_tool_list(), llm=llm).run("go")
    assert len(images_of(llm.asked[1])) == 2


def test_the_tools_do_not_block_an_event_loop(spec):
    """While a search runs, the loop does."""

    async def ticks_during_search() -> int:
        ticks = 0
        search = asyncio.create_task(tool(spec, "search_images").acall(text="mug"))
        while not search.done():
            ticks += 1
            await asyncio.sleep(0)
        assert not search.result().is_error
        return ticks

    assert asyncio.run(ticks_during_search()) > 3
