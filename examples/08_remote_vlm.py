"""Let a vision model on another machine rank what was found, through any server that speaks OpenAI's protocol.

    vllm serve microsoft/Phi-3.5-vision-instruct --trust-remote-code --limit-mm-per-prompt '{"image": 10}'
    VISION_URL=http://localhost:8000/v1 python examples/08_remote_vlm.py

Without a server it says what to set.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from llama_index.core import QueryBundle

from mm_retriever import ComposedRetriever, VisionLLMRerank, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_theme, write_catalogue


def main() -> None:
    url = os.environ.get("VISION_URL")
    if url is None:
        print("set VISION_URL to the address of a server, for example http://localhost:8000/v1")
        return
    folder = Path(tempfile.mkdtemp())
    drawn = write_catalogue(folder, count=60, seed=8)
    draw_theme("leopard", "natural", seed=1).save(folder / "leopard.png")

    embed_model = VisualizedBGEEmbedding("tiny")
    store = open_store(folder / "products.db", embed_model)
    ingest_images(drawn.products, store, embed_model, sidecar=drawn.labels, show_progress=False)

    query = QueryBundle("phone case with this", image_path=str(folder / "leopard.png"))
    found = ComposedRetriever(store, embed_model, top_k=4).retrieve(query)
    rerank = VisionLLMRerank(base_url=url, model="microsoft/Phi-3.5-vision-instruct", on_error="keep_order")
    for hit in rerank.postprocess_nodes(found, query_bundle=query):
        print(f"{hit.node.metadata['retrieval_rank']} -> {hit.node.metadata['rerank_rank']}", end="  ")
        print(hit.node.metadata["description"], hit.node.metadata.get("rerank_reason", ""))
    store.close()


if __name__ == "__main__":
    main()
