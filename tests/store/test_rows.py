"""What may be stored: nodes to rows and back, without a Milvus."""

from __future__ import annotations

import base64
import datetime
import math
from pathlib import Path

import pytest
from llama_index.core.schema import (
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)

from mm_retriever.errors import NodeError
from mm_retriever.store.rows import node_to_row, row_to_node

VECTOR = [0.25, -0.5, 1.0]


def there_and_back(node):
    return row_to_node(node_to_row(node, 3))


def image(**metadata):
    return ImageNode(id_="a", image_path="/photos/a.jpg", metadata=metadata, embedding=VECTOR)


def test_an_image_node_comes_back_whole():
    """Our choice: everything but the vector, which queries never fetch."""
    node = ImageNode(
        id_="a",
        image_path="/photos/a.jpg",
        image_url="https://example.com/a.jpg",
        text="a caption",
        metadata={"year": 2020, "price": 1.5, "new": True, "tags": ["x", "y"], "none": None, "empty": [], "Größe": "L"},
        excluded_llm_metadata_keys=["year"],
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="document")},
        embedding=VECTOR,
    )
    back = there_and_back(node)
    assert type(back) is ImageNode
    assert back.embedding is None
    assert back.model_dump() == {**node.model_dump(), "embedding": None}
    assert node.embedding == VECTOR, "the caller's node stays as it was"


def test_columns_are_what_filters_compare():
    """Our choice: a bool is 1 or 0, and None and [] are no column, so that every kind of Milvus agrees on them."""
    row = node_to_row(image(new=True, tags=[True, 2], none=None, empty=[], year=2020), 3)
    assert {key: row[key] for key in row if key in ("new", "tags", "none", "empty", "year")} == {
        "new": 1,
        "tags": [1, 2],
        "year": 2020,
    }
    assert type(row["new"]) is int


@pytest.mark.parametrize(
    "node",
    [
        ImageDocument(id_="a", image_url=None, embedding=VECTOR, metadata={"k": 1}, image=None),
        Document(id_="a", text="words", embedding=VECTOR, metadata={"k": 1}),
        Node(id_="a", text_resource=MediaResource(text="words"), embedding=VECTOR, metadata={"k": 1}),
        TextNode(id_="a", text="words", embedding=VECTOR, metadata={"k": 1}),
    ],
)
def test_texts_of_every_class_come_back_as_text_nodes(node):
    back = there_and_back(node)
    assert type(back) is TextNode
    assert (back.node_id, back.get_content(), back.metadata) == ("a", node.get_content(), {"k": 1})


@pytest.mark.parametrize("where", ["path", "url"])
def test_pictures_of_every_class_come_back_as_image_nodes(where):
    """LlamaIndex's MilvusVectorStore gives an ImageDocument back as text, and raises KeyError for a Node."""
    resource = MediaResource(path=Path("/p/a.png")) if where == "path" else MediaResource(url="https://x.org/a.png")
    node = Node(id_="a", image_resource=resource, text_resource=MediaResource(text="caption"), embedding=VECTOR)
    document = ImageDocument(id_="a", text="caption", embedding=VECTOR)
    document.image_resource = resource
    for one in (node, document):
        back = there_and_back(one)
        assert type(back) is ImageNode
        assert (back.image_path or back.image_url) == ("/p/a.png" if where == "path" else "https://x.org/a.png")
        assert back.get_content() == "caption"


def test_an_index_node_stays_one():
    back = there_and_back(IndexNode(id_="a", index_id="other", text="words", embedding=VECTOR))
    assert type(back) is IndexNode
    assert back.index_id == "other"


def test_picture_bytes_never_reach_milvus():
    """Truth: a dynamic field of a Milvus server takes 65,536 bytes. With a path they are dropped, without refused."""
    pixels = base64.b64encode(b"picture" * 10).decode()
    kept = there_and_back(ImageNode(id_="a", image=pixels, image_path="/a.png", embedding=VECTOR))
    assert (kept.image, kept.image_path) == (None, "/a.png")
    data_uri = f"data:image/png;base64,{pixels}"
    kept = there_and_back(ImageNode(id_="a", image_url=data_uri, image_path="/a.png", embedding=VECTOR))
    assert (kept.image_url, kept.image_path) == (None, "/a.png")
    for node in (
        ImageNode(id_="a", image=pixels, embedding=VECTOR),
        ImageNode(id_="a", image_url=data_uri, embedding=VECTOR),
        ImageDocument(id_="a", image=pixels, embedding=VECTOR),
    ):
        with pytest.raises(NodeError, match="save the picture and set image_path"):
            node_to_row(node, 3)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"size": {"width": 1}}, "'size': a dict is not flat"),
        ({"when": datetime.date(2020, 1, 1)}, "a date is not flat"),
        ({"tags": [["x"]]}, "text and numbers only"),
        ({"tags": ["x", None]}, "text and numbers only"),
        ({"file path": ["x"]}, "a list needs a key of ASCII letters"),
        ({"x": math.nan}, "not a finite number"),
        ({"x": [math.inf]}, "not a finite number"),
        ({"x": 2**63}, "64 bits"),
        ({"x": "\ud800"}, "not Unicode text"),
        ({"id": 1}, "'id' is a column of the store itself"),
        ({"doc_id": "x"}, "'doc_id' is a column of the store itself"),
        ({"_node_content": "x"}, "column of the store itself"),
        ({"a/b": 1}, "'a/b' is not a key"),
        ({"": 1}, "'' is not a key"),
        ({"x": "y" * 66_000}, "Milvus takes 65535"),
    ],
)
def test_metadata_that_filters_could_not_reach_are_refused(metadata, reason):
    """Our choice: refused with the key and the reason; LlamaIndex's store turns nested values into text, silently."""
    with pytest.raises(NodeError, match=reason) as caught:
        node_to_row(image(**metadata), 3)
    assert "node 'a'" in str(caught.value)


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (None, "has no embedding"),
        ([1.0, 2.0], "a vector of 2 numbers; the collection holds 3"),
        ([1.0, math.nan, 0.0], "NaN or infinity"),
        ([1.0, math.inf, 0.0], "NaN or infinity"),
        ([1e39, 0.0, 0.0], "NaN or infinity"),  # infinite in 32 bits
    ],
)
def test_a_vector_that_cannot_be_searched_is_refused(vector, reason):
    """Milvus Lite itself takes NaN, and returns it as a score."""
    with pytest.raises(NodeError, match=reason):
        node_to_row(ImageNode(id_="a", image_path="/a.png", embedding=vector), 3)


def test_texts_that_are_too_long_or_no_text_are_refused():
    with pytest.raises(NodeError, match="split it into smaller nodes"):
        node_to_row(TextNode(id_="a", text="é" * 40_000, embedding=VECTOR), 3)
    with pytest.raises(NodeError, match="not Unicode text"):
        node_to_row(TextNode(id_="a", text="\udcff", embedding=VECTOR), 3)
    with pytest.raises(NodeError, match="empty id"):
        node_to_row(TextNode(id_="", text="x", embedding=VECTOR), 3)
    with pytest.raises(NodeError, match="audio or video"):
        node_to_row(Node(id_="a", audio_resource=MediaResource(path=Path("/a.mp3")), embedding=VECTOR), 3)


def test_a_row_of_another_program_is_a_text_node():
    assert row_to_node({"id": "x", "text": "words"}).get_content() == "words"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "null",
        "5",
        "[]",
        '"text"',
        "{}",
        '{"id_": 5}',
        '{"metadata": 5}',
        "[" * 100_000,
        '{"relationships": {"x": 1}}',
    ],
)
@pytest.mark.parametrize("kind", ["ImageNode", "IndexNode", "Node", "TextNode", "os.system", ""])
def test_a_spoiled_row_is_a_text_of_its_own_id_and_ends_no_search(content, kind):
    """Our choice: whoever may write a row could otherwise end every search that meets it."""
    node = row_to_node({"id": "row", "text": "words", "_node_content": content, "_node_type": kind})
    assert (node.node_id, node.get_content()) == ("row", "words")


def test_a_row_says_nothing_of_another_id():
    content = ImageNode(id_="another", image_path="/a.png").to_json()
    node = row_to_node({"id": "row", "text": "", "_node_content": content, "_node_type": "ImageNode"})
    assert (node.node_id, node.image_path) == ("row", "/a.png")
