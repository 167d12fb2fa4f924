"""Rank what was found again, with a vision model that says why the first one fits; nothing to download.

    python examples/07_rerank.py

On photographs, use the published weights: ``VisualizedBGEEmbedding()`` and ``Phi3VisionRerank()``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from llama_index.core import QueryBundle

from mm_retriever import ComposedRetriever, Phi3VisionRerank, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_theme, write_catalogue


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    drawn = write_catalogue(folder, count=120, seed=8)
    draw_theme("leopard", "natural", seed=1).save(folder / "leopard.png")

    embed_model = VisualizedBGEEmbedding("tiny")
    store = open_store(folder / "products.db", embed_model)
    ingest_images(drawn.products, store, embed_model, sidecar=drawn.labels, show_progress=False)

    query = QueryBundle("phone case with this", image_path=str(folder / "leopard.png"))
    found = ComposedRetriever(store, embed_model, top_k=9).retrieve(query)
    result = Phi3VisionRerank("tiny", top_n=3, fusion_weight=0.3).rerank(found, query)
    print(f"it sees: {result.caption}; wanted: {result.wanted}")
    for hit in result.nodes:
        print(f"{hit.score:.3f}  {hit.node.metadata['description']}", hit.node.metadata.get("rerank_reason", ""))
    store.close()


if __name__ == "__main__":
    main()
