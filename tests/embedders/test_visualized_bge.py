"""Visualized BGE against the original's outputs, and what any implementation of it must keep to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEProcessor, crop_square
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig
from mm_retriever.errors import CheckpointError
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD
from tests.support.golden import DATA, TOLERANCE, fill, golden, golden_config, small_config, small_model, word_tokenizer
from tests.support.memory import peak_growth


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def distance(ours: Tensor, theirs: Any) -> float:
    return float((ours.double() - torch.as_tensor(np.asarray(theirs)).double()).abs().max())


def stages(model: VisualizedBGE, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """What passes every stage of one image-and-text pair, under the golden file's names."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, *, arriving: bool = False) -> Any:
        if arriving:
            return module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0][0]}))
        return module.register_forward_hook(lambda _, __, out: seen.update({name: out[0]}))

    visual: Any = model.model_visual["visual"]
    encoder: Any = model.bge_encoder
    hooks = [
        watch("patch_embed", visual.patch_embed),
        watch("vis_input", visual.blocks[0], arriving=True),
        watch("vis_block0_attn", visual.blocks[0].attn),
        watch("vis_block0_mlp", visual.blocks[0].mlp),
        watch("vis_block0", visual.blocks[0]),
        watch("vis_block1", visual.blocks[1]),
        watch("img_token_embedding", visual),
        watch("visual_proj", model.visual_proj),
        watch("mm_encoder_input", encoder, arriving=True),
        watch("mm_layer0", encoder.layer[0].output),
        watch("mm_encoder_output", encoder.layer[-1].output),
    ]
    model.encode_multimodal(pixel_values[None], input_ids[None])
    for hook in hooks:
        hook.remove()
    hooks = [watch("text_embeddings", encoder, arriving=True), watch("text_encoder_output", encoder.layer[-1].output)]
    model.encode_text(input_ids[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["tiny", "tiny_m3"])
def test_every_stage_equals_the_original(name: str) -> None:
    """Golden tensors in full width, BERT and XLM-RoBERTa text sides."""
    theirs = golden(name)
    model = fill(VisualizedBGE(golden_config(name)))
    ours = stages(model, torch.from_numpy(theirs["pixels/rand0"]), torch.from_numpy(theirs["ids/1"]))
    names = [key.removeprefix("dbg/") for key in theirs if key.startswith("dbg/") and "last4" not in key]
    assert set(names) == set(ours)
    for stage in names:
        expected = theirs[f"dbg/{stage}"]
        # the last layer computes [CLS] only
        got = ours[stage] if len(ours[stage]) == len(expected) else ours[stage][:1]
        assert distance(got, expected[: len(got)]) < TOLERANCE * max(1.0, float(np.abs(expected).max())), stage


@pytest.mark.parametrize("name", ["tiny", "tiny_m3"])
def test_vectors_of_images_texts_and_pairs_equal_the_original(name: str) -> None:
    """Golden vectors, alone and in padded batches; also against the original run in float64."""
    theirs = golden(name)
    model = fill(VisualizedBGE(golden_config(name)))
    tensor = {key: torch.from_numpy(value) for key, value in theirs.items() if value.dtype.kind in "fi"}
    pixels = torch.stack([tensor[f"pixels/{image_name}"] for image_name in theirs["image_names"]])
    batches = {
        "image_batch": model.encode_image(pixels),
        "text_batch": model.encode_text(tensor["ids_batch"], tensor["mask_batch"]),
        "mm_batch": model.encode_multimodal(pixels[:3], tensor["mm_ids_batch"], tensor["mm_mask_batch"]),
    }
    for key, ours in batches.items():
        assert distance(ours, theirs[key]) < TOLERANCE
        assert distance(ours, theirs[f"f64/{key}"]) < TOLERANCE
    for row, image_name in enumerate(theirs["image_names"]):
        assert distance(model.encode_image(pixels[row : row + 1])[0], theirs[f"image/{image_name}"]) < TOLERANCE
    for row in range(3):
        ids = tensor[f"ids/{row}"][None]
        assert distance(model.encode_text(ids)[0], theirs[f"text/{row}"]) < TOLERANCE
        assert distance(model.encode_multimodal(pixels[row : row + 1], ids)[0], theirs[f"mm/{row}"]) < TOLERANCE


@pytest.fixture(scope="module")
def base() -> VisualizedBGE:
    """EVA02-CLIP-B-16 and bge-base-en-v1.5 at full size, weights by name: some ten seconds."""
    with torch.device("meta"):
        model = VisualizedBGE(VisualizedBGEConfig())
    model.to_empty(device="cpu")
    model.model_visual["visual"].rope.__init__(model.config.vision_shape)  # type: ignore[misc]
    return fill(model)


@pytest.fixture(scope="module")
def base_pixels() -> dict[str, Tensor]:
    config = VisualizedBGEConfig()
    processor = VisualizedBGEProcessor(config, word_tokenizer(config, []))
    names = [key.removeprefix("image/") for key in golden("base") if key.startswith("image/")]
    pixels = processor.pixel_values([Image.open(DATA / name) for name in names])
    return dict(zip(names, pixels, strict=True))


@pytest.mark.slow
def test_full_size_equals_the_original(base: VisualizedBGE, base_pixels: dict[str, Tensor]) -> None:
    """Golden vectors and stages of the base architecture, from image files on."""
    theirs = golden("base")
    for name, pixels in base_pixels.items():
        assert distance(base.encode_image(pixels[None])[0], theirs[f"image/{name}"]) < TOLERANCE
    for row in range(2):
        ids = torch.from_numpy(theirs[f"ids/{row}"])[None]
        assert distance(base.encode_text(ids)[0], theirs[f"text/{row}"]) < TOLERANCE
    name, row = theirs["mm_pair/0"]
    ids = torch.from_numpy(theirs[f"ids/{row}"])
    assert distance(base.encode_multimodal(base_pixels[name][None], ids[None])[0], theirs["mm/0"]) < TOLERANCE
    for stage, ours in stages(base, base_pixels[name], torch.from_numpy(theirs["ids/1"])).items():
        expected = theirs[f"dbg/{stage}"]
        got = ours[: min(4, len(ours)), :16]
        assert distance(got, expected[: len(got)]) < TOLERANCE * max(1.0, float(np.abs(expected).max())), stage


@pytest.mark.parametrize(
    ("name", "mode", "sha256"),
    [
        (
            "01_rgb_landscape_640x480.jpg",
            "RGB",
            "32a1ff0963760c0afd3e0691bd382d4dbb1c31e5fca38ac142f811c851d8deab",
        ),
        (
            "05_gray_L_350x280.png",
            "L",
            "6be9733010203a9a7871a7213a1c55195c9edf24947946549267518f2d28969a",
        ),
    ],
)
def test_preprocessing_equals_the_original_bit_for_bit(name: str, mode: str, sha256: str) -> None:
    """Checksums of the original's preprocessed float32 tensors."""
    config = VisualizedBGEConfig()
    image = Image.open(DATA / name)
    pixels = VisualizedBGEProcessor(config, word_tokenizer(config, [])).pixel_values([image])
    assert image.mode == mode
    assert hashlib.sha256(pixels[0].numpy().tobytes()).hexdigest() == sha256


@pytest.mark.parametrize(("mode", "size"), [("RGB", (301, 97)), ("L", (97, 301)), ("CMYK", (130, 77))])
def test_resize_comes_before_the_conversion_to_rgb(mode: str, size: tuple[int, int]) -> None:
    """torchvision's steps written out: short side to 48, round half to even, crop, RGB, CLIP mean and std."""
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    image = Image.fromarray(noise.squeeze(), mode)
    config = small_config()
    ours = VisualizedBGEProcessor(config, word_tokenizer(config, [])).pixel_values([image])[0]
    width, height = (48, int(48 * size[1] / size[0])) if size[0] < size[1] else (int(48 * size[0] / size[1]), 48)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 48) / 2.0), round((height - 48) / 2.0)
    cropped = resized.crop((left, top, left + 48, top + 48)).convert("RGB")
    channels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).to(torch.float32).div(255)
    expected = (channels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert torch.equal(ours, expected)
    if mode == "CMYK":
        converted_first = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        assert np.asarray(converted_first).tobytes() != np.asarray(resized.convert("RGB")).tobytes()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 5_000_000), (300, 250_000)])
def test_an_image_as_thin_as_a_thread_takes_no_memory(size: tuple[int, int]) -> None:
    """Resized whole, the first would take 9 GB, and anybody can send it in 150 bytes."""
    image = Image.new("RGB", size, (9, 120, 200))
    with peak_growth() as mib:
        assert np.unique(np.asarray(crop_square(image, 224)).reshape(-1, 3), axis=0).tolist() == [[9, 120, 200]]
    assert mib() < 400


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (7, 500), (1, 1000)])
def test_the_middle_of_a_thin_image_is_the_middle_of_its_whole(size: tuple[int, int]) -> None:
    """Truth: the original's way, short side to 64 and the middle cut out; 2 of 255 for another order of rounding."""
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp / 2], axis=-1).astype(np.uint8))
    scale = 64 / min(size)
    whole = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = round((whole.width - 64) / 2), round((whole.height - 64) / 2)
    expected = np.asarray(whole.crop((left, top, left + 64, top + 64)), dtype=int)
    assert np.abs(np.asarray(crop_square(image, 64), dtype=int) - expected).max() <= 2


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "I;16", "F"])
def test_other_modes_become_rgb(mode: str) -> None:
    """Our choice: ``load_image`` hands over RGB, L and CMYK; the processor takes whatever comes."""
    image = Image.new("L", (60, 50), 128).convert(mode) if mode != "I;16" else Image.new("I;16", (60, 50), 30000)
    config = small_config()
    pixels = VisualizedBGEProcessor(config, word_tokenizer(config, [])).pixel_values([image])
    assert pixels.shape == (1, 3, 48, 48)
    assert bool(pixels.isfinite().all())


def test_long_text_is_cut_to_the_room_there_is() -> None:
    """As the tokenizer truncates: [SEP] stays; the original crashes. Base has 512, or 316 beside an image."""
    config = VisualizedBGEConfig()
    assert (config.room(), config.room(beside_image=True)) == (512, 316)
    small = small_config()
    assert (small.room(), small.room(beside_image=True)) == (33, 24)
    processor = VisualizedBGEProcessor(small, word_tokenizer(small, ["a"]))
    alone = processor.tokens(["a " * 1000])
    beside = processor.tokens(["a " * 1000, "a"], beside_image=True)
    assert alone["input_ids"].shape == (1, 33)
    assert beside["input_ids"].shape == (2, 24)
    assert beside["attention_mask"].sum(1).tolist() == [24, 3]
    for ids in (alone["input_ids"][0], beside["input_ids"][0]):
        assert (int(ids[0]), int(ids[-1])) == (2, 3)
        assert len(set(ids[1:-1].tolist())) == 1
    model = small_model()
    assert model.encode_text(**alone).shape == (1, 40)
    assert model.encode_multimodal(torch.zeros(2, 3, 48, 48), **beside).shape == (2, 40)


def test_room_of_m3_counts_from_behind_its_padding_index() -> None:
    """Position tables of the published m3 config: 8194 rows, two of them before the first token of a text alone."""
    m3 = VisualizedBGEConfig(
        vision={"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24},
        text={"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1, "cls_token_id": 0},
    )
    assert (m3.room(), m3.room(beside_image=True)) == (8192, 7938)


@pytest.mark.parametrize("text", ["", " ", "\x00", "\ud800 broken", "é\u202e🦒", "x" * 10_000])
def test_any_text_gets_a_vector(text: str) -> None:
    """Our choice: no text is an error, lone surrogates included."""
    config = small_config()
    tokens = VisualizedBGEProcessor(config, word_tokenizer(config, ["x"])).tokens([text])
    assert bool(small_model().encode_text(**tokens).isfinite().all())


def test_no_texts_give_an_empty_batch() -> None:
    """Our choice."""
    config = small_config()
    processor = VisualizedBGEProcessor(config, word_tokenizer(config, []))
    assert processor.tokens([])["input_ids"].shape == (0, 0)
    assert processor.pixel_values([]).shape == (0, 3, 48, 48)


def test_padding_does_not_change_a_vector() -> None:
    """A property of attention masks."""
    model = small_model()
    ids = torch.randint(4, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    padded = torch.cat((ids, torch.randint(0, 90, (1, 11))), dim=1)
    mask = torch.cat((torch.ones(1, 7, dtype=torch.long), torch.zeros(1, 11, dtype=torch.long)), dim=1)
    assert distance(model.encode_text(padded, mask), model.encode_text(ids)) < TOLERANCE
    both = model.encode_multimodal(pixels, padded, mask)
    assert distance(both, model.encode_multimodal(pixels, ids)) < TOLERANCE
    assert distance(both, model.encode_multimodal(pixels, ids, torch.ones_like(ids))) < TOLERANCE


def test_an_image_alone_is_an_image_beside_an_empty_text() -> None:
    """Definition in the original."""
    model = small_model()
    pixels = torch.randn(2, 3, 48, 48)
    empty = torch.tensor([[2, 3], [2, 3]])
    assert torch.equal(model.encode_image(pixels), model.encode_multimodal(pixels, empty))
    assert torch.equal(model(pixel_values=pixels), model(pixel_values=pixels, input_ids=empty))


def test_batches_equal_singles() -> None:
    """Rows of a batch do not see each other."""
    model = small_model()
    pixels = torch.randn(5, 3, 48, 48)
    ids = torch.randint(4, 90, (5, 9))
    batched = model.encode_multimodal(pixels, ids)
    for row in range(5):
        single = model.encode_multimodal(pixels[row : row + 1], ids[row : row + 1])
        assert distance(batched[row], single[0]) < TOLERANCE
    assert distance(batched.norm(dim=1), torch.ones(5)) < TOLERANCE
    assert float((batched @ batched.T - torch.eye(5)).abs().max()) < 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiny", "tiny_m3"])
def test_half_precision_points_the_same_way(dtype: torch.dtype, name: str) -> None:
    """Our choice of bound: cosine with the float32 vector above 0.999."""
    theirs = golden(name)
    model = fill(VisualizedBGE(golden_config(name))).to(dtype)
    pixels = torch.stack([torch.from_numpy(theirs[f"pixels/rand{row}"]) for row in range(3)])
    ids, mask = torch.from_numpy(theirs["mm_ids_batch"]), torch.from_numpy(theirs["mm_mask_batch"])
    ours = model.encode_multimodal(pixels, ids, mask)
    assert distance(ours.norm(dim=1), torch.ones(3)) < TOLERANCE
    cosine = (ours * torch.from_numpy(theirs["mm_batch"])).sum(1)
    assert float(cosine.min()) > 0.999


def test_save_and_from_pretrained_round_trip(tmp_path: Path) -> None:
    """transformers' own saving and loading, dtype argument included."""
    model = small_model()
    model.save_pretrained(tmp_path)
    pixels, ids = torch.randn(2, 3, 48, 48), torch.randint(4, 90, (2, 6))
    expected = model.encode_multimodal(pixels, ids)
    again = VisualizedBGE.from_pretrained(tmp_path)
    assert not again.training
    assert distance(again.encode_multimodal(pixels, ids), expected) < TOLERANCE
    half = VisualizedBGE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert float((half.encode_multimodal(pixels, ids) * expected).sum(1).min()) > 0.995
    written = json.loads((tmp_path / "config.json").read_text())
    assert VisualizedBGEConfig.from_pretrained(tmp_path).vision == model.config.vision == written["vision"]


def test_every_weight_learns() -> None:
    """In training mode every parameter gets a gradient: the bundled tiny model is trained with these classes."""
    with torch.inference_mode(False):
        model = small_model().train()
        vectors = model.encode_multimodal(torch.randn(3, 3, 48, 48), torch.randint(4, 90, (3, 6)))
        (vectors * torch.randn_like(vectors)).sum().backward()
        silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == []


def test_pixels_of_another_size_are_refused() -> None:
    """Our choice: an error that names both shapes."""
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*\(B, 3, 48, 48\)"):
        small_model().encode_image(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"layers": 10**9}, {}, "layers 1000000000"),
        ({"width": -8}, {}, "width -8"),
        ({"stem": "conv", "stem_channels": [8]}, {}, "stem 'conv' is not 'patch'"),
        ({"image_size": 225}, {}, "multiple of patch_size"),
        ({}, {"hidden_size": 0}, "hidden_size 0"),
        ({}, {"model_type": "gpt"}, "'gpt'"),
        ({}, {"num_attention_heads": 7}, "7 attention heads"),
    ],
)
def test_impossible_shapes_are_refused(vision: dict[str, Any], text: dict[str, Any], message: str) -> None:
    """Our choice: a config is untrusted, and is checked before anything is built."""
    with pytest.raises(ValueError, match=message):
        VisualizedBGEConfig(vision=vision, text=text)


@pytest.mark.parametrize("damage", ["not json", "too many words", "no [CLS]"])
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, damage: str) -> None:
    """Our choice: silently wrong ids are the worst outcome."""
    config = small_config()
    path = tmp_path / "tokenizer.json"
    if damage == "not json":
        path.write_text("{")
    else:
        tokenizer = word_tokenizer(VisualizedBGEConfig(), [f"w{n}" for n in range(200)])
        if damage == "no [CLS]":
            tokenizer = word_tokenizer(config, ["a"])
            tokenizer.post_processor = None
        tokenizer.save(str(path))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        VisualizedBGEProcessor(config, path)
