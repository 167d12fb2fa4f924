"""Search images by text, by image, and by both at once, on a real vector store, with nothing to download.

    python examples/01_composed_search.py

On photographs, use BAAI's weights: ``VisualizedBGEEmbedding()`` instead of ``VisualizedBGEEmbedding("tiny")``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from llama_index.core import QueryBundle

from mm_retriever import ComposedRetriever, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_theme, write_catalogue


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    drawn = write_catalogue(folder, count=120, seed=8)
    leopard = folder / "leopard.png"
    draw_theme("leopard", "natural", seed=1).save(leopard)

    embed_model = VisualizedBGEEmbedding("tiny")
    store = open_store(folder / "products.db", embed_model)
    print(ingest_images(drawn.products, store, embed_model, sidecar=drawn.labels))

    retriever = ComposedRetriever(store, embed_model, top_k=3)
    questions = {
        "text": QueryBundle("a green mug with hearts"),
        "image": QueryBundle("", image_path=str(leopard)),
        "both": QueryBundle("phone case with this", image_path=str(leopard)),
    }
    for name, question in questions.items():
        print(f"\n{name}: {question.query_str}")
        for hit in retriever.retrieve(question):
            print(f"  {hit.score:.3f}  {hit.node.metadata['description']}")
    store.close()


if __name__ == "__main__":
    main()
