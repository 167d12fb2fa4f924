"""Texts, images and images with text in one collection and one ranking; words that count exactly."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import QueryBundle, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import Document, ImageDocument, ImageNode, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BM25BuiltInFunction

from mm_retriever import ComposedRetriever, ImageStore, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.errors import QueryError, StoreMismatchError
from mm_retriever.store.words import STOP_WORDS, node_words
from tests.support.colour_embedding import ColourEmbedding, paint

TEXTS = {
    "care": "All mugs are made of porcelain and may go into the dishwasher.",
    "orders": "Orders placed before noon are shipped on the same day.",
    "returns": "Returns are free within thirty days; keep the receipt.",
    "steel": "Article XK-2041: spare lid for the travel bottle, steel.",
    "plastic": "Article XK-2042: spare lid for the travel bottle, plastic.",
    "shop": "Our shop in Lisbon opens at nine and closes at six.",
}
IMAGES = {
    "hearts": ("mug", "hearts", "red"),
    "leopard": ("phone case", "leopard", "natural"),
    "stripes": ("cap", "stripes", "blue"),
    "dots": ("sock", "polka dots", "green"),
    "stars": ("tote bag", "stars", "yellow"),
}


@pytest.fixture(scope="module")
def model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    for name, (kind, pattern, colour) in IMAGES.items():
        draw_product(kind, pattern, colour, 3).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in IMAGES}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, model: VisualizedBGEEmbedding, images: dict[str, Path]):
    """Six texts, five images, and one image with a text that is embedded together with it."""
    with open_store(tmp_path_factory.mktemp("mixed") / "corpus.db", model, hybrid=True) as store:
        nodes: list[Any] = [TextNode(id_=name, text=text, metadata={"kind": "text"}) for name, text in TEXTS.items()]
        nodes += [ImageNode(id_=name, image_path=str(path)) for name, path in images.items()]
        ingest_images(nodes, store, model, show_progress=False)
        both = ImageNode(id_="both", text="made by Nordlicht", image_path=str(images["hearts"]))
        both.embedding = model.get_composed_embedding("this in blue", images["hearts"])
        store.add([both])
        yield store


def ids(found: list[Any]) -> list[str]:
    return [one.node.node_id for one in found]


# ------------------------------------------------------------------------------------------ one ranking


@pytest.mark.parametrize(
    ("question", "answer", "mode"),
    [
        ("can mugs go into the dishwasher?", "care", "default"),
        ("a red mug with hearts", "hearts", "default"),
        ("a phone case with a leopard pattern", "leopard", "default"),
        ("can mugs go into the dishwasher?", "care", "hybrid"),
        ("when are orders shipped?", "orders", "hybrid"),  # the small model learned no such words
        ("a red mug with hearts", "hearts", "hybrid"),
        ("a phone case with a leopard pattern", "leopard", "hybrid"),
    ],
)
def test_texts_and_images_answer_in_one_ranking(corpus, model, question, answer, mode):
    """Our choice: a question answered by a text node and one answered by an image node both come first."""
    found = ComposedRetriever(corpus, model, top_k=3, mode=mode).retrieve(question)
    assert found[0].node.node_id == answer
    assert type(found[0].node) is (TextNode if answer in TEXTS else ImageNode)


def test_an_image_and_text_query_finds_the_image_and_the_pair(corpus, model, images):
    """A node of image and text together lies where the same composed query lies."""
    query = QueryBundle("this in blue", image_path=str(images["hearts"]))
    for mode in ("default", "hybrid"):
        assert ComposedRetriever(corpus, model, top_k=1, mode=mode).retrieve(query)[0].node.node_id == "both"
    leopard = draw_theme("leopard", "natural", 2)
    path = images["hearts"].parent / "theme.png"
    leopard.save(path)
    bundle = QueryBundle("phone case with this", image_path=str(path))
    assert ids(ComposedRetriever(corpus, model, top_k=1).retrieve(bundle)) == ["leopard"]


def test_an_index_and_a_pipeline_of_llamaindex_mix_as_well(tmp_path, model, images):
    """Users have pipelines: texts are split, images pass, all land in one collection."""
    with open_store(tmp_path / "pipeline.db", model, hybrid=True) as store:
        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), model], vector_store=store)
        pipeline.run(
            documents=[
                *(Document(text=text, id_=name) for name, text in TEXTS.items()),
                *(ImageDocument(id_=name, image_path=str(path)) for name, path in images.items()),
            ]
        )
        index = VectorStoreIndex.from_vector_store(store, embed_model=model)
        for mode in ("default", "hybrid"):
            retriever = index.as_retriever(similarity_top_k=2, vector_store_query_mode=mode)
            assert retriever.retrieve("can mugs go into the dishwasher?")[0].node.ref_doc_id == "care"
            assert retriever.retrieve("a red mug with hearts")[0].node.ref_doc_id == "hearts"
            composed = model.get_query_bundle(image=images["dots"])  # no words at all: by vector alone
            assert retriever.retrieve(composed)[0].node.image_path == str(images["dots"])


# ------------------------------------------------------------------------------------------ exact words


def test_hybrid_finds_the_exact_word_that_vectors_do_not_know(corpus, model):
    """Our choice: hybrid beats dense alone where the exact word matters. No model learned these article numbers."""
    questions = {"spare lid XK-2042": "plastic", "spare lid XK-2041": "steel", "Nordlicht": "both", "Lisbon": "shop"}
    first = {
        mode: [
            ids(ComposedRetriever(corpus, model, top_k=1, mode=mode).retrieve(question)) == [answer]
            for question, answer in questions.items()
        ]
        for mode in ("default", "hybrid")
    }
    assert all(first["hybrid"])
    assert sum(first["default"]) < len(questions)


def test_the_scores_are_sums_of_reciprocal_ranks(corpus, model):
    """Truth: the formula of reciprocal rank fusion (Cormack et al. 2009) with k = 60, over our own two rankings."""
    question = "XK-2042 is shipped in a red mug"
    vector = model.get_query_embedding(question)

    def ranking(mode: VectorStoreQueryMode) -> list[str]:
        query = VectorStoreQuery(query_embedding=vector, query_str=question, similarity_top_k=50, mode=mode)
        return corpus.query(query).ids or []

    dense, sparse = ranking(VectorStoreQueryMode.DEFAULT), ranking(VectorStoreQueryMode.TEXT_SEARCH)
    assert 1 < len(sparse) < len(dense) == 12
    expected = {one: sum(1 / (61 + ranks.index(one)) for ranks in (dense, sparse) if one in ranks) for one in dense}
    found = ComposedRetriever(corpus, model, top_k=12, mode="hybrid").retrieve(question)
    assert {one.node.node_id: one.score for one in found} == pytest.approx(expected, abs=1e-6)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_words_are_those_that_an_embedding_model_would_be_shown():
    """Text, and texts of the metadata that are not hidden; where a file lies says nothing of one image."""
    node = ImageNode(
        text="made by Nordlicht",
        metadata={"sku": "XK-1", "tags": ["soft", 3], "year": 2020, "secret": "hidden", "file_path": "/home/a/b.png"},
        excluded_embed_metadata_keys=["secret"],
    )
    assert node_words(node).split() == ["made", "by", "Nordlicht", "XK-1", "soft"]
    assert node_words(TextNode(text="é" * 40_000)) == "é" * 32_767


def test_words_of_metadata_are_found(tmp_path):
    """An image rarely has a text; its article number is in its metadata."""
    colours = ColourEmbedding()
    for name in ("a", "b", "c"):
        paint(tmp_path / f"{name}.png", "red")
    sidecar = {"b.png": {"sku": "XK-7"}}
    with open_store(tmp_path / "words.db", colours, hybrid=True) as store:
        ingest_images(tmp_path, store, colours, sidecar=sidecar, show_progress=False)
        found = ComposedRetriever(store, colours, mode="hybrid").retrieve("red xk-7")
        assert found[0].node.metadata["sku"] == "XK-7"
        assert found[0].score > found[1].score


def test_stop_words_have_no_say(corpus):
    for text in ("with this", " ".join(STOP_WORDS), "???"):
        query = VectorStoreQuery(query_str=text, similarity_top_k=5, mode=VectorStoreQueryMode.TEXT_SEARCH)
        assert corpus.query(query).ids == [], text


def test_filters_hold_in_both_halves(corpus, model):
    """The word half must not bring back what a filter leaves out, whatever the values hold."""
    only_images = MetadataFilters(filters=[MetadataFilter(key="kind", value="text")], condition=FilterCondition.NOT)
    found = ComposedRetriever(corpus, model, top_k=20, filters=only_images, mode="hybrid").retrieve("XK-2042 lid")
    assert set(ids(found)) == {*IMAGES, "both"}
    hostile = MetadataFilters(
        filters=[MetadataFilter(key="kind", value='text" or id != "', operator=FilterOperator.EQ)]
    )
    assert ComposedRetriever(corpus, model, filters=hostile, mode="hybrid").retrieve("XK-2042") == []


@pytest.mark.parametrize("text", ["XK-2042' or 1 == 1", 'XK-2042" \\', "{XK-2042}", "XK-2042\n\t%_"])
def test_the_words_of_a_query_are_only_words(corpus, model, text):
    assert ids(ComposedRetriever(corpus, model, top_k=1, mode="hybrid").retrieve(text)) == ["plastic"]


def test_hybrid_queries_may_be_asked_from_many_event_loops(corpus, model):
    retriever = ComposedRetriever(corpus, model, top_k=1, mode="hybrid")

    async def several() -> list[Any]:
        return await asyncio.gather(*(retriever.aretrieve("XK-2042") for _ in range(4)))

    for _ in range(2):
        assert [ids(found) for found in asyncio.run(several())] == [["plastic"]] * 4


def test_exclude_query_image_leaves_it_out_of_both_halves(tmp_path):
    colours = ColourEmbedding()
    red, blue = (paint(tmp_path / f"{name}.png", name) for name in ("red", "blue"))
    with open_store(tmp_path / "a.db", colours, hybrid=True) as store:
        ingest_images(tmp_path, store, colours, sidecar={"red.png": {"sku": "XK-7"}}, show_progress=False)
        retriever = ComposedRetriever(store, colours, top_k=2, mode="hybrid", exclude_query_image=True)
        found = retriever.retrieve(QueryBundle("XK-7", image_path=str(red)))
        assert [one.node.metadata["file_path"] for one in found] == [str(blue)]


# ------------------------------------------------------------------------------------------ the collection


def two_rows(store: ImageStore) -> None:
    store.add([
        TextNode(id_="a", text="the code XK-1", embedding=[1.0] + [0.0] * 26),
        TextNode(id_="b", text="nothing", embedding=[0.0, 1.0] + [0.0] * 25),
    ])  # fmt: skip


def words_found(store: ImageStore, text: str) -> list[str]:
    query = VectorStoreQuery(query_str=text, similarity_top_k=5, mode=VectorStoreQueryMode.TEXT_SEARCH)
    return store.query(query).ids or []


def test_the_words_are_kept_up_whoever_opens_the_collection(tmp_path):
    """Reopened without `hybrid`, replaced, removed, cleared: the index of words follows."""
    colours = ColourEmbedding()
    with open_store(tmp_path / "a.db", colours, hybrid=True) as store:
        two_rows(store)
    with open_store(tmp_path / "a.db", colours) as store:
        assert store.hybrid
        assert words_found(store, "xk-1") == ["a"]
        store.add([TextNode(id_="b", text="now XK-1 too", embedding=[0.0, 1.0] + [0.0] * 25)])
        assert set(words_found(store, "XK-1")) == {"a", "b"}
        assert words_found(store, "nothing") == []
        store.delete_nodes(["a"])
        assert words_found(store, "XK-1") == ["b"]
        store.clear()
        assert store.hybrid
        assert words_found(store, "XK-1") == []
        two_rows(store)
        assert words_found(store, "XK-1") == ["a"]


def test_a_collection_without_words_is_refused_where_words_are_asked_for(tmp_path):
    colours = ColourEmbedding()
    with open_store(tmp_path / "a.db", colours) as store:
        two_rows(store)
        assert not store.hybrid
        with pytest.raises(QueryError, match=r"open_store\(\.\.\., hybrid=True\)"):
            words_found(store, "XK-1")
        with pytest.raises(QueryError, match=r"open_store\(\.\.\., hybrid=True\)"):
            ComposedRetriever(store, colours, mode="hybrid")
    with pytest.raises(StoreMismatchError, match="has no index of words, hybrid= asks for one"):
        open_store(tmp_path / "a.db", colours, hybrid=True)
    with open_store(tmp_path / "a.db", colours, hybrid=True, overwrite=True) as anew:
        two_rows(anew)
        assert words_found(anew, "XK-1") == ["a"]


def test_a_hybrid_collection_of_plain_llamaindex_is_searched_by_its_own_words(tmp_path):
    """MilvusVectorStore's hybrid mode indexes its text column; that index serves."""
    plain = MilvusVectorStore(
        uri=str(tmp_path / "plain.db"), dim=27, collection_name="mm_retriever", use_async_client=False,
        enable_sparse=True, sparse_embedding_function=BM25BuiltInFunction(),
    )  # fmt: skip
    plain.add([TextNode(id_="a", text="the code XK-1", embedding=[1.0] + [0.0] * 26)])
    plain.client.close()
    colours = ColourEmbedding()
    with open_store(tmp_path / "plain.db", colours, hybrid=True) as store:
        store.add([TextNode(id_="b", text="the code XK-2", embedding=[0.0, 1.0] + [0.0] * 25)])
        assert words_found(store, "XK-1") == ["a", "b"] or words_found(store, "2") == ["b"]


def test_what_cannot_go_together_is_refused(corpus, model):
    vector = model.get_query_embedding("x")
    with pytest.raises(QueryError, match="min_score goes with mode 'default'"):
        ComposedRetriever(corpus, model, min_score=0.5, mode="hybrid")
    with pytest.raises(QueryError, match="'sparse' is not one of"):
        ComposedRetriever(corpus, model, mode="sparse")
    with pytest.raises(QueryError, match="without words"):
        words_found(corpus, " ")
    query = VectorStoreQuery(query_embedding=vector, query_str="x", alpha=0.3, mode=VectorStoreQueryMode.HYBRID)
    with pytest.raises(QueryError, match="have no weights"):
        corpus.query(query)
    with pytest.raises(QueryError, match="'svm' is not one of default, mmr, hybrid, text_search, sparse"):
        corpus.query(VectorStoreQuery(query_embedding=vector, mode=VectorStoreQueryMode.SVM))


# ------------------------------------------------------------------------------------------ a folder of everything


class PDFPages(BaseReader):
    """What llama-index-readers-file does for PDFs, in three lines."""

    def load_data(self, file: Path, extra_info: dict[str, Any] | None = None) -> list[Document]:
        from pypdf import PdfReader

        return [
            Document(text=page.extract_text(), metadata={**(extra_info or {}), "page_label": str(number)})
            for number, page in enumerate(PdfReader(file).pages, start=1)
        ]


@pytest.fixture
def folder(tmp_path: Path, images: dict[str, Path]) -> Path:
    path = tmp_path / "shop"
    path.mkdir()
    (path / "hours.md").write_text(f"# Hours\n\n{TEXTS['shop']}\n", encoding="utf-8")
    (path / "terms.pdf").write_bytes(pdf(TEXTS["orders"], TEXTS["returns"]))
    for name in ("hearts", "leopard"):
        (path / f"{name}.png").write_bytes(images[name].read_bytes())
    return path


def pdf(*pages: str) -> bytes:
    """A PDF file, one line of text a page, by the PDF 1.4 reference."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 20 700 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
        ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_of_markdown_pdfs_and_images_ends_up_right(tmp_path, folder, model, split):
    """SimpleDirectoryReader without llama-index-readers-file hands out images as text; they become images again."""
    documents: Any = SimpleDirectoryReader(folder, file_extractor={".pdf": PDFPages()}).load_data()
    if split:
        documents = SentenceSplitter(chunk_size=400).get_nodes_from_documents(documents)
    with open_store(tmp_path / "shop.db", model, hybrid=True) as store:
        report = ingest_images(documents, store, model, show_progress=False)
        assert (report.indexed, report.skipped) == (5, ())
        again = ingest_images(documents, store, model, show_progress=False)
        assert (again.indexed, again.replaced, again.skipped) == (0, 0, ())
        retriever = ComposedRetriever(store, model, top_k=1, mode="hybrid")
        answers = {
            "when does the shop in Lisbon open?": "hours.md",
            "when are orders shipped?": "terms.pdf",
            "are returns free?": "terms.pdf",
            "a red mug with hearts": "hearts.png",
            "a phone case with a leopard pattern": "leopard.png",
        }
        for question, file_name in answers.items():
            (found,) = retriever.retrieve(question)
            assert found.node.metadata["file_name"] == file_name, question
            assert isinstance(found.node, ImageNode) == file_name.endswith(".png")
            assert "\x00" not in found.node.get_content()
        assert retriever.retrieve("are returns free?")[0].node.metadata["page_label"] == "2"


def test_a_file_that_was_read_as_text_by_mistake_is_skipped_with_the_way_out(tmp_path, folder, model):
    """A PDF without a reader for PDFs comes as its bytes."""
    documents = SimpleDirectoryReader(folder).load_data()
    with open_store(tmp_path / "shop.db", model) as store:
        report = ingest_images(documents, store, model, show_progress=False)
        assert report.indexed == 3
        (skipped,) = report.skipped
        assert "terms.pdf" in skipped.reason
        assert "file_extractor" in skipped.reason


# ------------------------------------------------------------------------------------------ the examples

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run_example(source: str, capsys: Any) -> str:
    exec(compile(source, "example", "exec"), {"__name__": "__main__"})
    return str(capsys.readouterr().out)


def test_five_lines_make_a_plain_llamaindex_app_answer_composed_queries(capsys):
    """Our choice: five lines added. The app as it was runs too, and knows texts only."""
    source = (EXAMPLES / "02_existing_llamaindex_app.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    new = [line for line in lines if line.endswith("# new")]
    assert len(new) == 5
    answered = run_example(source, capsys)
    assert "shipped on the same day" in answered
    assert "leopard phone case.png" in answered
    before = "\n".join(line.replace("# was: ", "") for line in lines if line not in new)
    answered = run_example(before, capsys)
    assert "shipped on the same day" in answered
    assert ".png" not in answered


def test_the_mixed_corpus_example_finds_the_article_by_its_number(capsys):
    answered = run_example((EXAMPLES / "06_mixed_corpus.py").read_text(encoding="utf-8"), capsys)
    default, hybrid = answered.rsplit("XK-2041\n", 1)[0], answered.splitlines()[-1]
    assert "mug.png" in default
    assert "XK-2041" in hybrid
