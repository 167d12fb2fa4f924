"""Errors of the library in the words of the command line: options in place of Python's arguments."""

from __future__ import annotations

import re

_WORDS = (
    (r" \(\w+=True in Python\)", ""),
    (r"; ImagePolicy\(allow_urls=True\) turns it on", "; --allow-urls turns it on, in a command that has it"),
    (r" \(ImagePolicy\.\w+\)", ""),
    (r"prune=True needs a folder as the source", "--prune needs a folder"),
    (r"\b(prune|force|overwrite)=True", r"--\1"),
    (r"or with a base_url any model", "or with --rerank-url any model"),
    (r"give its base_url", "give its URL"),
    (r"or the base_url of", "or the URL of"),
    (r"\b(device|dtype|revision|analyzer)=", r"--\1 "),
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
    """Return a message in which every argument of Python that an option stands for is that option."""
    text = str(message)
    for pattern, words in _PATTERNS:
        text = pattern.sub(words, text)
    return text
