"""`ImageSearch`: search, find similar and describe, for agents.

Owns the steps from a request to a retrieval, a reranking and an answer. Knows nothing of agents, and nothing of the
host that shows the answer.
"""

from __future__ import annotations

import copy
import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeAlias

from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import FilterError, ImageLoadError, QueryError, one_line
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, encode_thumbnail, image_thumbnail, media_type, opened_image
from mm_retriever.images.header import sniff_format
from mm_retriever.own_keys import file_digest, own_value
from mm_retriever.rebuild import check_whole
from mm_retriever.refinement import Refinement
from mm_retriever.request import node_images
from mm_retriever.rerank.scorer import METADATA_KEYS, RERANK_NOTE, RERANK_REASON
from mm_retriever.retriever import ITEM_IMAGES, ComposedRetriever
from mm_retriever.search_tools.arguments import but_not, read_count, read_filters, read_text
from mm_retriever.search_tools.conversation import ONLY_NAMED, Conversation, NamedImage, named_image
from mm_retriever.search_tools.description import description_of
from mm_retriever.search_tools.results import (
    ImageDescription,
    ImageResult,
    Original,
    SearchLimits,
    SearchResult,
    shown_keys,
    shown_metadata,
    without_folders,
)
from mm_retriever.store import ImageStore
from mm_retriever.threads import in_thread, in_threads

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called in the searching thread with the number of finished steps, the number of all, and the next step."""

_LABELS = ("description", "title", "name", "label", "file_name")
_LONGEST_ID = 512
_ANY_NUMBER = 10**9


class ImageSearch:
    """Image search for a language model; one object serves any number of threads and conversations.

    Every method takes the `Conversation` it is part of; without one, only ids, data URIs and allowed paths can be
    named. A mistake of the model raises an `MMRetrieverError` whose message says what to do instead.

    Args:
        store: from `open_store`.
        embed_model: the model that the store was opened for.
        rerank: the name of a reranker, as `load_reranker` takes it; or node postprocessors, in order, whose own
            `top_n` limits the results.
        llm: a LlamaIndex LLM that takes images, to describe them; without one, `describe` returns stored facts only.
        image_policy: for image arguments: folders that paths must lie in, and whether URLs are fetched.
        stored_policy: for places in the store; a store that others can write to needs `roots`.
        limits: bounds of arguments and answers.
        group_by: the metadata column that names the item of an image; results are then items, each with the ids of its
            other images, as `ComposedRetriever` groups them.

    Raises:
        StoreMismatchError: the store was opened for another model.
    """

    def __init__(
        self,
        store: ImageStore,
        embed_model: ComposedEmbedding,
        *,
        rerank: str | BaseNodePostprocessor | Sequence[BaseNodePostprocessor] = (),
        llm: LLM | None = None,
        image_policy: ImagePolicy = ONLY_NAMED,
        stored_policy: ImagePolicy = DEFAULT_POLICY,
        limits: SearchLimits | None = None,
        group_by: str | None = None,
    ) -> None:
        self.limits = limits or SearchLimits()
        self.image_policy = image_policy
        self.stored_policy = stored_policy
        self._store = store
        self._embed_model = embed_model
        self._llm = llm
        self._group_by = group_by
        self._retriever(None, 1)  # raises now if store and model do not match
        from mm_retriever.rerank.registry import as_postprocessors  # imports clients of servers

        self._rerank = as_postprocessors(rerank, top_n=self.limits.max_top_k, image_policy=stored_policy)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a pickle; an error if LlamaIndex would leave out a part of the model or a postprocessor."""
        for component in (*self._rerank, self._llm):
            check_whole(component)
        return dict(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with the same models, and a store that is closed separately."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, _store=copy.deepcopy(self._store, memo))
        return copied

    # ------------------------------------------------------------------------------------------ requests

    def search(
        self,
        text: str | None = None,
        image: str | None = None,
        filters: object = None,
        top_k: int | None = None,
        *,
        unique: bool = True,
        refinement: Refinement | None = None,
        skip: int = 0,
        hybrid: bool = False,
        exclude: bool | None = None,
        conversation: Conversation | None = None,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Return the images nearest to a text, an image, or an image and a text about it.

        The query image itself is left out if a text says what should be different about it.

        Args:
            text: what to look for, or to change.
            image: an image argument: attachment, result, id, data URI or allowed path.
            filters: conditions as `read_filters` takes them.
            top_k: number of results; default and maximum are those of `limits`.
            unique: return only the best of several copies of one file, with the number of the others.
            refinement: further changes of the query; its images are image arguments, and it may be the whole query.
            skip: leave out so many of the best results, which an earlier call returned.
            hybrid: also search by the words of the text, in a store with a full-text index.
            exclude: whether to leave out the query image itself; None: if there is a text.
            conversation: for the image argument; keeps the results.
            progress: called at each step.

        Raises:
            QueryError: nothing to search for, an unknown image, or a number out of range.
            FilterError: the filters cannot be read or expressed, or no stored image can meet them, for example because
                a column does not exist.
            ImageLoadError: the image cannot or must not be read.
        """
        words = read_text(text, "text", most=self.limits.query_text)
        if not words and not image and (refinement is None or not (refinement.images or refinement.liked)):
            raise QueryError("nothing to search for: give text, image, or both")
        others = bool(words) if exclude is None else exclude
        options: dict[str, Any] = {"refinement": refinement, "skip": skip, "hybrid": hybrid, "unique": unique}
        return self._search(words, image, filters, top_k, conversation, progress, others=others, **options)

    def find_similar(
        self,
        result: str,
        change: str | None = None,
        filters: object = None,
        top_k: int | None = None,
        *,
        unique: bool = True,
        conversation: Conversation | None = None,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Return images like a given one, with a change ("in red"); the image itself is left out.

        Args and errors are those of `search`; `result` is its `image`, and `change` its `text`.
        """
        words = read_text(change, "change", most=self.limits.query_text)
        if not result:
            raise QueryError('which image? give "result 3", an id or an attachment as result')
        return self._search(words, result, filters, top_k, conversation, progress, others=True, unique=unique)

    def describe(
        self,
        image: str,
        question: str | None = None,
        *,
        conversation: Conversation | None = None,
        progress: Progress | None = None,
    ) -> ImageDescription:
        """Return the stored facts about an image, and a description by the vision model if there is one.

        Where the model fails, a note says so beside the facts.

        Args:
            image: an image argument, as in `search`.
            question: what to find out; default: a general description.
            conversation: for the image argument.
            progress: called at each step.

        Raises:
            QueryError: an unknown image.
            ImageLoadError: an image that is not in the store cannot or must not be read.
        """
        question_text = read_text(question, "question", most=self.limits.query_text)
        tell, steps = progress or _no_progress, 3 if self._llm else 2
        tell(0, steps, "reading the image")
        named = self.named(image, conversation)
        facts: dict[str, Any] = {}
        hidden = 0
        if named.node is not None:
            facts, hidden = self._facts(named.node)
        if not named.images:
            return ImageDescription(named.name, note="a text, not an image", **facts)
        try:
            size, large, small = named.read(lambda data: self._views(data, named.policy))
        except ImageLoadError as error:
            if named.node is None:
                raise
            return ImageDescription(named.name, note=_unreadable(error), **facts)
        tell(1, steps, "describing it" if self._llm else "making a thumbnail")
        notes = _left_out(hidden)
        if question_text and not self._llm:
            notes.insert(0, "no vision model is set up here to answer the question; look at the image")
        description = ""
        if self._llm:
            description, problem = description_of(large, question_text, self._llm, most=self.limits.long_text)
            notes[:0] = [f"{problem}; look at the image"] if problem else []
        answer = ImageDescription(
            named.name,
            description=description,
            size=size,
            thumbnail=small if self.limits.thumbnails else None,
            note="; ".join(notes),
            **facts,
        )
        tell(steps, steps, "done")
        return answer

    def original(self, node_id: str) -> Original:
        """Return the file of an indexed image, exactly as it was indexed.

        Raises:
            QueryError: there is no image of that id.
            ImageLoadError: its file cannot or must not be read, is not an image, is larger than `limits` allow, or is
                not the one that was indexed: its digest differs, or the store has no digest of it.
        """
        node = self.indexed(node_id)
        policy = replace(self.stored_policy, max_bytes=self.limits.original_bytes)
        data = NamedImage(node_id, node_images(node), policy, node, must_be_known=True).read(bytes)
        name = one_line(own_value(node.metadata, "file_name") or node_id, 200)
        kind = sniff_format(data)
        if kind is None:
            raise ImageLoadError(f"the file of {name!r} is not an image")
        return Original(node_id, name, media_type(kind), data)

    def indexed(self, node_id: str) -> BaseNode:
        """Return the node of an indexed image.

        Raises:
            QueryError: there is no image of that id.
        """
        node = self._stored(node_id)
        if node is None or not node_images(node):
            raise QueryError(f"there is no image of the id {one_line(node_id, 80)!r} in the store")
        return node

    def view(self, node_id: str) -> Original:
        """Return an indexed image as a JPEG that fits into a message to a model; errors are those of `original`."""
        original = self.original(node_id)
        side = self.limits.view_side
        with opened_image(original.data, policy=self.stored_policy) as image:
            data = encode_thumbnail(image, side)
            while len(data) > self.limits.view_bytes and side > 1:
                side = side * 3 // 4
                data = encode_thumbnail(image, side)
        return Original(node_id, original.name, "image/jpeg", data)

    asearch = in_thread(search)
    afind_similar = in_thread(find_similar)
    adescribe = in_thread(describe)

    # ------------------------------------------------------------------------------------------ searching

    def _search(
        self,
        words: str,
        image: str | None,
        filters: object,
        top_k: object,
        conversation: Conversation | None,
        progress: Progress | None,
        *,
        others: bool,
        unique: bool,
        refinement: Refinement | None = None,
        skip: int = 0,
        hybrid: bool = False,
    ) -> SearchResult:
        count = read_count(top_k, default=self.limits.top_k, most=self.limits.max_top_k)
        conditions = read_filters(filters)
        tell, steps = progress or _no_progress, 4 if self._rerank else 3
        tell(0, steps, "reading the query")
        named = None if image in (None, "") else self.named(image, conversation)
        if refinement is not None:
            more = tuple(self.named(image, conversation).read(bytes) for image in refinement.images)
            refinement = replace(refinement, images=more)
        retriever = self._retriever(
            but_not(named.node if named and others else None, conditions),
            skip + (max(count, self.limits.candidates) if self._rerank else count),
            exclude_query_image=others,
            unique=unique,
            refinement=refinement,
            mode="hybrid" if hybrid else "default",
        )
        if problems := self._store.filter_problems(conditions):  # refused before a model is asked
            raise FilterError(f"filters: {'; '.join(problems)}")
        query = self._query(words, named)
        tell(1, steps, "searching")
        nodes = retriever.retrieve(query)[skip:]
        matching = len(nodes)
        if self._rerank and nodes:
            tell(2, steps, f"reranking {len(nodes)} results")
            for postprocessor in self._rerank:
                nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query)
        tell(steps - 1, steps, "making thumbnails")
        ranks, shown = range(skip + 1, skip + count + 1), nodes[:count]
        read = self.limits.thumbnails > 0  # without images to read, threads would take longer than the search
        results = tuple(in_threads(self._result, ranks, shown) if read else map(self._result, ranks, shown))
        number = conversation.remember([node.node.node_id for node in nodes[:count]]) if conversation else 0
        tell(steps, steps, "done")
        names = [named.name] if named else []
        names += [f'"{one_line(words, 300)}"'] if words else []
        hint = "" if results else self._hint(query, conditions)
        return SearchResult(number, " and ".join(names), results, hint, self._note(top_k, len(results), matching))

    def _query(self, words: str, named: NamedImage | None) -> QueryBundle:
        if named is None and not words:  # the refinement is the whole query
            return QueryBundle(query_str="", embedding=[0.0] * self._embed_model.dimension)
        if named is None:
            return self._embed_model.get_query_bundle(words)
        if not named.images:
            raise QueryError(f"{named.name} is a text, not an image; give its words as text instead")
        return self._embed_model.get_query_bundle(words, named.read(bytes), image_policy=named.policy)

    def _note(self, top_k: object, count: int, matching: int) -> str:
        """A note on missing results and thumbnails."""
        requested = read_count(top_k, default=0, most=_ANY_NUMBER)
        most, thumbnails = self.limits.max_top_k, self.limits.thumbnails
        notes = [f"{requested} were asked for; one search gives at most {most}"] if requested > most else []
        if count and count < min(requested, most):
            why = "no more match" if count == matching else "the reranker gives no more"
            notes.append(f"{min(requested, most)} were asked for; {why}")
        if 0 < thumbnails < count:
            notes.append(f"the first {thumbnails} have thumbnails")
        return "; ".join(notes)

    def _retriever(self, filters: MetadataFilters | None, top_k: int, **options: Any) -> ComposedRetriever:
        options |= {"top_k": top_k, "filters": filters, "group_by": self._group_by, "image_policy": self.stored_policy}
        return ComposedRetriever(self._store, self._embed_model, **options)

    def _views(self, data: bytes, policy: ImagePolicy) -> tuple[tuple[int, int], bytes, bytes]:
        """Size of an image, a view for the model that describes it, and a thumbnail."""
        with opened_image(data, policy=policy) as image:
            large = encode_thumbnail(image, self.limits.described_side) if self._llm else b""
            return image.size, large, encode_thumbnail(image, self.limits.thumbnail_side)

    def _result(self, rank: int, scored: NodeWithScore) -> ImageResult:
        node, limits, policy = scored.node, self.limits, self.stored_policy
        facts, hidden = self._facts(node)
        note = node.metadata.get(RERANK_NOTE)
        notes = [without_folders(one_line(note, 200))] if note else []
        notes += _left_out(hidden)
        thumbnail = None
        images = node_images(node)
        if images and rank <= limits.thumbnails:
            try:
                thumbnail = NamedImage(node.node_id, images, policy, node).read(
                    lambda data: image_thumbnail(data, limits.thumbnail_side, policy=policy)
                )
            except ImageLoadError as error:
                notes.append(_unreadable(error))
        elif images and limits.thumbnails:
            notes.append(f"no thumbnail: only the first {limits.thumbnails} have one; ask for this one by itself")
        return ImageResult(
            rank,
            score=scored.score,
            text=facts.pop("stored_text"),
            reason=one_line(node.metadata.get(RERANK_REASON, ""), limits.long_text),
            thumbnail=thumbnail,
            item_images=tuple(image["id"] for image in node.metadata.get(ITEM_IMAGES, ()))[1:],
            note="; ".join(notes),
            version=(file_digest(node.metadata) or "")[:16],
            **facts,
        )

    def _facts(self, node: BaseNode) -> tuple[dict[str, Any], int]:
        """The shown facts of a node, and the number of its metadata that are not shown."""
        known = node.metadata
        used = next((key for key in _LABELS if isinstance(known.get(key), str) and known[key].strip()), "")
        hidden = frozenset({used, *METADATA_KEYS})
        facts = {
            "id": node.node_id,
            "label": one_line(known.get(used, ""), self.limits.value_text),
            "stored_text": one_line(node.get_content(MetadataMode.NONE), self.limits.long_text),
            "metadata": shown_metadata(known, self.limits, without=hidden),
            "file_type": mimetypes.guess_type(str(own_value(known, "file_name") or ""))[0] or "",
            "file_bytes": size if isinstance(size := own_value(known, "bytes"), int) else None,
        }
        return facts, max(0, len(shown_keys(known, without=hidden)) - self.limits.metadata)

    def _hint(self, query: QueryBundle, filters: MetadataFilters | None) -> str:
        """A hint for a model without results: the keys that it can filter by."""
        nearest = self._retriever(None, 1).retrieve(query)
        if not nearest:
            return "The store is empty."
        keys = ", ".join(shown_metadata(nearest[0].node.metadata, self.limits, without=frozenset(METADATA_KEYS)))
        return f"Without the filters there are results; they have the keys: {keys}." if filters else ""

    # ------------------------------------------------------------------------------------------ images

    def named(self, image: object, conversation: Conversation | None = None) -> NamedImage:
        """Return the image that an argument names; errors are those of `search`."""
        return named_image(
            image, conversation, self._stored, image_policy=self.image_policy, stored_policy=self.stored_policy
        )

    def _stored(self, node_id: str) -> BaseNode | None:
        if not node_id or len(node_id) > _LONGEST_ID:
            return None
        return next(iter(self._store.get_nodes([node_id.encode("utf-8", "replace").decode()])), None)


def _no_progress(done: int, steps: int, doing: str) -> None:
    """The progress function where the caller gives none."""


def _unreadable(error: ImageLoadError) -> str:
    return f"the image cannot be read: {one_line(without_folders(error.reason), 300)}"


def _left_out(count: int) -> list[str]:
    return [f"{count} more metadata not shown"] if count else []
