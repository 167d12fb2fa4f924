"""The search of the command line, from options to rows; the same in its own process and in a server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters
from PIL import Image

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.images import ImagePolicy, ImageSource, load_image
from mm_retriever.own_keys import LAYERS_KEY, PREFIX
from mm_retriever.refinement import Refinement
from mm_retriever.retriever import ITEM_IMAGES, ComposedRetriever, item_problems
from mm_retriever.store import ImageStore
from mm_retriever.store.conditions import where_filters, where_notes


@dataclass(frozen=True)
class RowsQuery:
    """The options of `mm-retriever search`."""

    text: str | None = None
    image: str | None = None
    images: tuple[str, ...] = ()  # further ones
    where: tuple[str, ...] = ()
    top_k: int = 9
    min_score: float | None = None
    hybrid: bool = False
    each_once: bool = False
    group_by: str | None = None
    exclude_query: bool = False


@dataclass(frozen=True)
class FoundRows:
    """The results of a search.

    Attributes:
        query: with its vector and its image.
        nodes: best first.
        notes: for the user: why results are missing, and how a condition was read.
    """

    query: QueryBundle
    nodes: list[NodeWithScore]
    notes: tuple[str, ...] = ()


def check_rows(store: ImageStore, request: RowsQuery) -> None:
    """Refuse a search that a store cannot answer, without its model.

    Raises:
        QueryError: in the words of the command line.
    """
    if request.exclude_query and request.image is None:
        raise QueryError("--exclude-query leaves out the query image, and there is none: give --image, or leave it out")
    if request.images and request.exclude_query:
        raise QueryError("--exclude-query goes with one --image: of several it is not clear which")
    if request.hybrid and request.min_score is not None:
        raise QueryError("--min-score goes without --hybrid: hybrid scores say ranks, not how near an image is")
    if request.min_score is not None and math.isnan(request.min_score):
        raise QueryError("--min-score nan: give a number, usually from -1 to 1")
    if request.hybrid and not store.hybrid:
        raise QueryError(
            f"{str(store.uri)!r} has no index of words; make one: mm-retriever index FOLDER --db NEW.db --hybrid"
        )
    check_items(store, request.group_by)
    if problems := store.filter_problems(where_filters(request.where)):
        raise QueryError(f"--where: {'; '.join(problems)}")


def check_items(store: ImageStore, group_by: str | None) -> None:
    """Refuse to search per item if no row has the column that names items."""
    if group_by is not None and (problems := item_problems(store, group_by)):
        way = "mm-retriever index FOLDER --item COLUMN names the one that has the items"
        raise QueryError(f"--per-item: {'; '.join(problems)}. {way}")


def find_rows(
    store: ImageStore,
    embed_model: ComposedEmbedding,
    request: RowsQuery,
    *,
    opened: Sequence[Image.Image] = (),
    image_policy: ImagePolicy | None = None,
) -> FoundRows:
    """Return the results that `mm-retriever search` shows.

    Args:
        store: to search.
        embed_model: of the store.
        request: the options of the command.
        opened: the images of the query, if they are decoded already.
        image_policy: which images may be read; None: all that the user may read, and URLs except private addresses.

    Raises:
        QueryError: nothing to search for, or an option that this store cannot serve; in the words of the command line.
        ImageLoadError: the image cannot or must not be read.
    """
    filters = where_filters(request.where)
    check_rows(store, request)
    # a URL that the user typed is to be fetched; private addresses stay closed
    policy = image_policy or replace(embed_model.image_policy, allow_urls=True)
    more: tuple[ImageSource, ...] = tuple(opened[1:]) or tuple(
        load_image(image, policy=policy, keep_mode=True) for image in request.images
    )
    retriever = ComposedRetriever(
        store,
        embed_model,
        top_k=request.top_k,
        filters=filters,
        min_score=request.min_score,
        mode="hybrid" if request.hybrid else "default",
        exclude_query_image=request.exclude_query,
        unique=request.each_once,
        group_by=request.group_by,
        image_policy=policy,
        refinement=Refinement(images=more) if more else None,
    )
    query = _query(embed_model, request, opened, policy)
    nodes = retriever.retrieve(query)
    notes = where_notes(request.where)
    if len(nodes) < request.top_k:
        reason = _why_fewer(store.count(), filters, request)
        notes.append(f"{len(nodes)} of the {request.top_k} results that were asked for: {reason}")
    return FoundRows(query, nodes, tuple(notes))


def _query(
    embed_model: ComposedEmbedding, request: RowsQuery, opened: Sequence[Image.Image], policy: ImagePolicy
) -> QueryBundle:
    """The query with its vector, from an image that is decoded once."""
    if not opened or request.image is None:
        return embed_model.get_query_bundle(request.text, request.image, image_policy=policy)
    words = request.text if request.text and request.text.strip() else ""
    vector = (
        embed_model.get_composed_embedding(words, opened[0])
        if words
        else embed_model.get_image_embedding(opened[0], query=True)
    )
    return QueryBundle(query_str=words, image_path=request.image, embedding=vector)


def result_rows(nodes: Sequence[NodeWithScore]) -> list[dict[str, Any]]:
    """Return the results as ``--json`` prints them: rank, id, score, text if there is one, and all metadata.

    Metadata with one of these names, such as a column `id` or `rank`, are in a separate object `metadata`.
    """
    rows = []
    for rank, node in enumerate(nodes, 1):
        row: dict[str, Any] = {"rank": rank, "id": node.node.node_id, "score": node.score}
        if text := node.node.get_content():
            row["text"] = text
        metadata = {key: value for key, value in node.node.metadata.items() if key != LAYERS_KEY}
        hidden = {key: value for key, value in metadata.items() if key in ("rank", "id", "score", "text", "metadata")}
        row |= {key: value for key, value in metadata.items() if key not in hidden}
        rows.append({**row, "metadata": hidden} if hidden else row)
    return rows


def without_places(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without the paths of files, for a user of another machine."""
    hidden = ("file_path", f"{PREFIX}file_path")
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    for row in shown:
        if ITEM_IMAGES in row:
            row[ITEM_IMAGES] = [{"id": image["id"]} for image in row[ITEM_IMAGES]]
    return shown


def _why_fewer(rows: int, filters: MetadataFilters | None, request: RowsQuery) -> str:
    limits = {
        "--where": filters,
        "--min-score": request.min_score is not None,
        "--each-once": request.each_once,
        "--per-item": request.group_by is not None,
        "--exclude-query": request.exclude_query,
    }
    given = [option for option, is_given in limits.items() if is_given]
    total = f"the collection holds {rows} rows"
    return f"{total}, and {', '.join(given)} {'leaves' if len(given) == 1 else 'leave'} out others" if given else total
