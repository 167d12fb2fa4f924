"""Short ways to ingest and to look at what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core.schema import ImageNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery

from mm_retriever.ingest import IngestReport, ingest_images
from mm_retriever.ingest.sources import path_id
from mm_retriever.store import ImageStore
from tests.support.colour_embedding import ColourEmbedding


def ingest(source: Any, store: ImageStore, model: ColourEmbedding, **options: Any) -> IngestReport:
    return ingest_images(source, store, model, show_progress=False, **options)


def counts(report: IngestReport) -> dict[str, int]:
    names = ("indexed", "replaced", "updated", "unchanged", "removed")
    numbers = {name: getattr(report, name) for name in names} | {"skipped": len(report.skipped)}
    return {name: count for name, count in numbers.items() if count}


def nodes(store: ImageStore) -> dict[str, ImageNode]:
    """By file name, or by id where there is none."""
    ids = [row["id"] for page in store.scan() for row in page]
    return {node.metadata.get("file_name", node.node_id): node for node in store.get_nodes(ids)}


def node_of(store: ImageStore, path: Path) -> ImageNode:
    return store.get_nodes([path_id(str(path))])[0]


def facts(store: ImageStore, path: Path, *keys: str) -> dict[str, Any]:
    metadata = node_of(store, path).metadata
    return {key: metadata[key] for key in keys if key in metadata}


def where(key: str, value: Any, operator: str = "==") -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator(operator))])


def nearest(store: ImageStore, vector: list[float]) -> ImageNode:
    return store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=1)).nodes[0]
