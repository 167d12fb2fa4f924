"""`ComposedRetriever`: a text, an image, or an image and what should be different about it, to the nearest images.

Owns how a query becomes one vector and which results are left out. Knows nothing of models and of Milvus.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import mean_agg
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.query.query_transform.base import BaseQueryTransform
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import FilterError, ImageLoadError, QueryError, StoreMismatchError, shown
from mm_retriever.images import (
    DEFAULT_POLICY,
    ImageDataURI,
    ImagePolicy,
    ImageSource,
    first_readable,
    is_place,
    opened_image,
    pixel_digest,
    portable_image,
    read_image_bytes,
)
from mm_retriever.images.header import sniff_format
from mm_retriever.own_keys import PREFIX, file_digest, own_value
from mm_retriever.refinement import Refinement
from mm_retriever.request import node_images
from mm_retriever.store import MAX_TOP_K, ImageStore, filter_expression, model_facts, same_model
from mm_retriever.store.queries import checked_top_k
from mm_retriever.store.schema import key_problem
from mm_retriever.threads import in_thread

logger = logging.getLogger(__name__)

_LOSSLESS = ("PNG", "TIFF")  # what the pixels of a PIL image or an array arrive as


COPIES = "copies_left_out"
"""Metadata of a result that stands for copies of its file too: how many."""

ITEM_IMAGES = f"{PREFIX}item_images"
"""Metadata of a result that stands for an item: the id and the place of each of its images, the result's own first."""

_ITEMS_AT_ONCE = 500
"""Items whose images are asked for with one request."""

_LONGEST_ITEM = 1_000  # characters of the name of an item: many of them stand in one filter


class ComposedRetriever(BaseRetriever):
    """Retrieves by text, by image, or by both at once.

    `retrieve` takes a text or a `QueryBundle(query_str, image_path=...)`, where `image_path` is a path or a data URI;
    a bundle whose `embedding` is set is searched by that. Several `custom_embedding_strs` are averaged, each together
    with the image if there is one. LlamaIndex's transforms of queries drop the image: `KeepQueryImage` puts it back.
    It returns `NodeWithScore`s, best first: `ImageNode`s where images were stored, and `score` their inner
    product with the query, from -1 to 1 and higher for nearer (the cosine, as the vectors have length 1).

    Args:
        store: from `open_store`.
        embed_model: the model that the store was opened for.
        top_k: how many results, 1 to 16384; LlamaIndex's name for it, `similarity_top_k`, is taken too.
        filters: only what matches these.
        min_score: only what scores at least this.
        mode: "default" searches by vector; "hybrid" also by the words of the query, in a store opened with `hybrid`.
            `score` is then the sum of 1 / (60 + rank) over both rankings.
        exclude_query_image: leave out the query image itself: by its path or URL, by the bytes of its file wherever
            copies of it lie, and, of an image without a file of its own (PIL, an array, a PNG that was uploaded), by
            its pixels. A composed query otherwise finds it first. The places it frees go to the next results.
        image_policy: which images may be read to leave out the query image; default: the policy of the model.
        unique: of copies of one file only the best; the places they free go to the next results.
        group_by: a metadata column such as "item", whose value the images of one item share: of each item only the best
            image, and `top_k` are items. Its metadata `mm_item_images` then list all images of the item, whatever the
            filters: [{"id": ..., "image": path or URL}, ...]. What has no text or number there is an item of its own.
            A query image that is left out does not take the other images of its item along.
        refinement: what else moves every query: more images, words to avoid, results that were liked or not.
        callback_manager: as LlamaIndex knows it.

    Raises:
        QueryError: nothing to search for, or a number out of range.
        FilterError: filters that cannot be expressed.
    """

    def __init__(
        self,
        store: ImageStore,
        embed_model: ComposedEmbedding,
        *,
        top_k: int = 9,
        filters: MetadataFilters | None = None,
        min_score: float | None = None,
        mode: Literal["default", "hybrid"] = "default",
        exclude_query_image: bool = False,
        unique: bool = False,
        group_by: str | None = None,
        refinement: Refinement | None = None,
        image_policy: ImagePolicy | None = None,
        callback_manager: CallbackManager | None = None,
        similarity_top_k: int | None = None,
    ) -> None:
        top_k = checked_top_k(top_k if similarity_top_k is None else similarity_top_k)
        if min_score is not None and min_score != min_score:
            raise QueryError("min_score is NaN: give a number, usually from -1 to 1")
        if mode not in ("default", "hybrid"):
            raise QueryError(f"mode {mode!r} is not one of 'default', 'hybrid'")
        if mode == "hybrid" and not store.hybrid:
            raise QueryError("mode 'hybrid' needs a store with an index of words: open_store(..., hybrid=True)")
        if mode == "hybrid" and min_score is not None:
            raise QueryError("min_score goes with mode 'default': hybrid scores say ranks, not how near an image is")
        model_id = model_facts(embed_model)["model_id"]
        if not same_model(store.model_id, model_id):
            raise StoreMismatchError(f"the store was opened for {store.model_id!r}, the model given is {model_id!r}")
        for problem in () if group_by is None else item_problems(store, group_by):
            logger.warning("group_by=%r: %s; each image is an item of its own", group_by, problem)
        super().__init__(callback_manager=callback_manager)
        self._store = store
        self._embed_model = embed_model
        self._top_k = top_k
        self._filters = filters
        self._expression = filter_expression(filters)  # what cannot be expressed is refused here, and not later
        self._min_score = min_score
        self._mode = VectorStoreQueryMode(mode)
        self._exclude_query_image = exclude_query_image
        self._unique = unique
        self._group_by = group_by
        self._refinement = refinement or Refinement()
        self._policy = image_policy or cast("ImagePolicy", getattr(embed_model, "image_policy", DEFAULT_POLICY))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        image: Any = query_bundle.image_path  # LlamaIndex says text, but checks nothing
        if image is not None and not isinstance(image, str):
            query_bundle = replace(query_bundle, image_path=portable_image(image, policy=self._policy))
        vector = self._vector(query_bundle)
        if not self._refinement.is_empty:
            vector = self._refinement.vector(query_bundle, vector, self._embed_model, self._store).tolist()
        if self._exclude_query_image and query_bundle.image_path:
            return self._others(query_bundle, vector, query_bundle.image_path)
        return self._filled(query_bundle, vector, lambda hits: hits)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def retrieve_many(self, queries: Sequence[QueryType]) -> list[list[NodeWithScore]]:
        """Return what `retrieve` returns for each query, in the order given; the model embeds all of them together.

        Raises:
            QueryError: one of them has nothing to search for, or there is one query and no list of them.
        """
        if isinstance(queries, str | QueryBundle):  # its characters would be queries
            raise QueryError(f"retrieve_many takes a list of queries, got {shown(queries)}: give [query], or retrieve")
        bundles = [query if isinstance(query, QueryBundle) else QueryBundle(query) for query in queries]
        rows = [
            row
            for row, bundle in enumerate(bundles)
            if bundle.embedding is None and not bundle.custom_embedding_strs and (_words(bundle) or bundle.image_path)
        ]
        texts = [_words(bundles[row]) or None for row in rows]
        places = [bundles[row].image_path for row in rows]
        images = [portable_image(place, policy=self._policy) if place else None for place in places]
        vectors = self._embed_model.embed(texts, images, query=True)
        for row, image, vector in zip(rows, images, vectors, strict=True):
            bundles[row] = replace(bundles[row], image_path=image, embedding=vector.tolist())
        return [self.retrieve(bundle) for bundle in bundles]

    aretrieve_many = in_thread(retrieve_many)

    def _vector(self, query: QueryBundle) -> list[float]:
        if query.embedding is not None:
            return query.embedding
        text = _words(query)
        if query.image_path:
            texts = query.custom_embedding_strs or ([text] if text else [])
            if not texts:
                return self._embed_model.get_image_embedding(query.image_path, query=True)
            return mean_agg([self._embed_model.get_composed_embedding(text, query.image_path) for text in texts])
        if query.custom_embedding_strs:
            return self._embed_model.get_agg_embedding_from_queries(query.custom_embedding_strs)
        if text:
            return self._embed_model.get_query_embedding(text)
        if self._refinement.images or self._refinement.liked:  # they alone are the query
            return [0.0] * self._embed_model.dimension
        raise QueryError("nothing to search for: give a text, QueryBundle(query_str, image_path=...), or both")

    def _search(self, query: QueryBundle, vector: list[float], top_k: int) -> Iterator[NodeWithScore]:
        result = self._store.search(
            VectorStoreQuery(
                query_str=query.query_str,
                query_embedding=vector,
                similarity_top_k=top_k,
                filters=self._filters,
                mode=self._mode,
            ),
            self._expression,
        )
        for node, score in zip(result.nodes or (), result.similarities or (), strict=True):
            if self._min_score is None or score >= self._min_score:
                yield NodeWithScore(node=node, score=score)

    def _others(self, query: QueryBundle, vector: list[float], image: str) -> list[NodeWithScore]:
        """The nearest that are not the query image; more are fetched for as long as copies of it take up places."""
        itself = _QueryImage(image, self._policy)
        return self._filled(query, vector, itself.left_out_of, more=1)

    def _filled(
        self,
        query: QueryBundle,
        vector: list[float],
        left: Callable[[list[NodeWithScore]], list[NodeWithScore]],
        *,
        more: int = 0,
    ) -> list[NodeWithScore]:
        """The nearest of those that are left; more are fetched for as long as others take up places."""
        # Not Milvus' grouping search: it groups by columns of the schema only, which existing collections do not have,
        # and Milvus Lite looks at the nearest 10 * top_k rows only: an item with more images would hide other items.
        limit = min(self._top_k * (1 if self._group_by is None else 4) + more, MAX_TOP_K)
        while True:
            hits = list(self._search(query, vector, limit))
            others = each_once(left(hits)) if self._unique else left(hits)
            others = others if self._group_by is None else best_of_each(others, self._group_by)
            if len(others) >= self._top_k or len(hits) < limit or limit == MAX_TOP_K:
                break
            limit = min(4 * limit, MAX_TOP_K)
        best = others[: self._top_k]
        if self._group_by is None:
            return best
        if len(best) < self._top_k and len(hits) == MAX_TOP_K:
            logger.warning("the nearest %d images are of %d items: there may be more items", MAX_TOP_K, len(best))
        return self._with_item_images(best, self._group_by)

    def _with_item_images(self, best: Sequence[NodeWithScore], column: str) -> list[NodeWithScore]:
        """The results, each with all images of its item in its metadata."""
        items = dict.fromkeys(key for hit in best if (key := _item(hit.node, column)) is not None)
        same = [MetadataFilter(key=column, operator=FilterOperator.EQ, value=name) for _, name in items]
        images: dict[_Item | None, dict[str, str]] = {}
        for start in range(0, len(same), _ITEMS_AT_ONCE):
            some = MetadataFilters(filters=[*same[start : start + _ITEMS_AT_ONCE]], condition=FilterCondition.OR)
            for node in self._store.get_nodes(filters=some):
                images.setdefault(_item(node, column), {}).update(_place(node))  # "7" was asked for 7 too
        return [_with_images(hit, images.get(_item(hit.node, column)) or {}) for hit in best]


def _words(query: QueryBundle) -> str:
    """The text of a query, "" where it is blank."""
    return query.query_str if query.query_str and query.query_str.strip() else ""


class KeepQueryImage(BaseQueryTransform):
    """Another transform of queries (HyDE, decomposition, ...), after which the query still has its image.

    LlamaIndex's own rewrite the words into a new bundle without the image, and so into another question.

    Args:
        transform: what rewrites the words.
    """

    def __init__(self, transform: BaseQueryTransform) -> None:
        super().__init__()
        self._transform = transform

    def _run(self, query_bundle: QueryBundle, metadata: dict[str, Any]) -> QueryBundle:
        changed = self._transform.run(query_bundle, metadata)
        return replace(changed, image_path=query_bundle.image_path) if changed.image_path is None else changed

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"transform": self._transform}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """There are none but the transform's."""


def each_once(hits: Iterable[NodeWithScore]) -> list[NodeWithScore]:
    """Return the best of each set of copies of one file, by its digest; its metadata say how many others there were."""
    best: dict[object, NodeWithScore] = {}
    copies: Counter[object] = Counter()
    for hit in hits:
        key = file_digest(hit.node.metadata) or hit.node.node_id
        copies[key] += 1
        best.setdefault(key, hit)
    return [hit if copies[key] == 1 else _with_copies(hit, copies[key] - 1) for key, hit in best.items()]


def _with_copies(hit: NodeWithScore, copies: int) -> NodeWithScore:
    metadata = {**hit.node.metadata, COPIES: copies}
    return NodeWithScore(node=hit.node.model_copy(update={"metadata": metadata}), score=hit.score)


# ---------------------------------------------------------------------------------------------------------- items

_Item: TypeAlias = tuple[str, str | float]
"""What tells one item from another: whether its name is text or a number, and the name."""


def item_problems(store: ImageStore, column: str) -> list[str]:
    """Return why a store has no items by this column, a sentence each; none where it has.

    Raises:
        FilterError: a name that no column can have.
    """
    if (problem := key_problem(column)) is not None:
        raise FilterError(f"cannot group by {column!r}: {problem}")
    named = MetadataFilter(key=column, operator=FilterOperator.NE, value=None)
    return store.filter_problems(MetadataFilters(filters=[named]))


def best_of_each(hits: Iterable[NodeWithScore], column: str) -> list[NodeWithScore]:
    """Return the first of each item, by the value in a metadata column; what has none there stays."""
    best: dict[object, NodeWithScore] = {}
    for hit in hits:
        best.setdefault(_item(hit.node, column) or hit.node.node_id, hit)
    return list(best.values())


def _item(node: BaseNode, column: str) -> _Item | None:
    """The item that a node is of; None where the column names none: no value, a list, or what no filter can ask for."""
    value = node.metadata.get(column)
    if isinstance(value, str):
        is_unicode = value.encode("utf-8", "replace").decode() == value
        return ("text", value) if value and is_unicode and len(value) <= _LONGEST_ITEM else None
    return ("number", int(value) if isinstance(value, bool) else value) if isinstance(value, int | float) else None


def _place(node: BaseNode) -> dict[str, str]:
    """Where the image of a node is, by its id; empty for a text."""
    return {node.node_id: node.image_path or node.image_url or ""} if isinstance(node, ImageNode) else {}


def _with_images(hit: NodeWithScore, images: Mapping[str, str]) -> NodeWithScore:
    node, own = hit.node, _place(hit.node)
    others = sorted((images.keys() - own.keys()), key=lambda id_: (images[id_], id_))
    places = {**own, **{id_: images[id_] for id_ in others}}
    listed = [{"id": id_, "image": place} for id_, place in places.items()]
    changed: dict[str, Any] = {"metadata": {**node.metadata, ITEM_IMAGES: listed}}
    for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
        changed[name] = [*getattr(node, name), ITEM_IMAGES]
    return NodeWithScore(node=node.model_copy(update=changed), score=hit.score)


class _QueryImage:
    """What tells that a node is the query image: its places, the digest of its file, its pixels."""

    def __init__(self, image: str, policy: ImagePolicy) -> None:
        self._image, self._policy = image, policy
        self._places: set[str] = set()
        if isinstance(image, ImageDataURI):
            self._places = {image.url} - {""}
        elif is_place(image):
            path = os.path.expanduser(image)  # noqa: PTH111 - may be a URL
            self._places = {image, os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100
        self._digest: str | None = None
        self._lossless = False
        self._pixels: tuple[tuple[int, int], str] | None = None
        self._is_same: dict[str, bool] = {}  # by node: more results are fetched as long as these take up places
        in_memory = not is_place(image)
        # what is in memory already is not limited again
        largest = max(policy.max_bytes, len(image)) if in_memory else policy.max_bytes
        try:
            data = read_image_bytes(image, policy=replace(policy, max_bytes=largest))
        except ImageLoadError as error:  # the bundle brought its vector along; the file need not be here
            logger.warning("the query image is left out of the results by its path alone: %s", error)
        else:
            self._digest = hashlib.sha256(data).hexdigest()
            self._lossless = in_memory and sniff_format(data) in _LOSSLESS

    def left_out_of(self, hits: list[NodeWithScore]) -> list[NodeWithScore]:
        """The nodes that are not the query image."""
        others = [hit for hit in hits if not self._is_file(hit.node)]
        if self._lossless and len(others) == len(hits):  # perhaps the file was decoded before it became the query
            others = self._without_same_pixels(others)
        return others

    def _is_file(self, node: BaseNode) -> bool:
        if self._digest is not None and file_digest(node.metadata) == self._digest:
            return True
        return isinstance(node, ImageNode) and (node.image_path in self._places or node.image_url in self._places)

    def _without_same_pixels(self, hits: list[NodeWithScore]) -> list[NodeWithScore]:
        try:
            self._pixels = self._pixels or getattr(self._image, "pixels", None) or self._size_and_digest(self._image)
        except ImageLoadError as error:
            logger.warning("the pixels of the results are not compared with the query image: %s", error)
            return hits
        for hit in hits:
            if hit.node.node_id not in self._is_same:
                self._is_same[hit.node.node_id] = self._has_pixels(hit.node, *self._pixels)
        return [hit for hit in hits if not self._is_same[hit.node.node_id]]

    def _has_pixels(self, node: BaseNode, size: tuple[int, int], digest: str) -> bool:
        images = node_images(node)
        own = [own_value(node.metadata, key) or side for key, side in zip(("width", "height"), size, strict=True)]
        own = list(size) if file_digest(node.metadata) is None else own  # a caller's columns, of a product perhaps
        if not images or tuple(own) != size:
            return False
        try:
            return first_readable(images, self._size_and_digest) == (size, digest)
        except ImageLoadError as error:
            logger.warning("not compared with the query image: %s", error)
            return False

    def _size_and_digest(self, source: ImageSource) -> tuple[tuple[int, int], str]:
        with opened_image(source, policy=self._policy) as image:
            return image.size, pixel_digest(image)
