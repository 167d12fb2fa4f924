"""Image search in LangChain: a retriever in a chain, and tools whose messages carry images.

pip install "mm-retriever[langchain]"
python examples/04_langchain.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from langchain_core.runnables import RunnableLambda
from langchain_mm_retriever import ComposedImageRetriever, VisualizedBGEEmbeddings, image_search_tools

from mm_retriever import ingest_images, open_store
from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.search_tools import Conversation, ImageSearch


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "products").mkdir()
    for kind in ("phone case", "mug", "backpack", "umbrella", "cap"):
        for pattern, colour in (("leopard", "natural"), ("hearts", "red"), ("stars", "blue")):
            draw_product(kind, pattern, colour, seed=1).save(folder / "products" / f"{pattern} {kind}.png")
    draw_theme("leopard", "natural", seed=1).save(folder / "leopard.png")

    embeddings = VisualizedBGEEmbeddings("tiny")
    with open_store(folder / "products.db", embeddings.embed_model) as store:
        ingest_images(folder / "products", store, embeddings.embed_model, show_progress=False)

        retriever = ComposedImageRetriever(store=store, embeddings=embeddings, k=3)
        chain = retriever | RunnableLambda(lambda documents: [one.metadata["file_name"] for one in documents])
        print(chain.invoke({"text": "phone case with this", "image": folder / "leopard.png"}))

        conversation = Conversation()
        conversation.attach("photo", folder / "leopard.png")
        search, *others = image_search_tools(ImageSearch(store, embeddings.embed_model), conversation)
        call = {"text": "phone case with this", "image": "photo", "top_k": 2}  # what a chat model would send
        message = search.invoke({"name": search.name, "args": call, "id": "1", "type": "tool_call"})
        for block in message.content:
            print(block.get("text") or f"<{block['type']}, {block['mime_type']}>")
        print("and", ", ".join(tool.name for tool in others))


if __name__ == "__main__":
    main()
