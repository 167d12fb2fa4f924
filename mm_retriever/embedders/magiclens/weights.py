"""The tensors of a flax checkpoint of MagicLens under the names and in the layouts of our model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from mm_retriever.errors import CheckpointError, shown

_CLIP_LAYER = {
    "attn/query": "self_attn.q_proj", "attn/key": "self_attn.k_proj", "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
    "mlp/c_fc": "mlp.fc1", "mlp/c_proj": "mlp.fc2",
}  # fmt: skip
_SIDES = {"visual": "vision_model", "text": "text_model"}
_WHOLE = {
    "clip/logit_scale": "clip.logit_scale",
    "clip/visual/class_embedding": "clip.vision_model.embeddings.class_embedding",
    "clip/visual/positional_embedding": "clip.vision_model.embeddings.position_embedding.weight",
    "clip/text/positional_embedding": "clip.text_model.embeddings.position_embedding.weight",
    "clip/text/token_embedding/embedding": "clip.text_model.embeddings.token_embedding.weight",
    "contrastive_multimodal_pooler/pooling_attn_query": "contrastive_multimodal_pooler.pooling_attn_query",
    "contrastive_multimodal_pooler/pool_attn/per_dim_scale/per_dim_scale": (
        "contrastive_multimodal_pooler.pool_attn.per_dim_scale"
    ),
}
_NORMS = {
    "clip/visual/ln_pre": "clip.vision_model.pre_layrnorm",
    "clip/visual/ln_post": "clip.vision_model.post_layernorm",
    "clip/text/ln_final": "clip.text_model.final_layer_norm",
}
_PROJECTIONS = {
    "clip/visual/proj/kernel": "clip.visual_projection.weight",
    "clip/text/text_projection/kernel": "clip.text_projection.weight",
}
_CLIP_BLOCK = re.compile(r"clip/(visual|text)/transformer/resblocks_(\d{1,4})/(.+)/(kernel|bias|scale)")
_MIXER = re.compile(r"multimodal_encoder/x_layers_(\d{1,4})/(.+)")
_POOL = "contrastive_multimodal_pooler/"


def from_flax(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `MagicLens`, from the arrays of a checkpoint by their path.

    Raises:
        CheckpointError: an array that no MagicLens has.
    """
    state: dict[str, Tensor] = {}
    for path, array in arrays.items():
        name, layout = _renamed(path.removeprefix("params/"))
        try:
            state[name] = layout(array).contiguous()  # the layout decides which product a CPU takes
        except (RuntimeError, IndexError) as error:  # another number of dimensions
            raise CheckpointError(f"the array {shown(path)} has the shape {list(array.shape)}") from error
    return state


def _renamed(path: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    if path in _WHOLE:
        return _WHOLE[path], lambda array: array
    if path == "clip/visual/conv1/kernel":  # (H, W, in, out)
        return "clip.vision_model.embeddings.patch_embedding.weight", lambda array: array.permute(3, 2, 0, 1)
    if path in _PROJECTIONS:
        return _PROJECTIONS[path], lambda array: array.T
    module, _, leaf = path.rpartition("/")
    if module in _NORMS and leaf in ("scale", "bias"):
        return f"{_NORMS[module]}.{'weight' if leaf == 'scale' else leaf}", lambda array: array
    if (block := _CLIP_BLOCK.fullmatch(path)) and block[3] in _CLIP_LAYER:
        return _of_clip_block(_SIDES[block[1]], block[2], block[3], block[4])
    if mixer := _MIXER.fullmatch(path):
        return _of_head(f"multimodal_encoder.{mixer[1]}", mixer[2], path)
    if path.startswith(_POOL):
        return _of_head("contrastive_multimodal_pooler", path.removeprefix(_POOL), path)
    raise CheckpointError(f"the array {shown(path)} is of no MagicLens")


def _of_clip_block(side: str, layer: str, module: str, leaf: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    name = f"clip.{side}.encoder.layers.{layer}.{_CLIP_LAYER[module]}"
    if leaf == "bias":
        return f"{name}.bias", lambda array: array.flatten()
    if leaf == "scale":
        return f"{name}.weight", lambda array: array
    if module == "attn/out":  # (heads, head, D)
        return f"{name}.weight", lambda array: array.flatten(0, 1).T
    return f"{name}.weight", lambda array: array.flatten(1).T  # (D, out), or (D, heads, head)


def _of_head(prefix: str, path: str, whole: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Of the layers above CLIP, which have their own LayerNorm: it multiplies by 1 + scale."""
    module, _, leaf = path.rpartition("/")
    module = re.sub(r"/(linear|bias)$", "", module)
    name = f"{prefix}.{module.replace('/', '.')}"
    if leaf == "scale":
        return f"{name}.weight", lambda array: 1 + array
    if leaf in ("b", "bias"):
        return f"{name}.bias", lambda array: array.flatten()
    if leaf == "w" and module.endswith("post"):  # (D, heads, head)
        return f"{name}.weight", lambda array: array.flatten(1)
    if leaf == "w":  # (D, heads, head) or (in, out)
        return f"{name}.weight", lambda array: array.flatten(1).T
    raise CheckpointError(f"the array {shown(whole)} is of no MagicLens")
