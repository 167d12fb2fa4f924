"""Embedders, rerankers and the whole pipeline as models of `mteb`, the Massive Text Embedding Benchmark.

    import mteb
    from mm_retriever.evaluation.mteb import MTEBEncoder

    mteb.evaluate(MTEBEncoder("BAAI/BGE-VL-base"), mteb.get_tasks(["CIRRIT2IRetrieval"]))

Three protocols of mteb: `MTEBEncoder` (EncoderProtocol), `MTEBPipeline` (SearchProtocol: ingestion, Milvus Lite,
`ComposedRetriever`, rerankers) and `MTEBReranker` (CrossEncoderProtocol). mteb leaves the query image in the ranking;
so does the pipeline unless it is told otherwise. Needs `pip install "mm-retriever[mteb]"`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

# the only way to the texts as mteb's own models read them: title with text, instruction with query
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.similarity_functions import dot_score, pairwise_dot_score
from mteb.types import PromptType
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.embedders.embedder import Embedder, cache_identity
from mm_retriever.embedding import ComposedEmbedding, Request
from mm_retriever.errors import IngestError, QueryError
from mm_retriever.images import load_image, pixel_digest
from mm_retriever.ingest import ingest_images
from mm_retriever.rerank import load_reranker
from mm_retriever.rerank.registry import as_postprocessors
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.store import ImageStore, open_store

_OTHER_MODALITIES = frozenset(("audio", "video"))
_EVERY_CANDIDATE = 1_000_000


Kind: TypeAlias = Literal["dense", "hybrid", "cross-encoder"]


class Entry(NamedTuple):
    """A query or a document of a task."""

    text: str
    image: Image.Image | None


class MTEBEncoder:
    """An embedder as an mteb model: texts, images, and both together; scores are inner products.

    Args:
        model: a name of `load_embedder`, an `Embedder`, or a `ComposedEmbedding`.
        revision: of a hub repository.
        device: "cpu", "cuda", ...; default: the fastest there is.
        options: of `ComposedEmbedding`, such as `dtype` or `base_url`.
    """

    def __init__(
        self,
        model: str | Embedder | ComposedEmbedding,
        revision: str | None = None,
        *,
        device: str | None = None,
        **options: Any,
    ) -> None:
        self.embed_model = _embed_model(model, revision=revision, device=device, **options)
        self.mteb_model_meta = _meta(self.embed_model, "dense")

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Return (B, D) float32, rows of length 1; `inputs` are batches with "text", "image" or both.

        Raises:
            QueryError: batches without either, or with audio or video; a precision other than float32.
        """
        model, query = self.embed_model, prompt_type is PromptType.query
        if kwargs.get("precision") not in (None, "float32"):
            raise QueryError(f"precision {kwargs['precision']!r}: these vectors are float32")
        vectors = [np.empty((0, model.dimension), np.float32)]
        for batch in inputs:
            requests = [Request(entry.text, entry.image) for entry in _entries(batch, task_metadata)]
            contents = [request.content(model.prepare_image, model.image_policy) for request in requests]
            vectors.append(model.embedder.encode(contents, query=query))
        return np.concatenate(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return (B1, B2): the inner products of all pairs."""
        return torch.as_tensor(dot_score(embeddings1, embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return (B,): the inner products of the pairs in order."""
        return torch.as_tensor(pairwise_dot_score(embeddings1, embeddings2))


class MTEBPipeline:
    """The whole pipeline as an mteb model: documents are ingested into a Milvus Lite file, queries are retrieved.

    A document with an image is found by its pixels, as ingestion does it; its text serves the words of hybrid search
    and the reranker. The file lies in a temporary folder and goes with the next `index`, with `close`, or at the end
    of a `with` block.

    Args:
        model: as of `MTEBEncoder`.
        rerank: a name of `load_reranker`, or node postprocessors, in order.
        rerank_depth: how many of the nearest are reranked; what the rerankers leave out, and all others, come after.
        hybrid: search by the words too.
        exclude_query_image: leave out the query image. mteb's published figures leave it in: do not compare the two.
        options: of `ComposedEmbedding`.
    """

    def __init__(
        self,
        model: str | Embedder | ComposedEmbedding,
        *,
        rerank: str | BaseNodePostprocessor | Sequence[BaseNodePostprocessor] = (),
        rerank_depth: int = 100,
        hybrid: bool = False,
        exclude_query_image: bool = False,
        **options: Any,
    ) -> None:
        self.embed_model = _embed_model(model, **options)
        self._rerank = as_postprocessors(rerank, top_n=rerank_depth)
        self._depth, self._hybrid, self._exclude_query_image = rerank_depth, hybrid, exclude_query_image
        rerankers = [_described(postprocessor) for postprocessor in self._rerank]
        settings: dict[str, Any] = {"hybrid": hybrid, "exclude_query_image": exclude_query_image}
        settings |= {"rerank": rerankers, "rerank_depth": rerank_depth} if rerankers else {}
        self.mteb_model_meta = _meta(self.embed_model, "hybrid" if hybrid else "dense", settings)
        self._folder: TemporaryDirectory[str] | None = None
        self._store: ImageStore | None = None
        self._ids: list[str] = []

    def index(
        self,
        corpus: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: Mapping[str, Any],
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Ingest the documents; those of an earlier call go.

        Raises:
            IngestError: a document that cannot be stored.
        """
        self.close()
        self._folder = TemporaryDirectory(prefix="mm-retriever-mteb-")
        place = Path(self._folder.name)
        self._store = open_store(place / "corpus.db", self.embed_model, hybrid=self._hybrid)
        self._ids = [str(id_) for id_ in corpus["id"]]
        options: dict[str, Any] = {"batch_size": encode_kwargs.get("batch_size", 32), "num_proc": num_proc}
        loader = create_dataloader(corpus, task_metadata=task_metadata, prompt_type=PromptType.document, **options)
        nodes = (_node(row, entry, place) for row, entry in enumerate(_all_entries(loader, task_metadata)))
        report = ingest_images(nodes, self._store, self.embed_model, exif=False, show_progress=False)
        if report.skipped or self._store.count() != len(self._ids):
            reason = f": {report.skipped[0].path}: {report.skipped[0].reason}" if report.skipped else ""
            raise IngestError(f"{self._store.count()} of {len(self._ids)} documents of {task_metadata.name}{reason}")

    def search(
        self,
        queries: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, list[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Return for each query its documents and their scores; after a reranker scores say the order alone.

        Raises:
            QueryError: `index` was not called before.
        """
        if self._store is None:
            raise QueryError("nothing is indexed: call index() before search()")
        options: dict[str, Any] = {"batch_size": encode_kwargs.get("batch_size", 32), "num_proc": num_proc}
        loader = create_dataloader(queries, task_metadata=task_metadata, prompt_type=PromptType.query, **options)
        rows = {id_: row for row, id_ in enumerate(self._ids)}
        results = {}
        for query_id, entry in zip(queries["id"], _all_entries(loader, task_metadata), strict=True):
            among = None if top_ranked is None else [rows[id_] for id_ in top_ranked.get(query_id, ())]
            results[str(query_id)] = self._found(entry, top_k, among)
        return results

    def _found(self, entry: Entry, top_k: int, among: Sequence[int] | None) -> dict[str, float]:
        assert self._store is not None
        if among is not None and not among:
            return {}
        filters = None
        if among is not None:
            ids = [_row_id(row) for row in among]
            filters = MetadataFilters(filters=[MetadataFilter(key="id", operator=FilterOperator.IN, value=ids)])
        retriever = ComposedRetriever(
            self._store,
            self.embed_model,
            top_k=min(top_k, len(self._ids)),
            filters=filters,
            mode="hybrid" if self._hybrid else "default",
            exclude_query_image=self._exclude_query_image,
        )
        query = self.embed_model.get_query_bundle(entry.text, entry.image)
        hits = retriever.retrieve(query)
        if not self._rerank:
            return {self._ids[_row(hit)]: float(hit.score or 0) for hit in hits}
        best = hits[: self._depth]
        for postprocessor in self._rerank if best else ():
            best = postprocessor.postprocess_nodes(best, query_bundle=query)
        order = list(dict.fromkeys(self._ids[_row(hit)] for hit in (*best, *hits)))
        return {id_: float(len(order) - place) for place, id_ in enumerate(order)}

    def close(self) -> None:
        """Remove the temporary store."""
        if self._store is not None:
            self._store.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._store = self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MTEBReranker:
    """A reranker as an mteb cross-encoder: each query's candidates are ranked together, as in a search.

    Args:
        model: a name of `load_reranker`, or a `Reranker`.
        revision: of a hub repository.
        device: "cpu", "cuda", ...; default: the fastest there is.
        options: of `load_reranker`.
    """

    def __init__(
        self, model: str | Reranker, revision: str | None = None, device: str | None = None, **options: Any
    ) -> None:
        given: dict[str, Any] = {"revision": revision, "device": device, **options}
        self.reranker = load_reranker(model, top_n=_EVERY_CANDIDATE, **given) if isinstance(model, str) else model
        described = _described(self.reranker)
        self.mteb_model_meta = _model_meta(self.reranker.model_name, _digest(described), None, "cross-encoder")

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Return (B,): 1 / rank of each candidate among those of its query, which follow one another.

        Raises:
            QueryError: as of `MTEBEncoder.encode`, or a query of nothing.
            RerankError: the reranker gave no ranking.
        """
        pairs = zip(_all_entries(inputs1, task_metadata), _all_entries(inputs2, task_metadata), strict=True)
        scores: list[float] = []
        for _, group in groupby(pairs, key=lambda pair: _same(pair[0])):
            queries, candidates = zip(*group, strict=True)
            scores += self._scores(queries[0], candidates)
        return np.asarray(scores, np.float32)

    def _scores(self, query: Entry, candidates: Sequence[Entry]) -> list[float]:
        with TemporaryDirectory(prefix="mm-retriever-mteb-") as folder:
            nodes = [NodeWithScore(node=_node(row, entry, Path(folder))) for row, entry in enumerate(candidates)]
            order = self.reranker.rerank(nodes, QueryBundle(query.text), query_image=query.image).order
        ranks = {position: rank for rank, position in enumerate(order, 1)}
        return [1 / ranks[position] for position in range(len(candidates))]


# ------------------------------------------------------------------------------------------ what mteb gives


def _entries(batch: Mapping[str, Any], task: TaskMetadata) -> Iterator[Entry]:
    """The rows of a batch."""
    texts, images = batch.get("text"), batch.get("image")
    if (texts is None and images is None) or _OTHER_MODALITIES & batch.keys():
        raise QueryError(f"{task.name} gives {', '.join(map(str, batch))}: texts and images are what can be embedded")
    for row in range(len(texts if texts is not None else images or ())):
        yield Entry(texts[row] or "" if texts is not None else "", None if images is None else _rgb(images[row]))


def _all_entries(batches: Iterable[Mapping[str, Any]], task: TaskMetadata) -> Iterator[Entry]:
    for batch in batches:
        yield from _entries(batch, task)


def _rgb(image: Any) -> Image.Image | None:
    """An image as this package reads it, from any mode, upright."""
    return None if image is None else load_image(image)


def _same(entry: Entry) -> tuple[str, str]:
    """Equal for equal queries."""
    return entry.text, "" if entry.image is None else pixel_digest(entry.image)


def _row_id(row: int) -> str:
    return f"document {row}"


def _row(hit: NodeWithScore) -> int:
    return int(hit.node.node_id.removeprefix("document "))


def _node(row: int, entry: Entry, folder: Path) -> BaseNode:
    """The document as a node; its pixels go to a file that loses none of them."""
    if entry.image is None:
        return TextNode(id_=_row_id(row), text=entry.text)
    path = folder / f"{row}.png"
    entry.image.save(path, compress_level=1)
    return ImageNode(id_=_row_id(row), text=entry.text, image_path=str(path))


# ------------------------------------------------------------------------------------------ what mteb is told


def _embed_model(model: str | Embedder | ComposedEmbedding, **options: Any) -> ComposedEmbedding:
    if not isinstance(model, ComposedEmbedding):
        return ComposedEmbedding(model, **options)
    if given := [name for name, value in options.items() if value is not None]:
        raise QueryError(f"{', '.join(given)}: {model.model_name!r} is a loaded model, which takes no options")
    return model


def _meta(model: ComposedEmbedding, kind: Kind, settings: Mapping[str, Any] | None = None) -> ModelMeta:
    """What names the results: mteb keeps them by it, so other weights, dtypes and settings must give other names."""
    revision = _digest(cache_identity(model.embedder, query=True), model.embedder.note)
    return _model_meta(model.model_name, revision, model.dimension, kind, settings)


def _model_meta(
    name: str, revision: str, dimension: int | None, kind: Kind, settings: Mapping[str, Any] | None = None
) -> ModelMeta:
    path = Path(name).expanduser()
    short = path.resolve().name if path.exists() else name
    return ModelMeta(
        loader=None,
        name=short if "/" in short else f"mm-retriever/{short}",
        revision=revision,
        embed_dim=dimension,
        framework=["PyTorch"],
        similarity_fn_name=None if dimension is None else ScoringFunction.DOT_PRODUCT,
        modalities=["text", "image"],
        model_type=[kind],
        experiment_kwargs=settings,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        use_instructions=None,
        training_datasets=None,
    )


def _described(postprocessor: BaseNodePostprocessor) -> str:
    """A postprocessor with its options, in a word that is another one for other options."""
    name = getattr(postprocessor, "model_name", postprocessor.class_name())
    options = json.dumps(postprocessor.to_dict(), sort_keys=True, default=str)
    return f"{Path(name).name} {_digest(options)}"


def _digest(*facts: str) -> str:
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
