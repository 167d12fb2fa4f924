"""Rewrites errors of the library for the command line: options in place of Python's arguments."""

from __future__ import annotations

import re
from collections.abc import Callable

_KEYS = "--model-key, --rerank-key or --vision-key"
_FEWER = "rank fewer results (--top-k)"


def _option(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')} is "


_WORDS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r" \(\w+=True in Python\)", ""),
    (r"; ImagePolicy\(allow_urls=True\) turns it on", "; --allow-urls turns it on, in a command that has it"),
    (r" \(ImagePolicy\.\w+\)", ""),
    (r"prune=True needs a folder as the source", "--prune needs a folder"),
    (r"\b(prune|force|overwrite)=True", r"--\1"),
    (r"or with a base_url any model", "or with --rerank-url (mcp: --vision-url) any model"),
    (r"give its base_url", "give its URL"),
    (r"or the base_url of", "or the URL of"),
    (r"\b(device|dtype|revision|analyzer|backend|item)=", r"--\1 "),
    (r"^(learning_rate|batch_size|pass_size|epochs|negatives|seed) is (?=.*; give )", _option),
    (r"^(prompt|collection|split|device|host) '", r"--\1 '"),
    (r" \(Expected one of .*?\)", ""),
    (r"and needs a token;", "and needs a token (--http-token);"),
    (r"^the origin '", "--cors-origin '"),
    (r"^the token (is empty|needs|repeats)", r"--http-token: the token \1"),
    (r"""on_error="keep_order" goes on without it""", "without --rerank they stay in the order of retrieval"),
    (r"\brows_per_shard\b", "--rows-per-file"),
    (r"embed_to_shards makes them", "`mm-retriever embed` makes them"),
    (r"say with how many workers=", "say with how many --workers"),
    (r"name it with tokenizer=", "write the model with `mm-retriever convert --tokenizer`"),
    (r"use ingest_images, or open a Milvus server", "use `mm-retriever index`, or give a Milvus server as --db"),
    (r"give a key as api_key", f"give the key with {_KEYS}"),
    (r"give the api_key that the server expects", f"give the key that the server expects with {_KEYS}"),
    (r"that base_url ends", "that the address of the server ends"),
    (r"raise max_tokens, now \d+ with a base_url, or rank fewer candidates at a time \(window=\d+\)", _FEWER),
    (r", or lower (?:num_crops|sheet_crops)=.*", f", or {_FEWER}"),
    (r"\banalyzer '", "--analyzer '"),
    (r"the same hybrid=", "the same --hybrid"),
    (r"open_store\(\.\.\., hybrid=(True)?\)", "index FOLDER --db NEW.db --hybrid"),
    (r"\(hybrid=True\)", "(index --hybrid)"),
    (r"\bhybrid=True", "--hybrid"),
    (r"(give .*?) as hybrid=", r"\1 in Python, which the command line cannot"),
    (r"\bhybrid= ", "--hybrid "),
    (r"Give another collection name, or --overwrite to drop its rows and start anew", "Give another --collection"),
    (r"min_score goes with mode 'default':", "--min-score goes without --hybrid:"),
    (r"\bmin_score is", "--min-score is"),
)
_PATTERNS = tuple((re.compile(pattern), words) for pattern, words in _WORDS)


def in_cli_words(message: object) -> str:
    """Return a message with options in place of the Python arguments that they stand for."""
    text = str(message)
    for pattern, words in _PATTERNS:
        text = pattern.sub(words, text)
    return text
