"""Untrusted weights: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mm_retriever.checkpoint import ModelEntry, load_strict, locate, read_state_dict
from mm_retriever.embedders import visualized_bge
from mm_retriever.embedders.folder import warn_if_not_published
from mm_retriever.embedders.registry import convert_model
from mm_retriever.embedders.visualized_bge.encoder import load_visualized_bge
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig
from mm_retriever.errors import CheckpointError, ModelNotFoundError
from mm_retriever.phi3_vision import config as phi3_vision
from mm_retriever.phi3_vision.load import load_phi3_vision
from tests.images.test_header import mutated
from tests.support.effort import EFFORT
from tests.support.golden import (
    DATA,
    TOLERANCE,
    fill,
    golden,
    golden_config,
    official_state,
    small_model,
    word_tokenizer,
)

State = dict[str, Tensor]
MODELS = {"visualized_bge": visualized_bge.MODELS, "phi3_vision": phi3_vision.MODELS}


def official_shapes() -> dict[str, tuple[int, ...]]:
    keys = json.loads((DATA / "tiny_state_dict_keys.json").read_text())
    return {name: tuple(shape) for name, (shape, _) in keys.items()}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The original's own state dict, cut to the golden file's small size, as ``torch.save`` writes it."""
    config = golden_config("tiny")
    torch.save(official_state(config, official_shapes()), tmp_path / "official.pth")
    config.save_pretrained(tmp_path)  # heads of 16, which the official files do not have
    word_tokenizer(config, ["red", "shoe"]).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "official.pth"


def saved(model: VisualizedBGE, folder: Path) -> Path:
    model.save_pretrained(folder)
    word_tokenizer(model.config, ["red", "shoe"]).save(str(folder / "tokenizer.json"))
    return folder


def change(path: Path, edit: Callable[[State], Any]) -> Path:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)
    return path


def test_an_official_file_gives_the_original_vectors(official: Path) -> None:
    """Golden vectors, through the same call that loads BAAI's file; dead tensors in it are passed over."""
    model, processor = load_visualized_bge(official, device="cpu")
    theirs = golden("tiny")
    pixels = torch.stack([torch.from_numpy(theirs[f"pixels/{name}"]) for name in theirs["image_names"]])
    with torch.inference_mode():
        assert np.abs(model.encode_image(pixels).numpy() - theirs["image_batch"]).max() < TOLERANCE
    assert not model.training
    assert processor.tokens(["red shoe"])["input_ids"].tolist() == [[1, 4, 5, 2]]


def test_position_ids_of_an_older_transformers_are_passed_over(official: Path) -> None:
    """The original code runs with either; state dicts written by transformers before 4.31 have the key."""
    key = "bge_embeddings.position_ids"
    load_visualized_bge(change(official, lambda state: state.update({key: torch.arange(64)[None]})), device="cpu")


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_an_official_file_alone_tells_its_own_shape(tmp_path: Path, kind: str) -> None:
    """The published files come without a config: heads of 64, everything else is in the tensors."""
    text: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 40,
    }
    if kind == "xlm-roberta":
        text |= {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2}
    else:
        text |= {"vocab_size": 110}  # [CLS] is 101, [SEP] 102
    config = VisualizedBGEConfig(
        vision={"image_size": 56, "patch_size": 14, "width": 192, "layers": 2}, text={"model_type": kind, **text}
    )
    model = fill(VisualizedBGE(config))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    word_tokenizer(config, ["red"]).save(str(tmp_path / "tokenizer.json"))
    loaded, _ = load_visualized_bge(tmp_path / "x.pth", device="cpu")
    assert (loaded.config.vision, loaded.config.text) == (config.vision, config.text)
    pixels, ids = torch.randn(2, 3, 56, 56), torch.randint(4, 90, (2, 5))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_multimodal(pixels, ids), model.encode_multimodal(pixels, ids))


def test_every_missing_and_unexpected_key_is_named(official: Path) -> None:
    """Our choice: a renamed key shows on both lists, and nothing is loaded."""
    change(official, lambda state: state.pop("bge_encoder.layer.1.output.dense.bias"))
    with pytest.raises(CheckpointError, match=r"official\.pth.*1 missing: bge_encoder\.layer\.1\.output\.dense\.bias$"):
        load_visualized_bge(official)
    change(official, lambda state: state.update({"visual_projection.weight": state.pop("visual_proj.weight")}))
    with pytest.raises(CheckpointError) as refused:
        load_visualized_bge(official)
    assert "2 missing: bge_encoder.layer.1.output.dense.bias, visual_proj.weight" in str(refused.value)
    assert "1 unexpected: visual_projection.weight" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(64, 65), r"visual_proj\.weight \[64, 65\] float32, expected \[64, 64\] float32"),
        (torch.zeros(64, 64, dtype=torch.int64), r"visual_proj\.weight \[64, 64\] int64"),
        (torch.zeros(64, 64, dtype=torch.complex64), r"visual_proj\.weight \[64, 64\] complex64"),
        (torch.zeros(64, 64).to(torch.float8_e4m3fn), r"visual_proj\.weight \[64, 64\] float8_e4m3fn"),
        (torch.zeros(64, 64).to_sparse(), r"visual_proj\.weight \[64, 64\] float32"),
        (torch.zeros(64, 64, device="meta"), r"visual_proj\.weight \[64, 64\] float32"),
    ],
)
def test_tensors_of_another_shape_or_kind_are_refused(
    official: Path, tried: Counter[str], tensor: Tensor, message: str
) -> None:
    """Our choice: a tensor is taken only under the name, shape and kind that the model has."""
    tried["hostile weight files"] += 1
    change(official, lambda state: state.update({"visual_proj.weight": tensor}))
    with pytest.raises(CheckpointError, match=message):
        load_visualized_bge(official)


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(
    official: Path, tmp_path: Path, tried: Counter[str], form: str
) -> None:
    """The classic attack on ``torch.load``, in every container that torch reads."""
    tried["hostile weight files"] += 1
    witness = tmp_path / "ran"
    state = {"visual_proj.weight": Payload(witness)}
    if form == "bare pickle":
        official.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, official, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="refused"):
        load_visualized_bge(official)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02.", b"hello world" * 50])
def test_a_file_that_is_no_checkpoint_is_refused(official: Path, content: bytes) -> None:
    """Our choice: one line that names the file."""
    official.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"official\.pth") as refused:
        load_visualized_bge(official)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_number_that_claims_to_be_a_billion_is_refused(official: Path, tried: Counter[str], legacy: bool) -> None:
    """A stride of 0 is a tensor of any shape in one number: 2 KB that would become 40 GB when copied into a model."""
    state = torch.load(official, weights_only=True)
    state["bge_embeddings.word_embeddings.weight"] = torch.zeros(1).expand(10**7, 1_000)
    torch.save(state, official, _use_new_zipfile_serialization=not legacy)
    tried["hostile weight files"] += 1
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight has fewer numbers in the file"):
        load_visualized_bge(official)


def test_a_part_of_a_larger_tensor_is_taken(tmp_path: Path) -> None:
    """torch.save writes the whole storage of a view; an axis of length 1 may have any stride."""
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole[1:, ::2], "b": torch.arange(4).expand(1, 4), "c": torch.zeros(0, 5), "d": torch.tensor(1.0)}
    torch.save(state, tmp_path / "x.pth")
    read = read_state_dict(tmp_path / "x.pth")
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["model.safetensors", "new.pth", "legacy.pth", "model.safetensors.index.json"])
def test_damaged_weights_load_whole_or_are_refused(tmp_path: Path, tried: Counter[str], name: str) -> None:
    """Truth: the contract; 500 seeded mutations of each container, mostly of its header."""
    model = torch.nn.Linear(3, 2)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    shards(tmp_path, shard=state)
    path, whole, chance, outcomes = tmp_path / name, (tmp_path / name).read_bytes(), random.Random(3), Counter[str]()
    for _ in range(500 * EFFORT):
        path.unlink()  # the one before may still be mapped
        path.write_bytes(mutated(whole, chance))
        tried["hostile weight files"] += 1
        try:
            load_strict(model, read_state_dict(path), source=path)
            outcomes["loaded"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 250 * EFFORT
    assert [parameter.shape for parameter in model.parameters()] == [(2, 3), (2,)]


SIZES = [10**9, 2**40, 10**30, 0, -1, 1.5, float("inf"), float("nan"), None, "8", "x" * 10**6, [1], {}, True]


def numbers_in(config: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The place of every value in a config but those that only name things."""
    found = []
    for key, value in config.items():
        inner = numbers_in(value, (*path, key)) if isinstance(value, dict) else []
        found += [*inner, (*path, key)] if key not in ("architectures", "dtype", "transformers_version") else []
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["visualized_bge", pytest.param("phi3_vision", marks=pytest.mark.slow)])
def test_a_config_may_say_anything(tmp_path: Path, tried: Counter[str], family: str) -> None:
    """Sizes of another kind, of none and without end, in every place of the bundled models' configs.

    Truth: the contract; a billion layers would be built one by one until the memory is full.
    """
    folder = tmp_path / "model"
    shutil.copytree(MODELS[family]["tiny"].folder, folder)
    original = json.loads((folder / "config.json").read_text())
    load = load_visualized_bge if family == "visualized_bge" else load_phi3_vision
    chance, places = random.Random(11), numbers_in(original)
    pairs = [(place, size) for place in places if "layers" in place[-1] for size in SIZES]
    pairs += [(chance.choice(places), chance.choice(SIZES)) for _ in range(120 * EFFORT)]
    for place, size in pairs:
        config = json.loads(json.dumps(original))
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = size
        (folder / "config.json").write_text(json.dumps(config))
        tried["hostile weight files"] += 1
        try:
            load(str(folder), device="cpu")
        except CheckpointError as error:
            assert len(str(error)) < 10_000, place


@pytest.mark.parametrize("crops", [-1, 257, 10**12, 1.5, None, "4", [4], float("inf")])
def test_a_number_of_crops_that_no_model_takes_is_refused(tmp_path: Path, tried: Counter[str], crops: object) -> None:
    """The largest that is published is 16; an image would be enlarged to as many crops as the file says."""
    folder = tmp_path / "model"
    shutil.copytree(MODELS["phi3_vision"]["tiny"].folder, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": crops}))
    tried["hostile weight files"] += 1
    with pytest.raises(CheckpointError, match="num_crops"):
        load_phi3_vision(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("family", ["visualized_bge", "phi3_vision"])
def test_json_of_any_size_is_not_read(tmp_path: Path, tried: Counter[str], family: str, name: str) -> None:
    """A hole of a file: it takes no disk, and would take the memory."""
    folder = tmp_path / "model"
    shutil.copytree(MODELS[family]["tiny"].folder, folder)
    if "index" in name:
        (folder / "model.safetensors").rename(folder / name)
    os.truncate(folder / name, 2**36)
    tried["hostile weight files"] += 1
    with pytest.raises(CheckpointError, match="is not read"):
        (load_visualized_bge if family == "visualized_bge" else load_phi3_vision)(str(folder), device="cpu")


def test_a_truncated_official_file_is_refused(official: Path) -> None:
    """An interrupted download."""
    whole = official.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 100):
        official.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"official\.pth"):
            load_visualized_bge(official)


def test_a_compressed_archive_is_refused(official: Path) -> None:
    """A zip bomb: torch.save stores, it never compresses."""
    with zipfile.ZipFile(official) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(official, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed"):
        load_visualized_bge(official)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_only_a_flat_dict_of_tensors_is_read(tmp_path: Path, content: Any) -> None:
    """Our choice."""
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="flat dict of tensors"):
        read_state_dict(tmp_path / "x.pth")


def header(length: int, content: bytes = b"{}", body: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content + body


def described(**tensors: Any) -> bytes:
    content = json.dumps(tensors).encode()
    return header(len(content), content, b"\0" * 400)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(2**63),
        header(99_000_000),
        header(2, b"[]"),
        described(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 400]}),
        described(a={"dtype": "F32", "shape": [101], "data_offsets": [0, 404]}),
        described(a={"dtype": "F32", "shape": [100], "data_offsets": [400, 0]}),
        described(
            a={"dtype": "F32", "shape": [100], "data_offsets": [0, 400]},
            b={"dtype": "F32", "shape": [100], "data_offsets": [0, 400]},
        ),
        described(a={"dtype": "PICKLE", "shape": [100], "data_offsets": [0, 400]}),
        described(a={"dtype": "F32", "shape": [-100], "data_offsets": [0, 400]}),
        described(a={"dtype": "F32", "shape": [100], "data_offsets": [-400, 400]}),
        described(a={"dtype": "F32", "shape": [50], "data_offsets": [0, 200]}),
        described(a={"dtype": "F32", "shape": [100], "data_offsets": [0, 400], "file": "/etc/passwd"}, b=7),
        header(100_000, b"[" * 100_000),
        header(400, b"{" + b" " * 399),
    ],
)
def test_hostile_safetensors_are_refused(tmp_path: Path, tried: Counter[str], content: bytes) -> None:
    """Empty, huge header, overflowing shape, offsets past the end, reversed and overlapping, unknown dtype."""
    tried["hostile weight files"] += 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_state_dict(tmp_path / "model.safetensors")


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    """An interrupted download."""
    path = saved(small_model(), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_visualized_bge(tmp_path)


def shards(folder: Path, **files: State) -> Path:
    weight_map = {key: f"{name}.safetensors" for name, state in files.items() for key in state}
    for name, state in files.items():
        save_file(state, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    """The layout of transformers' sharded checkpoints."""
    index = shards(tmp_path, one={"a": torch.ones(2), "b": torch.zeros(3)}, two={"c": torch.arange(4.0)})
    state = read_state_dict(index)
    assert {key: tensor.tolist() for key, tensor in state.items()} == {"a": [1, 1], "b": [0, 0, 0], "c": [0, 1, 2, 3]}
    model = small_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    word_tokenizer(model.config, ["red"]).save(str(tmp_path / "sharded" / "tokenizer.json"))
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    loaded, _ = load_visualized_bge(tmp_path / "sharded", device="cpu")
    pixels = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(pixels), model.encode_image(pixels))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "./x.safetensors",
        "x.safetensors/",
        "model.safetensors.index.json",
        "x.pth",
        "file:///x.safetensors",
        pytest.param("x" * 10**6 + "/.safetensors", id="long"),
    ],
)
def test_a_shard_index_cannot_point_out_of_its_folder(tmp_path: Path, tried: Counter[str], shard: str) -> None:
    """Path tricks."""
    tried["hostile weight files"] += 1
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="names the shard") as refused:
        read_state_dict(index)
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_a_broken_shard_index_is_refused(tmp_path: Path, content: str) -> None:
    """Our choice."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_state_dict(index)


def test_shards_must_hold_what_the_index_says(tmp_path: Path) -> None:
    """A key in no shard, and one in two."""
    index = shards(tmp_path, one={"a": torch.ones(2)}, two={"b": torch.ones(2)})
    save_file({"b": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="differ in a"):
        read_state_dict(index)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"two\.safetensors"):
        read_state_dict(index)


def test_loading_fills_nothing_when_anything_is_wrong() -> None:
    """A model half filled would answer nonsense."""
    model = torch.nn.Linear(3, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"some file does not fit Linear: 1 missing: bias"):
        load_strict(model, {"weight": torch.zeros(2, 3)}, source="some file")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_a_loaded_model_survives_the_loss_of_its_file(tmp_path: Path) -> None:
    """Weights are copied, not mapped: overwriting the file must not reach a model in use."""
    path = saved(small_model(), tmp_path) / "model.safetensors"
    model, _ = load_visualized_bge(tmp_path, device="cpu")
    pixels = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        before = model.encode_image(pixels)
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert torch.equal(model.encode_image(pixels), before)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_is_of_the_computation_and_not_of_the_rope_tables(tmp_path: Path, dtype: str | torch.dtype) -> None:
    """Our choice: angles in half precision would move patches."""
    model, _ = load_visualized_bge(saved(small_model(), tmp_path), dtype=dtype, device="cpu")
    assert model.dtype in (torch.bfloat16, torch.float16)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    with torch.inference_mode():
        assert bool(model.encode_image(torch.randn(1, 3, 48, 48)).isfinite().all())


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    """Our choice."""
    with pytest.raises(CheckpointError, match="'int8' is not one of float32, bfloat16, float16"):
        load_visualized_bge(saved(small_model(), tmp_path), dtype="int8")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "hpu"])
def test_a_device_that_is_not_here_is_refused(tmp_path: Path, device: str) -> None:
    """Our choice: one line, whichever of its errors torch raises."""
    with pytest.raises(CheckpointError, match=f"device '{device}' cannot be used here") as refused:
        load_visualized_bge(saved(small_model(), tmp_path), device=device)
    assert "\n" not in str(refused.value)


def test_fingerprints_tell_weights_apart_and_not_formats(tmp_path: Path, official: Path) -> None:
    """Our choice: a collection made with the official file goes on with the converted one."""
    of_file = load_visualized_bge(official, device="cpu")[0].fingerprint
    of_converted = load_visualized_bge(convert_model(official, tmp_path / "out"), device="cpu")[0].fingerprint
    of_half = load_visualized_bge(official, dtype="bfloat16", device="cpu")[0].fingerprint
    assert of_file == of_converted == of_half
    change(official, lambda state: state["visual_proj.bias"].add_(0.01))
    assert load_visualized_bge(official, device="cpu")[0].fingerprint != of_file


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_convert_writes_a_folder_that_loads_anywhere(tmp_path: Path, official: Path, stored: torch.dtype) -> None:
    """Ours and transformers' own loading; the floats stay as they were."""
    change(official, lambda state: state.update({key: tensor.to(stored) for key, tensor in state.items()}))
    folder = convert_model(official, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    weights = read_state_dict(folder / "model.safetensors")
    assert weights["visual_proj.weight"].dtype == stored
    assert not any("bge_pooler" in key or "logit_scale" in key for key in weights)
    first, _ = load_visualized_bge(official, device="cpu")
    second, _ = load_visualized_bge(folder, device="cpu")
    third = VisualizedBGE.from_pretrained(folder, dtype=torch.float32)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = first.encode_image(pixels)
        assert torch.equal(second.encode_image(pixels), expected)
        torch.testing.assert_close(third.encode_image(pixels), expected)
    half = convert_model(folder, tmp_path / "half", dtype="bfloat16")
    assert read_state_dict(half / "model.safetensors")["visual_proj.weight"].dtype == torch.bfloat16


def test_convert_says_when_it_found_no_tokenizer(tmp_path: Path, official: Path) -> None:
    """Offline, with nothing beside the file; a later ``tokenizer=`` repairs it."""
    tokenizer = official.with_name("tokenizer.json").rename(tmp_path / "words.json")
    with pytest.warns(UserWarning, match=r"no tokenizer\.json.*tokenizer="):
        folder = convert_model(official, tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match=r"BAAI/bge-base-en-v1\.5.*tokenizer="):
        load_visualized_bge(folder)
    load_visualized_bge(folder, tokenizer=tokenizer, device="cpu")
    assert (convert_model(official, folder, tokenizer=tokenizer) / "tokenizer.json").is_file()


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    """Our choice."""
    saved(small_model(), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for edit, message in [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"vision": {"depth": 3}}, "depth"),
        ({"vision": {**content["vision"], "layers": 3}}, "missing: model_visual"),
        ({"text": {**content["text"], "vocab_size": 91}}, "wrong shape"),
        ({"vision": {"width": "a" * 10}}, "does not describe"),
    ]:
        path.write_text(json.dumps({**content, **edit}))
        with pytest.raises(CheckpointError, match=message):
            load_visualized_bge(tmp_path)


@pytest.mark.parametrize("beside", [(), ("config.json", "model.safetensors")], ids=["alone", "beside its model"])
def test_an_adapter_is_told_from_a_model(tmp_path: Path, beside: tuple[str, ...]) -> None:
    """Alone it is no model; beside the weights of its model it was left out, and those answered without it."""
    tiny = visualized_bge.MODELS["tiny"].folder
    assert tiny is not None
    for name in beside:
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is an adapter for another model.*merge_and_unload"):
        locate(tmp_path, visualized_bge.MODELS)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "~/no.pth", "a/b/c", "no/where.pth"])
def test_a_path_that_is_not_there_never_asks_the_hub(name: str) -> None:
    """Our choice: one line that says what would work."""
    with pytest.raises(ModelNotFoundError, match=r"does not exist.*bundled model 'tiny'"):
        locate(name, visualized_bge.MODELS)


@pytest.mark.parametrize("name", ["BAAI/bge-visualized-base-en-v1.5", "BAAI/bge-visualized-m3", "some/model"])
def test_a_hub_out_of_reach_says_what_works_without_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is set for all tests, and the cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"hub cannot be reached.*local folder.*'tiny'") as refused:
        load_visualized_bge(name)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, FileNotFoundError)


def cached(hub: Path, repo: str, **files: Path) -> None:
    """A hub cache as huggingface_hub lays it out after a download."""
    commit = "0123456789012345678901234567890123456789"
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir()
    (folder / "snapshots" / commit).mkdir(parents=True)
    for name, source in files.items():
        blob = folder / "blobs" / name
        blob.write_bytes(source.read_bytes())
        (folder / "snapshots" / commit / name).symlink_to(f"../../blobs/{name}")


def test_a_published_name_loads_from_the_hub_cache(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real file names and repositories, in the layout that huggingface_hub keeps on disk."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    config = VisualizedBGEConfig(
        vision={"image_size": 32, "width": 128, "layers": 1},
        text={"vocab_size": 110, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
    )
    torch.save(fill(VisualizedBGE(config)).state_dict(), tmp_path / "weights.pth")
    word_tokenizer(config, ["red"]).save(str(tmp_path / "words.json"))
    cached(hub, "BAAI/bge-visualized", **{"Visualized_base_en_v1.5.pth": tmp_path / "weights.pth"})
    cached(hub, "BAAI/bge-base-en-v1.5", **{"tokenizer.json": tmp_path / "words.json"})
    with pytest.warns(UserWarning, match="is not the published Visualized_base_en_v1.5.pth: it has .* 392,860,018"):
        model, processor = load_visualized_bge(device="cpu")
    assert model.config.dimension == 64
    assert processor.tokens(["red"])["input_ids"].shape == (1, 3)
    with pytest.raises(ModelNotFoundError, match="hub cannot be reached"):
        load_visualized_bge(revision="another")


def test_our_layout_loads_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any repository with config.json, model.safetensors and tokenizer.json."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    folder = saved(small_model(), tmp_path / "model")
    cached(hub, "some/model", **{path.name: path for path in folder.iterdir()})
    assert load_visualized_bge("some/model", device="cpu")[0].config.dimension == 40


def test_a_file_that_differs_from_the_published_one_is_told_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size first, then sha256, which is remembered until the file changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.pth"
    path.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, of "abc"
    models = {"a/b": ModelEntry(repo="a/b", file="weights.pth", tokenizer_repo="c/d", size=3, sha256=sha256)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_not_published(path, models)
    assert len(list((tmp_path / "cache" / "mm_retriever" / "sha256").iterdir())) == 1
    path.write_bytes(b"abd")
    with pytest.warns(UserWarning, match="its sha256 is .*, that of the published file ba7816bf"):
        warn_if_not_published(path, models)


def test_a_folder_of_several_torch_files_must_be_named(tmp_path: Path) -> None:
    """Our choice: no guessing."""
    for name in ("a.pth", "b.pth"):
        torch.save(small_model().state_dict(), tmp_path / name)
    with pytest.raises(ModelNotFoundError, match=r"a\.pth, b\.pth"):
        locate(tmp_path, visualized_bge.MODELS)


def test_beside_the_weights_of_a_training_other_files_are_no_weights(tmp_path: Path) -> None:
    """The name that transformers gives to weights; a trainer, and models of several heads, write more files."""
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (tmp_path / name).touch()
    assert locate(tmp_path, visualized_bge.MODELS).weights == tmp_path / "pytorch_model.bin"


def test_weights_in_several_files_of_torch_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name in ("1-of-2.bin", "2-of-2.bin", "bin.index.json"):
        (tmp_path / f"pytorch_model{'.' if 'json' in name else '-'}{name}").touch()
    with pytest.raises(ModelNotFoundError, match=r"several files of torch .*save_pretrained.*writes safetensors"):
        locate(tmp_path, visualized_bge.MODELS)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, name: str) -> None:
    """Truth: the specification of such files, which a clone without Git LFS has in place of the weights."""
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{'0' * 64}", "size 12345", "")
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=r"is a pointer of Git LFS .*`git lfs pull`"):
        read_state_dict(tmp_path / name)
