"""OpenVINO computes the vectors that torch computes, keeps what it exported, and sends nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image

from mm_retriever.demo.catalogue import catalogue, draw_product
from mm_retriever.embedders.embedder import Content, Embedder, cache_identity
from mm_retriever.embedders.gate import LEAST_COSINE, Gate, measure, samples
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import CheckpointError, QueryError
from mm_retriever.files import cache_folder
from tests.support.small_models import MAKERS

EXPORTED = (
    pytest.param("visualized_bge"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("bge_vl", "magiclens", "sentence_transformers.siglip2")),
)
COLOURS = ((200, 90, 30), (20, 140, 80), (60, 60, 200))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mm_retriever" / "openvino"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The model that is exported fastest."""
    with MAKERS["bge_vl"](tmp_path_factory.mktemp("small"), 3) as model:
        yield model.name


def contents(embedder: Embedder) -> list[list[Content]]:
    """By kind: more rows than were traced, and texts of other lengths."""
    images = [embedder.prepare(Image.new("RGB", (90, 50), colour)) for colour in COLOURS]
    texts = ["mug", "a red phone case with white stars and the", "", "green mug"]
    return [
        [Content(image=image) for image in images],
        [Content(text) for text in texts],
        [Content(text, images[0]) for text in texts],
        [Content("red", images[1])],
    ]


def test_the_weights_of_torch_are_freed(small):
    """Our promise: a model is in memory once. Saving what is left of it fails, and never writes an empty model."""
    embedder = load_embedder(small, backend="openvino")
    assert {parameter.device.type for parameter in embedder.torch_model.parameters()} == {"meta"}
    with pytest.raises(NotImplementedError, match="meta"):
        embedder.save(Path(small) / "again")
    assert embedder.device == "cpu"
    assert embedder.encode([Content("red mug")]).shape == (1, embedder.dimension)


@pytest.mark.parametrize("family", EXPORTED)
def test_vectors_are_those_of_torch_and_the_space_stays(family, tmp_path):
    """Our choice: equal within the rounding of another order of sums, for every kind and any number of rows."""
    with MAKERS[family](tmp_path, 3) as model:
        plain = load_embedder(model.name, device="cpu", **model.options)
        by_openvino = load_embedder(model.name, backend="openvino", **model.options)
        compared = 0
        for given in contents(plain):
            try:
                expected = plain.encode(given)
            except QueryError:  # MagicLens has no vectors of texts alone
                with pytest.raises(QueryError):
                    by_openvino.encode(given)
                continue
            np.testing.assert_allclose(by_openvino.encode(given), expected, atol=1e-6)
            compared += 1
        assert compared >= 3
        assert by_openvino.space == plain.space
        assert by_openvino.note.startswith("float32 openvino")
        assert cache_identity(by_openvino, query=False) != cache_identity(plain, query=False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_rows_that_threads_share_are_those_of_torch_in_their_order(small, threads):
    """Our choice: shares of unequal size too, rows that are all different, and few rows again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, by_openvino = load_embedder(small, device="cpu"), load_embedder(small, backend="openvino")
        images = [plain.prepare(Image.new("RGB", (90, 50), (7 * row, 255 - 6 * row, 90))) for row in range(35)]
        for given in (
            [Content(image=image) for image in images],
            [Content(f"mug {row}" + " and a star" * (row % 3)) for row in range(14)],
            [Content(f"in {row}", image) for row, image in enumerate(images[:13])],
            [Content(image=image) for image in images[:2]],
        ):
            np.testing.assert_allclose(by_openvino.encode(given), plain.encode(given), atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_a_model_is_exported_once_and_a_broken_file_is_made_again(small, cache, caplog):
    """Our choice: what is in the cache is used as long as it is whole and ours, and said where it is not."""
    first = load_embedder(small, backend="openvino").encode([Content("red mug")])
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    whole = file.read_bytes()
    stamp = file.stat().st_mtime_ns

    np.testing.assert_array_equal(load_embedder(small, backend="openvino").encode([Content("red mug")]), first)
    assert file.stat().st_mtime_ns == stamp
    assert not caplog.records

    other = b"not a model"
    swapped = hashlib.sha256(other).digest() + other
    file.write_bytes(swapped)  # whole, but no tensors
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(load_embedder(small, backend="openvino").encode([Content("red mug")]), first)
    assert "exported again" in caplog.text
    assert file.read_bytes()[:32] != swapped[:32]

    caplog.clear()
    file.write_bytes(whole[:-5])
    file.chmod(0o666)  # anybody may have written it
    load_embedder(small, backend="openvino")
    assert "another user may have written it" in caplog.text


def test_without_a_place_for_the_cache_the_model_works_and_says_so(small, tmp_path, monkeypatch, caplog):
    """Our choice: a file is where the folder should be, as it would be for a home that cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    embedder = load_embedder(small, backend="openvino")
    assert embedder.encode([Content("red mug")]).shape == (1, 40)
    assert "cannot be written" in caplog.text


def test_a_full_disk_costs_the_cache_and_not_the_model(small, cache, caplog):
    """OpenVINO writes the graphs itself, and raises its own error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        embedder = load_embedder(small, backend="openvino")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert embedder.encode([Content("red mug")]).shape == (1, 40)
    assert "cannot be written" in caplog.text
    assert list(cache.iterdir()) == []


def test_temporary_files_are_where_the_cache_has_room(small, cache, tmp_path, monkeypatch):
    """Many machines have a small place for temporary files: a model of some gigabytes filled it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    load_embedder(small, backend="openvino")
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_what_does_not_go_together_is_refused_in_one_line():
    """Our choice: nothing asked for is silently left out."""
    with pytest.raises(QueryError, match="dtype 'float16' is not one of float32, bfloat16, int8"):
        load_embedder("tiny", backend="openvino", dtype="float16")
    with pytest.raises(QueryError, match="backend='tensorrt' is not one of torch, openvino, auto"):
        load_embedder("tiny", backend="tensorrt")
    with pytest.raises(QueryError, match="give backend='openvino'"):
        load_embedder("tiny", dtype="int8")
    with pytest.raises(QueryError, match="computes on the CPU"):
        load_embedder("tiny", backend="openvino", device="meta")
    with pytest.raises(QueryError, match="the server at base_url has its own"):
        load_embedder("m", backend="openvino", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(QueryError, match="is a loaded model"):
        ComposedEmbedding(load_embedder("tiny", device="cpu"), backend="openvino")


def test_bfloat16_is_computed_where_the_processor_has_it_and_refused_elsewhere(small):
    """OpenVINO itself would compute in float32 without a word."""
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(QueryError, match="this processor does not compute in bfloat16"):
            load_embedder(small, backend="openvino", dtype="bfloat16")
        return
    reference = load_embedder(small, device="cpu").encode([Content("red mug")])
    vectors = load_embedder(small, backend="openvino", dtype="bfloat16").encode([Content("red mug")])
    assert 0.99 < float((reference * vectors).sum()) < 1 - 1e-7


@pytest.mark.slow
def test_a_model_whose_inputs_have_no_fixed_form_is_refused(tmp_path):
    """Qwen's models see every image in its own shape."""
    with MAKERS["sentence_transformers"](tmp_path, 1) as model, pytest.raises(CheckpointError, match="take backend"):
        load_embedder(model.name, backend="openvino")


class Turned:
    """An embedder in a plane: the content is the angle."""

    name = space = note = "turned"
    dimension = 2

    def __init__(self, by: float) -> None:
        self.by = by

    def prepare(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((1, 1)).convert("RGB"))

    def encode(self, contents, *, query: bool = False) -> np.ndarray:
        angles = np.array([float(c.image[0, 0, 0] if c.image is not None else len(c.text)) for c in contents])
        angles = angles / 100 + self.by * (np.arange(len(contents)) % 2)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_gate_is_the_cosine_and_the_share_of_equal_neighbours():
    """By hand: half of the vectors are turned by 0.2, so the least cosine is cos(0.2) and the mean halfway to 1."""
    held_out = [Content(image=np.full((1, 1, 3), value, dtype=np.uint8)) for value in range(0, 120, 2)]
    reference = Turned(0).encode(held_out)
    same = measure(reference, reference, held_out, "here")
    assert (same.least_cosine, same.same_top) == (pytest.approx(1), 1.0)
    assert same.passes
    turned = measure(reference, Turned(0.2).encode(held_out), held_out, "here")
    assert turned.least_cosine == pytest.approx(np.cos(0.2), abs=1e-6)
    assert turned.mean_cosine == pytest.approx((1 + np.cos(0.2)) / 2, abs=1e-6)
    assert turned.same_top < 1
    assert not turned.passes
    assert f"at least {LEAST_COSINE}" in str(turned)
    assert not Gate(0.999, 0.9999, 0.97, 60, "here").passes  # alike, and yet in another order


def test_calibration_takes_own_images_each_once_and_counts_what_cannot_be_read(tmp_path):
    """Our choice: no image is in both halves, and with enough of them none is drawn."""
    for number in range(130):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:03}-copy.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    taken = samples(Turned(0), tmp_path)
    halves = [
        {content.image.tobytes() for content in part if content.image is not None}
        for part in (taken.calibration, taken.held_out)
    ]
    assert min(map(len, halves)) >= 60
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 130
    assert taken.source == f"{str(tmp_path)!r}, 1 unreadable left out"
    paths = sorted(tmp_path.glob("*-copy.png"))
    assert samples(Turned(0), [*paths[:2], *map(str, paths[2:])]).source == "the images given"
    with pytest.raises(QueryError, match="no folder"):
        samples(Turned(0), tmp_path / "missing")


def test_a_forked_child_is_told_to_load_for_itself(small, monkeypatch):
    """OpenVINO's threads do not survive a fork; waiting for them would never end."""
    embedder = load_embedder(small, backend="openvino")
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(CheckpointError, match="load it in each worker"):
        embedder.encode([Content("red mug")])


_SILENT = """
import sys, pathlib
calls = []
def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.fork"):
        calls.append((event, str(arguments)[:100]))
sys.addaudithook(hear)
first = sys.argv[1] == "openvino first"
if first:
    import openvino, openvino_telemetry
from mm_retriever.embedders.openvino import _alone, _nncf, with_openvino
from mm_retriever.embedders.registry import load_embedder
model = load_embedder("tiny", device="cpu")
calls.clear()
from mm_retriever.embedders.gate import Samples
from mm_retriever.demo.catalogue import catalogue, draw_product
from mm_retriever.embedders.embedder import Content
with_openvino(model, "float32", lambda: None)
import numpy as np
nncf = _nncf()
contents = [Content("a mug"), Content("a red mug")]
model = load_embedder("tiny", device="cpu")
side = model.processor.config.vision_shape.image_size
images = [Content(image=np.full((side, side, 3), value, np.uint8)) for value in range(0, 250, 20)]
pairs = [Content("in red", image.image) for image in images]
try:
    with_openvino(model, "int8", lambda: Samples(contents + images + pairs, contents + images + pairs, "made up"))
except Exception as error:
    assert "too far from itself" in str(error), error
import threading
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join()
print("CALLS", calls)
found = [file.name for file in pathlib.Path.home().rglob("*")]
print("FILES", [name for name in found if "telemetry" in name or name == "intel"])
"""


def _silent(tmp_path: Path, order: str) -> str:
    """What a fresh process prints that has no reason not to send: no test framework, no continuous integration."""
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")
    }
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _SILENT, order], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CALLS []" in done.stdout
    if order == "ours":  # a program that imports OpenVINO itself has its files
        assert "FILES []" in done.stdout
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ours", "openvino first"])
def test_nothing_is_sent_or_drawn_while_a_model_is_quantised(tmp_path, order):
    """OpenVINO and NNCF send usage data unless told otherwise; an audit hook hears every attempt of the process.

    Also in a program that has imported OpenVINO before.
    """
    printed = _silent(tmp_path, order)
    assert "Statistics" not in printed
    assert "INFO:nncf" not in printed


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    """Enough images that no others are drawn."""
    return [draw_product(*product.looks, seed=product.seed, size=96) for product in catalogue()[300:432]]


@pytest.mark.slow
def test_the_bundled_model_keeps_its_quality_in_8_bits(cache, drawn):
    """Our choice: least cosine .995 and 98% of the top 10 on held-out images; and the same numbers from the cache."""
    plain = load_embedder("tiny", device="cpu")
    quantised = load_embedder("tiny", backend="openvino", dtype="int8", calibration=drawn)
    assert quantised.space == plain.space
    assert quantised.note.startswith("int8 openvino ")
    held_out = samples(plain, drawn).held_out
    gate = measure(plain.encode(held_out), quantised.encode(held_out), held_out, "")
    assert gate.passes, gate
    assert gate.least_cosine < 1 - 1e-5  # it is quantised
    again = load_embedder("tiny", backend="openvino", dtype="int8")
    np.testing.assert_array_equal(again.encode(held_out[:5]), quantised.encode(held_out[:5]))
    assert again.note == quantised.note


@pytest.mark.slow
def test_a_quantisation_that_is_too_coarse_is_refused_now_and_later(tmp_path, cache, drawn):
    """Random weights lose their order in 8 bits; the refusal is remembered, and names the figures."""
    with MAKERS["visualized_bge"](tmp_path, 3) as model:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"least cosine \d\.\d+ \(at least 0.995\)"):
                load_embedder(model.name, backend="openvino", dtype="int8", calibration=drawn)
        assert len(list(cache_folder("openvino").iterdir())) == 1


@pytest.mark.slow
def test_auto_takes_the_fastest_that_passes_and_remembers_it(small, cache, drawn):
    """Our choice: it says what it measured, and measures once for a model and a machine."""
    first = load_embedder(small, backend="auto", dtype="float32", calibration=drawn)
    assert "torch float32" in first.remark
    assert "openvino float32" in first.remark
    again = load_embedder(small, backend="auto", dtype="float32")
    assert again.remark.endswith("as measured here before")
    assert again.note == first.note
    assert ComposedEmbedding(small, backend="auto", dtype="float32").backend in ("torch", "openvino")
