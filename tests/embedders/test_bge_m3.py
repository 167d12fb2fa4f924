"""BGE-M3's learned sparse vectors, by FlagEmbedding, on a small random checkpoint of the real architecture.

The published weights cannot be had here: what is tested is that the right numbers of the real code arrive in the right
places, not how good they are.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llama_index.core import QueryBundle
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from transformers import (
    XLMRobertaConfig,
    XLMRobertaModel,
)

from mm_retriever import ComposedRetriever, ingest_images, open_store
from mm_retriever.embedders.bge_m3 import BGEM3SparseEmbedding
from mm_retriever.errors import CheckpointError, MissingExtraError, ModelNotFoundError, StoreMismatchError
from tests.support.colour_embedding import ColourEmbedding, paint
from tests.support.flag_small import SIZES, word_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("FlagEmbedding") is None, reason='needs pip install "mm-retriever[hybrid]"'
)


def sparse_checkpoint(folder: Path, seed: int) -> Path:
    """BGE-M3's files: an XLM-RoBERTa and two linear heads. The head is near 1 everywhere, so that all words count."""
    torch.manual_seed(seed)
    XLMRobertaModel(XLMRobertaConfig(**SIZES)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    head = torch.nn.Linear(24, 1)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.ones_(head.bias)
    torch.save(head.state_dict(), folder / "sparse_linear.pt")
    torch.save(torch.nn.Linear(24, 24).state_dict(), folder / "colbert_linear.pt")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("m3"), seed=3)


@pytest.fixture(scope="module")
def sparse(folder: Path) -> BGEM3SparseEmbedding:
    return BGEM3SparseEmbedding(folder, device="cpu", batch_size=2)


def test_weights_are_the_head_over_the_last_hidden_states(folder, sparse):
    """Truth: the BGE-M3 paper's formula, relu(w h + b), greatest over a token's places, by transformers alone."""
    texts = ["spare lid XK-2041", "lid orders lid", "", "unheard of"]
    model, tokenizer = XLMRobertaModel.from_pretrained(folder).eval(), word_tokenizer()
    head = torch.load(folder / "sparse_linear.pt", weights_only=True)
    for text, found in zip(texts, sparse.encode_documents(texts), strict=True):
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**ids).last_hidden_state[0]
        weights = torch.relu(hidden @ head["weight"][0] + head["bias"]).tolist()
        expected: dict[int, float] = {}
        for token, weight in zip(ids["input_ids"][0].tolist(), weights, strict=True):
            if token > 3:  # not <s>, <pad>, </s>, <unk>
                expected[token] = max(weight, expected.get(token, 0.0))
        assert found == pytest.approx(expected, abs=1e-5)
    assert sparse.encode_documents(texts)[2:] == [{}, {}]


def test_the_name_is_that_of_the_weights(folder, sparse, tmp_path):
    assert BGEM3SparseEmbedding(folder, device="cpu").model_id == sparse.model_id
    other = sparse_checkpoint(tmp_path / folder.name, seed=4)
    assert BGEM3SparseEmbedding(other, device="cpu").model_id != sparse.model_id


def test_a_model_goes_to_other_processes_as_its_options(sparse):
    """Workers of a Ray cluster load the weights themselves."""
    carried = pickle.dumps(sparse)
    assert len(carried) < 1000
    again = pickle.loads(carried)
    assert again.model_id == sparse.model_id
    assert again.encode_queries(["xk-2041 lid"]) == sparse.encode_queries(["xk-2041 lid"])


def test_texts_may_be_encoded_by_many_threads_and_nothing_is_printed(sparse, capfd):
    texts = ["spare lid", "orders", "XK-2042", "shop red lid"]
    expected = sparse.encode_documents(texts)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: sparse.encode_queries(texts), range(8)):
            for one, other in zip(found, expected, strict=True):
                assert one == pytest.approx(other, abs=1e-5)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_without_the_head_is_refused(folder, tmp_path):
    """FlagEmbedding itself goes on with a random head and says nothing."""
    XLMRobertaModel.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has no sparse_linear\.pt"):
        BGEM3SparseEmbedding(tmp_path / "plain", device="cpu")
    with pytest.raises(ModelNotFoundError, match="cannot be downloaded from the hub"):
        BGEM3SparseEmbedding(tmp_path / "nowhere" / "at all")


# ------------------------------------------------------------------------------------------ in the store


class RunsCode:
    """What a pickle with code in it does when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    ("content", "state"),
    [(None, "is not installed"), ("import no_more", r"does not load \(No module named 'no_more'\)")],
)
def test_a_library_that_is_missing_and_one_that_does_not_load_are_told_apart(
    folder, tmp_path, monkeypatch, content, state
):
    if content is None:
        monkeypatch.setitem(sys.modules, "FlagEmbedding", None)
    else:
        monkeypatch.delitem(sys.modules, "FlagEmbedding", raising=False)
        (tmp_path / "FlagEmbedding.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=rf'^FlagEmbedding {state}: pip install "mm-retriever\[hybrid\]"$'):
        BGEM3SparseEmbedding(folder)


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt", "pytorch_model.bin", "code.py"])
def test_no_file_of_a_checkpoint_runs_code(tmp_path, name):
    """Pickles with code, and Python files that a config asks for: FlagEmbedding reads neither for us."""
    folder, ran = sparse_checkpoint(tmp_path / "m3", seed=5), tmp_path / "ran"
    if name == "code.py":
        (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Config: pass\n")
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "model.safetensors").unlink() if name == "pytorch_model.bin" else None
        torch.save(RunsCode(ran), folder / name)
    with pytest.raises((CheckpointError, pickle.UnpicklingError, ValueError)):
        BGEM3SparseEmbedding(folder, device="cpu")
    assert not ran.exists()


def test_learned_weights_find_exact_words_among_images(tmp_path, sparse):
    """Texts, and images without any word, whose sparse vectors are empty."""
    colours = ColourEmbedding()
    paint(tmp_path / "red.png", "red")
    paint(tmp_path / "blue.png", "blue")
    with open_store(tmp_path / "a.db", colours, hybrid=sparse) as store:
        ingest_images(
            [
                tmp_path / "red.png",
                tmp_path / "blue.png",
                TextNode(id_="41", text="spare lid XK-2041", metadata={"year": 1}),
                TextNode(id_="42", text="spare lid XK-2042", metadata={"year": 2}),
            ],
            store, colours, show_progress=False,
        )  # fmt: skip
        retriever = ComposedRetriever(store, colours, top_k=4, mode="hybrid")
        assert retriever.retrieve("2042")[0].node.node_id == "42"
        assert retriever.retrieve("red")[0].node.metadata["file_name"] == "red.png"
        assert len(retriever.retrieve(QueryBundle("", image_path=str(tmp_path / "blue.png")))) == 4
        assert len(retriever.retrieve("unheard of")) == 4
        first = MetadataFilters(filters=[MetadataFilter(key="year", value=1)])
        found = ComposedRetriever(store, colours, filters=first, mode="hybrid").retrieve("lid XK-2042")
        assert [one.node.node_id for one in found] == ["41"]
        store.add([TextNode(id_="41", text="orders", embedding=[1.0] + [0.0] * 26)])
        assert retriever.retrieve("orders")[0].node.node_id == "41"
        store.clear()
        assert store.hybrid


def test_a_collection_of_learned_weights_is_for_that_model_only(tmp_path, sparse):
    colours = ColourEmbedding()
    open_store(tmp_path / "a.db", colours, hybrid=sparse).close()
    with open_store(tmp_path / "a.db", colours, hybrid=sparse) as again:
        assert again.hybrid
    other = SimpleNamespace(model_id="another")
    for hybrid, reason in ((False, "give that model"), (True, "give that model"), (other, "hybrid= is 'another'")):
        with pytest.raises(StoreMismatchError, match=reason):
            open_store(tmp_path / "a.db", colours, hybrid=hybrid)
    open_store(tmp_path / "b.db", colours, hybrid=True).close()
    with pytest.raises(StoreMismatchError, match="indexes words by BM25, hybrid= is the model"):
        open_store(tmp_path / "b.db", colours, hybrid=sparse)
