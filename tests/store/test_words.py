"""Words of any language in the index of words: cut, kept with the collection, found in a real Milvus Lite."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from pymilvus import MilvusClient

from mm_retriever.errors import StoreError, StoreMismatchError
from mm_retriever.store import ImageStore, open_store
from mm_retriever.store.schema import collection_schema
from mm_retriever.store.words import WordIndex, indexed_words, needs_segments, query_words

MODEL = SimpleNamespace(dimension=2, model_id="two numbers")
TEXTS = {
    "chinese": "\u7ea2\u8272\u7684\u96e8\u4f1e",  # a red umbrella
    "japanese": "\u8d64\u3044\u5098\u3067\u3059\u3002\u30b1\u30fc\u30b9 XK-7",  # it is a red umbrella; case XK-7
    "korean": "\ube68\uac04 \uc6b0\uc0b0\uc774 \uc788\uc5b4\uc694",  # there is a red umbrella
    "thai": "\u0e23\u0e48\u0e21\u0e2a\u0e35\u0e41\u0e14\u0e07",  # a red umbrella
    "hindi": "\u0932\u093e\u0932 \u091b\u093e\u0924\u093e",  # a red umbrella
    "hindi 2": "\u0932\u0940\u0932\u093e",  # another word of the same consonants
    "arabic": "\u0645\u0650\u0638\u0644\u0651\u0629 \u062d\u0645\u0631\u0627\u0621",  # with vowel points
    "english": "a red umbrella, XK-9",
    "french": "un parapluie rouge e\u0301l\u00e9gant",
}


def asked(store: ImageStore, text: str) -> list[str]:
    query = VectorStoreQuery(query_str=text, mode=VectorStoreQueryMode.TEXT_SEARCH, similarity_top_k=9)
    return [node.node_id for node in store.query(query).nodes or []]


def nodes() -> list[TextNode]:
    return [TextNode(id_=name, text=text, embedding=[1.0, 0.0]) for name, text in TEXTS.items()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("words") / "a.db"
    with open_store(path, MODEL, hybrid=True) as opened:
        opened.add(nodes())
    with open_store(path, MODEL) as opened:  # the analyzer is the collection's
        yield opened


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("\u96e8\u4f1e", ["chinese"]),  # a word inside the sentence
        ("\u7ea2\u8272\u96e8\u4f1e", ["chinese"]),
        ("\u5098", ["japanese"]),  # one character
        ("\u30b1\u30fc\u30b9", ["japanese"]),
        ("\uff79\uff70\uff7d", ["japanese"]),  # the same in half-width signs
        ("\uff38\uff2b\uff0d\uff17", ["japanese", "english"]),  # XK-7 in full-width signs; "XK" is a word of both
        ("\uc6b0\uc0b0", ["korean"]),  # without the particle
        ("\u0e41\u0e14\u0e07", ["thai"]),
        ("\u091b\u093e\u0924\u093e", ["hindi"]),
        ("\u0932\u093e\u0932", ["hindi"]),  # not the other word of these consonants
        ("\u0645\u0638\u0644\u0629", ["arabic"]),  # without vowel points
        ("UMBRELLA", ["english"]),
        ("\u00e9l\u00e9gant", ["french"]),  # composed, where the text is decomposed
        ("\u7ebf", []),
    ],
)
def test_words_of_any_language_are_found(store: ImageStore, text: str, names: list[str]) -> None:
    """Truth: by hand; Milvus's own tokenizer finds none of the first ten."""
    assert sorted(asked(store, text)) == sorted(names)
    assert store.analyzer == "mixed"


def test_the_text_of_a_node_stays_as_it_is(store: ImageStore) -> None:
    assert {node.node_id: node.get_content() for node in store.get_nodes(list(TEXTS))} == TEXTS


def test_hybrid_search_uses_the_words(store: ImageStore) -> None:
    """All vectors are alike: only the words tell the first."""
    query = VectorStoreQuery(
        query_str="\u96e8\u4f1e",
        query_embedding=[1.0, 0.0],
        mode=VectorStoreQueryMode.HYBRID,
        similarity_top_k=1,
    )
    assert [node.node_id for node in store.query(query).nodes or []] == ["chinese"]


def test_collections_of_earlier_versions_answer_as_before_and_say_what_they_do_not_find(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truth: a collection with their schema and without a word on the analyzer."""
    path = str(tmp_path / "a.db")
    client = MilvusClient(path)
    index = client.prepare_index_params()
    index.add_index("embedding", index_name="embedding", index_type="FLAT", metric_type="IP")
    index.add_index("_sparse", index_name="_sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    schema = collection_schema(2)
    WordIndex().add_to(schema)
    client.create_collection(
        "mm_retriever",
        schema=schema,
        index_params=index,
        properties={"mm_retriever.model": "two numbers"},
    )
    client.close()
    with open_store(path, MODEL, hybrid=True) as old:
        old.add(nodes())
        assert old.analyzer == "standard"
        with caplog.at_level(logging.WARNING, logger="mm_retriever"):
            assert asked(old, "umbrella") == ["english"]
            assert not [record for record in caplog.records if record.name.startswith("mm_retriever")]
            assert [asked(old, "\u96e8\u4f1e") for _ in range(2)] == [[], []]
        [record] = [record for record in caplog.records if record.name.startswith("mm_retriever")]
        assert "finds words by the analyzer 'standard'" in record.getMessage()
        old.clear()
        assert old.analyzer == "standard"
    with pytest.raises(StoreMismatchError, match="by the analyzer 'standard', 'mixed' is asked for"):
        open_store(path, MODEL, hybrid=True, analyzer="mixed")
    with open_store(path, MODEL, hybrid=True, overwrite=True) as anew:
        assert anew.analyzer == "mixed"


def test_the_analyzer_is_an_option_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with open_store(path, MODEL, hybrid=True, analyzer="standard") as made:
        assert made.analyzer == "standard"
    with open_store(path, MODEL) as again:
        assert again.analyzer == "standard"
    for options, error, says in (
        ({"hybrid": True, "analyzer": "mixed"}, StoreMismatchError, "'mixed' is asked for"),
        ({"hybrid": True, "analyzer": "jieba"}, StoreError, "'jieba' is not one of mixed, standard"),
    ):
        with pytest.raises(error, match=says):
            open_store(path, MODEL, **options)
    with pytest.raises(StoreError, match="goes with hybrid=True"):
        open_store(tmp_path / "b.db", MODEL, analyzer="mixed")
    with open_store(tmp_path / "c.db", MODEL) as plain:
        assert plain.analyzer is None
    with pytest.raises(StoreMismatchError, match="has no index of words, and an analyzer is asked for"):
        open_store(tmp_path / "c.db", MODEL, analyzer="mixed")


def test_words_of_file_names_with_soft_hyphens_and_in_turkish(tmp_path: Path) -> None:
    """Truth: a server's tokenizer, and the Turkish alphabet; rows that earlier versions wrote are found too."""
    texts = {"file": "Red_Mug-1.jpg", "soft": "Fotoal\u00adbum", "turkish": "\u0130stanbul", "typed": "I\u0307zmir"}
    with open_store(tmp_path / "a.db", MODEL, hybrid=True) as store:
        store.write([TextNode(id_=name, text=text, embedding=[1.0, 0.0]) for name, text in texts.items()])
        asks = {"mug": "file", "red_mug": "file", "fotoalbum": "soft", "istanbul": "turkish", "\u0130zmir": "typed"}
        assert {words: asked(store, words) for words in asks} == {words: [name] for words, name in asks.items()}
    assert query_words("red_mug") == "red mug red_mug"
    assert query_words("\uff32ed\uff3fmug").split() == ["Red", "mug", "Red_mug"]


def test_segments_of_a_text() -> None:
    """Truth: Lucene's CJKBigramFilter, with single characters in what is indexed."""
    assert indexed_words("a \u96e8\u4f1e\u7ea2 b").split() == [
        "a",
        "\u96e8\u4f1e",
        "\u4f1e\u7ea2",
        "\u96e8",
        "\u4f1e",
        "\u7ea2",
        "b",
    ]
    assert query_words("\u96e8\u4f1e\u7ea2").split() == ["\u96e8\u4f1e", "\u4f1e\u7ea2"]
    assert query_words("\u96e8").split() == ["\u96e8"]
    assert query_words("plain XK-7") == indexed_words("plain XK-7") == "plain XK-7"
    assert not needs_segments("d\u00e9j\u00e0 \u043f\u0440\u0438\u0432\u0435\u0442")
    assert all(needs_segments(TEXTS[name]) for name in ("chinese", "japanese", "korean", "thai", "hindi"))
