"""Linear layers on a CPU whose weights oneDNN lays out once, rather than before every product.

torch hands each product the weight as it is stored, and the library below lays it out anew each time: for a query of
twelve words that takes as long as the product itself. Plain torch; knows no model.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mm_retriever.threads import ForkLock

M = TypeVar("M", bound=nn.Module)

_PACKING = ForkLock()
EXACT_ROWS = 32
_ROWS: set[int] = set()  # that have code of their own in this process
_MACHINES = {"x86_64", "amd64"}  # where it was measured


def pack_linears(model: M) -> M:
    """Let every linear layer that oneDNN can serve pack its weight at its first input; returns the model.

    Others stay as they are: on a GPU, in float16, with a weight that they share, and of kinds other than torch's own.
    """
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if type(module) is nn.Linear and names[id(module.weight)] == 1 and can_pack(module.weight):
            module.__class__ = PackedLinear
    return model


def unpack_linears(model: M) -> M:
    """Make every layer a plain `nn.Linear` again, as training and export need them; returns the model."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            _plain(module)
    return model


class PackedLinear(nn.Linear):
    """`nn.Linear` that keeps its weight in the layout that oneDNN multiplies with, for as long as nobody asks for it.

    ``state_dict()`` and ``to()`` find the weight in its place, bit by bit; the next input packs it again. The layer
    becomes a plain `nn.Linear` for good as soon as something reads ``weight``, copies or pickles the layer, or computes
    with gradients, autocast or tracing. Only a parameter that was taken from ``parameters()`` is empty while the layer
    is packed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of both."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined]
            return _plain(self).forward(x)
        packed = _packed_weight(self)
        if packed is None:
            packed = _pack(self)
        if packed is None or packed.dtype != x.dtype or x.shape[-1] != self.in_features:
            return _plain(self).forward(x)
        rows = x.numel() // self.in_features
        computed = _rows_computed(rows)
        if computed == rows:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
            return output
        padded = x.new_zeros(computed, self.in_features)
        padded[:rows] = x.reshape(rows, self.in_features)
        output = torch.ops.mkldnn._linear_pointwise(padded, packed, self.bias, "none", [], "")
        return output[:rows].view(*x.shape[:-1], self.out_features)

    def __getattr__(self, name: str) -> Any:
        return getattr(_plain(self), name) if name == "weight" else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        packed = _packed_weight(self)
        if packed is not None:
            probe = torch.empty(0, dtype=packed.dtype)
            if fn(probe) is probe and not probe.is_shared():
                return self  # moved to where it is
        with _PACKING:
            _unpack(self)
            moved: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return moved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _PACKING:
            _unpack(self)
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        with _PACKING:
            _unpack(self)
            super()._load_from_state_dict(*arguments)


def _rows_computed(rows: int) -> int:
    """How many rows an input is computed with: its own, for the first `EXACT_ROWS` different numbers, then rounded up.

    oneDNN writes code of about a megabyte for each number of rows and each layer's shape, and keeps it: texts of any
    length would fill gigabytes. At most an eighth is computed in vain.
    """
    if rows in _ROWS:
        return rows
    if len(_ROWS) < EXACT_ROWS:
        _ROWS.add(rows)
        return rows
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def _packed_weight(layer: nn.Linear) -> Tensor | None:
    """The packed weight, which hangs on the emptied one: layers that share a parameter share both."""
    packed: Tensor | None = getattr(layer._parameters["weight"], "packed", None)
    return packed


def _pack(layer: nn.Linear) -> Tensor | None:
    """The packed weight, made of the weight, which is emptied; None where oneDNN does not take it."""
    weight = layer._parameters["weight"]
    with _PACKING, torch.inference_mode(False), torch.no_grad():
        packed = _packed_weight(layer)  # another thread may have made it, or made the layer plain
        if packed is None and weight is not None and isinstance(layer, PackedLinear) and can_pack(weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            weight.packed = packed  # type: ignore[attr-defined]
            weight.data = weight.data.new_empty(0)
        return packed


def _unpack(layer: nn.Linear) -> None:
    """Put the weight back; only under the lock, as the next input may pack it again."""
    weight, packed = layer._parameters["weight"], _packed_weight(layer)
    if weight is not None and packed is not None:
        with torch.inference_mode(False), torch.no_grad():
            weight.data = packed.to_dense()
            del weight.packed  # type: ignore[attr-defined]


def _plain(layer: nn.Linear) -> nn.Linear:
    """The same layer as torch's own, for good."""
    with _PACKING:
        _unpack(layer)
        layer.__class__ = nn.Linear
    return layer


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN computes with such weights here, and gains by it."""
    if weight.device.type != "cpu" or weight.layout != torch.strided or type(weight.data) is not Tensor:
        return False
    if not weight.numel() or platform.machine().lower() not in _MACHINES or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
