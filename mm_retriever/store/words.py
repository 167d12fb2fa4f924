"""The words of a row beside its vector, for hybrid search: what is indexed, by what, and how it is asked.

Owns the columns of the word index and the rule which words a node has. Two kinds of index: BM25, which Milvus computes
from a text column, and learned sparse vectors, which a model computes here. Knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from llama_index.core.schema import BaseNode
from pymilvus import CollectionSchema, DataType, Function, FunctionType

from mm_retriever.store.filters import MAX_TEXT_BYTES, SPARSE_FIELD, WORDS_FIELD
from mm_retriever.store.identity import same_model

SparseVector: TypeAlias = dict[int, float]
"""Weights of terms, by the number of the term."""

STOP_WORDS = (
    *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not"),
    *("of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was"),
    *("will", "with"),
)
"""Left out of BM25: "phone case with this" asks for phone cases. Source: Apache Lucene's English list."""

_ANALYZER = {"tokenizer": "standard", "filter": ["lowercase", {"type": "stop", "stop_words": list(STOP_WORDS)}]}
_NO_WORDS: SparseVector = {2**32 - 2: 1.0}  # Milvus stores no empty vector; no query has this term
_WITHOUT_WORDS = frozenset(("file_path",))  # the names of its folders say nothing of one picture


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


@dataclass(frozen=True)
class WordIndex:
    """Where the words of a collection are.

    Attributes:
        vector_field: column of the sparse vectors.
        text_field: column that Milvus makes them from; "" where a model does.
        model: that model.
    """

    vector_field: str = SPARSE_FIELD
    text_field: str = WORDS_FIELD
    model: SparseEmbedding | None = None

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

    def columns(self, nodes: Sequence[BaseNode]) -> list[dict[str, Any]]:
        """Return what the rows of these nodes hold for the index, beside their other columns."""
        words = [node_words(node) for node in nodes]
        if self.model is not None:
            return [{self.vector_field: vector or _NO_WORDS} for vector in self.model.encode_documents(words)]
        if self.text_field != WORDS_FIELD:  # a collection of plain LlamaIndex: the text itself, which is there already
            return [{} for _ in nodes]
        return [{self.text_field: text} for text in words]

    def asked(self, text: str | None) -> str | SparseVector | None:
        """Return what to send to Milvus for the words of a query; None if it has none."""
        if not text or not text.strip():
            return None
        if self.model is None:
            return text
        return self.model.encode_queries([text])[0] or None


def node_words(node: BaseNode) -> str:
    """Return the text of a node, and the texts in its metadata that LlamaIndex would show an embedding model.

    What is longer than Milvus takes is cut off.
    """
    parts = [node.get_content()]
    excluded = _WITHOUT_WORDS.union(getattr(node, "excluded_embed_metadata_keys", ()))
    for key, value in node.metadata.items():
        if key not in excluded:
            parts += [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]
    return "\n".join(filter(None, parts)).encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


def new_word_index(hybrid: bool | SparseEmbedding) -> WordIndex | None:
    """Return the word index of a new collection; None without one."""
    if isinstance(hybrid, bool):
        return WordIndex() if hybrid else None
    return WordIndex(text_field="", model=hybrid)


def words_name(hybrid: bool | SparseEmbedding) -> str | None:
    """Return what indexes words: "BM25", the name of a model, or None where nothing does."""
    if isinstance(hybrid, bool):
        return "BM25" if hybrid else None
    return hybrid.model_id


def word_index_of(
    description: Mapping[str, Any], hybrid: bool | SparseEmbedding, stored_model: str | None
) -> WordIndex | str | None:
    """Return the word index of an existing collection; a text says why it is not the one that was asked for.

    Args:
        description: of the collection, from Milvus.
        hybrid: what was asked for; False takes what is there.
        stored_model: name of the sparse model that the collection was made with.
    """
    if stored_model is not None:
        if isinstance(hybrid, bool):
            return f"holds sparse vectors of the model {stored_model!r}: give that model as hybrid="
        if not same_model(stored_model, hybrid.model_id):
            return f"holds sparse vectors of the model {stored_model!r}, hybrid= is {hybrid.model_id!r}"
        return WordIndex(text_field="", model=hybrid)
    for function in description.get("functions") or ():
        if function["type"] == FunctionType.BM25:
            if not isinstance(hybrid, bool):
                return f"indexes words by BM25, hybrid= is the model {hybrid.model_id!r}"
            return WordIndex(function["output_field_names"][0], function["input_field_names"][0])
    return None if hybrid is False else "has no index of words, hybrid= asks for one"
