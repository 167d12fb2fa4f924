"""Packed linear layers: equal results, and a plain layer for everybody who looks at the weight."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mm_retriever import packed_linear
from mm_retriever.packed_linear import PackedLinear, can_pack, pack_linears, unpack_linears

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not can_pack(torch.ones(1, 1)), reason="oneDNN does not pack weights on this machine")


class Net(nn.Module):
    """Two layers, and words that share their weight with the last one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.words = nn.Embedding(23, 13)
        self.layers = nn.Sequential(nn.Linear(13, 48), nn.GELU(), nn.Linear(48, 13, bias=False))
        self.head = nn.Linear(13, 23, bias=False)
        self.head.weight = self.words.weight
        self.to(dtype).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


@pytest.fixture(params=DTYPES, ids=str)
def pair(request):
    """A plain model, the same one packed, and an input of both."""
    torch.manual_seed(0)
    plain = Net(request.param)
    packed = pack_linears(copy.deepcopy(plain))
    x = torch.randn(2, 5, 13).to(request.param)
    with torch.inference_mode():
        packed(x)
    assert [type(packed.layers[0]), type(packed.layers[2])] == [PackedLinear] * 2
    assert packed.layers[0]._parameters["weight"].numel() == 0  # packed by now
    return plain, packed, x


def is_whole(packed: Net) -> bool:
    return packed.layers[0]._parameters["weight"].shape == (48, 13)


def is_plain(packed: Net) -> bool:
    return type(packed.layers[0]) is nn.Linear and is_whole(packed)


def test_packed_layers_compute_the_same(pair):
    plain, packed, x = pair
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(packed(x[0, 0]), plain(x[0, 0]))
        assert packed(x[:0]).shape == (0, 5, 23)


def test_a_shared_weight_is_not_packed(pair):
    _, packed, _ = pair
    assert type(packed.head) is nn.Linear
    assert packed.head.weight is packed.words.weight


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.layers[0].weight.detach(),
        lambda model: copy.deepcopy(model).layers[0].weight.detach(),
        lambda model: copy.copy(model.layers[0]).weight.detach(),
        lambda model: pickle.loads(pickle.dumps(model)).layers[0].weight.detach(),
        lambda model: unpack_linears(model).layers[0].weight.detach(),
    ],
    ids=["attribute", "deepcopy", "copy", "pickle", "unpack"],
)
def test_who_reads_the_weight_finds_it_whole(pair, read):
    plain, packed, x = pair
    assert torch.equal(read(packed), plain.layers[0].weight)
    assert is_plain(packed)
    with torch.inference_mode():
        assert torch.equal(packed(x), plain(x))


def test_a_state_dict_holds_the_weight_and_changes_no_result(pair):
    plain, packed, x = pair
    with torch.inference_mode():
        before = packed(x)
    assert torch.equal(packed.state_dict()["layers.0.weight"], plain.layers[0].weight)
    assert is_whole(packed)
    packed.state_dict()["layers.2.weight"].zero_()
    with torch.inference_mode():
        assert not packed(x).any()
    packed.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert torch.equal(packed(x), before)
    assert not is_whole(packed)


def test_a_saved_model_is_the_plain_one(pair):
    plain, packed, _ = pair
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    again = Net(packed.words.weight.dtype)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_loaded_weights_replace_packed_ones(pair):
    plain, packed, x = pair
    other = Net(x.dtype)
    packed.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), other(x))
        assert not torch.equal(packed(x), plain(x))


def test_a_weight_that_is_set_replaces_a_packed_one(pair):
    _, packed, x = pair
    layer = packed.layers[2]
    layer.weight = nn.Parameter(torch.zeros(13, 48, dtype=x.dtype))
    with torch.inference_mode():
        assert not layer(torch.ones(1, 48, dtype=x.dtype)).any()


def test_moving_to_the_same_place_keeps_layers_packed(pair):
    plain, packed, x = pair
    packed.to("cpu").to(x.dtype)
    assert not is_whole(packed)
    packed.to(torch.float64)
    assert is_whole(packed)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x.double()), plain.double()(x.double()))
    assert packed.to("meta").layers[0].weight.device.type == "meta"


def test_shared_memory_holds_the_weights(pair):
    _, packed, _ = pair
    packed.share_memory()
    assert packed.layers[0].weight.is_shared()
    assert packed.layers[0].weight.shape == (48, 13)


def test_an_optimizer_made_while_layers_were_packed_trains_them(pair):
    plain, packed, x = pair
    steps = torch.optim.SGD(packed.parameters(), lr=1.0)
    packed(x).float().square().sum().backward()
    steps.step()
    assert not torch.equal(packed.layers[0].weight, plain.layers[0].weight)
    assert not torch.equal(packed.layers[2].weight, plain.layers[2].weight)


def test_autocast_computes_as_with_plain_layers(pair):
    plain, packed, x = pair
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_has_the_weights(pair):
    plain, packed, x = pair
    with torch.no_grad():
        traced = torch.jit.trace(packed, x)
        torch.testing.assert_close(traced(x), plain(x))


def test_weights_that_cannot_be_packed_stay():
    with torch.inference_mode():
        half = pack_linears(Net(torch.float16))
        assert is_plain(half)
        assert half(torch.ones(1, 13, dtype=torch.float16)).shape == (1, 23)
        assert is_plain(half)


def test_an_input_of_another_dtype_is_refused_as_ever(pair):
    _, packed, x = pair
    other = torch.bfloat16 if x.dtype == torch.float32 else torch.float32
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        packed(x.to(other))


def test_threads_may_pack_and_unpack_at_once():
    plain = Net()
    x = torch.randn(4, 13)

    def compute(model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            packed = pack_linears(copy.deepcopy(plain))
            jobs = [threads.submit(compute, packed) for _ in range(8)]
            weights = packed.state_dict()["layers.0.weight"]
            for job in jobs:
                torch.testing.assert_close(job.result(), compute(plain))
            assert torch.equal(weights, plain.layers[0].weight)


def test_inputs_of_any_number_of_rows_compute_the_same_with_few_forms_of_code(monkeypatch):
    monkeypatch.setattr(packed_linear, "_ROWS", set())
    plain = nn.Sequential(nn.Linear(13, 48), nn.GELU(), nn.Linear(48, 13, bias=False)).eval()
    packed = pack_linears(copy.deepcopy(plain))
    computed = set()
    with torch.inference_mode():
        for rows in [*range(300), 1500]:
            x = torch.randn(rows, 1, 13)
            torch.testing.assert_close(packed(x), plain(x))
            computed.add(packed_linear._rows_computed(rows))
        x = torch.randn(2, 131, 13).transpose(0, 1)  # rows that do not lie one after the other
        torch.testing.assert_close(packed(x), plain(x))
    assert len(computed) < 80
    assert all(packed_linear._rows_computed(rows) <= rows * 9 / 8 for rows in range(5000))
