"""What someone wants a vector of, from arguments or from a LlamaIndex node, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.embedders.embedder import Content
from mm_retriever.images import ImagePolicy, ImageSource, first_readable, opened_image, source_name


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

    @property
    def label(self) -> str:
        """For events: the text, and the image's name."""
        named = [] if self.image is None else [source_name(self.image)]
        return " + ".join(named + ([] if self.text is None else [self.text]))

    def content(self, prepare: Callable[[Image.Image], NDArray[np.uint8]], policy: ImagePolicy) -> Content:
        """What the model sees of it.

        Args:
            prepare: of the embedder.
            policy: which images may be read, where the request does not say.

        Raises:
            ImageLoadError: the image cannot or must not be read.
        """
        if self.image is None:
            return Content(self.text or "")

        def prepared(source: ImageSource) -> NDArray[np.uint8]:
            with opened_image(source, policy=self.policy or policy, keep_mode=True) as image:
                return prepare(image)

        return Content(self.text or "", first_readable((self.image, *self.elsewhere), prepared))


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
