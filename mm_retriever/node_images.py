"""Where the image of a LlamaIndex node is."""

from __future__ import annotations

from llama_index.core.schema import BaseNode

from mm_retriever.images import ImageSource


def node_images(node: BaseNode) -> tuple[ImageSource, ...]:
    """The places of the image of a LlamaIndex node or document, unread: its path, its own bytes, its URL.

    All that look at a node take the first of them that can be read (`first_readable`): embedding, reranking, engine
    and tools. The path comes first because it is what a store keeps; bytes stay outside of it. A URL is fetched only
    where a policy allows it.
    """
    resource = getattr(node, "image_resource", None)
    path = getattr(node, "image_path", None) or getattr(resource, "path", None)
    encoded = getattr(node, "image", None) or getattr(resource, "data", None)
    url = getattr(node, "image_url", None) or getattr(resource, "url", None)
    places: list[ImageSource] = [str(path)] if path else []
    if encoded:
        text = encoded.decode("ascii", "replace") if isinstance(encoded, bytes) else str(encoded)
        places.append(text if text[:5].lower() == "data:" else f"data:image/unknown;base64,{text}")
    return (*places, str(url)) if url else tuple(places)


def node_image(node: BaseNode) -> ImageSource | None:
    """The first place of the image of a node (see `node_images`), or None."""
    return next(iter(node_images(node)), None)
