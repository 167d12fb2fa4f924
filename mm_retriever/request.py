"""What someone wants a vector of, from arguments or from a LlamaIndex node, and how it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from llama_index.core.schema import BaseNode, MetadataMode
from PIL import Image

from mm_retriever.embedders.embedder import Content, Pixels
from mm_retriever.errors import QueryError, shown
from mm_retriever.images import (
    ImageDataURI,
    ImagePolicy,
    ImageSource,
    first_readable,
    opened_image,
    pixel_digest,
    source_name,
)

_READERS = min(8, os.cpu_count() or 1)  # threads that decode images; the decoders release the GIL


@dataclass(frozen=True)
class Request:
    """A text, an image, or both.

    Args:
        text: the text.
        image: the image.
        elsewhere: further places of the same image, for where the first cannot be read.
        policy: which images may be read; None: the policy of the model.
    """

    text: str | None = None
    image: ImageSource | None = None
    elsewhere: tuple[ImageSource, ...] = ()
    policy: ImagePolicy | None = None

    @classmethod
    def of_node(cls, node: BaseNode, *, compose: bool) -> Request:
        """The image of a node, with its text if `compose`; the text of a node without image."""
        images = node_images(node)
        if not images:
            return cls(node.get_content(metadata_mode=MetadataMode.EMBED))
        composed = compose and node.get_content(metadata_mode=MetadataMode.NONE).strip()
        text = node.get_content(metadata_mode=MetadataMode.EMBED) if composed else None
        return cls(text, images[0], elsewhere=images[1:])

    @classmethod
    def of_pair(cls, text: str | None, image: ImageSource | None) -> Request:
        """A text and an image about which it is; without the image it would be another query.

        Raises:
            QueryError: there is no image.
        """
        if image is None:
            raise QueryError(f"there is no image (None) beside the text {shown(text)}: give one, or embed the text")
        return cls(text, image)

    @property
    def label(self) -> str:
        """For events: the text, and the image's name."""
        named = [] if self.image is None else [source_name(self.image)]
        return " + ".join(named + ([] if self.text is None else [self.text]))

    def content(self, prepare: Callable[[Image.Image], Pixels], policy: ImagePolicy) -> Content:
        """What the model sees of it.

        Args:
            prepare: of the embedder.
            policy: which images may be read, where the request does not say.

        Raises:
            ImageLoadError: the image cannot or must not be read.
            QueryError: there is neither.
        """
        if self.image is None and self.text is None:
            raise QueryError("there is neither a text nor an image, but None")
        if self.image is None:
            return Content(self.text or "")

        def prepared(source: ImageSource) -> Pixels:
            with opened_image(source, policy=self.policy or policy, keep_mode=True) as image:
                if isinstance(source, ImageDataURI) and image.mode == "RGB":
                    source.pixels = image.size, pixel_digest(image)
                return prepare(image)

        return Content(self.text or "", first_readable((self.image, *self.elsewhere), prepared))


def paired(texts: Sequence[str | None] | None, images: Sequence[ImageSource | None] | None) -> list[Request]:
    """A request for each text, each image, or each text with the image in its place.

    Raises:
        QueryError: there are not as many texts as images, or a place has neither.
    """
    for value in (texts, images):
        if isinstance(value, str | bytes | os.PathLike):  # its letters would be texts or paths
            raise QueryError(f"{shown(value)} is one text or image: give a list, [...]")
    images = None if images is None else list(images)
    texts = [None] * len(images or ()) if texts is None else list(texts)
    images = [None] * len(texts) if images is None else images
    if len(texts) != len(images):
        raise QueryError(f"{len(texts)} texts and {len(images)} images: give one text for each image")
    requests = [Request(text, image) for text, image in zip(texts, images, strict=True)]
    for place, request in enumerate(requests):
        if request.text is None and request.image is None:
            raise QueryError(f"there is neither a text nor an image at place {place}")
    return requests


def read_ahead(
    requests: Sequence[Request], batch_size: int, read: Callable[[Request], Content]
) -> Iterator[tuple[list[int], list[Content]]]:
    """Yield the rows of each batch and what `read` makes of them; the images of the next batch are read meanwhile.

    Texts of like length share a batch, so that little is padded.
    """
    order = sorted(range(len(requests)), key=lambda row: len(requests[row].text or ""))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-image") as readers:

        def begin(rows: list[int]) -> list[Callable[[], Content]]:
            return [
                partial(read, requests[row])
                if requests[row].image is None
                else readers.submit(read, requests[row]).result
                for row in rows
            ]

        reading = begin(batches[0]) if batches else []
        try:
            for number, batch in enumerate(batches, 1):
                contents = [content() for content in reading]
                reading = begin(batches[number]) if number < len(batches) else []
                yield batch, contents
        finally:
            readers.shutdown(wait=True, cancel_futures=True)


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
