"""MagicLens against the outputs of its authors' code, and its files, of which nothing is executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mm_retriever.checkpoint import load_strict, read_state_dict, skeleton
from mm_retriever.embedders.clip import clip_config, fill_positions
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.magiclens.encoder import MagicLens, MagicLensConfig, MagicLensEncoder, config_of_shapes
from mm_retriever.embedders.magiclens.flax_file import from_flax, read_flax_file
from mm_retriever.embedders.registry import convert_model, load_embedder
from mm_retriever.errors import CheckpointError, ModelNotFoundError, QueryError
from tests.support.clip_golden import IMAGES, distance, flax_arrays, golden
from tests.support.flax_files import extension, packed, write_flax_file
from tests.support.small_models import clip_words

TOLERANCE = 5e-6


class OfIds(MagicLensEncoder):
    """Takes a text that is a row of ids, as the golden file has them."""

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(number) for number in text.split()] for text in texts if text[:1].isdigit()]


def filled(name: str) -> OfIds:
    """Weights by name, in the shape of a golden, through the reader of flax arrays."""
    arrays = flax_arrays(name)
    content = config_of_shapes({path: tuple(array.shape) for path, array in arrays.items()})
    sizes = {size: content[size] for size in ("num_layers", "num_heads", "ff_hidden_size")}
    config = MagicLensConfig(clip=clip_config(content, ""), **sizes)
    model = skeleton(lambda: MagicLens(config), "")
    load_strict(model, from_flax(arrays), source="", device="cpu", dtype=torch.float32)
    fill_positions(model, torch.device("cpu"))
    return OfIds(model.eval(), clip_words(97), name=name, fingerprint="")


@pytest.fixture(scope="module")
def tiny() -> OfIds:
    return filled("tiny")


def worst(encoder: OfIds, theirs: dict[str, Any], images: dict[str, Any]) -> float:
    """Distance of the vectors of every image with every text."""
    most = 0.0
    for key in theirs:
        if key.startswith("vector/"):
            image, row = key.removeprefix("vector/").split("|")
            ids = " ".join(str(number) for number in theirs[f"ids/{row}"] if number)
            most = max(most, distance(encoder.encode([Content(ids, images[image])])[0], theirs[key]))
    return most


def test_vectors_equal_the_original(tiny: OfIds) -> None:
    """Golden vectors, alone and as one batch."""
    theirs = golden("magiclens", "tiny_outputs")
    squares = {name: theirs[f"square/{name}"] for name in ("rand0", "rand1")}
    assert worst(tiny, theirs, squares) < TOLERANCE
    texts = [" ".join(str(number) for number in theirs[f"ids/{row}"] if number) for row in range(3)]
    batch = tiny.encode([Content(text, squares["rand1"]) for text in texts])
    assert distance(batch, np.stack([theirs[f"vector/rand1|{row}"] for row in range(3)])) < TOLERANCE


def test_every_stage_equals_the_original(tiny: OfIds) -> None:
    """Golden tensors of the first image and text, relative to the largest number of a stage."""
    theirs, seen = golden("magiclens", "tiny_outputs"), {}
    model: Any = tiny.model

    def watch(name: str, module: nn.Module, *, arriving: bool = False) -> Any:
        if arriving:
            return module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0][0]}))
        return module.register_forward_hook(lambda _, __, out: seen.update({name: out[0]}))

    hooks = [
        watch("image_embed", model.clip.visual_projection),
        watch("text_embed", model.clip.text_projection),
        watch("encoder_in", model.multimodal_encoder[0], arriving=True),
        *(watch(f"encoder_layer{n}", layer) for n, layer in enumerate(model.multimodal_encoder)),
        watch("pooled", model.contrastive_multimodal_pooler),
    ]
    ids = " ".join(str(number) for number in theirs["ids/0"] if number)
    tiny.encode([Content(ids, theirs["square/rand0"])])
    for hook in hooks:
        hook.remove()
    seen["pixels"] = tiny.pixel_values([theirs["square/rand0"]])[0].permute(1, 2, 0)
    assert {key.removeprefix("dbg/") for key in theirs if key.startswith("dbg/")} == set(seen)
    for name, ours in seen.items():
        expected = theirs[f"dbg/{name}"]
        assert distance(ours, expected) < TOLERANCE * max(1.0, float(np.abs(expected).max())), name


@pytest.mark.slow
def test_full_size_equals_the_original() -> None:
    """Golden vectors of the base architecture, from image files on."""
    theirs = golden("magiclens", "base_outputs")
    encoder = filled("base")
    images = {key.removeprefix("vector/").split("|")[0] for key in theirs if key.startswith("vector/")}
    squares = {name: encoder.prepare(Image.open(IMAGES / name)) for name in images}
    assert worst(encoder, theirs, squares) < TOLERANCE


def test_preprocessing_equals_the_original(tiny: OfIds) -> None:
    """Every eighth row and column of the original's squares, which jax resized: 2e-5 is its own rounding."""
    for name, theirs in golden("magiclens", "squares_every_eighth").items():
        encoder = OfIds(tiny.model, tiny.tokenizer, name="", fingerprint="")
        encoder.side = 224
        assert distance(encoder.prepare(Image.open(IMAGES / name))[3::8, 3::8], theirs) < 2e-5


def test_an_image_is_divided_by_its_own_maximum(tiny: OfIds) -> None:
    """As in the original; a black image stays black, where the original adds 1e-12 to the divisor."""
    dark = tiny.prepare(Image.new("RGB", (60, 90), (10, 20, 40)))
    assert np.allclose(dark, [0.25, 0.5, 1.0])
    assert not tiny.prepare(Image.new("RGB", (60, 90))).any()


def test_a_text_alone_is_refused_with_the_way_out(tiny: OfIds) -> None:
    with pytest.raises(QueryError, match=r"tiny embeds images.*no text alone.*give an image.*BAAI/BGE-VL-base"):
        tiny.encode([Content("red mug")])


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    clip_words(97).save(str(tmp_path / "tokenizer.json"))
    return write_flax_file(tmp_path / "magic_lens_clip_base.pkl", flax_arrays("tiny"))


def test_a_checkpoint_loads_by_path_and_converts_to_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    """The file by its path, its folder, and the converted folder: one space, equal vectors."""
    first, second = load_embedder(checkpoint, device="cpu"), load_embedder(tmp_path, device="cpu")
    folder = convert_model(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    third = load_embedder(folder, device="cpu")
    assert first.space == second.space == third.space
    content = [Content("red mug", first.prepare(Image.new("RGB", (60, 90), (10, 20, 40))))]
    assert np.array_equal(first.encode(content), second.encode(content))
    assert np.array_equal(first.encode(content), third.encode(content))
    assert all(tensor.dtype == torch.float32 for tensor in read_state_dict(folder / "model.safetensors").values())


def test_the_reader_gives_back_what_pickle_would(checkpoint: Path) -> None:
    """Python's own pickle on a file that this test wrote."""
    assert isinstance(pickle.loads(checkpoint.read_bytes()), bytes)
    arrays = read_flax_file(checkpoint)
    assert arrays.keys() == flax_arrays("tiny").keys()
    assert all(torch.equal(arrays[path], array) for path, array in flax_arrays("tiny").items())


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_that_has_bytes_is_read(tmp_path: Path, protocol: int) -> None:
    for size in (3, 300, 70_000):  # short, in a frame, beside frames
        tree = {"params": {"a": np.arange(size, dtype=np.float32)}}
        path = tmp_path / "a.pkl"
        path.write_bytes(pickle.dumps(packed(tree), protocol=protocol))
        assert torch.equal(read_flax_file(path)["params/a"], torch.arange(size, dtype=torch.float32))


def test_chunked_arrays_and_half_precision_are_read(tmp_path: Path) -> None:
    """flax writes arrays above 1 GiB in chunks, with lists as maps from "0"; bfloat16 by its own name."""
    chunks = {"0": np.arange(4, dtype=np.float32), "1": np.arange(4, 6, dtype=np.float32)}
    tree = {
        "a": {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks},
        "b": np.arange(3, dtype=np.float16),
    }
    half = extension(
        1, packed([[2], "bfloat16", torch.tensor([1.5, -2]).bfloat16().view(torch.uint8).numpy().tobytes()])
    )
    content = b"\x83" + packed(tree)[5:] + packed("c") + half
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=4))
    arrays = read_flax_file(tmp_path / "a.pkl")
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["b"].tolist() == [0, 1, 2]
    assert arrays["c"].tolist() == [1.5, -2]


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "magic_lens_clip_base.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Code(trace), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"more than one bytes object .*could run code: refused"):
        load_embedder(path, device="cpu")
    assert not trace.exists()


ARRAY = packed(np.ones(2, dtype=np.float32))
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a dict": lambda: pickle.dumps({"params": b"a"}),
    "two objects": lambda: pickle.dumps((b"a", b"b"), protocol=4),
    "a text": lambda: pickle.dumps("params"),
    "a bytearray": lambda: pickle.dumps(bytearray(b"a"), protocol=5),
    "bytes and more": lambda: pickle.dumps(packed({"a": 1}), protocol=4) + b"more",
    "no pickle": lambda: b"\xff" * 100,
    "nothing": lambda: b"",
    "a size that is not there": lambda: b"\x80\x04\x8e" + b"\xff" * 8 + b"a.",
    "protocol 0 bytes": lambda: pickle.dumps(b"a", protocol=0),
    "no msgpack": lambda: pickle.dumps(b"\xc1", protocol=4),
    "msgpack cut short": lambda: pickle.dumps(packed({"a": {"b": 1}})[:-4], protocol=4),
    "msgpack and more": lambda: pickle.dumps(packed({}) + b"\x01", protocol=4),
    "no map": lambda: pickle.dumps(packed([1, 2]), protocol=4),
    "a map without end": lambda: pickle.dumps(b"\xdf\xff\xff\xff\xff", protocol=4),
    "a billion nils": lambda: pickle.dumps(b"\xdd\x00\x02\x00\x00" + b"\xc0" * 131_072, protocol=4),
    "maps ten thousand deep": lambda: pickle.dumps(b"\x81\xa1a" * 10_000, protocol=4),
    "lists ten thousand deep": lambda: pickle.dumps(b"\x91" * 10_000, protocol=4),
    "a key twice": lambda: pickle.dumps(b"\x82" + (packed("a") + ARRAY) * 2, protocol=4),
    "a key that is a number": lambda: pickle.dumps(b"\x81\x01" + ARRAY, protocol=4),
    "a key with a slash": lambda: pickle.dumps(packed({"a/b": np.ones(1, dtype=np.float32)}), protocol=4),
    "a leaf that is a number": lambda: pickle.dumps(packed({"a": 1}), protocol=4),
    "another extension": lambda: pickle.dumps(b"\x81" + packed("a") + extension(2, packed([1, 2])), protocol=4),
    "an array of objects": lambda: of_array([[1], "object", b"12345678"]),
    "an array of too large a shape": lambda: of_array([[10**9, 10**9], "float32", b"1234"]),
    "an array of a negative shape": lambda: of_array([[-1, -1], "float32", b"1234"]),
    "an array of 100 dimensions": lambda: of_array([[1] * 100, "float32", b"1234"]),
    "an array of half a number": lambda: of_array([[1], "float32", b"123"]),
    "an array without bytes": lambda: of_array([[1], "float32", "1234"]),
    "chunks that are none": lambda: pickle.dumps(
        packed({"a": {"__msgpack_chunked_array__": True, "shape": [2], "chunks": {"1": 3}}}), protocol=4
    ),
    "arrays of another model": lambda: pickle.dumps(
        packed({"params": {"a": np.ones(3, dtype=np.float32)}}), protocol=4
    ),
}


def of_array(content: list[Any]) -> bytes:
    return pickle.dumps(b"\x81" + packed("a") + extension(1, packed(content)), protocol=4)


@pytest.mark.parametrize("what", HOSTILE)
def test_anything_else_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "magic_lens_clip_base.pkl"
    path.write_bytes(HOSTILE[what]())
    with pytest.raises(CheckpointError) as refused:
        load_embedder(path, device="cpu")
    message = str(refused.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    assert len(message) < 600


def test_a_flipped_bit_or_a_cut_is_refused_or_another_number(checkpoint: Path, tried: Any) -> None:
    """Damage anywhere in the structure: one of our errors, or arrays; never another exception, never a hang."""
    whole = checkpoint.read_bytes()
    generator = np.random.default_rng(0)
    for place in [*range(200), *generator.integers(0, len(whole), 100)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        checkpoint.write_bytes(damaged if place % 3 else damaged[:place])
        tried["damaged MagicLens files"] += 1
        try:
            from_flax(read_flax_file(checkpoint))
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("change", ["an array less", "another shape", "fewer dimensions", "one more layer"])
def test_arrays_that_do_not_fit_are_named(checkpoint: Path, change: str) -> None:
    arrays = flax_arrays("tiny")
    path = "params/multimodal_encoder/x_layers_1/ff_layer/ffn_layer1/linear/w"
    if change == "an array less":
        del arrays[path]
    elif change == "another shape":
        arrays[path] = arrays[path][:-1]
    elif change == "fewer dimensions":
        arrays[path] = arrays[path][0]
    else:
        arrays[path.replace("layers_1", "layers_7")] = arrays[path]
    write_flax_file(checkpoint, arrays)
    with pytest.raises(CheckpointError, match=r"ffn_layer1") as refused:
        load_embedder(checkpoint, device="cpu")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["magiclens-base", "magiclens-large"])
def test_a_published_name_says_where_its_file_is(name: str, tmp_path: Path) -> None:
    """The weights are in a bucket, and on no model hub."""
    for call in (lambda: load_embedder(name), lambda: convert_model(name, tmp_path)):
        with pytest.raises(
            ModelNotFoundError, match=r"gsutil cp gs://gresearch/magiclens/models/magic_lens_clip_\w+\.pkl"
        ):
            call()
