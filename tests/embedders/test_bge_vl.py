"""BGE-VL against the outputs of its authors' code, and which CLIPs are taken for one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel

from mm_retriever.checkpoint import ModelFiles, fingerprint
from mm_retriever.embedders import bge_vl
from mm_retriever.embedders.bge_vl.encoder import BGEVLEncoder
from mm_retriever.embedders.clip import clip_config, fill_positions
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.errors import CheckpointError
from tests.support.clip_golden import DATA, IMAGES, clip_weight, distance, golden
from tests.support.small_models import bge_vl as small_bge_vl
from tests.support.small_models import clip_words

TOLERANCE = 2e-6
TEXTS = ("white with", "mug", "and the mystery unused0")  # what the small tokenizer writes as the golden ids


class OfPixels(BGEVLEncoder):
    """Takes the normalised pixels that the golden file has."""

    def pixel_values(self, images: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack(images))


def filled(name: str) -> CLIPModel:
    """Weights by name, in the shape of a golden."""
    original = json.loads((DATA / "bge_vl" / f"{name}_config.json").read_text())
    sides = {"text_config": original["text"], "vision_config": original["vision"]}
    config = clip_config({"projection_dim": original["projection_dim"], **sides}, "")
    with torch.device("meta"):
        model = CLIPModel(config)
    state = {key: clip_weight(key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    fill_positions(model, torch.device("cpu"))
    return model.eval()


@pytest.fixture(scope="module")
def tiny() -> OfPixels:
    model = filled("tiny")
    return OfPixels(model, clip_words(97), name="tiny", family="bge-vl", fingerprint=fingerprint(model.state_dict()))


def test_vectors_equal_the_original(tiny: OfPixels) -> None:
    """Golden vectors: single, in a padded batch, and composed of features that are not normalised."""
    theirs = golden("bge_vl", "tiny_outputs")
    for row, text in enumerate(TEXTS):
        assert tiny.token_ids([text]) == [theirs[f"ids/{row}"].tolist()]
        assert distance(tiny.encode([Content(text)])[0], theirs[f"text/{row}"]) < TOLERANCE
    assert distance(tiny.encode([Content(text) for text in TEXTS]), theirs["text_batch"]) < TOLERANCE
    pixels = [theirs["pixels/rand0"], theirs["pixels/rand1"]]
    for row in range(2):
        assert distance(tiny.encode([Content(image=pixels[row])])[0], theirs[f"image/rand{row}"]) < TOLERANCE
    pairs = [Content(text, image) for text, image in zip(TEXTS[:2], pixels, strict=True)]
    assert distance(tiny.encode(pairs), theirs["composed_batch"]) < TOLERANCE


def test_every_stage_equals_the_original(tiny: OfPixels) -> None:
    """Golden tensors of an image alone, and of another with a text, in full width."""
    theirs, seen = golden("bge_vl", "tiny_outputs"), {}
    clip: Any = tiny.clip

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, __, out: seen.update({name: out[0]}))

    hooks = [
        watch("vision/embeddings", clip.vision_model.embeddings),
        watch("vision/pre_layrnorm", clip.vision_model.pre_layrnorm),
        *(watch(f"vision/layer{n}", layer) for n, layer in enumerate(clip.vision_model.encoder.layers)),
        watch("visual_projection", clip.visual_projection),
        watch("text/embeddings", clip.text_model.embeddings),
        *(watch(f"text/layer{n}", layer) for n, layer in enumerate(clip.text_model.encoder.layers)),
        watch("text/final_layer_norm", clip.text_model.final_layer_norm),
        watch("text_projection", clip.text_projection),
    ]
    tiny.encode([Content(image=theirs["pixels/rand1"])])
    ours_by_name = {f"{name}@image0": ours for name, ours in seen.items()}  # as the golden file calls that run
    seen.clear()
    tiny.encode([Content(TEXTS[0], theirs["pixels/rand0"])])
    ours_by_name |= seen
    for hook in hooks:
        hook.remove()
    assert {key.removeprefix("dbg/") for key in theirs if key.startswith("dbg/")} == set(ours_by_name)
    for name, ours in ours_by_name.items():
        expected = theirs[f"dbg/{name}"]
        expected = expected[: len(ours)] if name.startswith("text/") else expected  # theirs goes on with padding
        assert distance(ours, expected) < TOLERANCE * max(1.0, float(np.abs(expected).max())), name


@pytest.mark.slow
def test_full_size_equals_the_original() -> None:
    """Golden vectors of the base architecture, from image files on."""
    theirs = golden("bge_vl", "base_outputs")
    model = filled("base")
    words = clip_words(49408)
    encoder = BGEVLEncoder(model, words, name="base", family="bge-vl", fingerprint="")
    names = [key.removeprefix("image/") for key in theirs if key.startswith("image/")]
    squares = [encoder.prepare(Image.open(IMAGES / name)) for name in names]
    for name, square in zip(names, squares, strict=True):
        assert distance(encoder.encode([Content(image=square)])[0], theirs[f"image/{name}"]) < TOLERANCE
    texts = [" ".join(words.id_to_token(number) for number in theirs[f"ids/{row}"][1:-1]) for row in range(3)]
    assert [encoder.token_ids([text])[0] for text in texts] == [theirs[f"ids/{row}"].tolist() for row in range(3)]
    assert distance(encoder.encode([Content(text) for text in texts]), theirs["text_batch"]) < TOLERANCE
    # the original composes an empty text too; here "" is no text, and a blank one has no words
    pairs = [Content(text or " ", square) for text, square in zip(texts, squares, strict=True)]
    assert distance(encoder.encode(pairs), theirs["composed_batch"]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("01_rgb_landscape_640x480.jpg", "32a1ff0963760c0afd3e0691bd382d4dbb1c31e5fca38ac142f811c851d8deab"),
        ("02_rgb_portrait_300x500.png", "5079a9c304b0eeaae7d9e7273cb09ecd575be5d0953166fc1deddb364f1cc5a7"),
    ],
)
def test_preprocessing_equals_the_original_bit_for_bit(tiny: OfPixels, name: str, sha256: str) -> None:
    """Checksums of the original's preprocessed float32 tensors."""
    square = BGEVLEncoder.prepare(of_side(tiny, 224), Image.open(IMAGES / name))
    assert square.dtype == np.uint8
    pixels = BGEVLEncoder.pixel_values(tiny, [square])[0]
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == sha256


def of_side(encoder: OfPixels, side: int) -> OfPixels:
    other = OfPixels(encoder.clip, encoder.tokenizer, name="", family="", fingerprint="")
    other.side = side
    return other


@pytest.mark.parametrize(("mode", "size"), [("RGB", (301, 97)), ("L", (97, 302)), ("CMYK", (131, 77)), ("RGB", (9, 9))])
def test_preprocessing_equals_transformers_own(tiny: OfPixels, mode: str, size: tuple[int, int]) -> None:
    """CLIPImageProcessorPil as the published preprocessor_config.json sets it up, at another size."""
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0] if mode == "L" else noise, mode)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)(image, return_tensors="np")
    ours = BGEVLEncoder.pixel_values(tiny, [tiny.prepare(image)])
    assert np.abs(ours.numpy() - theirs["pixel_values"]).max() < 1e-6


def test_an_empty_text_is_no_text_beside_an_image(tiny: OfPixels) -> None:
    """Our choice: an image alone is what "" says everywhere in this package."""
    pixels = golden("bge_vl", "tiny_outputs")["pixels/rand0"]
    assert np.array_equal(tiny.encode([Content("", pixels)]), tiny.encode([Content(image=pixels)]))


def test_a_long_text_is_cut_before_its_end_and_said_so_once(tiny: OfPixels, caplog: pytest.LogCaptureFixture) -> None:
    """The original crashes on it. The model has room for 19 tokens, its start and end among them."""
    with caplog.at_level(logging.WARNING):
        (ids,) = tiny.token_ids(["mug " * 40])
        tiny.token_ids(["mug " * 50])
    assert ids == [95, *[5] * 17, 96]
    assert [record.getMessage() for record in caplog.records] == [
        "tiny reads the first 19 tokens of a text: one of 42 was cut, as will be all such texts"
    ]
    assert np.array_equal(tiny.encode([Content("mug " * 40)]), tiny.encode([Content("mug " * 17)]))


@pytest.mark.parametrize(
    ("config", "folder", "is_one"),
    [
        ({"model_type": "clip", "auto_map": {"AutoModel": "modeling_MMRet_CLIP.CLIPModel"}}, "weights", True),
        ({"model_type": "clip", "_name_or_path": "./final_model/MMRet-base"}, "weights", True),
        ({"model_type": "clip", "composed_as": "bge-vl"}, "weights", True),
        ({"model_type": "clip"}, "BGE-VL-base-finetuned", True),
        ({"model_type": "clip"}, "clip-vit-base-patch16", False),
        ({"model_type": "clip", "_name_or_path": "openai/clip-vit-base-patch16"}, "weights", False),
        ({"model_type": "llava_next"}, "BGE-VL-MLLM-S1", False),
    ],
)
def test_only_a_clip_that_says_so_is_a_bge_vl(
    tmp_path: Path, config: dict[str, Any], folder: str, is_one: bool
) -> None:
    """Configs as published by BAAI and OpenAI. A plain CLIP's features are not made to be added."""
    place = tmp_path / folder
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    files = ModelFiles(name=str(place), weights=place / "model.safetensors", config=place / "config.json")
    assert bge_vl.recognises(files) == is_one


def test_files_of_older_transformers_load_too(tmp_path: Path) -> None:
    """They hold tables of positions, and the shape under a second key that wins."""
    with small_bge_vl(tmp_path, 0) as small:
        expected = load_embedder(small.name, device="cpu")
        state = dict(load_embedder(small.name, device="cpu").clip.state_dict())  # type: ignore[attr-defined]
        state["text_model.embeddings.position_ids"] = torch.arange(19)[None]
        save_file(state, tmp_path / "model.safetensors")
        content = json.loads((tmp_path / "config.json").read_text())
        content["text_config_dict"], content["text_config"] = content["text_config"], {"hidden_size": 512}
        (tmp_path / "config.json").write_text(json.dumps(content))
        again = load_embedder(small.name, device="cpu")
    assert again.space == expected.space
    assert np.array_equal(again.encode([Content("red")]), expected.encode([Content("red")]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"projection_dim": 0}, "projection_dim 0 is not between 1"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers 1000000000"),
        ({"vision_config": []}, "weights|describes|does not fit"),
        ({"text_config": "a"}, "text_config is 'a', expected an object"),
        ({"text_config": {"hidden_size": 48, "num_attention_heads": 7}}, "does not describe a CLIP model"),
        ({"text_config": {"hidden_act": "no such"}}, "describes no model"),
    ],
)
def test_impossible_configs_are_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    """Our choice: a config is untrusted, and is checked before anything is built."""
    with small_bge_vl(tmp_path, 0) as small:
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | edit))
        with pytest.raises(CheckpointError, match=message) as refused:
            load_embedder(small.name, device="cpu")
    assert len(str(refused.value).splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Silently wrong ids are the worst outcome."""
    with small_bge_vl(tmp_path, 0) as small:
        clip_words(91).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(CheckpointError, match="91 entries, the model 90"):
            load_embedder(small.name, device="cpu")
        tokenizer = clip_words(90)
        tokenizer.post_processor = None
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(CheckpointError, match="needs a start and an end"):
            load_embedder(small.name, device="cpu")
