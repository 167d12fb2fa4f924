"""A LlamaIndex app over texts, and the five lines that make it find images and answer composed queries.

    python examples/02_existing_llamaindex_app.py

The five end in "# new"; two of them stand for the line before them, "# was".
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from llama_index.core import MockEmbedding, SimpleDirectoryReader, VectorStoreIndex  # noqa: F401 - as it was
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter

from mm_retriever import VisualizedBGEEmbedding, ingest_images, open_store  # new
from mm_retriever.demo.catalogue import draw_product, draw_theme


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    open_shop(folder)
    llm = MockLLM()  # yours; this one repeats what it is given

    # was: embed_model = MockEmbedding(64)
    embed_model = VisualizedBGEEmbedding("tiny")  # new
    documents = SimpleDirectoryReader(folder / "handbook").load_data()
    nodes = SentenceSplitter().get_nodes_from_documents(documents)
    # was: index = VectorStoreIndex(nodes, embed_model=embed_model)
    index = VectorStoreIndex.from_vector_store(open_store(folder / "shop.db", embed_model), embed_model)  # new
    ingest_images([*nodes, *(folder / "photos").iterdir()], index.vector_store, embed_model, show_progress=False)  # new
    engine = index.as_query_engine(llm, similarity_top_k=1)

    print(engine.query("when are orders shipped?"))
    print(engine.query(embed_model.get_query_bundle("phone case with this", folder / "leopard.png")))  # new


def open_shop(folder: Path) -> None:
    """Draw what an app would have: a handbook, photos of products, and the image that someone asks with."""
    (folder / "handbook").mkdir()
    (folder / "photos").mkdir()
    (folder / "handbook" / "shipping.md").write_text("Orders placed before noon are shipped on the same day.\n")
    for kind, pattern, colour in (
        ("phone case", "leopard", "natural"),
        ("mug", "hearts", "red"),
        ("cap", "stars", "blue"),
    ):
        draw_product(kind, pattern, colour, seed=1).save(folder / "photos" / f"{pattern} {kind}.png")
    draw_theme("leopard", "natural", seed=1).save(folder / "leopard.png")


if __name__ == "__main__":
    main()
