"""Text as tokenizers take it."""

from __future__ import annotations


def valid_unicode(text: str) -> str:
    """Return the text with "?" for each half of a surrogate pair, which no tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
