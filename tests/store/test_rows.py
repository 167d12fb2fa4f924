"""What may be stored: nodes to rows and back, without a Milvus."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import fractions
import math
import uuid
from pathlib import Path

import numpy as np
import pandas
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
from mm_retriever.store.rows import node_to_row, row_to_node, storable_node, unfiltered_keys

VECTOR = [0.25, -0.5, 1.0]


def there_and_back(node):
    return row_to_node(node_to_row(node, 3))


def image(**metadata):
    return ImageNode(id_="a", image_path="/photos/a.jpg", metadata=metadata, embedding=VECTOR)


def nested(depth):
    return [nested(depth - 1)] if depth else "x"


def itself():
    value = {}
    value["x"] = value
    return value


def test_an_image_node_comes_back_whole():
    """Our choice: everything, with the vector where it was fetched, which queries never do."""
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
    assert back.model_dump() == node.model_dump()
    without = {name: value for name, value in node_to_row(node, 3).items() if name != "embedding"}
    assert row_to_node(without).model_dump() == {**node.model_dump(), "embedding": None}
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
def test_images_of_every_class_come_back_as_image_nodes(where):
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


def test_a_node_of_an_own_class_keeps_its_image_or_index():
    """LlamaIndex knows its own class names only, and makes a text node of any other."""

    class Photo(ImageNode):
        @classmethod
        def class_name(cls):
            return "Photo"

    class Album(IndexNode):
        @classmethod
        def class_name(cls):
            return "Album"

    photo = there_and_back(Photo(id_="a", image_path="/photos/a.jpg", embedding=VECTOR))
    assert (type(photo), photo.image_path) == (ImageNode, "/photos/a.jpg")
    album = there_and_back(Album(id_="b", text="t", index_id="album", embedding=VECTOR))
    assert (type(album), album.index_id) == (IndexNode, "album")


def test_an_index_node_stays_one():
    back = there_and_back(IndexNode(id_="a", index_id="other", text="words", embedding=VECTOR))
    assert type(back) is IndexNode
    assert back.index_id == "other"


def test_image_bytes_never_reach_milvus():
    """Truth: a dynamic field of a Milvus server takes 65,536 bytes. With a path they are dropped, without refused."""
    pixels = base64.b64encode(b"image" * 10).decode()
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
        with pytest.raises(NodeError, match="save the image and set image_path, or give the node to ingest_images"):
            node_to_row(node, 3)


@pytest.mark.parametrize(
    "metadata",
    [
        {"size": {"width": 1, "deeper": [{"x": None}]}},
        {"tags": [["x"]]},
        {"tags": ["x", None]},
        {"file path": ["x"]},
        {"x": 2**63},
        {"x": "\ud800"},
        {"id": 1, "doc_id": "x", "document_id": "y", "ref_doc_id": "z", "text": "w"},
        {"embedding": "x", "_node_content": "x", "_words": "y"},
        {"a/b": 1, "dc:title": "A", "exif:Date Taken": "2024", "": 1, "x" * 200: 1},
    ],
)
def test_metadata_that_filters_cannot_name_stay_in_the_node(metadata):
    """Our choice: readers make such keys and values; they are no columns, and no reason to refuse a batch."""
    node = image(**metadata)
    row = node_to_row(node, 3)
    assert row_to_node(row).metadata == metadata
    assert row.keys() == node_to_row(image(), 3).keys(), "and no column"
    assert unfiltered_keys(storable_node(node).metadata) == list(metadata)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"x": "y" * 66_000}, "Milvus takes 65535"),
        ({"x": nested(100)}, "metadata: nested more than 32 deep"),
        ({"x": itself()}, "metadata: nested more than 32 deep"),
    ],
)
def test_metadata_that_no_node_can_hold_are_refused(metadata, reason):
    with pytest.raises(NodeError, match=reason) as caught:
        node_to_row(image(**metadata), 3)
    assert "node 'a'" in str(caught.value)


class Size(enum.Enum):
    LARGE = "L"


@dataclasses.dataclass
class Camera:
    maker: str
    year: np.int16


@pytest.mark.parametrize(
    ("value", "expected", "is_column"),
    [
        (np.int64(3), 3, True),
        (np.float32(0.5), 0.5, True),
        (np.bool_(True), True, True),
        (np.array([1, 2]), [1, 2], True),
        (np.str_("x"), "x", True),
        (np.float64("nan"), None, False),
        (math.nan, None, False),
        (math.inf, "inf", True),
        (np.datetime64("2024-05-01"), "2024-05-01", True),
        (np.datetime64("NaT"), None, False),
        (pandas.Timestamp("2024-05-01 10:00"), "2024-05-01T10:00:00", True),
        (pandas.NaT, None, False),
        (pandas.NA, None, False),
        (pandas.Timedelta("1h"), "0 days 01:00:00", True),
        (datetime.date(2024, 5, 1), "2024-05-01", True),
        (datetime.datetime(2024, 5, 1, 10, tzinfo=datetime.UTC), "2024-05-01T10:00:00+00:00", True),
        (datetime.time(10, 30), "10:30:00", True),
        (decimal.Decimal("19.99"), 19.99, True),
        (fractions.Fraction(1, 4), 0.25, True),
        (2 + 1j, "(2+1j)", True),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005", True),
        (Path("/a/b"), "/a/b", True),
        (Size.LARGE, "L", True),
        pytest.param({"b", "a"}, ["a", "b"], True, id="set"),
        (("a", 1), ["a", 1], True),
        (b"Canon\0\0", "Canon", True),
        (b"\xff\xfe", "//4=", True),
        ({1: {Size.LARGE: np.int8(1)}}, {"1": {"L": 1}}, False),
        (Camera("Leica", np.int16(1954)), {"maker": "Leica", "year": 1954}, False),
    ],
    ids=repr,
)
def test_values_of_any_library_come_back_as_json_has_them(value, expected, is_column):
    """Our choice: the nearest value of JSON; what is missing is None, as it is for filters."""
    back = there_and_back(image(key=value))
    assert back.metadata == {"key": expected}
    assert type(back.metadata["key"]) is type(expected)
    row = node_to_row(image(key=value), 3)
    assert ("key" in row) is is_column
    if is_column:
        assert row["key"] == expected
    source = RelatedNodeInfo(node_id="d", metadata={"key": value})
    with_source = ImageNode(
        id_="a", image_path="/a.jpg", embedding=VECTOR, relationships={NodeRelationship.SOURCE: source}
    )
    assert there_and_back(with_source).ref_doc_id == "d", "a splitter copies the metadata into the relationships"


def test_an_image_from_no_document_is_its_own():
    """Truth: LlamaIndex removes a document by the id that its nodes name as their source."""
    row = node_to_row(image(), 3)
    assert row["doc_id"] == row_to_node(row).ref_doc_id == "a"
    assert node_to_row(TextNode(id_="t", text="x", embedding=VECTOR), 3)["doc_id"] == "t"


def test_bytes_of_files_are_no_text():
    """SimpleDirectoryReader without readers for files decodes JPEG and PDF as text, and a splitter cuts that up."""
    jpeg = Path("/p/a.jpg")
    text = (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" * 300).decode("utf-8", "ignore")
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}
    whole = Document(id_="d", text=text, embedding=VECTOR, metadata={"file_path": str(jpeg)})
    piece = TextNode(id_="p", text=text, embedding=VECTOR, metadata=whole.metadata, relationships=source)
    empty = TextNode(id_="e", text="", embedding=VECTOR, metadata=whole.metadata)
    for node, id_ in ((whole, "d"), (piece, "d"), (empty, "e")):
        back = there_and_back(node)
        assert (type(back), back.node_id, back.image_path, back.get_content()) == (ImageNode, id_, str(jpeg), "")
    caption = TextNode(id_="c", text="a mug", embedding=VECTOR, metadata=whole.metadata)
    assert there_and_back(caption).get_content() == "a mug"
    stray = TextNode(id_="s", text="one \x0e stray character in a text of some length" * 9, embedding=VECTOR)
    assert type(there_and_back(stray)) is TextNode
    for broken in ("%PDF-1.4\n\x01\x02", text):
        with pytest.raises(NodeError, match=r"bytes of a file \(/p/a.pdf\): read that with a reader"):
            node_to_row(TextNode(id_="b", text=broken, embedding=VECTOR, metadata={"file_path": "/p/a.pdf"}), 3)


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
