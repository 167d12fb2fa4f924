"""`ImageSearch` over the Model Context Protocol: three tools, originals as resources.

Owns what is MCP's: content blocks, resource URIs, progress, sessions. Knows nothing of HTTP, stores and models. (No
`from __future__ import annotations` here: the tools' types are read at run time.)
"""

import base64
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, ToolError
from mcp.server.stdio import stdio_server
from mcp_types import CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent, ToolAnnotations
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from pydantic import ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from mcp_server_mm_retriever.lines import Item, pass_on
from mm_retriever import __version__
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import MMRetrieverError, QueryError, one_line
from mm_retriever.images import ImagePolicy
from mm_retriever.search_tools import (
    ONLY_NAMED,
    ChangeArgument,
    Conversation,
    FiltersArgument,
    ImageArgument,
    ImageDescription,
    ImageSearch,
    Progress,
    QuestionArgument,
    ResultArgument,
    SearchLimits,
    SearchResult,
    TextArgument,
    TopKArgument,
    check_names,
    without_folders,
)
from mm_retriever.store import ImageStore
from mm_retriever.tools import ImageSearchToolSpec

ORIGINALS = "image://indexed/"
VIEWS = "image://view/"
INSTRUCTIONS = (
    "Searches a collection of images by words, by an image, or by both at once. Results are numbered and have ids; "
    f"the resource {VIEWS}ID is a result as a JPEG of less than 1 MB, {ORIGINALS}ID its original file."
)
MAX_SESSIONS = 256
IDLE_SECONDS = 30 * 60  # after which the SDK ends a session
SEARCHES_AT_ONCE = 4

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer", SearchResult, ImageDescription)


class ImageAnswer(TypedDict, total=False):
    """What is known about an image; what is empty is left out."""

    rank: int
    id: str
    name: str
    score: float
    label: str
    text: str
    reason: str
    description: str
    size: list[int]
    metadata: dict[str, Any]
    item_images: list[str]
    file_type: str
    file_bytes: int
    note: str


class SearchAnswer(TypedDict, total=False):
    """What a search found, best first."""

    search: int
    query: str
    results: list[ImageAnswer]
    hint: str
    note: str


class ImageSearchServer(MCPServer[Any]):
    """An MCP server over one `ImageSearch`.

    A client over stdio is one conversation, in which "result 3" means the last search's. Over HTTP so is a session of a
    client that opens one (protocol versions up to 2025); one that opens none refers to results by their ids.

    Args:
        search: what is asked.
        one_client: whether all requests come from one client, as over stdio.
        structured: also give answers as JSON (`structuredContent`), and their schema. Many clients that read it leave
            out the images beside it; None: only where the search gives no images.
    """

    def __init__(self, search: ImageSearch, *, one_client: bool, structured: bool | None = None) -> None:
        handlers = list(logging.getLogger().handlers)
        super().__init__("mm-retriever", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")
        logging.getLogger().handlers[:] = handlers  # the SDK's draws boxes around tracebacks; logging is the program's
        self._search = search
        self._structured = search.limits.thumbnails == 0 if structured is None else structured
        self.conversations = Conversations(one_client)
        self._turns = anyio.CapacityLimiter(SEARCHES_AT_ONCE)
        looks = ToolAnnotations(
            read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
        )
        for tool, described in (
            (self._search_images, ImageSearchToolSpec.search_images),
            (self._find_similar, ImageSearchToolSpec.find_similar),
            (self._describe_image, ImageSearchToolSpec.describe_image),
        ):
            self.add_tool(
                tool,
                name=described.__name__,
                description=inspect.cleandoc(described.__doc__ or ""),
                annotations=looks,
                structured_output=None if self._structured else False,
            )
        self.resource(ORIGINALS + "{node_id}", name="image", mime_type="image/*")(self._original_bytes)
        self.resource(VIEWS + "{node_id}", name="view", mime_type="image/jpeg")(self._view_bytes)

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """Call a tool; an argument whose name is nearly right is refused, not passed over: its filter would be lost.

        Others that no tool takes are passed over: some clients add their own to every call.

        Raises:
            ToolError: as of the SDK, or an argument that is misspelt.
        """
        known: dict[str, Any] = {}
        for tool in await self.list_tools():
            known = tool.input_schema["properties"] if tool.name == name else known
        try:
            check_names(arguments, known)
        except QueryError as error:
            raise ToolError(str(error)) from error
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            reasons = (f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.__cause__.errors()[:5])
            raise ToolError(one_line("; ".join(reasons), 500)) from error

    async def _search_images(
        self,
        ctx: Context,
        text: TextArgument = None,
        image: ImageArgument = None,
        filters: FiltersArgument = None,
        top_k: TopKArgument = None,
    ) -> Annotated[CallToolResult, SearchAnswer]:
        return self._result(await self._ask(ctx, self._search.search, text, image, filters, top_k))

    async def _find_similar(
        self,
        ctx: Context,
        result: ResultArgument,
        change: ChangeArgument = None,
        filters: FiltersArgument = None,
        top_k: TopKArgument = None,
    ) -> Annotated[CallToolResult, SearchAnswer]:
        return self._result(await self._ask(ctx, self._search.find_similar, result, change, filters, top_k))

    async def _describe_image(
        self, ctx: Context, image: ResultArgument, question: QuestionArgument = None
    ) -> Annotated[CallToolResult, ImageAnswer]:
        return self._result(await self._ask(ctx, self._search.describe, image, question))

    async def _ask(self, ctx: Context, request: Callable[..., Answer], *arguments: object) -> Answer:
        """Run one request in a thread, telling the client how far it is.

        A call that its client gives up frees its place at once; its thread ends at the next step.
        """
        call = partial(request, *arguments, conversation=self.conversations.of(ctx), progress=_progress(ctx))
        try:
            return await anyio.to_thread.run_sync(call, limiter=self._turns, abandon_on_cancel=True)
        except MMRetrieverError as error:
            raise ToolError(without_folders(str(error))) from error

    async def run_stdio_async(self) -> None:
        """As of the SDK, which leaves lines that are no message without an answer."""
        async with stdio_server() as (lines, answers), anyio.create_task_group() as tasks:
            send, messages = anyio.create_memory_object_stream[Item]()
            tasks.start_soon(pass_on, lines, send, answers.send)
            server = self._lowlevel_server  # as the method that this one replaces: there is no public name
            async with messages:
                await server.run(messages, answers, server.create_initialization_options())
            tasks.cancel_scope.cancel()

    async def read_resource(self, uri: Any, context: Any = None) -> Iterable[ReadResourceContents] | Any:
        """Return an indexed image with its own media type, which a template could not give it."""
        kind = next((kind for kind in (ORIGINALS, VIEWS) if str(uri).startswith(kind)), None)
        if kind is None:
            return await super().read_resource(uri, context)
        read = self._search.original if kind == ORIGINALS else self._search.view
        node_id = unquote(str(uri).removeprefix(kind))
        try:
            original = await anyio.to_thread.run_sync(read, node_id, limiter=self._turns)
        except QueryError as error:
            raise ResourceNotFoundError(without_folders(str(error))) from error
        except MMRetrieverError as error:
            raise ResourceError(without_folders(str(error))) from error
        return [ReadResourceContents(content=original.data, mime_type=original.media_type)]

    def _original_bytes(self, node_id: str) -> bytes:
        """The original file of an indexed image, by the id of a result."""
        return self._search.original(node_id).data

    def _view_bytes(self, node_id: str) -> bytes:
        """An indexed image as a JPEG of less than 1 MB, by the id of a result."""
        return self._search.view(node_id).data

    def _result(self, answer: SearchResult | ImageDescription) -> CallToolResult:
        """An answer as MCP content: a line for each result, then its thumbnail, then where its original is."""
        results = answer.results if isinstance(answer, SearchResult) else ()
        content: list[ContentBlock] = []
        for part, result in zip(answer.parts, (None, *results), strict=True):
            content.append(TextContent(text=part.text))
            if part.thumbnail is None:
                continue
            content.append(ImageContent(data=base64.b64encode(part.thumbnail).decode(), mime_type="image/jpeg"))
            if result is not None:
                content.append(
                    ResourceLink(
                        uri=ORIGINALS + quote(result.id, safe=""),
                        name=f"original of result {result.rank}",
                        mime_type=result.file_type or None,
                        size=result.file_bytes,
                    )
                )
        return CallToolResult(content=content, structured_content=answer.to_dict() if self._structured else None)


def image_search(
    store: ImageStore,
    embed_model: ComposedEmbedding,
    *,
    vision_model: str | None = None,
    vision_server: Mapping[str, Any] | None = None,
    roots: Sequence[Path] | None = None,
    allow_urls: bool = False,
    device: str | None = None,
    group_by: str | None = None,
    limits: SearchLimits | None = None,
) -> ImageSearch:
    """Return the search that the command line serves.

    Args:
        store: from `open_store`.
        embed_model: the model that the store was opened for.
        vision_model: a name of `load_reranker`; the model ranks the results and, if it can, describes images.
        vision_server: `base_url`, `api` and `api_key` of `load_reranker`, for a model that runs on a server.
        roots: folders that images may be read from, those of the store and those that a client names. None: those
            of the store lie where its file says, which a server shared with others is not trusted with.
        allow_urls: whether a client may name images by URL.
        device: of a vision model on this machine.
        group_by: the metadata column that names the item of an image; results are items then.
        limits: of what goes in and out, as of `ImageSearch`.
    """
    named = replace(ONLY_NAMED, roots=tuple(roots or ()), allow_urls=allow_urls)
    shared = not str(store.uri).endswith(".db")
    stored = ImagePolicy(roots=tuple(roots) if roots else () if shared else None)
    if shared and not roots:
        logger.warning("images of a shared server are read only inside folders given as roots; there are none")
    options: dict[str, Any] = {"image_policy": named, "stored_policy": stored, "group_by": group_by, "limits": limits}
    make = partial(ImageSearch, store, embed_model, **options)
    if vision_model is None:
        return make()
    from mm_retriever.rerank import load_reranker

    reranker = load_reranker(
        vision_model,
        top_n=(limits or SearchLimits()).max_top_k,
        device=None if vision_server else device,
        image_policy=stored,
        **vision_server or {},
    )
    return make(rerank=reranker, llm=reranker.llm)


def create_server(search: ImageSearch, *, one_client: bool = True, structured: bool | None = None) -> ImageSearchServer:
    """Return a server (see `ImageSearchServer`), for a client of the same process, or with `run` for one on stdio."""
    return ImageSearchServer(search, one_client=one_client, structured=structured)


def serve_stdio(search: ImageSearch, *, structured: bool | None = None) -> None:
    """Serve one client on stdin and stdout until it closes them; nothing else may write to stdout."""
    create_server(search, structured=structured).run("stdio")


class Conversations:
    """The conversation that a request is part of, if it is part of one; ended and long idle sessions are forgotten."""

    def __init__(self, one_client: bool) -> None:
        self._only = Conversation() if one_client else None
        self._by_session: dict[str, tuple[Conversation, float]] = {}  # the longest unused first

    def of(self, ctx: Context) -> Conversation | None:
        """Return the conversation of a request, None if it is part of none."""
        if self._only is not None:
            return self._only
        # only a version with sessions checks the header: later ones pass on whatever a client writes there
        session = (ctx.headers or {}).get("mcp-session-id")
        if not session or ctx.protocol_version not in HANDSHAKE_PROTOCOL_VERSIONS:
            return None
        now = time.monotonic()
        conversation, _ = self._by_session.pop(session, (Conversation(), now))
        self._by_session[session] = conversation, now
        for oldest, (_, used) in list(self._by_session.items()):
            if len(self._by_session) <= MAX_SESSIONS and now - used <= IDLE_SECONDS:
                break
            self.forget(oldest)
        return conversation

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._by_session)

    def forget(self, session: str) -> None:
        """Forget what a session could refer to."""
        self._by_session.pop(session, None)


def _progress(ctx: Context) -> Progress:
    def tell(done: int, steps: int, doing: str) -> None:
        anyio.from_thread.check_cancelled()  # a call that its client gave up ends before the next step
        anyio.from_thread.run(ctx.report_progress, done, steps, doing)

    return tell
