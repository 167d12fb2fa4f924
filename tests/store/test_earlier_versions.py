"""Collections that earlier versions wrote open under today's models, answer as they did, and are not embedded again.

Truth: the rows and schemas that those versions made; collections of ten of them were tried with their own code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_index.core.schema import ImageNode
from pymilvus import DataType, MilvusClient

from mm_retriever.images import load_image
from mm_retriever.ingest.sources import path_id
from mm_retriever.store import open_store, open_stored
from mm_retriever.store.rows import node_to_row
from tests.ingest.test_pipeline import counts, ingest, where
from tests.store.test_image_store import query
from tests.support.colour_embedding import ColourEmbedding, paint

WEIGHTS = "0123456789ab"
MODELS = {"name, weights and dtype": f"tiny@{WEIGHTS}/bfloat16", "no model at all": None}


class Today(ColourEmbedding):
    """A model whose identity has today's form."""

    model_name: str = f"visualized-bge@{WEIGHTS}.abcdef"


def old_node(path: Path, model: Today, *, captioned: bool) -> ImageNode:
    """A row as versions wrote it that knew size and time alone, with one digest of all columns."""
    columns = {"price": 9.5} if captioned else {}
    status = path.stat()
    metadata = {
        "label": path.parent.name,
        **columns,
        "file_path": str(path),
        "file_name": path.name,
        "width": 24,
        "height": 18,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    if captioned:
        account = json.dumps(["", columns], sort_keys=True)
        metadata["metadata_digest"] = hashlib.sha256(account.encode()).hexdigest()
    vector = model.embed_images([load_image(path)])[0].tolist()
    return ImageNode(id_=path_id(str(path)), image_path=str(path), metadata=metadata, embedding=vector)


def make_collection(path: Path, model_id: str | None, dimension: int, *, content: bool) -> MilvusClient:
    """An empty collection of an earlier schema: the first had the node among the dynamic columns."""
    client = MilvusClient(str(path))
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=65_535)
    names = ("doc_id", "text", *(("_node_content", "_node_type") if content else ()))
    for name in names:
        schema.add_field(name, DataType.VARCHAR, max_length=65_535)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dimension)
    properties = {"mm_retriever.model": model_id} if model_id else {}
    client.create_collection("mm_retriever", schema=schema, consistency_level="Strong", properties=properties)
    return client


@pytest.mark.parametrize("content", [True, False], ids=["node in fields", "node in dynamic columns"])
@pytest.mark.parametrize("stated", MODELS)
def test_it_opens_answers_and_is_kept_up_without_embedding(tmp_path, stated, content):
    model = Today()
    photos = [paint(tmp_path / "photos" / "cars" / f"{colour}.png", colour) for colour in ("red", "blue", "green")]
    client = make_collection(tmp_path / "old.db", MODELS[stated], model.dimension, content=content)
    nodes = [old_node(path, model, captioned=number == 0) for number, path in enumerate(photos)]
    rows = [node_to_row(node, model.dimension) for node in nodes]
    client.insert("mm_retriever", [{**row, "embedding": row["embedding"].tolist()} for row in rows])
    client.close()
    embedded = model.embedded
    with open_store(tmp_path / "old.db", model, create=False) as store:
        assert store.query(query(model.get_text_embedding("blue"), 1)).ids == [nodes[1].node_id]
        assert [one.node_id for one in store.get_nodes(filters=where("price", 9.5))] == [nodes[0].node_id]
        embedded = model.embedded
        for _ in range(2):
            assert counts(ingest(tmp_path / "photos", store, model)) == {"unchanged": 3}
        (tmp_path / "photos" / "cars").rename(tmp_path / "photos" / "moved")
        assert ingest(tmp_path / "photos", store, model).moved == 3
        assert model.embedded == embedded
        (priced,) = store.get_nodes(filters=where("price", 9.5))
        assert priced.metadata["label"] == "moved"
        assert store.query(query(model.get_text_embedding("blue"), 1)).nodes[0].metadata["file_name"] == "blue.png"
    with open_stored(tmp_path / "old.db") as store:
        assert store.count() == 3


def test_a_dtype_that_differs_is_no_other_model(tmp_path):
    with open_store(tmp_path / "a.db", SimpleNamespace(dimension=27, model_id=f"tiny@{WEIGHTS}/float16")) as store:
        store.add([ImageNode(id_="a", image_path="/a.png", embedding=[1.0] + [0.0] * 26)])
    for dtype in ("float32", "bfloat16"):
        with open_store(tmp_path / "a.db", SimpleNamespace(dimension=27, model_id=f"copy@{WEIGHTS}/{dtype}")) as store:
            assert store.count() == 1
