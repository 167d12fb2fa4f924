"""Visualized BGE: a text, an image, or both into one vector (VISTA, arXiv:2406.04292)."""
