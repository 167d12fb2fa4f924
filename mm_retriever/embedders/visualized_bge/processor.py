"""Images and texts to tensors, as the original prepares them. Loads no transformers.

Source: EVA-CLIP transform.py (torchvision's Resize, CenterCrop, Normalize) as used by FlagEmbedding
research/visual_bge (github.com/FlagOpen/FlagEmbedding at 7ed43d67, MIT); equal to it bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from mm_retriever.checkpoint import locate, read_state_dict
from mm_retriever.embedders.folder import find_tokenizer
from mm_retriever.embedders.visualized_bge import DEFAULT_MODEL, MODELS, MULTILINGUAL
from mm_retriever.embedders.visualized_bge.network import Shape, config_from_tensors, read_config
from mm_retriever.errors import CheckpointError
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD, middle_square
from mm_retriever.tokenizer import read_tokenizer, valid_unicode

_PROBES = ("Phone case with this, in RED", "déjà vu – 50 €\n\tnaïve", "手机壳 スマホケース чехол", "a" * 40)


class VisualizedBGEProcessor:
    """Images to ``pixel_values``, texts to ``input_ids`` and ``attention_mask``; threads may share it.

    Args:
        config: of the model that will read the output.
        tokenizer: a ``tokenizers.Tokenizer``, or the path of its ``tokenizer.json``.
    """

    def __init__(self, config: Shape, tokenizer: Tokenizer | str | Path) -> None:
        self.config = config
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else _read_tokenizer(Path(tokenizer), config)
        self.tokenizer.no_truncation()  # a file may carry both; lengths depend on what stands beside the text
        self.tokenizer.no_padding()

    def fingerprint(self) -> str:
        """Six hex digits that tell apart processors that give the weights different inputs.

        A tokenizer file of another layout that splits texts alike has the same.
        """
        facts = [self.config.inputs(), self.token_ids([*_PROBES])]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> VisualizedBGEProcessor:
        """The processor of a model, by the names that :func:`load_visualized_bge` takes; no weights are read.

        Args:
            name: "tiny", a local folder that :meth:`save_pretrained` and the model's have filled, or a hub repository.
            **kwargs: ``revision`` of the hub repository; what else transformers passes along changes nothing.
        """
        files = locate(name, MODELS, revision=kwargs.get("revision"))
        if files.config is None:
            config = config_from_tensors(read_state_dict(files.weights), files.weights)
        else:
            config = read_config(files.config)
        return cls(config, find_tokenizer(files, None, tokenizer_repo(config)))

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> list[str]:
        """Writes ``tokenizer.json`` and ``processor_config.json``; returns their paths.

        A folder that the model's ``save_pretrained`` has filled too is one that :func:`load_visualized_bge` loads.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(target / "tokenizer.json"))
        settings = {"processor_class": type(self).__name__}
        (target / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return [str(target / name) for name in ("tokenizer.json", "processor_config.json")]

    def square(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3) of one image of any size and mode: all that the model will see of it."""
        return np.asarray(crop_square(image, self.config.vision_shape.image_size))

    def pixel_values(self, images: Sequence[Image.Image | NDArray[np.uint8]]) -> Tensor:
        """(B, 3, H, W) float32 of images, or of what :meth:`square` made of them."""
        side = self.config.vision_shape.image_size
        pixels = np.empty((len(images), side, side, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            pixels[row] = self.square(image) if isinstance(image, Image.Image) else image
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).contiguous()  # (B, 3, H, W)
        mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (CLIP_MEAN, CLIP_STD))
        return values.div_(255).sub_(mean).div_(std)

    def token_ids(self, texts: Sequence[str], *, beside_image: bool = False) -> list[list[int]]:
        """Ids of every text, [CLS] and [SEP] included.

        A text too long for the room there is loses its end, as the tokenizer's own truncation would have it.
        """
        room = self.config.room(beside_image=beside_image)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch([valid_unicode(text) for text in texts])]
        return [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in rows]

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, each (B, T), padded on the right to the longest row."""
        input_ids = torch.full((len(rows), max(map(len, rows), default=0)), self.config.text_shape.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def tokens(self, texts: Sequence[str], *, beside_image: bool = False) -> dict[str, Tensor]:
        """:meth:`token_ids`, padded: what ``encode_text`` and ``encode_multimodal`` take."""
        return self.pad(self.token_ids(texts, beside_image=beside_image))


def _read_tokenizer(path: Path, config: Shape) -> Tokenizer:
    tokenizer = read_tokenizer(path)
    text = config.text_shape
    if (size := tokenizer.get_vocab_size()) > text.vocab_size:
        raise CheckpointError(f"{path} has {size:,} entries, the model {text.vocab_size:,}: not its tokenizer")
    if (empty := tokenizer.encode("").ids) != [text.cls_token_id, text.sep_token_id]:
        expected = [text.cls_token_id, text.sep_token_id]
        raise CheckpointError(
            f"{path} writes an empty text as {empty}, the model expects {expected}: not its tokenizer"
        )
    return tokenizer


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """RGB of ``side`` x ``side``: the short side resized to it, the middle cut out."""
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    # parity: the original resizes in the file's own mode and converts to RGB only afterwards
    return middle_square(image, side, lambda excess: round(excess / 2)).convert("RGB")


def tokenizer_repo(config: Shape) -> str:
    """Where the published tokenizer of this kind of text side is."""
    published = MULTILINGUAL if config.text["model_type"] == "xlm-roberta" else DEFAULT_MODEL
    return MODELS[published].tokenizer_repo
