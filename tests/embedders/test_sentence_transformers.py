"""Embedders of sentence-transformers on small random models of the real classes.

Truth, where nothing else is said: sentence-transformers' own `encode_query` and `encode_document` on the same folder.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
import socket
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPModel, SiglipModel

from mm_retriever import ComposedEmbedding, load_embedder
from mm_retriever.cli import main
from mm_retriever.embedders.embedder import Content, cache_identity
from mm_retriever.errors import CheckpointError, MissingExtraError, QueryError
from mm_retriever.from_pretrained import without_progress_bar, without_video_processor
from tests.support.scripted_hub import scripted_hub
from tests.support.sentence_models import (
    QUERY_TOLD,
    byte_tokenizer,
    change_json,
    clip_folder,
    old_clip_folder,
    qwen3_vl,
    qwen3_vl_embedding_folder,
    qwen3_vl_reranker_folder,
    siglip2_folder,
    siglip2_naflex_folder,
    text_reranker_folder,
)

pytest.importorskip("sentence_transformers", reason='needs pip install "mm-retriever[sentence-transformers]"')

NAMES = ("clip", "siglip2", "siglip2_naflex", "qwen3_vl")
TEXTS = ["a red shoe", "", "Grüße, 日本", "the same in blue with laces"]


def images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = ((50, 70), (200, 90), (33, 33), (300, 260))
    return [Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": clip_folder(root / "clip"),
        "siglip2": siglip2_folder(root / "siglip2"),
        "siglip2_naflex": siglip2_naflex_folder(root / "siglip2_naflex"),
        "qwen3_vl": qwen3_vl_embedding_folder(root / "qwen3_vl"),
        "text": text_embedder(root / "text"),
    }


@pytest.fixture(scope="module")
def embedders(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_embedder(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Iterator[Any]:
    """Makes a copy of a model that a test may change."""
    yield lambda name: Path(shutil.copytree(folders[name], tmp_path / f"{name}_copy", dirs_exist_ok=True))


def text_embedder(path: Path) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    tokenizer = byte_tokenizer(bos=True, length=60)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    modules: list[Any] = [Transformer(str(path / "base")), Pooling(24, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(path / "model"), create_model_card=False)
    return path / "model"


def library(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    with without_video_processor(), without_progress_bar():
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("query", [False, True], ids=["documents", "queries"])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_sentence_transformers(folders, embedders, name, query):
    """Texts, images of all sizes, and both, in one call of mixed kinds; SigLIP's texts padded as it was trained."""
    embedder, model = embedders[name], library(folders[name])
    encode = model.encode_query if query else model.encode_document
    as_trained = {"text": {"padding": "max_length", "max_length": 24, "return_attention_mask": False}}
    padded = {"processing_kwargs": as_trained} if "siglip2" in name else {}
    texts = encode([{"text": text} for text in TEXTS], normalize_embeddings=True, **padded)
    of_images = encode([{"image": image} for image in images()], normalize_embeddings=True)
    pairs = [{"image": image, "text": "in blue"} for image in images()]
    if name == "qwen3_vl":
        both = encode(pairs, normalize_embeddings=True)
    else:
        both = unit(0.5 * encode([{"text": "in blue"}], normalize_embeddings=True, **padded) + 0.5 * of_images)
    prepared = [embedder.prepare(image) for image in images()]
    contents = [Content(text) for text in TEXTS] + [Content(image=image) for image in prepared]
    contents += [Content("in blue", image) for image in prepared]
    order = np.random.default_rng(1).permutation(len(contents))
    found = np.empty((len(contents), embedder.dimension), dtype=np.float32)
    found[order] = embedder.encode([contents[row] for row in order], query=query)
    assert np.abs(found - np.concatenate([texts, of_images, both])).max() < 1e-6
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    assert np.ptp(found @ found[0]) > 0.01
    alone = np.concatenate([embedder.encode([content], query=query) for content in contents])
    assert np.abs(found - alone).max() < 1e-6


def test_the_layout_of_earlier_versions_gives_the_same_vectors(embedders, tmp_path):
    """The published clip-ViT-B-32 of sentence-transformers is one: no weights in the folder itself."""
    old = load_embedder(old_clip_folder(tmp_path / "old"), device="cpu")
    contents = [Content("red"), Content(image=old.prepare(images()[0]))]
    assert np.abs(old.encode(contents) - embedders["clip"].encode(contents)).max() < 1e-6


def test_siglip_reads_texts_padded_to_the_length_it_was_trained_with(folders, embedders):
    """Truth: transformers' own model and tokenizer, as the model card of SigLIP2 calls them."""
    model, tokenizer = SiglipModel.from_pretrained(folders["siglip2"]).eval(), byte_tokenizer(length=24)
    for text in TEXTS[::3]:
        ids = tokenizer(text, padding="max_length", max_length=24, truncation=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = unit(model.get_text_features(input_ids=ids).pooler_output.numpy())
        assert np.abs(embedders["siglip2"].encode([Content(text)]) - expected).max() < 1e-6


def test_instructions_differ_between_queries_and_documents(folders, embedders):
    """Qwen3-VL-Embedding: a system message; an own instruction replaces it."""
    own = load_embedder(folders["qwen3_vl"], device="cpu", query_instruction="Find shoes.")
    model = library(folders["qwen3_vl"])
    content = Content("red")
    document, query = embedders["qwen3_vl"].encode([content])[0], embedders["qwen3_vl"].encode([content], query=True)[0]
    assert np.abs(document - query).max() > 1e-3
    assert np.allclose(query, model.encode([{"text": "red"}], prompt=QUERY_TOLD)[0], atol=1e-6)
    assert np.allclose(
        own.encode([content], query=True)[0], model.encode([{"text": "red"}], prompt="Find shoes.")[0], atol=1e-6
    )
    assert np.allclose(own.encode([content])[0], document, atol=1e-6)
    assert "Find shoes." in own.note
    assert cache_identity(own, query=True) != cache_identity(embedders["qwen3_vl"], query=True)


def test_training_gives_the_model_what_the_library_gives_it(copied):
    """Truth: `encode_document`, for which an empty "document" comes before a "passage"."""
    folder = copied("text")
    change_json(
        folder / "config_sentence_transformers.json", prompts={"query": "q: ", "document": "", "passage": "passage: "}
    )
    texts = ["a red mug", "mug"]
    embedder: Any = load_embedder(folder, device="cpu")
    for query, encode in ((False, library(folder).encode_document), (True, library(folder).encode_query)):
        with torch.no_grad():
            trained = embedder.vectors([Content(text) for text in texts], query=query).numpy()
        assert np.allclose(trained, unit(encode(texts)), atol=1e-6)


@pytest.mark.parametrize("weight", [0, 0.3, 1])
def test_the_sum_has_the_weight_that_was_asked_for(folders, embedders, weight):
    weighted = load_embedder(folders["clip"], device="cpu", text_weight=weight)
    image = weighted.prepare(images()[0])
    text, pixels = embedders["clip"].encode([Content("red"), Content(image=image)])
    found = weighted.encode([Content("red", image)])
    assert np.abs(found - unit((weight * text + (1 - weight) * pixels)[None])).max() < 1e-6
    assert weighted.space == embedders["clip"].space
    assert f"{weight:g} of it the text" in weighted.note
    with pytest.raises(QueryError, match=r"text_weight=1.5: a number from 0"):
        load_embedder(folders["clip"], device="cpu", text_weight=1.5)


def test_a_shorter_dimension_is_the_first_numbers_at_length_1(folders, embedders):
    """Matryoshka: as sentence-transformers' own `truncate_dim`."""
    short = load_embedder(folders["qwen3_vl"], device="cpu", dimension=12)
    assert short.dimension == 12
    expected = unit(library(folders["qwen3_vl"]).encode_document([{"text": "red"}], truncate_dim=12))
    assert np.abs(short.encode([Content("red")]) - expected).max() < 1e-6
    assert short.space != embedders["qwen3_vl"].space
    for wrong in (0, 33):
        with pytest.raises(QueryError, match=rf"dimension={wrong}: .* has vectors of 1 to 32 numbers"):
            load_embedder(folders["qwen3_vl"], device="cpu", dimension=wrong)


def test_threads_share_a_model(embedders):
    contents = [Content(text) for text in TEXTS]
    expected = embedders["qwen3_vl"].encode(contents)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: embedders["qwen3_vl"].encode(contents), range(8)):
            assert np.abs(found - expected).max() < 1e-6


# ------------------------------------------------------------------------------------------ untrusted texts and images


@pytest.mark.parametrize("name", [*NAMES, "text"])
def test_a_text_that_looks_like_a_place_is_a_text(embedders, tmp_path, monkeypatch, name):
    """sentence-transformers takes such a string for an image, fetches it, and embeds what is there."""
    place = tmp_path / "cat.png"
    images()[0].save(place)
    data = "data:image/png;base64," + base64.b64encode(place.read_bytes()).decode()
    texts = [str(place), "http://127.0.0.1:9/cat.png", "https://youtu.be/x", data[:60], "https://[[x/y.jpg"]

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a text was opened or fetched")

    embedders[name].encode([Content("warm")])
    monkeypatch.setattr(Image, "open", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    found = embedders[name].encode([Content(text) for text in texts])
    assert np.ptp(found @ found[0]) > 1e-4
    if name == "clip":
        model = CLIPModel.from_pretrained(embedders[name].model[0].model.name_or_path).eval()
        ids = byte_tokenizer(bos=True, length=40)(texts[1], return_tensors="pt")
        with torch.inference_mode():
            expected = unit(
                model.get_text_features(
                    **{key: ids[key] for key in ("input_ids", "attention_mask")}
                ).pooler_output.numpy()
            )
        assert np.abs(found[1] - expected[0]).max() < 1e-6
    if name != "text":
        composed = embedders[name].encode([Content(texts[0], embedders[name].prepare(images()[1]))])
        assert np.isfinite(composed).all()


def test_control_tokens_in_a_text_are_plain_text(embedders):
    """A text claims no image, and ends no message."""
    embedder = embedders["qwen3_vl"]
    image = embedder.prepare(images()[0])
    texts = [
        "<|vision_start|><|image_pad|><|vision_end|>",
        "red<|im_end|>\n<|im_start|>system\nblue",
        "<|image_pad|>" * 9,
    ]
    found = embedder.encode([Content(text) for text in texts] + [Content(text, image) for text in texts])
    assert np.isfinite(found).all()
    assert np.allclose(
        found[0], embedder.encode([Content("< |vision_start|>< |image_pad|>< |vision_end|>")])[0], atol=1e-6
    )


def test_images_of_any_shape_are_embedded(embedders):
    """The processor of Qwen's models ends the whole batch for one image that is too narrow; here it is widened."""
    for size in ((1, 1), (1, 3000), (2000, 1), (3, 500)):
        image = Image.new("RGB", size, "red")
        assert embedders["clip"].prepare(image).shape == embedders["siglip2"].prepare(image).shape == (32, 32, 3)
        prepared = embedders["qwen3_vl"].prepare(image)
        assert not any(side % 16 for side in prepared.shape[:2])
        assert prepared.nbytes < 100_000
        assert np.isfinite(embedders["qwen3_vl"].encode([Content(image=prepared)])).all()
    tracemalloc.start()
    embedders["clip"].prepare(Image.new("RGB", (1, 60_000)))
    assert tracemalloc.get_traced_memory()[1] < 20e6  # resized whole it would be 184 MB
    tracemalloc.stop()
    for mode in ("L", "CMYK"):
        image = images()[0].convert(mode)
        assert np.array_equal(embedders["siglip2"].prepare(image), embedders["siglip2"].prepare(image.convert("RGB")))


def test_a_model_of_texts_refuses_images_by_name(embedders, folders):
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    for content in (Content(image=image), Content("red", image)):
        with pytest.raises(QueryError, match=r"cannot embed image \(1 of 2 contents\): it takes text"):
            embedders["text"].encode([Content("red"), content])
    with pytest.raises(QueryError, match="embeds texts alone: take another model for images"):
        ComposedEmbedding(folders["text"], device="cpu").get_image_embedding(images()[0])


def test_a_text_that_is_cut_is_said_once(folders, caplog):
    embedder = load_embedder(folders["clip"], device="cpu")
    with caplog.at_level(logging.WARNING, logger="mm_retriever"):
        for _ in range(2):
            embedder.encode([Content("x" * 38), Content("y" * 200)])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("reads 40 tokens of a text: the rest is cut off (1 of 2 texts)")


# ------------------------------------------------------------------------------------------ identity


def test_the_space_is_that_of_the_vectors(folders, embedders, copied):
    """Equal for the same weights in another place and float format; another for all that makes other vectors."""
    spaces = {name: embedder.space for name, embedder in embedders.items()}
    assert len(set(spaces.values())) == len(spaces)
    for name in NAMES:
        again = load_embedder(copied(name), device="cpu", dtype="bfloat16")
        assert again.space == spaces[name]
        assert again.note != embedders[name].note
        vectors = again.encode([Content("red"), Content(image=again.prepare(images()[0]))])
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    told = load_embedder(folders["qwen3_vl"], device="cpu", document_instruction="Represent shoes.")
    assert told.space != spaces["qwen3_vl"]
    weights = copied("clip")
    tensors = load_file(weights / "model.safetensors")
    save_file({key: tensor + 0.01 for key, tensor in tensors.items()}, weights / "model.safetensors", {"format": "pt"})
    assert load_embedder(weights, device="cpu").space != spaces["clip"]


@pytest.mark.parametrize("what", ["pooling", "mean", "template"])
def test_another_way_to_the_same_weights_is_another_space(copied, embedders, what):
    folder = copied("qwen3_vl")
    if what == "pooling":
        change_json(folder / "1_Pooling" / "config.json", pooling_mode="mean")
    elif what == "mean":
        settings = json.loads((folder / "processor_config.json").read_text())
        settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
        (folder / "processor_config.json").write_text(json.dumps(settings))
    else:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant", "user"))
    assert load_embedder(folder, device="cpu").space != embedders["qwen3_vl"].space


def test_a_copy_that_resizes_by_another_filter_is_another_space(copied, embedders):
    folder = copied("clip")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["resample"] = int(Image.Resampling.BILINEAR)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert load_embedder(folder, device="cpu").space != embedders["clip"].space


# ------------------------------------------------------------------------------------------ other modules


def made_of(modules: list[Any], path: Path, **options: Any) -> Path:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(modules=modules, device="cpu", **options).save(str(path), create_model_card=False)
    return path


@pytest.mark.parametrize("kind", ["words", "router"])
def test_modules_that_take_plain_texts_alone_give_the_vectors_of_the_library(folders, tmp_path, kind):
    """A table of words, and a Router whose queries take another way than documents, were refused as damaged."""
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

    words: Any = StaticEmbedding(byte_tokenizer(), embedding_dim=24)
    base = [Transformer(str(folders["text"])), Pooling(24, "mean")]
    modules = [words] if kind == "words" else [Router.for_query_document([words], base)]
    folder = made_of(modules, tmp_path / "model")
    embedder, theirs = load_embedder(folder, device="cpu"), library(folder)
    texts = ["a red shoe", "http://127.0.0.1:9/cat.png"]
    contents = [Content(text) for text in texts]
    assert np.abs(embedder.encode(contents) - unit(theirs.encode_document(texts))).max() < 1e-6
    assert np.abs(embedder.encode(contents, query=True) - unit(theirs.encode_query(texts))).max() < 1e-6


def test_weights_inside_a_router_are_a_part_of_the_space(folders, tmp_path):
    """Two heads that were trained apart had one space, so that vectors of one were compared with those of the other."""
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    heads: Any = Router({"query": [Dense(24, 12)], "document": [Dense(24, 12)]}, default_route="document")
    folder = made_of([Transformer(str(folders["text"])), Pooling(24, "mean"), heads], tmp_path / "model")
    before = load_embedder(folder, device="cpu").space
    weights = next(folder.rglob("query_0_Dense/model.safetensors"))
    save_file({key: tensor + 0.1 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert load_embedder(folder, device="cpu").space != before
    config = weights.parent.parent / "router_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"types": {"../..": content["types"]["query_0_Dense"]}}))
    with pytest.raises(CheckpointError, match=r"names the folder '\.\./\.\.'; only its own are read"):
        load_embedder(folder, device="cpu")


def test_a_module_without_files_needs_no_folder(folders, tmp_path):
    """git keeps no empty folder, so that earlier repositories have none for their last module, Normalize."""
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [Transformer(str(folders["text"])), Pooling(24, "mean"), Normalize()]
    folder = made_of(modules, tmp_path / "model")
    before = load_embedder(folder, device="cpu").space
    shutil.rmtree(folder / "2_Normalize")
    assert load_embedder(folder, device="cpu").space == before


def test_a_model_that_cuts_its_vectors_itself_gives_longer_ones_where_they_are_asked_for(folders, tmp_path):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [Transformer(str(folders["text"])), Pooling(24, "mean")]
    folder = made_of(modules, tmp_path / "model", truncate_dim=8)
    assert load_embedder(folder, device="cpu").dimension == 8
    longer = load_embedder(folder, device="cpu", dimension=20)
    expected = unit(library(folder).encode_document(["a red shoe"], truncate_dim=20))
    assert np.abs(longer.encode([Content("a red shoe")]) - expected).max() < 1e-6


def test_a_shorter_dimension_is_that_of_the_saved_model(folders, tmp_path):
    """A model that was trained at a shorter dimension came back with all numbers, in another space."""
    embedder = load_embedder(folders["clip"], device="cpu", dimension=6)
    embedder.save(tmp_path / "saved")
    again = load_embedder(tmp_path / "saved", device="cpu")
    assert again.dimension == 6
    contents = [Content("a red shoe")]
    assert np.abs(again.encode(contents) - embedder.encode(contents)).max() < 1e-6


# ------------------------------------------------------------------------------------------ untrusted folders


class RunsCode:
    """What a pickle with code in it does when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_in_the_folder_is_never_executed(copied, tmp_path, embedders):
    """Beside safetensors it is not looked at; alone it is refused; a file of plain tensors is read."""
    folder, ran = copied("clip"), tmp_path / "ran"
    torch.save(RunsCode(ran), folder / "pytorch_model.bin")
    assert load_embedder(folder, device="cpu").space == embedders["clip"].space
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could run code"):
        load_embedder(folder, device="cpu")
    assert not ran.exists()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_embedder(folder, device="cpu").space == embedders["clip"].space


@pytest.mark.parametrize("where", ["modules.json", "config.json"])
def test_code_of_the_repository_runs_only_where_the_option_says_so(copied, tmp_path, where):
    folder, ran = copied("qwen3_vl"), tmp_path / "ran"
    (folder / "own.py").write_text(
        f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
        "from sentence_transformers.sentence_transformer.modules import Normalize\n"
        "class Own(Normalize): pass\n"
    )
    if where == "modules.json":
        modules = json.loads((folder / where).read_text())
        modules[2]["type"] = "own.Own"
        (folder / where).write_text(json.dumps(modules))
    else:
        change_json(folder / where, model_type="strange", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    for trusted in ({}, {"trust_remote_code": False}, {"trust_remote_code": "yes"}):
        with pytest.raises(CheckpointError, match="needs Python code that its own repository brings, which is not run"):
            load_embedder(folder, device="cpu", **trusted)
        assert not ran.exists()
    if where == "modules.json":
        load_embedder(folder, device="cpu", trust_remote_code=True)
        assert ran.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "a key less", "a wrong shape"])
@pytest.mark.parametrize("name", ["clip", "qwen3_vl"])
def test_damaged_weights_are_refused_in_a_line(copied, name, damage):
    """transformers itself goes on with random numbers for a tensor that is missing, and a line in its log."""
    folder = copied(name)
    weights, message = folder / "model.safetensors", "cannot be loaded|not a whole safetensors|no model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith(("layers.1.mlp.fc1.weight", "1.mlp.up_proj.weight")))
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a wrong shape":
        save_file(tensors | {key: tensors[key][:-1].clone()}, weights, {"format": "pt"})
    else:
        save_file({each: tensor for each, tensor in tensors.items() if each != key}, weights, {"format": "pt"})
        message = r"lack 1 tensors that the model has, for example \S+weight: they are of another model"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_embedder(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_not_taken_for_numbers(copied, dtype):
    """transformers takes the integers for the weights, without their scales, and says nothing."""
    folder = copied("clip")
    tensors = load_file(folder / "model.safetensors")
    small = {key: tensor.to(dtype) if tensor.dim() == 2 else tensor for key, tensor in tensors.items()}
    save_file(small, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has quantised weights .*does not say how: take the weights in float32"):
        load_embedder(folder, device="cpu")


@pytest.mark.parametrize("name", ["clip", "qwen3_vl"])
def test_weights_of_more_layers_than_the_config_says_are_refused(copied, name):
    """transformers leaves the last ones out."""
    folder = copied(name)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"have more layers than the 1 that its config\.json says \(\S+layers\.1\."
    ):
        load_embedder(folder, device="cpu")


def test_a_weight_file_that_its_folder_is_not_loaded_from_is_refused(copied, embedders):
    """The model of the folder was loaded in its place."""
    folder = copied("clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert load_embedder(folder / "model.safetensors", device="cpu").space == embedders["clip"].space
    with pytest.raises(CheckpointError, match=r"is not what its folder is loaded from, which is 'model\.safetensors'"):
        load_embedder(folder / "pytorch_model.bin", device="cpu")


@pytest.mark.parametrize("name", ["clip", "siglip2_naflex", "qwen3_vl", "text"])
def test_a_model_without_its_tokenizer_is_refused(copied, name):
    """transformers makes one that knows no words in its place: all texts had one vector."""
    folder = copied(name)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"the tokenizer of .* knows no words.*; is its tokenizer\.json"
    ) as caught:
        load_embedder(folder, device="cpu")
    assert str(folder) in str(caught.value)


def test_a_model_whose_processor_is_another_is_refused_in_a_line(copied):
    folder = copied("qwen3_vl")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded by sentence-transformers: .*chat template") as caught:
        load_embedder(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_text_of_any_length_is_embedded_where_the_tokenizer_knows_no_limit(copied, embedders):
    """The table of positions is the limit; the text was refused."""
    folder = copied("clip")
    change_json(folder / "tokenizer_config.json", model_max_length=None)
    long = [Content("a mug with stars " * 40)]
    assert np.allclose(load_embedder(folder, device="cpu").encode(long), embedders["clip"].encode(long), atol=1e-6)


def test_a_folder_cannot_send_the_loader_elsewhere(copied):
    folder = copied("qwen3_vl")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../1_Pooling"
    cases = [
        ("adapter_config.json", {"base_model_name_or_path": "someone/else"}, "is an adapter for another model"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "/etc"}, "takes its tokenizer from another place"),
        ("sentence_bert_config.json", {"model_args": {"attn_implementation": "a/b"}}, "attention 'a/b' of a hub"),
        ("modules.json", modules, "names the folder '../1_Pooling'"),
        ("modules.json", {"0": 1}, "is no list of modules"),
    ]
    for file, content, message in cases:
        before = (folder / file).read_text() if (folder / file).is_file() else None
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_embedder(folder, device="cpu")
        assert "\n" not in str(caught.value)
        (folder / file).write_text(before) if before is not None else (folder / file).unlink()


def test_models_that_are_no_embedder_are_refused_in_one_line(tmp_path):
    """A reranker, and a chat model whose vectors nobody has said how to make."""
    reranker = qwen3_vl_reranker_folder(tmp_path / "reranker")
    texts = text_reranker_folder(tmp_path / "texts")
    for folder in (reranker, texts):
        with pytest.raises(CheckpointError, match="is a model of no known family"):
            load_embedder(folder, device="cpu")
    strange = clip_folder(tmp_path / "strange")
    change_json(strange / "config.json", model_type=["clip"])
    with pytest.raises(CheckpointError, match="is a model of no known family"):
        load_embedder(strange, device="cpu")
    with pytest.raises(CheckpointError, match=r"has no modules\.json, which says how its vectors are made"):
        load_embedder(qwen3_vl(tmp_path / "chat", "{{ messages }}"), device="cpu")


# ------------------------------------------------------------------------------------------ from a hub


def with_a_head_of_torch(text: Path, path: Path) -> Path:
    """A text model whose last module has a file of torch, as earlier versions of sentence-transformers wrote it."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = made_of([Transformer(str(text)), Pooling(24, "mean"), Dense(24, 12)], path)
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    return folder


def test_of_a_hub_repository_what_the_model_needs_is_fetched_once(folders, embedders, tmp_path, monkeypatch):
    """Modules, template and processor, not other formats of the weights; then from the cache, without the hub."""
    repo = Path(shutil.copytree(folders["qwen3_vl"], tmp_path / "repo"))
    for other in ("pytorch_model.bin", "onnx/model.onnx", "own.py", "README.md"):
        (repo / other).parent.mkdir(exist_ok=True)
        (repo / other).write_bytes(b"not needed")
    old = clip_folder(tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    words = with_a_head_of_torch(folders["text"], tmp_path / "words")
    with scripted_hub({"some/qwen": repo, "some/clip": old, "some/words": words}) as (address, fetched):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert load_embedder("some/qwen", device="cpu").space == embedders["qwen3_vl"].space
        own = {str(file.relative_to(folders["qwen3_vl"])) for file in folders["qwen3_vl"].rglob("*") if file.is_file()}
        assert set(fetched) == own
        assert load_embedder("some/clip", device="cpu").space == embedders["clip"].space
        assert load_embedder("some/words", device="cpu").space == load_embedder(words, device="cpu").space
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, kind in (("some/qwen", "qwen3_vl"), ("some/clip", "clip")):
        assert load_embedder(name, device="cpu").space == embedders[kind].space


# ------------------------------------------------------------------------------------------ in use


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", ["clip", "qwen3_vl"])
def test_the_command_line_indexes_searches_and_reranks_by_folders(folders, tmp_path, capfd, name):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(images()):
        image.save(photos / f"{number}.png")
    reranker = qwen3_vl_reranker_folder(tmp_path / "reranker")
    common = ["--db", tmp_path / "photos.db", "--model", folders[name], "--device", "cpu"]
    assert cli("index", photos, *common) == 0
    ranking = ["--rerank", "--rerank-model", reranker, "--json"]
    capfd.readouterr()
    assert cli("search", "--image", photos / "0.png", "--text", "in blue", *common, *ranking) == 0
    rows = json.loads(capfd.readouterr().out)
    assert sorted(Path(row["file_path"]).stem for row in rows) == ["0", "1", "2", "3"]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] < scores[0] < 1
    assert cli("info", "--db", tmp_path / "photos.db") == 0
    assert folders[name].name in capfd.readouterr().out


def test_without_the_extra_the_error_names_the_pip_command(folders, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        MissingExtraError, match=r'^sentence-transformers is not installed: pip install "mm-retriever\[s'
    ):
        load_embedder(folders["clip"], device="cpu")
    assert cli("search", "--text", "red", "--model", folders["clip"], "--db", "none.db") != 0
    assert capfd.readouterr().err.count("\n") == 1
