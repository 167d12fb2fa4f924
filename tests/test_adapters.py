"""What users do to models with other libraries: offload, adapt, quantise, checkpoint, save. All through the modules."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.embedders.visualized_bge.encoder import (
    VisualizedBGEEncoder,
    VisualizedBGEProcessor,
    load_visualized_bge,
)
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE
from mm_retriever.packed_linear import unpack_linears
from mm_retriever.phi3_vision.load import load_phi3_vision
from mm_retriever.phi3_vision.model import Phi3Vision
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor
from tests.support.golden import TOLERANCE, small_model, word_tokenizer

WORDS = ["red", "mug", "with", "stars"]
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "proj", "w1", "w2", "w3"}


@pytest.fixture
def model() -> VisualizedBGE:
    return small_model(seed=3)


@pytest.fixture
def processor(model: VisualizedBGE) -> VisualizedBGEProcessor:
    return VisualizedBGEProcessor(model.config, word_tokenizer(model.config, WORDS))


@pytest.fixture
def encode(processor: VisualizedBGEProcessor) -> Callable[[VisualizedBGE], Tensor]:
    """Vectors of a text, an image and a pair, by the public way, from a model that was changed."""
    square = np.random.default_rng(3).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    contents = [Content("red mug"), Content("", square), Content("with stars", square)]
    return lambda model: torch.from_numpy(VisualizedBGEEncoder(model, processor).encode(contents))


# ---------------------------------------------------------------------------------------------- offloading


def test_offloaded_weights_give_the_same_vectors(model: VisualizedBGE, encode: Callable[..., Tensor]) -> None:
    """Truth: the model in memory, bit for bit; accelerate fetches weights only for modules that are called."""
    accelerate = pytest.importorskip("accelerate")
    expected = encode(model)
    accelerate.cpu_offload(model)
    assert model.bge_encoder.layer[0].attention.self.query.weight.device.type == "meta"
    assert torch.equal(encode(model), expected)


@pytest.mark.parametrize("part", ["model_visual", "bge_encoder", "bge_embeddings", "visual_proj"])
def test_any_part_may_be_left_on_disk(
    model: VisualizedBGE, encode: Callable[..., Tensor], tmp_path: Path, part: str
) -> None:
    """Truth: the model in memory; tensors mapped from a file lie elsewhere, which can cost the last bit."""
    pytest.importorskip("accelerate")
    expected = encode(model)
    model.save_pretrained(tmp_path / "model")
    names = ["model_visual", "bge_encoder", "bge_embeddings", "visual_proj"]
    places = {name: "disk" if name == part else "cpu" for name in names}
    offloaded = VisualizedBGE.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in getattr(offloaded, part).parameters())
    torch.testing.assert_close(encode(offloaded), expected, rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------- adapters


def every_linear_is_called(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of linear layers and embeddings that `run` goes past."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)}
    called: set[str] = set()
    hooks = [part.register_forward_hook(lambda *_, name=name: called.add(name)) for name, part in parts.items()]
    run()
    for hook in hooks:
        hook.remove()
    return parts.keys() - called


def test_no_layer_is_gone_past(model: VisualizedBGE, encode: Callable[..., Tensor]) -> None:
    """Truth: torch runs hooks exactly where a module is called; whatever wraps a module hangs there."""
    assert not every_linear_is_called(model, lambda: encode(model))


def test_no_layer_of_phi3_vision_is_gone_past() -> None:
    """Truth: as above. CLIP's pooling layers are not there, and its position table is a table of the tower."""
    model, processor = load_phi3_vision("tiny")
    image = Image.new("RGB", (64, 48), "red")
    inputs = processor("<|user|>\n<|image_1|>\nwhat?<|end|>\n<|assistant|>\n", [image])
    with torch.inference_mode():
        assert not every_linear_is_called(model, lambda: model(**inputs))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_every_adapter_matters_and_merging_changes_nothing(model: VisualizedBGE, encode: Callable[..., Tensor]) -> None:
    """Truth: PEFT: an adapter that is merged into the weights computes what it computes beside them."""
    peft = pytest.importorskip("peft")
    plain = encode(model)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    targets = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert targets >= PROJECTIONS
    beside = encode(adapted.base_model.model)
    assert float((beside - plain).abs().max()) > 1e-3
    with torch.inference_mode(False):
        pixels, ids = torch.randn(2, 3, 48, 48), torch.randint(4, 90, (2, 5))
        vectors = adapted(pixel_values=pixels, input_ids=ids)
        (vectors * torch.randn_like(vectors)).sum().backward()
    dead = [name for name, value in adapted.named_parameters() if value.requires_grad and value.grad is None]
    assert dead == []
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(encode(merged), beside, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_adapters_on_query_and_value_change_the_vectors(model: VisualizedBGE, encode: Callable[..., Tensor]) -> None:
    """Truth: the usual targets of LoRA; they were dead in the vision tower."""
    peft = pytest.importorskip("peft")
    plain = encode(model)
    for target in ("q_proj", "v_proj"):
        settings = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        adapted = encode(peft.get_peft_model(copy.deepcopy(model), settings).base_model.model)
        assert torch.equal(adapted[0], plain[0])  # a text does not pass the tower
        assert float((adapted[1:] - plain[1:]).abs().max()) > 1e-4


# ---------------------------------------------------------------------------------------------- quantisation


def quantised_by_torch(model: VisualizedBGE) -> VisualizedBGE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: VisualizedBGE = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantised


def torchao_quantization() -> Any:
    """torchao as the Makefile installs it: apart, since transformers would import it in every command."""
    sys.path.append(str(Path(sys.prefix) / "torchao"))
    try:
        return pytest.importorskip("torchao.quantization")
    finally:
        sys.path.pop()


def quantised_by_torchao(model: VisualizedBGE) -> VisualizedBGE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = torchao_quantization()
        quantised = copy.deepcopy(model)
        quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    return quantised


@pytest.mark.parametrize("quantise", [quantised_by_torch, quantised_by_torchao])
def test_eight_bit_weights_point_the_same_way(
    model: VisualizedBGE, encode: Callable[..., Tensor], quantise: Callable[[VisualizedBGE], VisualizedBGE]
) -> None:
    """Our choice of bound: cosine above 0.99, and not the same numbers, which would mean that nothing was quantised."""
    expected = encode(model)
    quantised = encode(quantise(model))
    assert float((quantised * expected).sum(1).min()) > 0.99
    assert not torch.equal(quantised, expected)


def test_a_loaded_model_is_one_of_transformers_as_soon_as_it_is_asked_for() -> None:
    """Truth: the plain modules' vectors, bit for bit; what is changed afterwards, at the top too, is computed with."""
    embedder: Any = load_embedder("tiny", device="cpu")
    square = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    contents = [Content("red mug"), Content("", embedder.prepare(Image.fromarray(square)))]
    plain = embedder.encode(contents)
    assert not isinstance(embedder.torch_model, VisualizedBGE)
    model = embedder.model
    assert isinstance(model, VisualizedBGE) and model is embedder.model is embedder.network
    assert model.state_dict().keys() == load_visualized_bge("tiny", device="cpu")[0].state_dict().keys()
    assert np.array_equal(embedder.encode(contents), plain)
    model.visual_proj = nn.Linear(model.visual_proj.in_features, model.visual_proj.out_features)
    changed = embedder.encode(contents)
    assert np.array_equal(changed[0], plain[0]) and not np.allclose(changed[1], plain[1])


# ---------------------------------------------------------------------------------------------- training, saving


def test_gradient_checkpointing_gives_the_same_gradients(model: VisualizedBGE) -> None:
    """Truth: the gradients without it; the layers run twice, once forward and once backward."""
    pixels, ids = torch.randn(2, 3, 48, 48), torch.randint(4, 90, (2, 5))

    def gradients(model: VisualizedBGE) -> tuple[dict[str, Tensor], int]:
        runs = 0

        def count(*_: object) -> None:
            nonlocal runs
            runs += 1

        hook = model.model_visual["visual"].blocks[0].mlp.register_forward_pre_hook(count)
        vectors = model.train()(pixel_values=pixels, input_ids=ids)
        (vectors * torch.arange(vectors.numel()).view_as(vectors)).sum().backward()
        hook.remove()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, runs

    expected, once = gradients(copy.deepcopy(model))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    found, twice = gradients(model)
    assert (once, twice) == (1, 2)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_word_embeddings_are_found_and_resized(model: VisualizedBGE, tmp_path: Path) -> None:
    """Truth: transformers' own resizing; the size is kept with the model."""
    assert model.get_input_embeddings() is model.bge_embeddings.word_embeddings
    model.resize_token_embeddings(95, mean_resizing=False)
    assert model.config.vocab_size == model.config.text_shape.vocab_size == 95
    model.save_pretrained(tmp_path)
    assert VisualizedBGE.from_pretrained(tmp_path).get_input_embeddings().num_embeddings == 95


def test_a_saved_folder_loads_by_our_loader_and_by_transformers(
    model: VisualizedBGE, processor: VisualizedBGEProcessor, tmp_path: Path
) -> None:
    """Truth: what was saved."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load_visualized_bge(tmp_path, device="cpu")
    ids, image = reader.tokens(["red stars"]), Image.new("RGB", (60, 50), "red")
    assert reader.token_ids(["red stars"]) == processor.token_ids(["red stars"])
    assert torch.equal(reader.pixel_values([image]), processor.pixel_values([image]))
    with torch.inference_mode():
        assert torch.equal(unpack_linears(again).encode_text(**ids), model.encode_text(**ids))
    assert isinstance(AutoConfig.from_pretrained(tmp_path), type(model.config))
    found = AutoModel.from_pretrained(tmp_path)
    assert isinstance(found, VisualizedBGE)
    with torch.inference_mode():
        torch.testing.assert_close(found.encode_text(**ids), model.encode_text(**ids), rtol=0, atol=TOLERANCE)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), VisualizedBGEProcessor)
    assert VisualizedBGEProcessor.from_pretrained("tiny").token_ids(["mug"])[0][0] == 2


def test_a_saved_folder_of_phi3_vision_loads_by_our_loader_and_by_transformers(tmp_path: Path) -> None:
    """Truth: what was saved, the number of crops included."""
    model, processor = load_phi3_vision("tiny")
    processor.num_crops = 7
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load_phi3_vision(str(tmp_path))
    assert reader.num_crops == Phi3VisionProcessor.from_pretrained(tmp_path).num_crops == 7
    inputs = reader("<|user|>\n<|image_1|>\nwhat?<|end|>\n<|assistant|>\n", [Image.new("RGB", (64, 48), "red")])
    with torch.inference_mode():
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        found = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(found, Phi3Vision)
        torch.testing.assert_close(found(**inputs).logits, expected)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), Phi3VisionProcessor)


def test_importing_the_package_registers_nothing_with_transformers() -> None:
    """Our promise: `import mm_retriever` loads no transformers."""
    code = "import mm_retriever, sys; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------- the vector cache


def test_squares_of_equal_bytes_and_another_shape_are_other_content() -> None:
    """Truth: they are different images."""
    pixels = np.arange(48, dtype=np.uint8)
    keys = {Content("", pixels.reshape(shape)).key("m") for shape in [(4, 4, 3), (2, 8, 3), (8, 2, 3)]}
    assert len(keys) == 3
