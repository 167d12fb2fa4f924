"""A drawn catalogue: products and theme images of known kind, pattern and colour, with Pillow and numpy alone.

The demo, the tests and the training of the bundled models use it where photographs would need a download.

    from mm_retriever.demo.catalogue import catalogue, draw_product, draw_theme, write_catalogue

    draw_product("phone case", "leopard", "natural", seed=7).save("case.png")
    written = write_catalogue("demo", count=900)
"""

from mm_retriever.demo.catalogue.captions import KINDS, Looks, caption
from mm_retriever.demo.catalogue.colours import COLOURS, NATURAL, PATTERNS, colours_of
from mm_retriever.demo.catalogue.drawing import draw_product, draw_theme
from mm_retriever.demo.catalogue.products import (
    HELD_OUT,
    Product,
    WrittenCatalogue,
    all_looks,
    catalogue,
    write_catalogue,
)

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "KINDS",
    "NATURAL",
    "PATTERNS",
    "Looks",
    "Product",
    "WrittenCatalogue",
    "all_looks",
    "caption",
    "catalogue",
    "colours_of",
    "draw_product",
    "draw_theme",
    "write_catalogue",
]
