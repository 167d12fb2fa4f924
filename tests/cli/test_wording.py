"""Errors of the library, in the words of the command line."""

from __future__ import annotations

import pytest

from mm_retriever.cli.wording import in_cli_words
from mm_retriever.devices import as_dtype
from mm_retriever.errors import ImageLoadError, MMRetrieverError
from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.rerank.registry import check_reranker


def test_arguments_of_python_become_options(tmp_path):
    """Truth: what the library says today; a change there that no longer fits shows here."""
    with pytest.raises(MMRetrieverError) as error:
        as_dtype("int4")
    assert in_cli_words(error.value).startswith("--dtype 'int4' is not one of")
    with pytest.raises(ImageLoadError) as error:
        load_image("http://example.org/a.png")
    assert in_cli_words(error.value).endswith(
        "fetching URLs is off; --allow-urls turns it on, in a command that has it"
    )
    (tmp_path / "a.png").write_bytes(b"x" * 9)
    with pytest.raises(ImageLoadError) as error:
        load_image(tmp_path / "a.png", policy=ImagePolicy(max_bytes=4))
    assert "ImagePolicy" not in in_cli_words(error.value)
    with pytest.raises(MMRetrieverError) as error:
        check_reranker("no-such-reranker")
    assert "base_url" not in in_cli_words(error.value)


def test_other_words_stay():
    assert in_cli_words("the column 'hybrid' of 'prune' is empty") == "the column 'hybrid' of 'prune' is empty"
