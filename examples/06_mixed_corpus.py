"""Texts and images in one collection, one ranking, and exact words where they matter.

python examples/06_mixed_corpus.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from llama_index.core import SimpleDirectoryReader
from llama_index.core.node_parser import MarkdownNodeParser

from mm_retriever import ComposedRetriever, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_product

HANDBOOK = """\
# Care
All mugs are made of porcelain and may go into the dishwasher.
# Shipping
Orders placed before noon are shipped on the same day.
# Spare parts
Article XK-2041: spare lid for the travel bottle, steel.
"""


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "shop").mkdir()
    (folder / "shop" / "handbook.md").write_text(HANDBOOK)
    draw_product("mug", "hearts", "red", seed=1).save(folder / "shop" / "mug.png")
    draw_product("sock", "stripes", "green", seed=1).save(folder / "shop" / "sock.png")

    embed_model = VisualizedBGEEmbedding("tiny")
    documents = SimpleDirectoryReader(folder / "shop").load_data()
    nodes = MarkdownNodeParser().get_nodes_from_documents(documents)  # chapters; images pass through
    with open_store(folder / "shop.db", embed_model, hybrid=True) as store:
        print(ingest_images(nodes, store, embed_model, show_progress=False))
        for question in ("can mugs go into the dishwasher?", "a red mug with hearts", "XK-2041"):
            print(f"\n{question}")
            for mode in ("default", "hybrid"):
                best = ComposedRetriever(store, embed_model, top_k=1, mode=mode).retrieve(question)[0]
                print(f"  {mode:8}{best.score:.3f}  {best.text.strip() or best.metadata['file_name']}")


if __name__ == "__main__":
    main()
