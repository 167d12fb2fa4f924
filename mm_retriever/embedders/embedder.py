"""The interface of every embedding model to the rest of the package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.errors import QueryError, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

Pixels: TypeAlias = NDArray[Any]
"""(H, W, 3): uint8, or float32 in 0..1 for a model that distinguishes finer steps."""


@dataclass(frozen=True)
class Content:
    """The content of one vector: a text, an image, or both.

    Args:
        text: the text.
        image: (H, W, 3), as `Embedder.prepare` made it.

    Raises:
        QueryError: the text is none.
    """

    text: str = ""
    image: Pixels | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise QueryError(f"{shown(self.text)} is no text: give a str")

    def key(self, model: str) -> bytes:
        """Return a digest that is equal only for equal content and model; vector caches on disk use it as key."""
        kind = "text" if self.image is None else f"picture {self.image.shape} {self.image.dtype}"
        digest = hashlib.sha256(f"{model}\0{kind}\0".encode())
        if self.image is not None:
            digest.update(self.image.tobytes())
        digest.update(self.text.encode("utf-8", "surrogatepass"))
        return digest.digest()


class Embedder(Protocol):
    """Texts, images, and image-text pairs to vectors of length 1 in one space; threads may share it."""

    @property
    def name(self) -> str:
        """The name, for people."""
        ...

    @property
    def space(self) -> str:
        """Equal if and only if vectors may be compared: family, weights' fingerprint, dimension, instruction.

        Says nothing of dtype, quantisation or path: see `note`.
        """
        ...

    @property
    def note(self) -> str:
        """The float format or quantisation; stored with a collection, and a part of cache keys."""
        ...

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        ...

    def prepare(self, image: Image.Image) -> Pixels:
        """(H, W, 3): all that the model will see of an image; called in reading threads."""
        ...

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D), rows of length 1.

        Args:
            contents: what to embed.
            query: whether the vectors are searched with, rather than stored.

        Raises:
            QueryError: the model cannot embed this kind of content.
        """
        ...


@runtime_checkable
class Trainable(Embedder, Protocol):
    """An embedder in torch whose vectors have gradients, for `mm_retriever.training`."""

    @property
    def network(self) -> nn.Module:
        """The module that holds all of the model's weights."""
        ...

    @property
    def sides(self) -> Mapping[str, Sequence[nn.Module]]:
        """The modules that read a "text", and those that read an "image"."""
        ...

    def vectors(self, contents: Sequence[Content], *, query: bool = False) -> Tensor:
        """(B, D) float32, rows of length 1 with gradients, in one pass: the vectors of `encode`, for training."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model with its current weights to a folder that `load_embedder` loads."""
        ...


def cache_identity(embedder: Embedder, *, query: bool) -> str:
    """Return the identity of a model in keys of a vector cache; equal identities give equal numbers."""
    own = getattr(embedder, "cache_identity", None)  # of a family whose caches are older than `space`
    if own is not None:
        return str(own)
    return f"{embedder.space}/{embedder.note}" + ("/query" if query else "")
