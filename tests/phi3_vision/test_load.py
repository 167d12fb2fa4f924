"""Phi-3 Vision from files: the published folder, damaged ones, devices and adapters."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.utils import logging as transformers_logging

from mm_retriever.errors import CheckpointError, ModelNotFoundError
from mm_retriever.packed_linear import can_pack
from mm_retriever.phi3_vision.load import load_phi3_vision
from mm_retriever.phi3_vision.model import CPU_ATTENTION, Phi3Vision
from tests.support.phi3_vision_golden import ASK, DATA, NORM, made_image
from tests.support.phi3_vision_small import (
    SHORT_CONTEXT,
    small_model,
    small_processor,
    small_tokenizer,
)

# ---------------------------------------------------------------- files


@pytest.fixture
def official_folder(tmp_path: Path) -> Path:
    """A folder as published: sharded, bfloat16, with the alias, the dead layers and the remote-code entries."""
    folder = tmp_path / "published"
    folder.mkdir()
    model = small_model()
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    layers = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers."
    used = [key for key in weights if key.startswith(layers + "1.")]
    weights |= {key.replace(layers + "1.", layers + "2."): weights[key].clone() for key in used}
    weights["model.vision_embed_tokens.wte.weight"] = weights["model.embed_tokens.weight"].clone()
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = json.loads((DATA / "config.json").read_text())
    for name, value in model.config.to_dict().items():
        if name in settings or name == "vision_config":
            settings[name] = value
    settings |= {
        "torch_dtype": "bfloat16",
        "pad_token_id": 32000,
        "original_max_position_embeddings": SHORT_CONTEXT,
        "_attn_implementation": "flash_attention_2",
        "rope_scaling": {"type": "su", "short_factor": [1.05, 1.4, 2.0], "long_factor": [1.1, 6.0, 30.0]},
    }
    settings["vision_config"] = {k: v for k, v in settings["vision_config"].items() if k != "dtype"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4}))
    (folder / "tokenizer.json").write_text(small_tokenizer().to_str())
    return folder


def edit_shard(folder: Path, change: object) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / shard)
        change(tensors)  # type: ignore[operator]
        save_file(tensors, folder / shard)
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard} | dict.fromkeys(
            tensors, shard
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("alias", [True, False])
def test_the_published_folder_loads_without_remote_code(official_folder: Path, alias: bool) -> None:
    """Truth: the weights it was saved from, rounded to bfloat16 as published."""
    if not alias:
        edit_shard(official_folder, lambda tensors: tensors.pop("model.vision_embed_tokens.wte.weight", None))
    model, processor = load_phi3_vision(str(official_folder))
    assert (model.dtype, processor.num_crops, model.training) == (torch.bfloat16, 4, False)
    assert model.generation_config.eos_token_id == [2, 32000, 32007]
    expected = {name: tensor.bfloat16() for name, tensor in small_model().state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    wide, coarse = load_phi3_vision(str(official_folder), dtype="float32", device="cpu", num_crops=1)
    assert (wide.dtype, coarse.num_crops) == (torch.float32, 1)
    inputs = coarse(ASK, [made_image(40, 30)])
    with torch.inference_mode():
        assert torch.isfinite(wide(**inputs).logits).all()


def test_loading_draws_no_progress_bar_and_leaves_others_theirs(
    official_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Truth: our choice; transformers itself draws a bar in another thread meanwhile, and in this one afterwards."""

    def draw_beside(module: nn.Module, name: str, part: nn.Module | None) -> None:
        if name == "lm_head":
            thread = threading.Thread(target=lambda: list(transformers_logging.tqdm([1], desc="another thread's")))
            thread.start()
            thread.join()

    beside = register_module_module_registration_hook(draw_beside)
    try:
        load_phi3_vision(str(official_folder))
    finally:
        beside.remove()
    shown = capfd.readouterr().err
    assert shown.count("another thread's: 100%") == 2  # when the shapes are compared, and when the weights are loaded
    assert "Loading weights" not in shown
    Phi3Vision.from_pretrained(official_folder, dtype=torch.float32)
    assert "Loading weights: 100%" in capfd.readouterr().err


@pytest.mark.skipif(not can_pack(torch.ones(1, 1)), reason="oneDNN does not pack weights on this machine")
def test_on_a_cpu_layers_are_packed_and_stay_so_while_it_answers(official_folder: Path) -> None:
    model, processor = load_phi3_vision(str(official_folder), device="cpu", dtype="float32")
    assert model.config._attn_implementation == CPU_ATTENTION
    inputs = processor(ASK, [made_image(90, 30)])
    with torch.inference_mode():
        features = model.image_features(inputs["pixel_values"], inputs["image_sizes"])
    prefix = model.extend(model.prefill(inputs["input_ids"], features), [5])
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in linears.items() if type(module) is nn.Linear} == set()
    assert not any(module._parameters["weight"].numel() for module in linears.values())

    plain = Phi3Vision.from_pretrained(official_folder, dtype=torch.float32)
    expected = plain.extend(plain.prefill(inputs["input_ids"], features), [5])
    torch.testing.assert_close(prefix.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_from_pretrained_and_save_pretrained_work_as_for_any_model(official_folder: Path, tmp_path: Path) -> None:
    """Truth: transformers' own loading report, and the logits before and after."""
    model, report = Phi3Vision.from_pretrained(official_folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval().save_pretrained(tmp_path / "saved")
    again = Phi3Vision.from_pretrained(tmp_path / "saved").eval()
    inputs = small_processor()(ASK, [made_image(40, 30)])
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_a_device_map_may_leave_parts_on_disk(official_folder: Path, tmp_path: Path) -> None:
    """Truth: the same model in memory. Needs accelerate, as every device map does."""
    pytest.importorskip("accelerate")
    names = ["model.norm", "model.rotary_emb", "model.layers.0", "model.layers.2", "lm_head"]
    places = dict.fromkeys(names, "cpu") | dict.fromkeys(
        ["model.embed_tokens", "model.layers.1", "model.vision_embed_tokens"], "disk"
    )
    offloaded = Phi3Vision.from_pretrained(
        official_folder, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    model = Phi3Vision.from_pretrained(official_folder, dtype=torch.float32)
    inputs = small_processor()(ASK, [made_image(40, 30)])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(**inputs, **options), model.generate(**inputs, **options))
    features = offloaded.image_features(inputs["pixel_values"], inputs["image_sizes"])
    assert offloaded.prefill(inputs["input_ids"], features).logits.shape == (1, 32064)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_an_adapter_can_be_trained_and_switched_off(official_folder: Path) -> None:
    """Truth: PEFT's LoRA changes the logits, and its absence restores them."""
    peft = pytest.importorskip("peft")
    model = Phi3Vision.from_pretrained(official_folder, dtype=torch.float32)
    inputs = small_processor()(ASK, [made_image(40, 30)])
    with torch.inference_mode():
        plain = model(**inputs).logits
    settings = peft.LoraConfig(r=2, target_modules=["qkv_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted(**inputs, labels=inputs["input_ids"].clamp(min=0)).loss.backward()
    with torch.inference_mode():
        assert not torch.allclose(adapted(**inputs).logits, plain, atol=1e-3)
        assert adapted.generate(**inputs, max_new_tokens=2).shape[0] == 1
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight", None), "1 missing: lm_head.weight"),
        (lambda tensors: "lm_head.weight" in tensors and tensors.update(extra=torch.ones(2)), "1 unexpected: extra"),
        (lambda tensors: tensors.update({key: torch.ones(5) for key in tensors if key == NORM}), NORM),
    ],
)
def test_weights_that_do_not_fit_are_refused(official_folder: Path, change: object, message: str) -> None:
    """Truth: our choice: strict loading."""
    edit_shard(official_folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_phi3_vision(str(official_folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_scaling": {"type": "su"}}, "short_factor"),
        ({"vision_config": {"stem": "linear"}}, "'linear'"),
    ],
)
def test_a_config_that_is_not_phi3_visions_is_refused(
    official_folder: Path, settings: dict[str, object], message: str
) -> None:
    """Truth: our choice."""
    stored = json.loads((official_folder / "config.json").read_text())
    (official_folder / "config.json").write_text(json.dumps(stored | settings))
    with pytest.raises(CheckpointError, match=message):
        load_phi3_vision(str(official_folder))


def test_a_folder_without_its_parts_or_no_folder_says_so(official_folder: Path, tmp_path: Path) -> None:
    """Truth: our choice."""
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_phi3_vision(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="dtype='int8'"):
        load_phi3_vision(str(official_folder), dtype="int8")
    for name in ("tokenizer.json", "config.json"):
        shutil.move(official_folder / name, tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_phi3_vision(str(official_folder))
        shutil.move(tmp_path / name, official_folder / name)
