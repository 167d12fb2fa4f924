"""Embedding models: one module or folder for each family; nothing else of the package knows their names."""
