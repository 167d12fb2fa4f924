"""Errors of the library, in the words of the command line."""

from __future__ import annotations

import pytest

from mm_retriever.bulk.plan import read_plan
from mm_retriever.cli.wording import in_cli_words
from mm_retriever.devices import as_device, as_dtype
from mm_retriever.embedders.backends import load_with
from mm_retriever.errors import ImageLoadError, MMRetrieverError
from mm_retriever.evaluation.datasets.evaluation_set import EvaluationQuery
from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.rerank.llm_requests import WITHOUT_IT
from mm_retriever.rerank.registry import check_reranker
from mm_retriever.servers.failures import advice
from mm_retriever.store.schema import check_options
from mm_retriever.training import Recipe
from tests.support.command_line import run


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


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (lambda: Recipe(learning_rate=-1), "--learning-rate is -1; give a number above 0"),
        (lambda: Recipe(batch_size=1), "--batch-size is 1; give a whole number from 2"),
        (lambda: read_plan("no-such-folder"), "`mm-retriever embed` makes them"),
        (lambda: check_options("a-b", None, "auto", None), "--collection 'a-b': use up to 255"),
        (lambda: EvaluationQuery("1", {"text": "red"}).asked("{other}"), "--prompt '{other}': no words for"),
        (
            lambda: load_with("onnx", lambda *_: None, dtype=None, device=None, calibration=None),
            "--backend 'onnx' is not one of",
        ),
        (lambda: as_device("gpu"), "--device 'gpu' cannot be used here; this machine has"),
    ],
)
def test_what_a_command_refuses_is_said_with_its_option(fails, says):
    with pytest.raises(MMRetrieverError) as error:
        fails()
    assert says in in_cli_words(error.value)


def test_a_reranker_without_an_answer_is_done_without():
    told = in_cli_words(f"'m' gave no answer in 3 requests; {advice(ConnectionError(), WITHOUT_IT)}")
    assert told.endswith("without --rerank they stay in the order of retrieval")


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "--host '0.0.0.0' can be reached by other machines, and needs a token (--http-token)"),
        ("short", "--http-token: the token needs at least"),
    ],
)
def test_a_server_for_others_is_refused_with_its_options(token, says):
    check_access = pytest.importorskip("mcp_server_mm_retriever", reason='needs the extra "mcp"').check_access
    with pytest.raises(MMRetrieverError) as error:
        check_access("0.0.0.0", token)
    assert in_cli_words(error.value).startswith(says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--host", "0.0.0.0"), "--host, --port and --cors-origin need --http"),
        (("--cors-origin", "https://a.example"), "--host, --port and --cors-origin need --http"),
        (("--http", "--cors-origin", "a.example"), "--cors-origin 'a.example' is no web page's"),
        (("--http", "--cors-origin", "https://a.example/page"), "--cors-origin 'https://a.example/page' is no"),
    ],
)
def test_no_option_of_a_server_is_ignored(given, says, capfd):
    """Our choice: what would have no effect is refused before a store or a model is opened."""
    pytest.importorskip("mcp_server_mm_retriever", reason='needs the extra "mcp"')
    code, _, err = run(capfd, "mcp", *given)
    assert code == 2
    assert says in err


def test_usage_errors_say_where_help_is(capfd):
    code, _, err = run(capfd, "index", "photos", "--bd", "a.db")
    assert code == 2
    assert "No such option: --bd" in err
    assert err.endswith("`mm-retriever index --help` says what it takes\n")


def test_other_words_stay():
    assert in_cli_words("the column 'hybrid' of 'prune' is empty") == "the column 'hybrid' of 'prune' is empty"


def test_no_arguments_show_the_help_and_no_empty_error(capfd):
    code, out, err = run(capfd)
    assert (code, "Usage: mm-retriever" in out + err, "says what it takes" in err) == (2, True, False)
