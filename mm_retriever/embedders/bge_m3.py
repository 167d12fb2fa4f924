"""BGE-M3's learned sparse vectors, computed by FlagEmbedding: a weight for every token of a text.

Hybrid search in `store` uses it in place of BM25. Needs the extra ``[hybrid]``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_retriever.checkpoint import fingerprint
from mm_retriever.devices import default_device
from mm_retriever.downloads import hub_files
from mm_retriever.errors import CheckpointError, MissingExtraError, ModelNotFoundError, one_line
from mm_retriever.threads import ForkLock
from mm_retriever.tokenizer import check_words

DEFAULT_MODEL = "BAAI/bge-m3"
_HEAD = "sparse_linear.pt"
_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "sentencepiece*", _HEAD, "colbert_linear.pt")


class BGEM3SparseEmbedding:
    """Learned sparse vectors of texts for `open_store(..., hybrid=...)`; may be used by many threads.

    Args:
        model_name: hub id, or a local folder.
        revision: of the hub repository.
        device: "cpu", "cuda", ...; default: the fastest there is.
        batch_size: texts that go through the model together.
        max_length: tokens after which a text is cut off, at most 8192.

    Raises:
        MissingExtraError: FlagEmbedding is not installed.
        ModelNotFoundError: the hub is out of reach, and the name is no folder.
        CheckpointError: the weights lack the head for sparse vectors.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int = 32,
        max_length: int = 512,
    ) -> None:
        try:
            from FlagEmbedding import BGEM3FlagModel
        except ImportError as error:
            raise MissingExtraError.of(error, "FlagEmbedding", "hybrid") from error

        folder = flag_model_folder(model_name, revision, _FILES)
        if not (folder / _HEAD).is_file():  # FlagEmbedding would use random weights
            raise CheckpointError(f"{os.fspath(model_name)!r} has no {_HEAD}: it is no BGE-M3, or not all of one")
        self._model: Any = BGEM3FlagModel(str(folder), use_fp16=False, devices=device or default_device())
        self._load_again = partial(
            type(self), model_name, revision=revision, device=device, batch_size=batch_size, max_length=max_length
        )
        self._batch_size = batch_size
        self._max_length = max_length
        self._turn = ForkLock()
        name = Path(model_name).name if Path(model_name).is_dir() else os.fspath(model_name)
        parts = self._model.model
        check_words(self._model.tokenizer, os.fspath(model_name))
        weights = {**parts.model.state_dict(), **parts.sparse_linear.state_dict(prefix="sparse_linear.")}
        self._model_id = f"{name}@{fingerprint(weights)}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the options; other processes load the model themselves."""
        return self._load_again, ()

    @property
    def model_id(self) -> str:
        """Name and weights in one line, kept with a collection."""
        return self._model_id

    def encode_documents(self, texts: Sequence[str]) -> list[dict[int, float]]:
        """Return the weight of each token of each text, by its number; empty for a text without any."""
        vectors: list[dict[int, float]] = []
        for start in range(0, len(texts), self._batch_size):
            batch = list(texts[start : start + self._batch_size])
            with self._turn:
                encoded = self._model.encode(
                    batch,
                    batch_size=len(batch) + 1,  # or it draws a progress bar
                    max_length=self._max_length,
                    return_dense=False,
                    return_sparse=True,
                )
            vectors += [
                {int(token): float(weight) for token, weight in weights.items()}
                for weights in encoded["lexical_weights"]
            ]
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> list[dict[int, float]]:
        """Return the same for queries: BGE-M3 makes no difference."""
        return self.encode_documents(texts)


def flag_model_folder(name: str | os.PathLike[str], revision: str | None, files: Sequence[str]) -> Path:
    """Return the folder that a model of FlagEmbedding is in, fetched from the hub if it is no local one.

    Raises:
        ModelNotFoundError: the hub is out of reach, and the name is no folder.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return hub_files(os.fspath(name), files, revision)
    except Exception as error:  # the hub's client has a dozen kinds
        raise ModelNotFoundError(
            f"{os.fspath(name)!r} is no folder here and cannot be downloaded from the hub: {one_line(error, 300)}"
        ) from error
