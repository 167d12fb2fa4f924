"""What people write with LlamaIndex around images: the vector is that of the pixels, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import base64
import datetime
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from llama_index.core import SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, MetadataMode, Node, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from mm_retriever.demo.catalogue import draw_product
from mm_retriever.embedding import ComposedEmbedding, VisualizedBGEEmbedding
from mm_retriever.errors import IngestError, NodeError
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import ingest_images
from mm_retriever.store import ImageStore, open_store


@pytest.fixture(scope="module")
def model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for kind in ("mug", "umbrella"):
        draw_product(kind, "hearts", "red", seed=1, size=96).save(folder / f"{kind}.png")
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model: VisualizedBGEEmbedding) -> ImageStore:
    with open_store(tmp_path_factory.mktemp("store") / "a.db", model) as store:
        yield store


@pytest.fixture
def store(shared: ImageStore) -> ImageStore:
    shared.clear()
    return shared


def vectors(store: ImageStore) -> dict[str, np.ndarray]:
    return {row["id"]: np.asarray(row["embedding"]) for page in store.scan(["embedding"]) for row in page}


def assert_by_pixels(store: ImageStore, model: VisualizedBGEEmbedding, images: list[Path]) -> None:
    """Every row is one of the images, under the vector of its pixels, and each image is there once."""
    found = vectors(store)
    nodes = store.get_nodes(filters=MetadataFilters(filters=[]))
    assert sorted(Path(node.image_path).name for node in nodes) == sorted(image.name for image in images)
    for node in nodes:
        assert isinstance(node, ImageNode)
        expected = np.asarray(model.get_image_embedding(node.image_path))
        assert found[node.node_id] @ expected > 0.999


def image_node(path: Path, **more: Any) -> ImageNode:
    return ImageNode(id_=path.stem, image_path=str(path), metadata={"file_path": str(path)}, **more)


# ------------------------------------------------------------------------------------------ vectors of pixels


@pytest.mark.parametrize(
    "make",
    [
        image_node,
        lambda path: ImageNode(image_path=str(path), text="a red thing with hearts"),
        lambda path: ImageNode(image_path=str(path), image=base64.b64encode(path.read_bytes()).decode()),
        lambda path: Node(image_resource=MediaResource(path=path), text_resource=MediaResource(text="a caption")),
        lambda path: Node(image_resource=MediaResource(path=path)),
        lambda path: ImageDocument(image_path=str(path), metadata={"album": "garden"}),
    ],
    ids=["node", "caption", "bytes and path", "resource and text", "resource", "document"],
)
@pytest.mark.parametrize("how", ["insert_nodes", "ainsert_nodes"])
def test_images_inserted_into_an_index_are_embedded_by_their_pixels(make, how, store, model, folder):
    """Truth: the vector of the file. A VectorStoreIndex asks for the vector of each node's words, images included."""
    index = VectorStoreIndex.from_vector_store(store, model)
    nodes = [make(path) for path in sorted(folder.glob("*.png"))]
    if how == "insert_nodes":
        index.insert_nodes(nodes)
    else:
        asyncio.run(index.ainsert_nodes(nodes))
    assert_by_pixels(store, model, list(folder.glob("*.png")))


@pytest.mark.parametrize("how", ["from_documents", "nodes", "insert", "pipeline", "pipeline twice", "split pipeline"])
def test_documents_of_images_are_embedded_by_their_pixels_however_they_come(how, store, model, folder):
    paths = sorted(folder.glob("*.png"))
    documents = [ImageDocument(image_path=str(path), id_=path.stem, metadata={"album": "x"}) for path in paths]
    context = StorageContext.from_defaults(vector_store=store)
    if how == "from_documents":
        VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=model)
    elif how == "nodes":
        VectorStoreIndex([image_node(path) for path in paths], storage_context=context, embed_model=model)
    elif how == "insert":
        index = VectorStoreIndex.from_vector_store(store, model)
        for document in documents:
            index.insert(document)
    else:
        steps = [SentenceSplitter(), model] if how == "split pipeline" else [model]
        pipeline = IngestionPipeline(transformations=steps, vector_store=store, cache=IngestionCache())
        for _ in range(2 if how == "pipeline twice" else 1):
            pipeline.run(documents=documents)
    assert_by_pixels(store, model, paths)


@pytest.mark.parametrize("how", ["index", "pipeline"])
def test_a_reader_that_decodes_images_as_text_gives_images_all_the_same(how, store, model, folder):
    """Without llama-index-readers-file the bytes of an image arrive as text; a splitter makes dozens of pieces."""
    documents = SimpleDirectoryReader(folder).load_data()
    assert type(documents[0]) is Document
    if how == "index":
        context = StorageContext.from_defaults(vector_store=store)
        splitter = SentenceSplitter(chunk_size=400, chunk_overlap=0)
        index = VectorStoreIndex.from_documents(
            documents, storage_context=context, embed_model=model, transformations=[splitter]
        )
        assert_by_pixels(store, model, list(folder.glob("*.png")))
        index.delete_ref_doc(documents[0].doc_id)
        assert store.count() == 1
    else:
        IngestionPipeline(transformations=[model], vector_store=store).run(documents=documents)
        assert_by_pixels(store, model, list(folder.glob("*.png")))


def test_vectors_that_the_caller_made_stay(store, model, folder):
    """Of the pixels, of image and text together, of anything but the node's own words."""
    path = folder / "mug.png"
    given = {
        "pixels": model.get_image_embedding(str(path)),
        "composed": model.get_composed_embedding("in green", str(path)),
        "other": model.get_text_embedding("a description that the node does not have"),
    }
    store.add([ImageNode(id_=id_, image_path=str(path), embedding=vector) for id_, vector in given.items()])
    stored = vectors(store)
    assert all(stored[id_] @ np.asarray(vector) > 0.9999 for id_, vector in given.items())


class Recorder:
    """The small model, and whether each content that it was asked for had an image."""

    def __init__(self, model: VisualizedBGEEmbedding) -> None:
        self._embedder, self.asked = model.embedder, list[bool]()
        for name in ("name", "space", "dimension", "note", "prepare"):
            setattr(self, name, getattr(self._embedder, name))

    def encode(self, contents: Any, *, query: bool = False) -> Any:
        self.asked += [content.image is not None for content in contents]
        return self._embedder.encode(contents, query=query)


def test_the_text_of_an_image_is_embedded_only_to_judge_a_vector_that_the_model_did_not_make(store, model, folder):
    """Truth: what the model is asked for."""
    recorder = Recorder(model)
    mine = ComposedEmbedding(recorder)
    nodes = [image_node(path, text=f"some {path.stem}") for path in folder.glob("*.png")]
    words = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    judged = [image for _ in nodes for image in (False, True)]

    def rounded(vectors: list[list[float]]) -> list[list[float]]:
        """As another process sends them, in half precision."""
        return np.float16(vectors).astype(float).tolist()

    with open_store(store.uri, mine) as opened:
        for vectors_of, expected in (
            (lambda: [node.embedding for node in mine(nodes)], []),
            (lambda: mine.get_text_embedding_batch(words), [True] * len(nodes)),
            (lambda: rounded(mine.get_text_embedding_batch(words)), sorted(judged)),
            (lambda: rounded([node.embedding for node in mine(nodes)]), [False] * len(nodes)),
        ):
            given = [
                node.model_copy(update={"embedding": vector}) for node, vector in zip(nodes, vectors_of(), strict=True)
            ]
            recorder.asked.clear()
            opened.add(given)
            assert sorted(recorder.asked) == expected
            assert_by_pixels(opened, model, list(folder.glob("*.png")))


def test_texts_keep_the_vectors_of_their_words(store, model):
    VectorStoreIndex.from_vector_store(store, model).insert_nodes([TextNode(id_="t", text="a red mug")])
    assert vectors(store)["t"] @ np.asarray(model.get_text_embedding("a red mug")) > 0.999


def test_an_image_that_cannot_be_embedded_is_refused_with_the_way_to_do_it(tmp_path, store, model, folder):
    gone = ImageNode(id_="x", image_path=str(tmp_path / "gone.png"), metadata={"album": "garden"})
    with pytest.raises(NodeError, match=r"node 'x' is an image under a vector of words: .*embed_model\(\[node\]\)"):
        VectorStoreIndex.from_vector_store(store, model).insert_nodes([gone])
    data = base64.b64encode((folder / "mug.png").read_bytes()).decode()
    with pytest.raises(NodeError, match="save the image and set image_path, or give the node to ingest_images"):
        VectorStoreIndex.from_vector_store(store, model).insert_nodes([ImageNode(image=data, metadata={"a": 1})])
    assert store.count() == 0
    document = SimpleDirectoryReader(input_files=[folder / "mug.png"]).load_data()[0]
    document.embedding = [1.0, 0.0, 0.0]
    with (
        open_store(tmp_path / "named.db", SimpleNamespace(dimension=3, model_id="a name")) as named,
        pytest.raises(NodeError, match="open the store with its embed_model"),
    ):
        named.add([document])


# ------------------------------------------------------------------------------------------ each image is a document


def test_each_image_can_be_removed_by_its_id(store, model, folder):
    """From a folder, as a node and as a document; a row of an earlier version has no document id."""
    ingest_images(folder, store, model, show_progress=False)
    ids = [node.node_id for node in store.get_nodes(filters=MetadataFilters(filters=[]))]
    index = VectorStoreIndex.from_vector_store(store, model)
    index.insert_nodes([ImageNode(id_="node", image_path=str(folder / "mug.png"), metadata={"a": 1})])
    index.insert(ImageDocument(id_="document", image_path=str(folder / "mug.png"), metadata={"a": 1}))
    assert store.count() == 4
    for id_ in (*ids, "node", "document"):
        (row,) = [one for page in store.scan(["doc_id"]) for one in page if one["doc_id"] == id_]
        assert store.get_nodes([row["id"]])[0].ref_doc_id == id_
        index.delete_ref_doc(id_)
    assert store.count() == 0
    row = {"id": "old", "doc_id": "", "text": "", "embedding": model.get_text_embedding("x")}
    store._collection.write([{**row, "_node_content": "{}", "_node_type": "ImageNode"}])
    store.delete("old")
    assert store.count() == 0


# ------------------------------------------------------------------------------------------ images that are no files


def test_documents_that_carry_bytes_are_taken_once(store, model, folder, caplog):
    """Our choice: vector, digest and metadata are kept, under an id of the contents; Milvus never holds the bytes."""
    data = (folder / "mug.png").read_bytes()
    text = base64.b64encode(data).decode()

    def documents():
        return [
            ImageDocument(image=data, metadata={"album": "garden"}, text="a caption"),
            ImageNode(id_="mine", image=text),
            ImageNode(id_="uri", image_url=f"data:image/png;base64,{text}"),
            Node(id_="resource", image_resource=MediaResource(data=data)),
            ImageNode(id_="broken", image=base64.b64encode(b"no image").decode()),
        ]

    report = ingest_images(documents(), store, model, show_progress=False)
    assert (report.indexed, len(report.skipped)) == (4, 1)
    expected = np.asarray(model.get_image_embedding(data))
    assert all(vector @ expected > 0.999 for vector in vectors(store).values())
    nodes = store.get_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="album", value="garden")]))
    assert (nodes[0].get_content(), nodes[0].image, nodes[0].metadata["width"]) == ("a caption", None, 96)
    again = ingest_images(documents(), store, model, show_progress=False)
    assert (again.indexed, again.replaced, again.unchanged) == (0, 0, 4)


@pytest.fixture
def memory(folder):
    fs = fsspec.filesystem("memory")
    for path in folder.glob("*.png"):
        fs.pipe(f"/bucket/p/{path.name}", path.read_bytes())
    fs.pipe("/bucket/p/notes.txt", b"words")
    yield fs
    fs.rm("/bucket", recursive=True)


def test_images_of_another_file_system_are_found_where_a_reader_has_read_them(memory, store, model, folder):
    documents = SimpleDirectoryReader(input_dir="/bucket/p", fs=memory, required_exts=[".png"]).load_data()
    report = ingest_images(documents, store, model, show_progress=False)
    assert (report.indexed, report.skipped) == (2, ())
    nodes = store.get_nodes(filters=MetadataFilters(filters=[]))
    assert sorted(node.image_url for node in nodes) == ["memory:///bucket/p/mug.png", "memory:///bucket/p/umbrella.png"]
    for node in nodes:
        expected = np.asarray(model.get_image_embedding(folder / Path(node.image_url).name))
        assert vectors(store)[node.node_id] @ expected > 0.999
    documents = SimpleDirectoryReader(input_dir="/bucket/p", fs=memory, required_exts=[".png"]).load_data()
    again = ingest_images(documents, store, model, show_progress=False)
    assert (again.indexed, again.replaced, again.unchanged) == (0, 0, 2)
    memory.pipe("/bucket/p/mug.png", (folder / "umbrella.png").read_bytes())
    assert ingest_images("/bucket/p", store, model, fs=memory, show_progress=False).replaced == 1
    roots = ImagePolicy(roots=(folder,))
    assert not ingest_images(documents, store, model, show_progress=False, image_policy=roots).indexed


def test_paths_and_folders_of_another_file_system(memory, store, model):
    report = ingest_images("/bucket/p", store, model, fs=memory, show_progress=False)
    assert (report.indexed, report.skipped) == (2, ())
    assert [one.kind for one in report.ignored] == [".txt"]
    listed = ["/bucket/p/mug.png", "memory://bucket/p/umbrella.png", "/bucket/p/gone.png"]
    report = ingest_images(listed, store, model, fs=memory, show_progress=False)
    assert (report.indexed, report.unchanged, len(report.skipped)) == (0, 2, 1)


def test_the_file_system_of_this_machine_is_no_other(folder, store, model):
    """`url_to_fs` gives one for any place: a row whose image is at a file: URL could be neither shown nor reranked."""
    fs, path = fsspec.core.url_to_fs(str(folder))
    assert ingest_images(path, store, model, fs=fs, show_progress=False).indexed == 2
    nodes = store.get_nodes(filters=MetadataFilters(filters=[]))
    assert sorted(node.image_path for node in nodes) == [str(folder / name) for name in ("mug.png", "umbrella.png")]
    assert ingest_images(folder, store, model, show_progress=False).unchanged == 2


def test_a_place_that_needs_a_file_system_says_so(store, model):
    report = ingest_images(["s3://bucket/p/x.png"], store, model, show_progress=False)
    assert "give fs=fsspec.filesystem('s3')" in report.skipped[0].reason
    report = ingest_images([ImageNode(image_path="gs://bucket/x.png")], store, model, show_progress=False)
    assert "give fs=fsspec.filesystem('gs')" in report.skipped[0].reason
    with pytest.raises(IngestError, match=r"s3://bucket/p.*give fs=fsspec.filesystem\('s3'\)"):
        ingest_images("s3://bucket/p", store, model, show_progress=False)


# ------------------------------------------------------------------------------------------ metadata of readers


def test_one_strange_document_of_many_costs_nothing(store, model, caplog):
    """LlamaHub's readers produce such keys; each was a reason to store none of a batch."""
    strange = {"id": "r1", "dc:title": "A", "a/b": {"c": 1}, "taken": datetime.date(2024, 5, 1), "price": np.float32(2)}
    texts = [TextNode(id_=str(number), text=f"text {number}") for number in range(20)]
    texts[7].metadata = strange
    index = VectorStoreIndex.from_vector_store(store, model)
    with caplog.at_level(logging.WARNING):
        index.insert_nodes(texts)
        index.insert_nodes(texts)
    assert store.count() == 20
    expected = {**strange, "taken": "2024-05-01", "price": 2.0}
    assert store.get_nodes(["7"])[0].metadata == expected
    by_price = MetadataFilters(filters=[MetadataFilter(key="price", value=2), MetadataFilter(key="id", value="7")])
    assert [node.node_id for node in store.get_nodes(filters=by_price)] == ["7"]
    said = [record.message for record in caplog.records if "filters cannot name" in record.message]
    assert len(said) == 1
    assert "'a/b', 'dc:title', 'id'" in said[0]


def test_what_an_app_asks_of_any_store(store, model):
    """As MilvusVectorStore answers it."""
    store.add([TextNode(id_="t", text="x", embedding=model.get_text_embedding("x"))])
    assert [node.node_id for node in store.get_nodes(filters=MetadataFilters(filters=[]))] == ["t"]
    store.delete_nodes([])
    assert store.count() == 1
    (counted,) = asyncio.run(store.aclient.query(store.collection_name, output_fields=["count(*)"]))
    assert counted["count(*)"] == 1
    asyncio.run(store.aclear())
    assert store.count() == 0
