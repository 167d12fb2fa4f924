"""The full-text index of a collection, for hybrid search.

Owns its columns, the choice of words of a node, and what a query sends. There are two kinds: BM25, which Milvus
computes from a text column, and learned sparse vectors, which a model computes here. Knows nothing of connections.

Milvus's standard tokenizer ends a word at white space, punctuation and combining marks: a Chinese or Japanese sentence
is one word to it, and a Hindi word is several. `indexed_words` and `query_words` cut runs of scripts without spaces
into overlapping pairs of characters, as Lucene's CJK analyzer does, and keep marks as parts of their words.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

from llama_index.core.schema import BaseNode
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction, BM25BuiltInFunction
from pymilvus import CollectionSchema, DataType, Function, FunctionType

from mm_retriever.errors import QueryError, StoreError, shown
from mm_retriever.store.schema import MAX_TEXT_BYTES, SPARSE_FIELD, WORDS_FIELD, same_model, stored_property

logger = logging.getLogger(__name__)

SparseVector: TypeAlias = dict[int, float]
"""Weights of terms, by the number of the term."""

MIXED, STANDARD = ANALYZERS = ("mixed", "standard")
"""How BM25 finds words: "mixed" in any language, also without spaces between words; "standard" is Milvus' own, which
serves languages with spaces, and is what collections of earlier versions have."""

STOP_WORDS = (
    *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not"),
    *("of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was"),
    *("will", "with"),
)
"""Left out of BM25, so that "phone case with this" asks for phone cases. Source: Apache Lucene's English list."""

_SPARSE_PROPERTY = "mm_retriever.sparse_model"
_ANALYZER_PROPERTY = "mm_retriever.analyzer"
_ANALYZER = {"tokenizer": "standard", "filter": ["lowercase", {"type": "stop", "stop_words": list(STOP_WORDS)}]}
_NO_WORDS: SparseVector = {2**32 - 2: 1.0}  # Milvus stores no empty vector; no query has this term
_WITHOUT_WORDS = frozenset(("file_path",))  # the names of its folders do not describe an image


class SparseEmbedding(Protocol):
    """A model of learned sparse vectors; `BGEM3SparseEmbedding` is one."""

    @property
    def model_id(self) -> str:
        """Equal for two models if and only if their vectors may be compared."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[SparseVector]:
        """Return the weights of the terms of each stored text; empty for a text without any."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> list[SparseVector]:
        """Return the weights of the terms of each query."""
        ...


class LlamaIndexSparse:
    """A sparse embedding function of LlamaIndex; two of one class count as the same model."""

    def __init__(self, function: BaseSparseEmbeddingFunction) -> None:
        self._function = function

    @property
    def model_id(self) -> str:
        """The name of its class."""
        return f"{type(self._function).__module__}.{type(self._function).__qualname__}"

    def encode_documents(self, texts: Sequence[str]) -> list[SparseVector]:
        """Return the weights of the terms of each stored text."""
        return self._function.encode_documents(list(texts))

    def encode_queries(self, texts: Sequence[str]) -> list[SparseVector]:
        """Return the weights of the terms of each query."""
        return self._function.encode_queries(list(texts))


class UnopenedModel:
    """A placeholder for the sparse model of a collection that is opened without models."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def encode_documents(self, texts: Sequence[str]) -> list[SparseVector]:
        """Refuse to encode."""
        raise QueryError(f"this store was opened without its sparse model {self.model_id!r}: open_store(..., hybrid=)")

    encode_queries = encode_documents


@dataclass(frozen=True)
class WordIndex:
    """The full-text index of a collection.

    Attributes:
        vector_field: column of the sparse vectors.
        text_field: column that Milvus computes them from; "" where a model computes them.
        model: that model, None for BM25.
        analyzer: how BM25 finds words, one of `ANALYZERS`; unused with a model.
    """

    vector_field: str = SPARSE_FIELD
    text_field: str = WORDS_FIELD
    model: SparseEmbedding | None = None
    analyzer: str = STANDARD

    @property
    def name(self) -> str:
        """The name of the index, as `words_name` gives it."""
        return self.model.model_id if self.model else _bm25_name(self.analyzer)

    @property
    def metric(self) -> str:
        """How Milvus compares two of the vectors."""
        return "IP" if self.model else "BM25"

    def add_to(self, schema: CollectionSchema) -> None:
        """Add the columns to the schema of a new collection."""
        schema.add_field(self.vector_field, DataType.SPARSE_FLOAT_VECTOR)
        if self.model is None:
            schema.add_field(
                self.text_field,
                DataType.VARCHAR,
                max_length=MAX_TEXT_BYTES,
                enable_analyzer=True,
                analyzer_params=_ANALYZER,
            )
            schema.add_function(
                Function(
                    name=self.vector_field,
                    function_type=FunctionType.BM25,
                    input_field_names=[self.text_field],
                    output_field_names=[self.vector_field],
                )
            )

    @property
    def properties(self) -> dict[str, str]:
        """The properties of a new collection that describe its index."""
        if self.model is not None:
            return {_SPARSE_PROPERTY: self.model.model_id}
        return {_ANALYZER_PROPERTY: self.analyzer}

    def columns(self, nodes: Sequence[BaseNode]) -> list[dict[str, Any]]:
        """Return the columns of the index for the rows of these nodes."""
        words = [node_words(node) for node in nodes]
        if self.model is not None:
            return [{self.vector_field: vector or _NO_WORDS} for vector in self.model.encode_documents(words)]
        if self.text_field != WORDS_FIELD:  # a collection of plain LlamaIndex: the text itself, which is there already
            return [{} for _ in nodes]
        if self.analyzer == MIXED:
            words = [_cut(indexed_words(text)) for text in words]
        return [{self.text_field: text} for text in words]

    def query_terms(self, text: str | None) -> str | SparseVector | None:
        """Return what to send to Milvus for the words of a query; None if it has none."""
        if not text or not text.strip():
            return None
        if self.model is None and self.analyzer == MIXED:
            return query_words(text)
        if self.model is None:
            return text
        return self.model.encode_queries([text])[0] or None

    def unserved(self, text: str | None) -> bool:
        """Whether the text has words of a script that this index does not find inside longer texts."""
        return self.model is None and self.analyzer == STANDARD and text is not None and needs_segments(text)


def node_words(node: BaseNode) -> str:
    """Return the text of a node, and the texts in its metadata that LlamaIndex would show an embedding model.

    The result is cut off at the size that Milvus takes.
    """
    parts = [node.get_content()]
    excluded = _WITHOUT_WORDS.union(getattr(node, "excluded_embed_metadata_keys", ()))
    for key, value in node.metadata.items():
        if key not in excluded:
            values = value if isinstance(value, list | tuple) else [value]
            parts += [text for text in values if isinstance(text, str)]
    return _cut("\n".join(filter(None, parts)))


def _cut(text: str) -> str:
    size = len(text.encode())
    if size <= MAX_TEXT_BYTES:
        return text
    logger.warning("%d bytes of words in one node: %d are indexed for search by words", size, MAX_TEXT_BYTES)
    return text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


def new_word_index(hybrid: bool | SparseEmbedding | None, analyzer: str | None = None) -> WordIndex | None:
    """Return the word index of a new collection, BM25 ("mixed" by default) or a sparse model's; None without one."""
    _check_analyzer(analyzer)
    if analyzer is not None and hybrid is not True:
        raise StoreError(f"analyzer {analyzer!r} is how BM25 finds words: it goes with hybrid=True in a new collection")
    if isinstance(hybrid, bool | None):
        return WordIndex(analyzer=analyzer or MIXED) if hybrid else None
    return WordIndex(text_field="", model=hybrid)


def sparse_option(given: dict[str, Any], hybrid: bool | SparseEmbedding | None) -> bool | SparseEmbedding | None:
    """Take `MilvusVectorStore`'s two options of sparse vectors out of `given`, as `open_store`'s `hybrid`."""
    enabled: bool | SparseEmbedding | None = given.pop("enable_sparse", hybrid)
    function = given.pop("sparse_embedding_function", None)
    if not enabled or function is None:
        return enabled
    if isinstance(function, BM25BuiltInFunction):
        return True
    if not isinstance(function, BaseSparseEmbeddingFunction):
        raise StoreError(
            f"sparse_embedding_function={shown(function)}: give a BaseSparseEmbeddingFunction of LlamaIndex, "
            "or a model with a model_id as hybrid="
        )
    return LlamaIndexSparse(function)


def _check_analyzer(analyzer: str | None) -> None:
    if analyzer is not None and analyzer not in ANALYZERS:
        raise StoreError(f"analyzer {analyzer!r} is not one of {', '.join(ANALYZERS)}")


def _bm25_name(analyzer: str) -> str:
    return "BM25" if analyzer == STANDARD else f"BM25 {analyzer}"


def analyzer_of(name: str | None) -> str | None:
    """Return the analyzer of an index of words by its name, None for one that is not BM25."""
    return next((analyzer for analyzer in ANALYZERS if _bm25_name(analyzer) == name), None)


def words_name(hybrid: bool | SparseEmbedding) -> str | None:
    """Return the name of a new collection's full-text index: "BM25 mixed", that of a model, or None without one."""
    index = new_word_index(hybrid)
    return None if index is None else index.name


def word_index_of(
    description: Mapping[str, Any], hybrid: bool | SparseEmbedding | None, analyzer: str | None
) -> WordIndex | str | None:
    """Return the full-text index of an existing collection, or a text that says how it differs from the options.

    `hybrid=False` accepts an existing BM25 index; `hybrid=None` accepts any index, `analyzer=None` any analyzer.
    Earlier versions stored no analyzer, which was "standard".
    """
    _check_analyzer(analyzer)
    stored_model = stored_property(description, _SPARSE_PROPERTY)
    stored_analyzer = stored_property(description, _ANALYZER_PROPERTY)
    if stored_model is not None:
        if analyzer is not None:
            return f"holds sparse vectors of the model {stored_model!r}, without an analyzer; {analyzer!r} is asked for"
        if hybrid is None:
            return WordIndex(text_field="", model=UnopenedModel(stored_model))
        if isinstance(hybrid, bool):
            return f"holds sparse vectors of the model {stored_model!r}: give that model as hybrid="
        if not same_model(stored_model, hybrid.model_id):
            return f"holds sparse vectors of the model {stored_model!r}, hybrid= is {hybrid.model_id!r}"
        return WordIndex(text_field="", model=hybrid)
    for function in description.get("functions") or ():
        if function["type"] == FunctionType.BM25:
            if not isinstance(hybrid, bool | None):
                return f"indexes words by BM25, hybrid= is the model {hybrid.model_id!r}"
            stored = stored_analyzer or STANDARD
            if analyzer not in (None, stored):
                return f"finds words by the analyzer {stored!r}, {analyzer!r} is asked for"
            return WordIndex(function["output_field_names"][0], function["input_field_names"][0], analyzer=stored)
    if analyzer is not None:
        return f"has no index of words, and an analyzer is asked for: {analyzer!r}"
    return "has no index of words, hybrid= asks for one" if hybrid else None


# ------------------------------------------------------------------------------------------ scripts without spaces

_CJK = (
    "\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_SOUTH_EAST_ASIA = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_UNSPACED = re.compile(f"[{_CJK}]+|[{_SOUTH_EAST_ASIA}]+")
_MARKED = re.compile("[\u0900-\u109f\u1780-\u17ff]")  # their marks are letters: without them words fall together
_OTHER = re.compile(f"[{_CJK}{_SOUTH_EAST_ASIA}\u0900-\u0dff]")


def needs_segments(text: str) -> bool:
    """Whether the text has words that the standard tokenizer does not find."""
    return _OTHER.search(text) is not None


# Milvus Lite's tokenizer takes "red_mug" for one word, a server's for two. A soft hyphen is no part of a word, and the
# Turkish capital is lower-cased to two characters, which nobody types.
_SPELLED = str.maketrans({"_": " ", "\u00ad": None, "\u0130": "i"})


def _spelled(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).translate(_SPELLED)


def indexed_words(text: str) -> str:
    """Return the words to index; runs without spaces as pairs of characters and, for short queries, single ones."""
    return _segmented(_spelled(text), singles=True)


def query_words(text: str) -> str:
    """Return the words to search for; runs without spaces as pairs of characters, a lone character as it is."""
    spelled = _spelled(text)
    words = _segmented(spelled, singles=False)
    if spelled == text:
        return words
    earlier = _segmented(text, singles=False)
    return words if words == earlier else f"{words} {earlier}"  # as rows of earlier versions are indexed


def _segmented(text: str, *, singles: bool) -> str:
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    return _without_marks(_UNSPACED.sub(lambda run: f" {_pairs(run[0], singles=singles)} ", text))


def _pairs(run: str, *, singles: bool) -> str:
    signs: list[str] = []
    for sign in run:
        if signs and unicodedata.category(sign) in ("Mn", "Mc"):
            signs[-1] += sign
        else:
            signs.append(sign)
    pairs = [first + second for first, second in pairwise(signs)]
    return " ".join([*pairs, *(signs if singles or not pairs else ())])


def _without_marks(text: str) -> str:
    """The text with combining marks as letters; those of Arabic and Hebrew, which only add vowels, are left out."""
    if text.isascii():
        return text
    return "".join(
        sign if unicodedata.category(sign) not in ("Mn", "Mc") else f"x{ord(sign):x}" if _MARKED.match(sign) else ""
        for sign in text
    )
