"""Detects image nodes that come with a vector of their text, and embeds them by their pixels.

`VectorStoreIndex` embeds the text of every node, image nodes included; such a vector says nothing about the image.
Knows nothing of Milvus.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, TextNode

from mm_retriever.errors import ImageLoadError, NodeError
from mm_retriever.request import node_image
from mm_retriever.store.rows import storable_node

logger = logging.getLogger(__name__)

_SAME = 0.999
"""The cosine above which two vectors count as the same text's; batches and half precision change less."""


def embedded_by_pixels(nodes: Sequence[BaseNode], embed_model: Any) -> list[ImageNode | TextNode]:
    """Return the nodes as they are stored, every image under a vector of its pixels.

    A model that is only a name and a dimension embeds nothing; the vectors of image nodes are then kept as they are.

    Raises:
        NodeError: a node cannot be stored, or comes with a vector of its words and an image that cannot be read.
    """
    stored = [storable_node(node) for node in nodes]
    knows_pixels = hasattr(embed_model, "get_image_embedding") and hasattr(embed_model, "get_text_embedding_batch")
    bytes_as_text: list[int] = []
    unknown: list[int] = []
    for place, node in enumerate(nodes):
        if isinstance(stored[place], ImageNode) and node.embedding is not None:
            if node_image(node) is not None:
                unknown.append(place)
            elif node_image(stored[place]) is not None:
                bytes_as_text.append(place)
    if bytes_as_text and not knows_pixels:
        raise _refused(nodes[bytes_as_text[0]], "open the store with its embed_model, or use ingest_images")
    by_words = _by_words([nodes[place] for place in unknown], embed_model) if unknown and knows_pixels else []
    wrong: dict[int, BaseNode] = {place: stored[place] for place in bytes_as_text}
    wrong |= {place: nodes[place] for place, is_of_words in zip(unknown, by_words, strict=False) if is_of_words}
    vectors: dict[str, list[float]] = {}  # by id: pieces of the bytes of one image share it
    for place, source in wrong.items():
        id_ = stored[place].node_id
        if id_ not in vectors:
            vectors[id_] = _pixel_vector(source, embed_model)
        stored[place] = stored[place].model_copy(update={"embedding": vectors[id_]})
    if wrong:
        logger.info("%d images came with vectors of their words and were embedded by their pixels", len(vectors))
    return stored


def _by_words(nodes: Sequence[BaseNode], embed_model: Any) -> list[bool]:
    """Whether the vector of each node is of its words; the model knows that for vectors that it computed itself.

    For other vectors, such as those from another process, the words are embedded and compared.
    """
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
    is_of_text = getattr(embed_model, "is_of_text", lambda *_: None)
    known = [is_of_text(node.embedding, text) for node, text in zip(nodes, texts, strict=True)]
    unknown = [text for text, of_text in zip(texts, known, strict=True) if of_text is None]
    vectors = iter(embed_model.get_text_embedding_batch(unknown) if unknown else ())
    return [
        _cosine(node.embedding, next(vectors)) > _SAME if of_text is None else of_text
        for node, of_text in zip(nodes, known, strict=True)
    ]


def _cosine(first: Any, second: Any) -> float:
    """The cosine of two vectors, 0 where it is undefined; a bad vector is refused later, when its row is made."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    with np.errstate(all="ignore"):
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) if a.shape == b.shape else 0.0
    return cosine if np.isfinite(cosine) else 0.0


def _pixel_vector(node: BaseNode, embed_model: Any) -> list[float]:
    try:
        if hasattr(embed_model, "embed_nodes"):
            vector: list[float] = embed_model.embed_nodes([node])[0]
        else:
            vector = embed_model.get_image_embedding(node_image(node))
    except ImageLoadError as error:
        raise _refused(node, f"its image cannot be read ({error.reason or error})") from error
    return vector


def _refused(node: BaseNode, reason: str) -> NodeError:
    return NodeError(
        f"node {node.node_id[:80]!r} is an image under a vector of words: {reason}. "
        "An image is embedded by embed_model([node]) or embed_model.get_image_embedding(path)"
    )
