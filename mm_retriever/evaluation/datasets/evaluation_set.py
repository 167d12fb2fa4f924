"""`EvaluationSet`: queries, the images that answer them, and the searched gallery, for every layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from mm_retriever.errors import QueryError
from mm_retriever.images import ImageDataURI, load_image, portable_image

_BLANK = re.compile(r"\{(\w*)\}")
_DILATION = 0.7


@dataclass(frozen=True)
class Crop:
    """A region of an image with its surroundings in a black square, the form of objects in GeneCIS.

    Source: `VAWDataset.load_cropped_image` of facebookresearch/genecis.

    Args:
        path: the whole image.
        box: left, top, width and height in pixels.
    """

    path: Path
    box: tuple[float, float, float, float]

    def data_uri(self) -> ImageDataURI:
        """Return the region as an image of its own, without loss.

        Raises:
            ImageLoadError: the image cannot be read.
        """
        from PIL import Image

        whole = load_image(str(self.path))
        left, top, width, height = self.box
        left, top = max(0, left - _DILATION * width), max(0, top - _DILATION * height)
        right = min(whole.width, left + (1 + _DILATION) * width)
        bottom = min(whole.height, top + (1 + _DILATION) * height)
        region = whole.crop((left, top, right, bottom))  # parity: Pillow rounds the corners
        side = max(region.size)
        square = Image.new("RGB", (side, side))
        square.paste(region, ((side - region.width) // 2, (side - region.height) // 2))
        return ImageDataURI(portable_image(square), f"{self.path} {self.box}")


Picture: TypeAlias = Path | Crop


@dataclass(frozen=True)
class EvaluationQuery:
    """A query, and the names of the images that answer it.

    Args:
        id: unique in its set.
        words: the words for a prompt, by name; "text" is the query without a prompt.
        image: name of the query image; "" without one.
        targets: the right images; none in a test split, whose answers are not published.
        recall_target: the only target that recall counts, if the data set has one; "": all.
        negatives: images that look right and are wrong.
        subset: members of the subset in which CIRR ranks again.
        among: the images that this query searches; (): the gallery.
    """

    id: str
    words: Mapping[str, str]
    image: str = ""
    targets: tuple[str, ...] = ()
    recall_target: str = ""
    negatives: tuple[str, ...] = ()
    subset: tuple[str, ...] = ()
    among: tuple[str, ...] = ()

    def asked(self, prompt: str) -> str:
        """Return the words of the query, in a prompt such as "Find an image that is {text}".

        Raises:
            QueryError: the prompt has a placeholder for which the data set has no words.
        """

        def filled(blank: re.Match[str]) -> str:
            if blank[1] not in self.words:
                known = ", ".join(f"{{{name}}}" for name in self.words)
                raise QueryError(f"prompt {prompt!r}: no words for {blank[0]}; this data set has {known}")
            return self.words[blank[1]]

        return _BLANK.sub(filled, prompt)


@dataclass(frozen=True)
class EvaluationSet:
    """Queries over one gallery.

    Args:
        name: of the data set, split and part.
        layout: a word for the layout, for files.
        queries: at least one.
        pictures: the place of each image, query images included, by name.
        gallery: the names of the searched images.
        measures: the published measures, the most important first.
        removed: whether published figures have the query image removed from the ranking.
        notes: on what was left out or treated specially.
    """

    name: str
    layout: str
    queries: tuple[EvaluationQuery, ...]
    pictures: Mapping[str, Picture]
    gallery: tuple[str, ...]
    measures: tuple[str, ...]
    removed: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def labelled(self) -> bool:
        """Whether the right answers are known."""
        return bool(self.queries[0].targets)

    def source(self, name: str) -> str:
        """Return the image of a name as a path or a data URI.

        Raises:
            ImageLoadError: the image of a region cannot be read.
        """
        picture = self.pictures[name]
        return picture.data_uri() if isinstance(picture, Crop) else str(picture)


def checked(data: EvaluationSet) -> EvaluationSet:
    """Return the set if ids are unique, and all images of every query exist in the set.

    Raises:
        QueryError: names the first query at fault.
    """
    gallery = set(data.gallery)
    if len({query.id for query in data.queries}) < len(data.queries):
        raise QueryError(f"{data.name}: two queries have the same id")
    for query in data.queries:
        searched = set(query.among) or gallery
        if missing := [name for name in query.targets if name not in searched]:
            raise QueryError(f"{data.name}: query {query.id!r} wants {missing[0]!r}, which is not in its gallery")
        if missing := [
            name for name in (query.image, *query.subset, *query.among) if name and name not in data.pictures
        ]:
            raise QueryError(f"{data.name}: query {query.id!r} names {missing[0]!r}, of which no image is known")
        if query.image in query.targets:
            raise QueryError(
                f"{data.name}: the query image of {query.id!r} is one of its targets, and would find itself"
            )
    return data
