"""What Phi-3 Vision reads: images as crops, conversations as token ids with slots for the images.

Pixels are bit-exact with the original and need no torchvision. The prompt side reads ``tokenizer.json`` itself:
rebuilding this tokenizer from its parts, as transformers' ``AutoTokenizer`` does, drops a token after ``<|user|>``.
Knows nothing of weights.

Source: ``image_processing_phi3_v.py`` and ``processing_phi3_v.py`` of microsoft/Phi-3-vision-128k-instruct (MIT),
rewritten; checked against their outputs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoProcessor

from mm_retriever.checkpoint import ModelFiles, locate, read_json
from mm_retriever.errors import CheckpointError, PromptError, shown
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD
from mm_retriever.phi3_vision.config import MODELS, read_config
from mm_retriever.phi3_vision.tower import Phi3VisionConfig
from mm_retriever.tokenizer import read_tokenizer, valid_unicode

MAX_CROPS = 256
ROLES = ("system", "user", "assistant")
STOP_TOKENS = ("<|end|>", "<|endoftext|>", "</s>")
_IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True)
class ImageInputs:
    """Images ready for the tower.

    ``pixel_values`` (crops of all images, 3, S, S): per image the global view first, then its crops row by row;
    no padding crops. ``image_sizes`` (images, 2): height and width in pixels after padding, as in the original.
    ``token_counts``: how many slots each image takes in a prompt.
    """

    pixel_values: Tensor
    image_sizes: Tensor
    token_counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_counts)


@dataclass(frozen=True)
class Slot:
    """The place of one image in a conversation: ``tokens`` slots."""

    tokens: int


@dataclass(frozen=True)
class Message:
    """What one side says: texts and image slots in reading order. ``role``: "system", "user" or "assistant".

    Texts are taken literally: ``<|end|>`` or ``<|image_1|>`` inside one is plain characters, so what a document or a
    caller says cannot end the message or speak for the other side.
    """

    role: str
    parts: Sequence[str | Slot]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"role {self.role!r} is not one of {', '.join(map(repr, ROLES))}")


@dataclass(frozen=True)
class Control:
    """A control token such as ``<|end|>``, as opposed to the same characters in somebody's text."""

    content: str


Piece: TypeAlias = str | Slot | Control


def crop_grid(width: int, height: int, num_crops: int, side: int = 336) -> tuple[int, int]:
    """(rows, columns) of crops for an image: the largest that ``num_crops`` allows at about its own shape."""
    ratio = max(width, height) / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    # parity: rows follow from the resized height in whole pixels, not from ceil(scale / ratio)
    rows = max(1, math.ceil(int(scale * side / ratio) / side))
    return (rows, scale) if width >= height else (scale, rows)


class Phi3VisionProcessor:
    """Images to pixels, prompts to ids, ids to text.

    Args:
        tokenizer: A ``tokenizer.json``, or one already read.
        num_crops: Most crops of one image beside its global view: 16 in Phi-3, 4 in Phi-3.5. An image takes up to
            ``(num_crops + 1) * 144 + 1 + ...`` tokens. 0: the global view alone, which the original does not have.
        image_size: Side of a crop in pixels.
        tokens_per_side: Tokens along one side of a crop after the 2 x 2 merge.
        use_hd_transform: False: one view per image and no crops (the bundled tiny model).
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str | Path,
        *,
        num_crops: int = 16,
        image_size: int = 336,
        tokens_per_side: int = 12,
        use_hd_transform: bool = True,
    ) -> None:
        if num_crops < 0:
            raise PromptError(f"num_crops={num_crops!r}: give 0 (the whole image once), or more (4 and 16 are usual)")
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else read_tokenizer(tokenizer)
        self.num_crops = num_crops
        self.image_size = image_size
        self.tokens_per_side = tokens_per_side
        self.use_hd_transform = use_hd_transform
        added = self.tokenizer.get_added_tokens_decoder()
        self._added = {token.content: token for token in added.values()}
        missing = [token for token in ("<|user|>", "<|assistant|>", "<|end|>") if token not in self._added]
        if missing:
            raise CheckpointError(f"the tokenizer has no {', '.join(missing)}; is it Phi-3 Vision's tokenizer.json?")
        self.bos_ids: list[int] = self.tokenizer.encode("").ids
        self.stop_ids = tuple(sorted(self.token_id(token) for token in STOP_TOKENS if token in self._added))
        self.special_ids = frozenset(added)
        # the same tokenizer to which no text is a control token
        self._literal = Tokenizer.from_str(json.dumps(json.loads(self.tokenizer.to_str()) | {"added_tokens": []}))
        self._control_ids = self.special_ids - {self.tokenizer.token_to_id("<unk>")}
        self._mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
        self._std = torch.tensor(CLIP_STD).view(3, 1, 1)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Phi3VisionProcessor:
        """The processor of a model, by the names that :func:`load_phi3_vision` takes; no weights are read.

        Args:
            name: "tiny", a local folder that :meth:`save_pretrained` and the model's have filled, or a hub repository.
            **kwargs: ``revision`` of the hub repository, ``num_crops``; what else transformers passes along changes
                nothing.
        """
        files = locate(name, MODELS, revision=kwargs.get("revision"))
        return read_processor(files, read_config(files), kwargs.get("num_crops"))

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> list[str]:
        """Writes ``tokenizer.json`` and ``preprocessor_config.json``; returns their paths.

        A folder that the model's ``save_pretrained`` has filled too is one that :func:`load_phi3_vision` loads.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(target / "tokenizer.json"))
        settings = {"processor_class": type(self).__name__, "num_crops": self.num_crops}
        (target / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return [str(target / name) for name in ("tokenizer.json", "preprocessor_config.json")]

    # ------------------------------------------------------------------ images

    def image_inputs(self, images: Sequence[Image.Image]) -> ImageInputs:
        """Crops of RGB images (other modes are converted; transparency is dropped, as in the original)."""
        views = [self._views(image) for image in images]
        side = self.image_size
        return ImageInputs(
            pixel_values=torch.cat([pixels for pixels, _ in views]) if views else torch.empty(0, 3, side, side),
            image_sizes=torch.tensor([[rows * side, cols * side] for _, (rows, cols) in views]).reshape(-1, 2),
            token_counts=tuple(self._grid_tokens(*grid) for _, grid in views),
        )

    def image_tokens(self, width: int, height: int) -> int:
        """Slots that an image of this size takes in a prompt."""
        return self._grid_tokens(*self._grid(width, height))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        if not self.use_hd_transform:
            return 1, 1
        return crop_grid(width, height, self.num_crops, self.image_size) if self.num_crops else (0, 0)

    def _grid_tokens(self, rows: int, cols: int) -> int:
        side = self.tokens_per_side
        if not self.use_hd_transform:
            return side * (side + 1)
        return rows * side * (cols * side + 1) + 1 + side * (side + 1)  # crops, separator, global view

    def _views(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Global view and crops (1 + rows * cols, 3, S, S), and the grid."""
        grid = rows, cols = self._grid(*image.size)
        side = self.image_size
        whole = (max(1, rows), max(1, cols))
        padded = self._normalised(_resize_and_pad(image.convert("RGB"), whole, side))  # (3, rows * S, cols * S)
        if not self.use_hd_transform or not rows:
            return padded[None], grid
        overview = F.interpolate(padded[None], size=(side, side), mode="bicubic")
        crops = padded.unflatten(2, (cols, side)).unflatten(1, (rows, side))  # (3, rows, S, cols, S)
        return torch.cat([overview, crops.permute(1, 3, 0, 2, 4).flatten(0, 1)]), grid

    def _normalised(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)

    # ------------------------------------------------------------------ prompts

    def encode(self, prompt: str, token_counts: Sequence[int] = ()) -> list[int]:
        """Ids of a prompt in the original's notation; slots of the image ``<|image_k|>`` are ``-k``.

        Control tokens in `prompt` are control tokens: for text you did not write, use :meth:`encode_messages`.

        Raises:
            PromptError: The tags are not ``<|image_1|>`` to ``<|image_n|>``, once each and in this order.
        """
        # parity: split's odd entries are the numbers of the tags; every text between tags starts with BOS again
        pieces = _IMAGE_TAG.split(valid_unicode(prompt))
        tags = [int(number) for number in pieces[1::2]]
        if tags != list(range(1, len(token_counts) + 1)):
            given = ", ".join(f"<|image_{tag}|>" for tag in tags) or "no image tags"
            wanted = ", ".join(f"<|image_{k}|>" for k in range(1, len(token_counts) + 1)) or "none, as no image came"
            raise PromptError(f"the prompt has {given}; expected {wanted}, once each and in this order")
        ids: list[int] = self.tokenizer.encode(pieces[0]).ids
        for tag, text in zip(tags, pieces[2::2], strict=True):
            ids += [-tag] * token_counts[tag - 1] + self.tokenizer.encode(text).ids
        return ids

    def encode_messages(
        self, messages: Iterable[Message], *, answer: bool | str = True, first: bool = True
    ) -> list[int]:
        """Ids of a conversation; the slots of its k-th image are ``-k``.

        Args:
            messages: In order.
            answer: True opens the assistant's message at the end; a text is put into its mouth.
            first: False: the ids continue a conversation in which the assistant was speaking; images count from 1
                again, as each piece of a conversation is embedded on its own.
        """
        pieces: list[Piece] = [] if first else [Control("<|end|>"), "\n"]
        for message in messages:
            if f"<|{message.role}|>" not in self._added:
                raise PromptError(f"this tokenizer has no <|{message.role}|>: it knows no {message.role} messages")
            pieces += [Control(f"<|{message.role}|>"), "\n", *message.parts, Control("<|end|>"), "\n"]
        if answer is not False:
            pieces += [Control("<|assistant|>"), "\n", "" if answer is True else answer]
        return self.encode_pieces(pieces, first=first)

    def encode_pieces(self, pieces: Sequence[Piece], *, first: bool = True) -> list[int]:
        """Ids of any run of texts, slots and control tokens; ``first``: with the BOS a prompt starts with.

        Each run of text is tokenised on its own, as the tokenizer itself would between control tokens. So a prompt may
        be cut before or after a slot or control token, and its parts encoded apart.
        """
        ids: list[int] = [*self.bos_ids] if first else []
        text, swallow, image = "", False, 0

        def flush() -> None:
            nonlocal text
            ids.extend(self.encode_literal(text.lstrip() if swallow else text))
            text = ""

        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            if isinstance(piece, Control) and self._added[piece.content].lstrip:
                text = text.rstrip()
            flush()
            if isinstance(piece, Slot):
                image += 1
                # parity: a BOS stands after every image
                ids += [-image] * piece.tokens + self.bos_ids
            else:
                ids.append(self.token_id(piece.content))
            swallow = isinstance(piece, Control) and self._added[piece.content].rstrip
        flush()
        return ids

    def encode_literal(self, text: str) -> list[int]:
        """Ids of a text with no BOS, in which nothing is a control token."""
        ids = self._literal.encode(valid_unicode(text), add_special_tokens=False).ids
        return [i for i in ids if i not in self._control_ids]  # a word-level vocabulary may still hold them

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        text: str = self.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int:
        """Id of a control token.

        Raises:
            CheckpointError: The tokenizer does not have it.
        """
        token_id: int | None = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no {token}; is it Phi-3 Vision's tokenizer.json?")
        return token_id

    def __call__(self, prompt: str, images: Sequence[Image.Image] = ()) -> dict[str, Tensor]:
        """Everything ``Phi3Vision.generate`` wants, batch of one, for a prompt in the original's notation."""
        given = self.image_inputs(images)
        ids = torch.tensor([self.encode(prompt, given.token_counts)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if len(given):
            inputs |= {"pixel_values": given.pixel_values, "image_sizes": given.image_sizes}
        return inputs


def _resize_and_pad(image: Image.Image, grid: tuple[int, int], side: int) -> Image.Image:
    """The image at the width of its grid, centred on white up to the grid's height (on its side if upright)."""
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    rows, cols = sorted(grid)
    width = cols * side
    height = max(1, int(width / (image.width / image.height)))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (width, rows * side), (255, 255, 255))
    canvas.paste(resized, (0, (rows * side - height) // 2))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if upright else canvas


def read_processor(files: ModelFiles, config: Phi3VisionConfig, num_crops: int | None) -> Phi3VisionProcessor:
    """The processor among a model's files.

    Raises:
        CheckpointError: there is no tokenizer, or a file is damaged.
    """
    if files.tokenizer is None:
        raise CheckpointError(f"{files.name!r} has no tokenizer.json; Phi-3 Vision needs it beside the weights")
    crops = _stored_num_crops(files) if num_crops is None else num_crops
    return processor_for(config, files.tokenizer, num_crops=crops)


def processor_for(
    config: Phi3VisionConfig, tokenizer: Tokenizer | str | Path, *, num_crops: int = 16
) -> Phi3VisionProcessor:
    """The processor that fits a model of this configuration."""
    vision: Any = config.vision_config
    return Phi3VisionProcessor(
        tokenizer,
        num_crops=num_crops,
        image_size=vision.image_size,
        tokens_per_side=vision.grid // 2,
        use_hd_transform=config.use_hd_transform,
    )


def _stored_num_crops(files: ModelFiles) -> int:
    stored = files.weights.parent / "preprocessor_config.json"
    crops = read_json(stored).get("num_crops", 16) if stored.is_file() else 16
    if not isinstance(crops, int) or not 0 <= crops <= MAX_CROPS:
        raise CheckpointError(f"{str(stored)!r}: num_crops {shown(crops)} is not a whole number from 0 to {MAX_CROPS}")
    return crops


AutoProcessor.register(Phi3VisionConfig, Phi3VisionProcessor, exist_ok=True)
