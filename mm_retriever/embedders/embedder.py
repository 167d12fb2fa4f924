"""What an embedding model is to the rest of the package: the one interface of every family."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor, nn

Pixels: TypeAlias = NDArray[Any]
"""(H, W, 3): uint8, or, for a model that was made for finer steps, float32 in 0..1."""


@dataclass(frozen=True)
class Content:
    """What one vector stands for: a text, an image, or both.

    Args:
        text: the text.
        image: (H, W, 3), as `Embedder.prepare` made it.
    """

    text: str = ""
    image: Pixels | None = None

    def key(self, model: str) -> bytes:
        """A digest that is equal for equal content and model only; vector caches on disk keep vectors by it."""
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
        """How exactly it computes: its float format or quantisation; kept with a collection, and part of cache keys."""
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
    """An embedder in torch whose vectors have gradients: what `mm_retriever.training` asks of a family."""

    @property
    def network(self) -> nn.Module:
        """The module that holds all of the model's weights."""
        ...

    @property
    def sides(self) -> Mapping[str, Sequence[nn.Module]]:
        """The modules that read a "text", and those that read an "image"."""
        ...

    def vectors(self, contents: Sequence[Content], *, query: bool = False) -> Tensor:
        """(B, D) float32, rows of length 1 with gradients, in one pass: what `encode` gives, for training."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the model, as its weights are now, as a folder that `load_embedder` loads."""
        ...


def cache_identity(embedder: Embedder, *, query: bool) -> str:
    """The model as keys of a vector cache name it: two calls with equal identities give equal numbers."""
    own = getattr(embedder, "cache_identity", None)  # of a family that caches were written for before there was `space`
    if own is not None:
        return str(own)
    return f"{embedder.space}/{embedder.note}" + ("/query" if query else "")
