"""What the trainings of the bundled tiny models share: endless drawn images, words, noise, and the loop itself.

A drawn image is linear in its colours (see ``mm_retriever.demo.catalogue.drawing``). ``LayerCache`` therefore draws
shapes and pattern textures once, with the very code that draws the catalogue, and composes batches of them in
torch: about a millisecond an image instead of twenty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from phrases import COLOUR_NAMES, KIND_NAMES, PATTERN_NAMES, vocabulary
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mm_retriever.demo.catalogue import COLOURS, HELD_OUT, KINDS, NATURAL, PATTERNS, Looks, colours_of
from mm_retriever.demo.catalogue.colours import palette
from mm_retriever.demo.catalogue.drawing import (
    NATIVE_SIZE,
    PRODUCT_ZOOM,
    SEED_BLOCK,
    THEME_ZOOM,
    background,
    product_layers,
    theme_layers,
)
from mm_retriever.demo.catalogue.patterns import texture
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD

THEME = len(KINDS)  # the "kind" of a theme image in label tensors
TRAINING_BLOCK = 1000  # pattern maps from here on are drawn for training only (a catalogue's seed is its block)
SEEN_PAIRS = tuple((kind, pattern) for kind in KINDS for pattern in PATTERNS if (kind, pattern) not in HELD_OUT)

NEVER = torch.zeros(len(KINDS) + 1, len(PATTERNS), dtype=torch.bool)
"""True for the (kind, pattern) pairs of ``HELD_OUT``: what training leaves out of its softmaxes (``--adjust``)."""
for _kind, _pattern in HELD_OUT:
    NEVER[KINDS.index(_kind), PATTERNS.index(_pattern)] = True


def labels_of(looks: Sequence[Looks]) -> Tensor:
    """(B, 3) indices of kind (``THEME`` for a theme image), pattern and colour."""
    rows = [
        (THEME if kind is None else KINDS.index(kind), PATTERNS.index(pattern), COLOURS.index(colour))
        for kind, pattern, colour in looks
    ]
    return torch.tensor(rows)


def random_colour(pattern: str, rng: np.random.Generator) -> str:
    """A colour that the pattern comes in; natural furs are as frequent as in a shop."""
    colours = colours_of(pattern)
    if len(colours) > 1 and colours[0] == NATURAL and rng.random() < 0.4:
        return NATURAL
    return colours[int(rng.integers(len(colours)))]


# ---------------------------------------------------------------------- images


def _reduced(planes: np.ndarray, size: int, resample: int) -> np.ndarray:
    """Planes resized as the preprocessing resizes images."""
    how = Image.Resampling(resample)
    resized = [Image.fromarray(plane).resize((size, size), how) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized])


class LayerCache:
    """Shapes and textures of one size, drawn once; ``render`` composes them into labelled images.

    Args:
        size: pixels of the images.
        shapes: drawings of each kind of product, and half as many theme scenes for each pattern.
        textures: windows on each pattern, three on each pattern map.
        seed: of everything drawn; maps come from blocks of seeds that no catalogue uses.
        resample: how the model's preprocessing resizes: bicubic for Visualized BGE, bilinear for Phi-3 Vision.
    """

    margin = 1.4  # textures are this much larger than images, and cut out at random places

    def __init__(
        self,
        size: int,
        *,
        shapes: int = 64,
        textures: int = 96,
        seed: int = 0,
        resample: int = Image.Resampling.BICUBIC,
    ) -> None:
        rng = np.random.default_rng([4, seed])
        self.size, self.shapes, self.scenes, self.textures = size, shapes, shapes // 2, textures
        layers = [_reduced(product_layers(kind, rng), size, resample) for kind in KINDS for _ in range(shapes)]
        layers += [
            _reduced(theme_layers(pattern, rng), size, resample) for pattern in PATTERNS for _ in range(self.scenes)
        ]
        self.layers = torch.from_numpy(np.array(layers)).half()  # (N, 6, size, size)
        wide = round(NATIVE_SIZE * self.margin)
        windows = []
        low, high = PRODUCT_ZOOM[0], THEME_ZOOM[1]
        for pattern in PATTERNS:
            for number in range(textures):
                drawing = (TRAINING_BLOCK + seed) * SEED_BLOCK + number // 3
                zoom = rng.uniform(low, high) / self.margin
                window = texture(pattern, drawing, rng, wide, zoom=zoom, turn=rng.normal(0, 11))
                windows.append(_reduced(window, round(size * self.margin), resample))
        self.windows = torch.from_numpy(np.array(windows)).half()  # (M, 2, margin * size, margin * size)
        self.palettes = torch.zeros(len(PATTERNS), len(COLOURS), 3, 3)
        for row, pattern in enumerate(PATTERNS):
            for colour in colours_of(pattern):
                self.palettes[row, COLOURS.index(colour)] = torch.from_numpy(palette(pattern, colour))

    @classmethod
    def load(cls, folder: Path, size: int, **options: int) -> LayerCache:
        """The cache from a file in ``folder``, drawn and written there first if need be."""
        name = "-".join(["layers", str(size), *(f"{key}{value}" for key, value in sorted(options.items()))])
        path = folder / f"{name}.pt"
        cache = cls.__new__(cls)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(cls(size, **options).__dict__, path)
        cache.__dict__.update(torch.load(path, weights_only=True))
        return cache

    def render(self, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """(B, 3) labels -> (B, 3, size, size) float32 images, 0 to 255."""
        kind, pattern, colour = labels.unbind(1)
        count, size = len(labels), self.size
        product = torch.from_numpy(rng.integers(self.shapes, size=count)) + kind * self.shapes
        scene = torch.from_numpy(rng.integers(self.scenes, size=count)) + pattern * self.scenes
        layers = self.layers[torch.where(kind == THEME, len(KINDS) * self.shapes + scene, product)].float()
        weights = self._cut(pattern, rng)
        planes = torch.empty(count, 5, size, size)
        planes[:, 0], planes[:, 1], planes[:, 4] = layers[:, 0], layers[:, 1], layers[:, 2]
        torch.mul(layers[:, 1:2], weights, out=planes[:, 2:4])
        colours = self._colours(kind, pattern, colour, rng)
        image = torch.baddbmm(layers[:, 3:].flatten(2), colours, planes.flatten(2))
        return image.clamp_(0, 255).view(count, 3, size, size)

    def _cut(self, pattern: Tensor, rng: np.random.Generator) -> Tensor:
        size, count = self.size, len(pattern)
        slack = self.windows.shape[-1] - size
        chosen = pattern.numpy() * self.textures + rng.integers(self.textures, size=count)
        corners = rng.integers(slack + 1, size=(count, 2))
        weights = torch.empty(count, 2, size, size)
        for row, (window, (top, left)) in enumerate(zip(chosen, corners, strict=True)):
            weights[row] = self.windows[window, :, top : top + size, left : left + size]
        return weights

    def _colours(self, kind: Tensor, pattern: Tensor, colour: Tensor, rng: np.random.Generator) -> Tensor:
        """(B, 3, 5): colour channels times background, ground, figure - ground, accent - ground and trim."""
        count = len(kind)
        jitter = torch.from_numpy(rng.normal(0, 7, (count, 3, 3)).astype(np.float32))
        ground, figure, accent = (self.palettes[pattern, colour] + jitter).clamp(0, 255).unbind(1)
        dark = ground.mean(1, keepdim=True) <= 70
        trim = torch.where(dark, ground * 1.6 + 20, ground * 0.62)
        behind = torch.from_numpy(np.stack([background(rng) for _ in range(count)]))
        dim = torch.from_numpy(rng.uniform(0.55, 1, (count, 1)).astype(np.float32))
        behind = torch.where((kind == THEME)[:, None], behind * dim, behind)
        return torch.stack((behind, ground, figure - ground, accent - ground, trim), dim=2)


def augmented(images: Tensor, rng: np.random.Generator, *, noise: float = 3.0) -> Tensor:
    """Images under other light: contrast, brightness, tint and grain, still 0 to 255."""
    count = len(images)
    contrast = torch.from_numpy(rng.uniform(0.85, 1.15, (count, 1, 1, 1)).astype(np.float32))
    shift = rng.normal(0, 9, (count, 1, 1, 1)) + rng.normal(0, 3, (count, 3, 1, 1))
    offset = torch.from_numpy(shift.astype(np.float32)) + 128 * (1 - contrast)
    return torch.addcmul(offset, images, contrast).add_(torch.randn_like(images), alpha=noise)


def normalised(images: Tensor) -> Tensor:
    """0 to 255 images as ``pixel_values``, in the memory layout that convolutions like."""
    mean, std = (torch.tensor(channel).view(3, 1, 1) * 255 for channel in (CLIP_MEAN, CLIP_STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def enlarged_crops(images: Tensor, rng: np.random.Generator, smallest: float = 0.35) -> Tensor:
    """A random square of each image, enlarged to full size: hides the kind, shows the pattern."""
    count = len(images)
    scale = torch.from_numpy(rng.uniform(smallest, 1, (count, 1)).astype(np.float32))
    centre = torch.from_numpy(rng.uniform(-1, 1, (count, 2)).astype(np.float32)) * (1 - scale)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale[:, 0]
    affine[:, :, 2] = centre
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# ---------------------------------------------------------------------- words

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ENDINGS = ("##s", "##es", "##ed", "##y")
_MARKS = (",", "-", "'", ".", "?", "!")
_OPENINGS = ("please", "hello,", "can you find", "we want", "i am looking for", "could i have", "give me", "now")
_CLOSINGS = ("please", "thanks", "if possible", "for my sister", "?", "!", "for a friend", "today")
_CONTENT = frozenset(
    word
    for names in (KIND_NAMES, PATTERN_NAMES, COLOUR_NAMES)
    for choices in names.values()
    for choice in choices
    for word in choice.split()
)


def build_tokenizer() -> Tokenizer:
    """BERT's tokenizer over the words of the training wordings: uncased WordPiece, ids from 0 as in SPECIAL_TOKENS.

    A word outside the vocabulary becomes one [UNK], which training makes a familiar sight.
    """
    extra = {word for phrase in (*_OPENINGS, *_CLOSINGS) for word in phrase.strip(",?!").split()}
    words = sorted({*vocabulary(), *extra})
    entries = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *_MARKS, *_ENDINGS, *words))}
    tokenizer = Tokenizer(models.WordPiece(entries, unk_token="[UNK]", max_input_chars_per_word=60))  # noqa: S106 - a piece of text, no password
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, entries[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def reworded(text: str, rng: np.random.Generator) -> str:
    """The text as a chattier or sloppier person might put it: extra and unknown words, a plural, a lost word."""
    words = text.split()
    chance = rng.random()
    if chance < 0.3:
        return text
    for place, word in enumerate(words):
        if word.strip(",") not in _CONTENT:
            fate = rng.random()
            if fate < 0.14:
                words[place] = "[UNK]"
            elif fate < 0.19 and len(words) > 2:
                words[place] = ""
        elif rng.random() < 0.04 and not word.endswith(("s", ",")):
            words[place] = word + "s"
    if rng.random() < 0.25:
        words.insert(0, _OPENINGS[int(rng.integers(len(_OPENINGS)))])
    if rng.random() < 0.25:
        words.append(_CLOSINGS[int(rng.integers(len(_CLOSINGS)))])
    for _ in range(int(rng.integers(4)) if rng.random() < 0.35 else 0):
        words.insert(0 if rng.random() < 0.5 else len(words), "[UNK]")
    return " ".join(word for word in words if word) or text


# ---------------------------------------------------------------------- training

HEADS = (len(KINDS) + 1, len(PATTERNS), len(COLOURS))


class Stage:
    """One stage of a training, so many steps or seconds long; prints the means of its last steps twice a minute.

    ``parameters`` come in groups with their highest learning rates, which rise over 40 steps, then fall to a fiftieth.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[Sequence[Tensor], float]],
        *,
        steps: int,
        seconds: float | None,
        weight_decay: float = 0.02,
    ) -> None:
        self.name, self.steps, self.seconds = name, steps, seconds
        self.parameters = [parameter for group, _ in parameters for parameter in group]
        groups = [{"params": group, "top": top} for group, top in parameters]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.98))
        self.rows: list[dict[str, float]] = []
        self.start = self.last = time.monotonic()

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps, each with its learning rate set."""
        step = 0
        while (share := self._share(step)) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = group["top"] * min(1.0, (step + 1) / 40) * max(0.02, 1 - share)
            yield step
            step += 1
        print(f"{self.name} done after {step} steps, {time.monotonic() - self.start:.0f} s", flush=True)

    def _share(self, step: int) -> float:
        return step / self.steps if self.seconds is None else (time.monotonic() - self.start) / self.seconds

    def update(self, loss: Tensor) -> None:
        """One clipped step down the gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def note(self, step: int, **values: float) -> None:
        """Keep a step's figures."""
        self.rows.append(values)
        now = time.monotonic()
        if now - self.last > 30:
            shown = " ".join(f"{key} {np.mean([row[key] for row in self.rows[-40:]]):.3f}" for key in values)
            print(f"{self.name} step {step}/{self.steps} {now - self.start:.0f} s  {shown}", flush=True)
            self.last = now


def train_naming(
    stage: Stage,
    logits_of: Callable[[Tensor], Tensor],
    render: Callable[[Tensor], Tensor],
    *,
    batch: int,
    crops: float,
    adjust: bool,
    rng: np.random.Generator,
) -> None:
    """The first stage of both models: kind, pattern and colour of an image.

    ``render`` draws images of labels, ``logits_of`` tells from their ``pixel_values``; a share of ``crops`` is
    enlarged parts, which hide the kind.
    """
    for step in stage:
        looks = []
        for number in range(batch):
            kind, pattern = SEEN_PAIRS[int(rng.integers(len(SEEN_PAIRS)))]
            if number % 4 == 0:
                kind, pattern = None, PATTERNS[int(rng.integers(len(PATTERNS)))]
            looks.append(Looks(kind, pattern, random_colour(pattern, rng)))
        labels = labels_of(looks)
        images = render(labels)
        cropped = torch.from_numpy(rng.random(len(labels)) < crops)
        images[cropped] = enlarged_crops(images[cropped], rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(normalised(augmented(images, rng)))
        loss = attribute_loss(logits, labels, adjust=adjust, scored=((~cropped).float(), None, None))
        stage.update(loss)
        right = correct(logits, labels).float()
        shares = {"kind": right[~cropped, 0], "pattern": right[:, 1], "colour": right[:, 2]}
        stage.note(step, loss=loss.item(), **{name: share.mean().item() for name, share in shares.items()})


def named(tokens: Tensor, head: nn.Module) -> Tensor:
    """(N, patches, C) -> logits of kind, pattern and colour, from the mean and the maximum of the tokens."""
    logits: Tensor = head(torch.cat((tokens.mean(1), tokens.amax(1)), dim=1))
    return logits


def attribute_loss(
    logits: Tensor, labels: Tensor, *, adjust: bool, scored: tuple[Tensor | None, ...] = (None,) * 3
) -> Tensor:
    """Cross-entropy of kind, pattern and colour.

    With ``adjust``, what training never shows together is no evidence against it: pairs of ``HELD_OUT`` stay out of
    the softmax over patterns of their kind and over kinds of their pattern.
    """
    kind, pattern, colour = logits.float().split(HEADS, dim=1)
    if adjust:
        pattern = pattern.masked_fill(NEVER[labels[:, 0]], -1e4)
        kind = kind.masked_fill(NEVER.T[labels[:, 1]], -1e4)
    total = torch.zeros(())
    for column, (head, weight) in enumerate(zip((kind, pattern, colour), scored, strict=True)):
        losses = F.cross_entropy(head, labels[:, column], reduction="none")
        total = total + (losses.mean() if weight is None else (losses * weight).sum() / weight.sum().clamp(min=1))
    return total


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 3) whether kind, pattern and colour come out right."""
    return torch.stack([head.argmax(1) for head in logits.split(HEADS, dim=1)], dim=1) == labels
