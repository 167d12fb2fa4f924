"""`ComposedEmbedding`: LlamaIndex's multi-modal embedding over any `Embedder`.

Every public call ends in one place, `_vectors`: look into the cache, compute what is missing, each content once.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import BaseNode, QueryBundle
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from mm_retriever.embedders.embedder import Content, Embedder, Pixels, cache_identity
from mm_retriever.embedders.registry import chosen_backend, load_embedder, server_options
from mm_retriever.embedders.visualized_bge import DEFAULT_MODEL
from mm_retriever.errors import QueryError, shown
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, ImageSource, portable_image
from mm_retriever.rebuild import Rebuilt, Secret, field_arguments, portable_name
from mm_retriever.request import Request, node_image, node_images, paired, read_ahead
from mm_retriever.threads import in_thread
from mm_retriever.tracing import spanned
from mm_retriever.vector_cache import MAX_BYTES, VectorCache, VectorOrigins

if TYPE_CHECKING:
    import torch

    from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEEncoder

__all__ = ["DEFAULT_MODEL", "ComposedEmbedding", "Request", "VisualizedBGEEmbedding", "node_image", "node_images"]

dispatcher = get_dispatcher(__name__)


class ComposedEmbedding(Rebuilt, MultiModalEmbedding):
    """Texts, images, and image-text pairs to vectors of length 1 in one space, by any model of the registry.

    One object may serve many threads and event loops. The model is loaded here, not at the first call.

    Args:
        model_name: a published name, "tiny" (bundled; drawn products only), a local folder or weight file, a hub
            repository, or an `Embedder`.
        device: "cpu", "cuda", "mps", ...; default: the fastest there is.
        dtype: "float32" (default), "bfloat16" or "float16"; with OpenVINO "float32", "bfloat16" or "int8".
        backend: "torch"; "openvino", which is faster on CPUs; or "auto", the fastest that keeps the vectors.
        calibration: a folder of images that "int8" is calibrated and measured on, once; default: drawn ones.
        revision: of the hub repository.
        base_url: of a server that embeds, such as vLLM's "http://gpu:8000/v1"; `model_name` is its name there.
        api_key: if the server needs one; it is in no pickle, dict or event.
        options: of the model's family.
        embed_batch_size: inputs from one event and progress step to the next; the model takes as many as fit.
        cache_dir: a folder that keeps vectors by content, model and dtype; default: none are kept.
        cache_bytes: how large its file may become; beyond that, the vectors that were unused for longest are removed.
        image_policy: which images may be read: folders, sizes, network.
        compose_nodes: as a transformation, embed a node of image and text as both together; default: as its image.

    Raises:
        ModelNotFoundError: the name leads to no files, or the hub is out of reach.
        CheckpointError: the files are damaged, unsafe, or of no known family.
    """

    model_name: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str = "float32"
    backend: str = "torch"
    calibration: str | None = None
    revision: str | None = None
    base_url: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    cache_dir: str | None = None
    cache_bytes: int = MAX_BYTES
    image_policy: ImagePolicy = Field(default=DEFAULT_POLICY)
    compose_nodes: bool = False

    families: ClassVar[tuple[str, ...] | None] = None  # that this class loads; None: all

    _embedder: Any = PrivateAttr(default=None)
    _given: Embedder | None = PrivateAttr(default=None)
    _cache: VectorCache | None = PrivateAttr(default=None)
    _origins: VectorOrigins = PrivateAttr(default_factory=VectorOrigins)

    def __init__(
        self,
        model_name: str | os.PathLike[str] | Embedder = DEFAULT_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        embed_batch_size: int = 32,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = MAX_BYTES,
        image_policy: ImagePolicy = DEFAULT_POLICY,
        compose_nodes: bool = False,
        backend: str = "torch",
        calibration: str | os.PathLike[str] | None = None,
        callback_manager: CallbackManager | None = None,
        num_workers: int | None = None,
        embeddings_cache: Any | None = None,
        rate_limiter: Any | None = None,
    ) -> None:
        given = None if isinstance(model_name, str | os.PathLike) else model_name
        loads = backend != "torch" or calibration is not None
        served = server_options(given, base_url, api_key, options or {}, loads=loads)
        fields: dict[str, Any] = {
            "model_name": os.fspath(model_name) if isinstance(model_name, str | os.PathLike) else model_name.name,
            "options": dict(options or {}),
            "embed_batch_size": embed_batch_size,
            "cache_dir": None if cache_dir is None else os.fspath(cache_dir),
            "calibration": None if calibration is None else portable_name(calibration),
            "callback_manager": callback_manager or CallbackManager([]),
            "embeddings_cache": embeddings_cache,
        }
        fields |= {"revision": revision, "base_url": base_url, "cache_bytes": cache_bytes, "image_policy": image_policy}
        fields |= {"compose_nodes": compose_nodes, "num_workers": num_workers, "rate_limiter": rate_limiter}
        super().__init__(**fields)
        self._given = given
        chosen: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision, "families": self.families}
        chosen |= {"backend": backend, "calibration": self.calibration}
        self._embedder = given or load_embedder(self.model_name, **chosen, **self.options, **served)
        self.device = getattr(self._embedder, "device", None) if device is None else str(device)
        self.dtype = self._embedder.note if given or base_url else str(dtype or "float32").removeprefix("torch.")
        if backend != "torch":
            self.backend, self.dtype = chosen_backend(self._embedder)
        if self.cache_dir is not None:
            self._cache = VectorCache(self.cache_dir, self.dimension, unit=True, max_bytes=self.cache_bytes)

    @property
    def embedder(self) -> Embedder:
        """The model, without LlamaIndex around it."""
        return cast("Embedder", self._embedder)

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return self.embedder.dimension

    @property
    def model_id(self) -> str:
        """The embedder's `space`, kept with a collection: equal if and only if vectors may be compared."""
        return self.embedder.space

    @property
    def model_note(self) -> str:
        """Name and float format, for people; kept with a collection too."""
        if self.base_url is not None:
            return f"{self.model_name}, {self.embedder.note}"
        path = Path(self.model_name).expanduser()
        name = path.resolve().name if path.exists() else self.model_name
        return f"{name}, {self.embedder.note}"

    def _vectors(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D) float32, row by row; equal contents are computed once."""
        identity = cache_identity(self.embedder, query=query)
        keys = [content.key(identity) for content in contents]
        wanted = dict(zip(keys, contents, strict=True))
        known: dict[bytes, NDArray[np.float32]] = {} if self._cache is None else self._cache.get(wanted)
        missing = [key for key in wanted if key not in known]
        if missing:
            fresh = dict(zip(missing, self.embedder.encode([wanted[key] for key in missing], query=query), strict=True))
            if self._cache is not None:
                self._cache.put(fresh)
            known |= fresh
        vectors = np.empty((len(keys), self.dimension), dtype=np.float32)
        for row, key in enumerate(keys):
            vectors[row] = known[key]
        self._origins.note(vectors, [content.text if content.image is None else None for content in contents])
        return vectors

    def is_of_text(self, vector: Embedding, text: str) -> bool | None:
        """Whether a vector is of this text, and not of an image; None where it was not made here, or long ago."""
        return self._origins.is_of_text(vector, text)

    def _content(self, request: Request) -> Content:
        return request.content(self.prepare_image, self.image_policy)

    def _batch(
        self, requests: Sequence[Request], *, show_progress: bool, name: str, query: bool = False
    ) -> list[Embedding]:
        """Vectors in the order of the requests; images of the next batch are read while the model works on this one."""
        embeddings: list[Embedding] = [[]] * len(requests)
        with tqdm(total=len(requests), desc=name, disable=not show_progress) as bar:
            for rows, contents in read_ahead(requests, self.embed_batch_size, self._content):
                computed = self._announced([requests[row].label for row in rows], contents, query=query)
                for row, embedding in zip(rows, computed, strict=True):
                    embeddings[row] = embedding
                bar.update(len(rows))
        return embeddings

    def _announced(self, labels: list[str], contents: Sequence[Content], *, query: bool) -> list[Embedding]:
        """The vectors of the contents, with the events that LlamaIndex's own text methods send."""
        payload = self.to_payload()
        dispatcher.event(EmbeddingStartEvent(model_dict=payload))
        with self.callback_manager.event(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: payload}) as event:
            if self.rate_limiter is not None:
                self.rate_limiter.acquire()
            embeddings: list[Embedding] = self._vectors(contents, query=query).tolist()
            event.on_end(payload={EventPayload.CHUNKS: labels, EventPayload.EMBEDDINGS: embeddings})
        dispatcher.event(EmbeddingEndEvent(chunks=labels, embeddings=embeddings))
        return embeddings

    def _single(self, request: Request, *, query: bool) -> Embedding:
        return self._announced([request.label], [self._content(request)], query=query)[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> Embedding:
        return cast("Embedding", self._vectors([Content(query)], query=True)[0].tolist())

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return cast("list[Embedding]", self._vectors([Content(text) for text in texts]).tolist())

    _aget_text_embedding = in_thread(_get_text_embedding)  # type: ignore[arg-type]
    _aget_query_embedding = in_thread(_get_query_embedding)  # type: ignore[arg-type]
    _aget_text_embeddings = in_thread(_get_text_embeddings)  # type: ignore[arg-type]

    def get_query_embedding(self, query: str) -> Embedding:
        """Vector of a text to search with; LlamaIndex's cache would give that of an equal text that is stored."""
        is_as_stored = cache_identity(self.embedder, query=True) == cache_identity(self.embedder, query=False)
        if self.embeddings_cache is None or is_as_stored:
            return super().get_query_embedding(query)
        return self._single(Request(query), query=True)

    aget_query_embedding = in_thread(get_query_embedding)

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Embedding]:
        """Vectors of texts, in the order given."""
        if self.embeddings_cache is not None:  # LlamaIndex's own cache: by its own rules
            return super().get_text_embedding_batch(texts, show_progress, **kwargs)
        return self._batch(paired(texts, None), show_progress=show_progress, name="Embedding texts")

    aget_text_embedding_batch = in_thread(get_text_embedding_batch)

    def _get_image_embedding(self, img_file_path: ImageSource) -> Embedding:
        return cast("Embedding", self._vectors([self._content(Request(image=img_file_path))])[0].tolist())

    _aget_image_embedding = in_thread(_get_image_embedding)  # type: ignore[arg-type]

    @spanned
    def get_image_embedding(self, img_file_path: ImageSource, *, query: bool = False) -> Embedding:
        """Vector of an image: a path, bytes, a file object, a PIL image, ... (see :func:`load_image`).

        Args:
            img_file_path: the image, under LlamaIndex's name for it.
            query: whether it is searched with, rather than stored.

        Raises:
            ImageLoadError: the image cannot or must not be read.
        """
        return self._single(Request(image=img_file_path), query=query)

    aget_image_embedding = in_thread(get_image_embedding)  # type: ignore[arg-type]

    @spanned
    def get_image_embedding_batch(
        self, img_file_paths: Sequence[ImageSource], show_progress: bool = False
    ) -> list[Embedding]:
        """Vectors of images, in the order given.

        Raises:
            ImageLoadError: names the first image that cannot or must not be read.
        """
        return self._batch(paired(None, img_file_paths), show_progress=show_progress, name="Embedding images")

    aget_image_embedding_batch = in_thread(get_image_embedding_batch)  # type: ignore[arg-type]

    def prepare_image(self, image: Image.Image) -> Pixels:
        """(H, W, 3): all that the model sees of an image, to be made in a reading thread and kept in little memory."""
        return self.embedder.prepare(image)

    def embed_images(self, images: Sequence[Image.Image | Pixels]) -> NDArray[np.float32]:
        """(B, D) of loaded images, or of what :meth:`prepare_image` made of them: the fast path, without events."""
        prepared = [self.prepare_image(image) if isinstance(image, Image.Image) else image for image in images]
        return self._vectors([Content(image=image) for image in prepared])

    @spanned
    def get_composed_embedding(self, text: str, image: ImageSource, *, query: bool = True) -> Embedding:
        """Vector of an image and a text about it ("the same in red") together.

        Args:
            text: what to change, or what the image is about.
            image: as of :meth:`get_image_embedding`.
            query: whether the pair is searched with, rather than stored.

        Raises:
            ImageLoadError: the image cannot or must not be read.
        """
        return self._single(Request.of_pair(text, image), query=query)

    aget_composed_embedding = in_thread(get_composed_embedding)

    @spanned
    def get_composed_embedding_batch(
        self,
        texts: Sequence[str],
        images: Sequence[ImageSource],
        show_progress: bool = False,
        *,
        query: bool = True,
    ) -> list[Embedding]:
        """Vectors of pairs, the first text with the first image and so on; errors are those of :meth:`embed`."""
        return self._batch(paired(texts, images), show_progress=show_progress, name="Embedding pairs", query=query)

    aget_composed_embedding_batch = in_thread(get_composed_embedding_batch)

    @spanned
    def embed(
        self,
        texts: Sequence[str | None] | None = None,
        images: Sequence[ImageSource | None] | None = None,
        *,
        query: bool = False,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """(B, D), rows of length 1 in the order given: of texts, of images, or of each text with its image.

        Args:
            texts: None beside an image is the image alone.
            images: None beside a text is the text alone.
            query: whether the vectors are searched with, rather than stored.
            show_progress: draw a progress bar.

        Raises:
            QueryError: there are not as many texts as images.
            ImageLoadError: names the first image that cannot or must not be read.
        """
        requests = paired(texts, images)
        vectors = self._batch(requests, show_progress=show_progress, name="Embedding", query=query)
        return np.array(vectors, dtype=np.float32).reshape(len(requests), self.dimension)

    aembed = in_thread(embed)

    def get_query_bundle(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        image_policy: ImagePolicy | None = None,
    ) -> QueryBundle:
        """A query that carries its vector and its image: any retriever, reranker or engine answers it.

        The bundle's ``image_path`` is the image's path, or else a data URI of exactly its bytes or pixels.

        Args:
            text: what to look for, or to change.
            image: of any kind that `load_image` takes.
            image_policy: which images may be read; default: the policy of the model.

        Raises:
            QueryError: neither text nor image.
            ImageLoadError: the image cannot or must not be read.
        """
        if not isinstance(text, str | None):
            raise QueryError(f"text={shown(text)}: give words as text, and an image as image")
        words = text if text and text.strip() else ""
        if image is None:
            if not words:
                raise QueryError("nothing to search for: give a text, an image, or both")
            return QueryBundle(query_str=words, embedding=self.get_query_embedding(words))
        policy = image_policy or self.image_policy
        carried = portable_image(image, policy=policy)
        embedding = self._single(Request(words or None, carried, policy=policy), query=True)
        return QueryBundle(query_str=words, image_path=carried, embedding=embedding)

    aget_query_bundle = in_thread(get_query_bundle)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Gives every node its vector: an image node's from its pixels, a text node's from its text."""
        embeddings = self.embed_nodes(nodes := list(nodes), show_progress=bool(kwargs.get("show_progress", False)))
        for node, embedding in zip(nodes, embeddings, strict=True):
            node.embedding = embedding
        return nodes

    def embed_nodes(self, nodes: Sequence[BaseNode], *, show_progress: bool = False) -> list[Embedding]:
        """The vectors that calling it gives to the nodes, which stay as they are.

        Raises:
            ImageLoadError: names the first image that cannot or must not be read.
        """
        requests = [Request.of_node(node, compose=self.compose_nodes) for node in nodes]
        return self._batch(requests, show_progress=show_progress, name="Embedding nodes")

    acall = in_thread(__call__)  # type: ignore[arg-type]

    def _made_of(self) -> dict[str, Any]:
        if self.base_url is not None:
            self.embedder.server.portable()  # type: ignore[attr-defined]
        return self._described()

    def _described(self) -> dict[str, Any]:
        made_of = field_arguments(self) | {"cache_dir": self.cache_dir and portable_name(self.cache_dir)}
        if self.base_url is None:
            return made_of | {"model_name": self._given or portable_name(self.model_name)}
        secret = {"api_key": Secret()} if self.embedder.server.has_key else {}  # type: ignore[attr-defined]
        return made_of | {"dtype": None} | secret

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The fields, the model's identity, and a number that is never the same twice.

        An IngestionPipeline with a cache takes nodes for equal when their text and this dict are: two images without
        text would get one vector. ``cache_dir`` keeps vectors by pixels instead.
        """
        return {**super().to_dict(**kwargs), "model_id": self.model_id, "pictures": uuid.uuid4().hex}


class VisualizedBGEEmbedding(ComposedEmbedding):
    """`ComposedEmbedding` of a Visualized BGE model.

    Args:
        model_name: as of `ComposedEmbedding`.
        tokenizer: path of ``tokenizer.json`` when it is not beside the weights.
        **options: as of `ComposedEmbedding`.
    """

    tokenizer: str | None = None

    families: ClassVar[tuple[str, ...] | None] = ("visualized_bge",)

    def __init__(
        self,
        model_name: str | os.PathLike[str] | Embedder = DEFAULT_MODEL,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if tokenizer is not None:
            tokenizer = portable_name(tokenizer)
            options["options"] = {**(options.get("options") or {}), "tokenizer": tokenizer}
        super().__init__(model_name, **options)
        self.tokenizer = tokenizer

    @property
    def encoder(self) -> VisualizedBGEEncoder:
        """The `embedder`, with its model and processor."""
        return cast("VisualizedBGEEncoder", self._embedder)
