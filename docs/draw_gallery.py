"""Draws the images of the documentation: ten searches of the gallery, and the README's figure.

    python docs/draw_gallery.py        # writes docs/assets/*.jpg and docs/gallery.md

Everything runs on the drawn catalogue with the bundled tiny models; the same versions give the same images.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
from PIL import Image

from mm_retriever import (
    ComposedRetriever,
    ImageStore,
    Phi3VisionRerank,
    VisualizedBGEEmbedding,
    before_after,
    contact_sheet,
    ingest_images,
    open_store,
)
from mm_retriever.demo.catalogue import draw_product, draw_theme, write_catalogue
from mm_retriever.refinement import Refinement

DOCS = Path(__file__).resolve().parent
SHOWN, CELL, QUALITY = 6, 112, 78
FIGURE = ("stripes", "black", 5_009_313, "any tshirt wearing these looks?")
"""Pattern and colour of the query image, its seed, and the text."""
FUSION = 0.3
"""How much the retrieval score counts: the weight of the model card of the reranker."""


@dataclass(frozen=True)
class Search:
    """One search of the gallery."""

    title: str
    text: str = ""
    image: str = ""
    code: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def red_only() -> MetadataFilters:
    """Only what a sidecar calls red."""
    return MetadataFilters(filters=[MetadataFilter(key="colour", value="red")])


SEARCHES = (
    Search("A text", "a green backpack with stars"),
    Search("A text in other words", "rucksack, camo"),
    Search("An image", image="umbrella"),
    Search("An image and the kind of product", "phone case with this", "leopard"),
    Search("The same image, another kind", "an umbrella like this", "leopard"),
    Search("The same product in another colour", "the same in green", "mug"),
    Search("The same product with another pattern", "the same with stripes", "mug"),
    Search("With a filter", "a mug", code='filters: colour is "red"', options={"filters": red_only()}),
    Search("More like the image", "mug", "leopard", "balance=0.2", {"refinement": Refinement(balance=0.2)}),
    Search(
        "Without something",
        "a pink mug",
        code='avoid=("hearts",)',
        options={"refinement": Refinement(avoid=("hearts",))},
    ),
)


def query_images(folder: Path) -> dict[str, Path]:
    """Draw the images that are asked with."""
    drawn = {
        "leopard": draw_theme("leopard", "natural", seed=90_001, size=320),
        "umbrella": draw_product("umbrella", "polka dots", "red", seed=90_002, size=320),
        "mug": draw_product("mug", "hearts", "pink", seed=90_003, size=320),
    }
    for name, image in drawn.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in drawn}


def draw_search(
    number: int, search: Search, store: ImageStore, model: VisualizedBGEEmbedding, image: Path | None
) -> str:
    """Search, write the sheet of results, and return the section of the page."""
    retriever = ComposedRetriever(store, model, top_k=SHOWN, **search.options)
    hits = retriever.retrieve(model.get_query_bundle(search.text or None, image))
    images = [Image.open(hit.node.metadata["file_path"]).convert("RGB") for hit in hits]
    query = None if image is None else Image.open(image).convert("RGB")
    sheet = contact_sheet(images, query, columns=SHOWN, cell=CELL)
    sheet.save(DOCS / "assets" / f"gallery-{number:02}.jpg", quality=QUALITY, optimize=True)
    parts = [f"“{search.text}”"] if search.text else []
    asked = " and ".join([*parts, *(["the image in the blue frame"] if image else [])])
    found = "; ".join(str(hit.node.metadata["description"]) for hit in hits[:3])
    more = f", `{search.code}`" if search.code else ""
    alt = f"{search.title}: the {len(hits)} best of 900 drawn products"
    return (
        f"## {search.title}\n\n{asked}{more}\n\n![{alt}](assets/gallery-{number:02}.jpg)\n\nThe first three: {found}.\n"
    )


def main() -> None:
    """Draw everything."""
    model = VisualizedBGEEmbedding("tiny")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        written = write_catalogue(folder / "catalogue")
        queries = query_images(folder)
        with open_store(folder / "gallery.db", model) as store:
            ingest_images(written.products, store, model, sidecar=written.labels, show_progress=False)
            sections = [
                draw_search(number, search, store, model, queries.get(search.image))
                for number, search in enumerate(SEARCHES, start=1)
            ]
            draw_figure(store, model, folder)
    page = [
        "# Gallery\n",
        "Ten searches among 900 drawn products, with the bundled `tiny` model. `python docs/draw_gallery.py` draws the "
        "products, runs the searches and writes this page.\n",
        *sections,
    ]
    (DOCS / "gallery.md").write_text("\n".join(page), encoding="utf-8")


def draw_figure(store: ImageStore, model: VisualizedBGEEmbedding, folder: Path) -> None:
    """Draw the README's figure: a query whose right answer retrieval does not put first."""
    pattern, colour, seed, text = FIGURE
    place = folder / "figure.png"
    draw_theme(pattern, colour, seed, size=320).save(place)
    query = model.get_query_bundle(text, place)
    hits = ComposedRetriever(store, model, top_k=9).retrieve(query)
    result = Phi3VisionRerank("tiny", top_n=9, fusion_weight=FUSION).rerank(hits, query)
    ids = [hit.node.node_id for hit in hits]
    order = [ids.index(hit.node.node_id) for hit in result.nodes]
    images = [Image.open(hit.node.metadata["file_path"]).convert("RGB") for hit in hits]
    reason = str(result.nodes[0].node.metadata.get("rerank_reason", ""))
    figure = before_after(
        images,
        order,
        Image.open(place).convert("RGB"),
        title=f"“{text}”",
        caption=result.caption,
        reason=reason,
        cell=120,
    )
    figure.save(DOCS / "assets" / "composed.jpg", quality=80, optimize=True)
    first, now = (nodes[0].node.metadata["description"] for nodes in (hits, result.nodes))
    print(f"figure: first before {first!r}, after {now!r}")


if __name__ == "__main__":
    main()
