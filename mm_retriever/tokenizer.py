"""`tokenizer.json` from a file, and text as tokenizers take it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from mm_retriever.checkpoint import MAX_JSON_BYTES
from mm_retriever.errors import CheckpointError


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer in a `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing, too large, or no tokenizer.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no tokenizer at {str(file)!r}; give the path of a tokenizer.json")
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise CheckpointError(f"{str(file)!r} has {size:,} bytes; more than {MAX_JSON_BYTES:,} is not read")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        raise CheckpointError(f"{str(file)!r} is not a tokenizer: {error}") from error


def valid_unicode(text: str) -> str:
    """Return the text with "?" for each half of a surrogate pair, which no tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
