"""`tokenizer.json` from a file, and text as tokenizers take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mm_retriever.checkpoint import MAX_JSON_BYTES
from mm_retriever.errors import CheckpointError, reason_of

_PAIRS = (("mug", "dog"), ("кот", "дом"), ("猫", "鞋"), ("كلب", "قطة"))  # of one length, for tokenizers of any script


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


def check_words(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer of transformers that knows no words: it makes one where the files of the real one are missing.

    Args:
        tokenizer: of the model.
        name: of the model, for the error.

    Raises:
        CheckpointError: its vocabulary is empty but for control tokens, or is damaged.
    """
    try:
        ids = [[list(tokenizer(word)["input_ids"]) for word in pair] for pair in _PAIRS]
    except Exception as error:  # the library raises a bare Exception for a vocabulary that lacks its own tokens
        raise CheckpointError(
            f"the tokenizer of {name!r} does not work ({reason_of(error)}); are all of its files beside the weights?"
        ) from error
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if all(first == second for first, second in ids) and len(tokenizer.get_vocab().keys() - special) < 2:
        raise CheckpointError(
            f"the tokenizer of {name!r} knows no words, so that all texts would be one; is its tokenizer.json (or "
            "vocab.json and merges.txt) beside the weights?"
        )


def valid_unicode(text: str) -> str:
    """Return the text with "?" for each half of a surrogate pair, which no tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
