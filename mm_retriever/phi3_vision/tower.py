"""Phi-3 Vision's shape and its eyes: configuration, CLIP tower, and the layout of crops as rows of token embeddings.

transformers' own CLIP tower with the original's glue: crops joined to one large image, separators, projector. Module
attributes keep the checkpoint's names. Knows nothing of words.

Source: ``image_embedding_phi3_v.py`` of microsoft/Phi-3-vision-128k-instruct (MIT; technical report arXiv:2404.14219),
rewritten; checked against its outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config
from transformers.configuration_utils import SubConfigSpec

from mm_retriever.errors import PromptError

CROPS_AT_ONCE = 32  # crops that go through the tower in one batch


@strict
class Phi3VisionTowerConfig(CLIPVisionConfig):
    """A CLIP tower whose layer ``feature_layer`` is used; layers above it are neither built nor run.

    The defaults are the official models' ViT-L/14-336.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    feature_layer: int = -2
    stem: str = "patch"  # the only one there is; stored configurations name it

    def validate_architecture(self) -> None:
        """Raise a ValueError that names what does not fit together."""
        super().validate_architecture()  # type: ignore[no-untyped-call]
        if self.stem != "patch":
            raise ValueError(f"stem {self.stem!r} is not 'patch', the only one that is built")
        if self.image_size % (2 * self.patch_size):
            raise ValueError(f"image_size {self.image_size} is not an even number of patches of {self.patch_size}")
        if not -self.num_hidden_layers - 1 <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer {self.feature_layer} is not one of -1 to {-self.num_hidden_layers - 1}")

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.patch_size

    @property
    def layers_used(self) -> int:
        """How many layers lie below the features."""
        return self.num_hidden_layers + 1 + self.feature_layer


@strict
class Phi3VisionConfig(Phi3Config):
    """Reads the official ``config.json``; ``vision_config`` is ours and defaults to its ViT-L/14-336."""

    model_type = "phi3_v"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' own way to declare them)
        "vision_config": SubConfigSpec(config_class=Phi3VisionTowerConfig)
    }

    vision_config: dict[str, Any] | Phi3VisionTowerConfig | None = None
    embd_layer: dict[str, Any] | None = None
    img_processor: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("_attn_implementation", None)  # the official file asks for Flash Attention 2, installed or not
        if kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])  # the caller's stays as it is
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.standardize_rope_params()  # a second time: the first does not know the original's name "su"
        if self.short_context is not None:  # written out, or transformers warns that it had to work it out
            self.rope.setdefault("factor", self.max_position_embeddings / self.short_context)
        if self.sliding_window is not None and self.sliding_window >= self.max_position_embeddings:
            self.sliding_window = None  # never closes; saying so spares masks and a slower cache

    @property
    def use_hd_transform(self) -> bool:
        """Whether images are cut into crops; False: one view per image (the bundled tiny model)."""
        return bool((self.embd_layer or {}).get("use_hd_transform", True))

    @property
    def rope(self) -> dict[str, Any]:
        """``rope_parameters``, which transformers fills in while constructing."""
        parameters: Any = self.rope_parameters
        return dict[str, Any]() if parameters is None else parameters

    @property
    def short_context(self) -> int | None:
        """Positions up to which the short rotary factors hold; None when there is one set for all."""
        return self.rope["original_max_position_embeddings"] if self.rope["rope_type"] == "longrope" else None


def with_its_crop(whole: Tensor) -> Tensor:
    """Features of an image in one crop, which is the whole again: (tokens, D), from those of the whole alone."""
    return torch.cat([whole[1:], whole])  # the rows, then the separator and the same rows


class ImageTower(nn.Module):
    """CLIP without the layers above the features (``img_processor`` in the checkpoint)."""

    def __init__(self, config: Phi3VisionTowerConfig) -> None:
        super().__init__()
        used = copy.deepcopy(config)
        used.num_hidden_layers = config.layers_used
        self.vision_model = CLIPVisionModel(used)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, patches, C): ``hidden_states[feature_layer]`` without CLS."""
        features: Tensor = self.vision_model(pixel_values).last_hidden_state[:, 1:]
        return features


class Phi3VisionEmbeddings(nn.Module):
    """Crops of images to rows of token embeddings (``vision_embed_tokens`` in the checkpoint)."""

    def __init__(self, config: Phi3VisionConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        width, hidden = 4 * vision.hidden_size, config.hidden_size
        self.use_hd_transform = config.use_hd_transform
        self.image_size, self.grid = vision.image_size, vision.grid
        self.img_processor = ImageTower(vision)
        if config.use_hd_transform:
            self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """(crops of all images, 3, S, S), (images, 2) -> per image (tokens, D), as laid out by the original."""
        side = self.image_size
        grids = [(int(height) // side, int(width) // side) for height, width in image_sizes.tolist()]
        counts = [1 + rows * cols if self.use_hd_transform else 1 for rows, cols in grids]
        if sum(counts) != len(pixel_values):
            raise PromptError(
                f"{len(pixel_values)} crops for image_sizes {image_sizes.tolist()}, expected {sum(counts)}"
            )
        # an image of one crop is its own global view: looked at once, where the original looks twice
        views_of = [
            views[:1] if len(views) == 2 and torch.equal(views[0], views[1]) else views
            for views in pixel_values.split(counts)
        ]
        patches = torch.cat([self.img_processor(chunk) for chunk in torch.cat(views_of).split(CROPS_AT_ONCE)])
        merged = self._merge(patches).split([len(views) for views in views_of])  # (views, g/2, g/2, 4C) each
        rows = [
            self._lay_out(views.expand(count, -1, -1, -1), *grid)
            for views, count, grid in zip(merged, counts, grids, strict=True)
        ]
        projected = self.img_projection(torch.cat(rows))
        return list(projected.split([len(row) for row in rows]))

    def _merge(self, patches: Tensor) -> Tensor:
        """Each 2 x 2 neighbourhood becomes one token, its patches one after the other, row by row."""
        half = self.grid // 2
        neighbours = patches.view(-1, half, 2, half, 2, patches.shape[-1])
        return neighbours.permute(0, 1, 3, 2, 4, 5).reshape(-1, half, half, 4 * patches.shape[-1])

    def _lay_out(self, views: Tensor, rows: int, cols: int) -> Tensor:
        """Crops joined to one large image, the separator, then the global view: (tokens, 4C)."""
        overview = self._end_rows(views[0])
        if not self.use_hd_transform:
            return overview
        if not rows:
            return torch.cat([self.glb_GN[0], overview])
        half = self.grid // 2
        crops = views[1:].unflatten(0, (rows, cols)).transpose(1, 2)  # (rows, g/2, cols, g/2, 4C)
        image = self._end_rows(crops.reshape(rows * half, cols * half, -1))
        return torch.cat([image, self.glb_GN[0], overview])

    def _end_rows(self, image: Tensor) -> Tensor:
        """(h, w, 4C) -> (h * (w + 1), 4C): ``sub_GN`` after every row."""
        return torch.cat([image, self.sub_GN[0].expand(len(image), 1, -1)], dim=1).flatten(0, 1)
