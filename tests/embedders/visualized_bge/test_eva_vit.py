"""Pieces of the vision tower against plain, slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_retriever.embedders.visualized_bge import eva_vit
from mm_retriever.embedders.visualized_bge.eva_vit import (
    EvaVisionConfig,
    EvaVisionTower,
    RotaryPositions,
    attend,
    rope_frequencies,
    rotate,
)


def test_rope_turns_the_first_half_by_row_and_the_second_by_column() -> None:
    """EVA-CLIP rope.py: frequencies 10000**(-2i/half), positions scaled to 16, each angle twice."""
    config = EvaVisionConfig(image_size=60, patch_size=20, width=72, head_width=24)
    cos, sin = rope_frequencies(config)
    assert cos.shape == sin.shape == (9, 24)
    for patch in range(9):
        for dim in range(24):
            place = patch // 3 if dim < 12 else patch % 3
            angle = place / 3 * 16 / 10_000 ** (2 * (dim % 12 // 2) / 12)
            assert math.isclose(cos[patch, dim], math.cos(angle), abs_tol=1e-5)
            assert math.isclose(sin[patch, dim], math.sin(angle), abs_tol=1e-5)


def test_complex_rotation_equals_the_original_formula() -> None:
    """The original: x * cos + rotate_half(x) * sin with (x0, x1) -> (-x1, x0), on every head, not on CLS."""
    config = EvaVisionConfig(image_size=60, patch_size=20, width=72, head_width=24)
    rope = RotaryPositions(config)
    states = torch.randn(2, 10, 72)
    heads = states[:, 1:].view(2, 9, 3, 24)
    turned = torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2)
    expected = heads * rope.freqs_cos[:, None] + turned * rope.freqs_sin[:, None]
    ours = rotate(states, rope())
    torch.testing.assert_close(ours[:, 1:], expected.flatten(2), atol=1e-6, rtol=0)
    assert torch.equal(ours[:, 0], states[:, 0])
    assert rotate(states.bfloat16(), rope()).dtype == torch.bfloat16


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_attention_equals_its_definition(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    """Softmax of scaled products, whichever kernel computes it."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = torch.randn(2, 2, 7, 3, 8, generator=generator)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    expected = softmax_attention(query, key, value, mask if masked else None)
    ours = attend(query.to(dtype), key.to(dtype), value.to(dtype), mask=mask if masked else None)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=0)


def test_bfloat16_attention_too_large_for_plain_products_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our choice: beyond a bound on memory torch's own kernel takes over."""
    query, key, value = torch.randn(3, 2, 9, 3, 8).bfloat16()
    plain = attend(query, key, value)
    monkeypatch.setattr(eva_vit, "PLAIN_ATTENTION_SCORES", 0)
    torch.testing.assert_close(attend(query, key, value), plain, atol=2e-2, rtol=0)


def test_patch_tokens_are_row_major() -> None:
    """A change inside one patch reaches that patch's token and no other."""
    torch.manual_seed(0)
    tower = EvaVisionTower(EvaVisionConfig(image_size=40, patch_size=8, width=24, head_width=12))
    tower.train(False)
    before, after = torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 40)
    after[:, :, 8:16, 24:32] = 3.0  # row 1, column 3
    change = (tower.patch_embed(after) - tower.patch_embed(before)).norm(dim=-1)[0]
    assert change.shape == (25,)
    assert change.nonzero().flatten().tolist() == [1 * 5 + 3]


def test_the_tower_has_no_layer_after_the_last_block() -> None:
    """The original takes all tokens straight after the last block; its final norm and head are dead."""
    tower = EvaVisionTower(EvaVisionConfig(image_size=32, width=24, head_width=12, layers=1))
    seen: list[Tensor] = []
    tower.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    out = tower(torch.randn(1, 3, 32, 32))
    assert torch.equal(out, seen[0])
    assert not any(name.startswith(("norm", "head", "fc_norm")) for name in tower.state_dict())
    assert F.mse_loss(out[:, 0], out[:, 1]) > 0
