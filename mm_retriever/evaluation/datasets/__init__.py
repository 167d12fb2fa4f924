"""Data sets for evaluation and training, from local folders; nothing is downloaded.

- `queries.py`: a user's own `queries.jsonl`, the web page's ratings, MegaPairs' triplets.
- `evaluation_set.py`: the common form of all layouts: queries, a gallery, and the right answers.
- `published.py`: CIRR, FashionIQ, CIRCO and GeneCIS.
- `jsonfiles.py`: annotation files, checked key by key.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets.evaluation_set import EvaluationQuery, EvaluationSet
from mm_retriever.evaluation.datasets.published import read_circo, read_cirr, read_fashion_iq, read_genecis
from mm_retriever.evaluation.datasets.queries import FILE_NAME, LabelledQuery, read_own, read_queries

__all__ = ["EvaluationQuery", "EvaluationSet", "LabelledQuery", "is_evaluation", "read_evaluation", "read_queries"]

_LAYOUTS = (
    (("captions/cap.rc2.*.json", "cirr/captions/cap.rc2.*.json"), read_cirr),
    (("captions/cap.dress.*.json",), read_fashion_iq),
    (("annotations/val.json", "annotations/test.json"), read_circo),
    (("focus_attribute.*", "genecis/focus_attribute.*"), read_genecis),
)


def read_evaluation(
    place: str | os.PathLike[str], *, split: str | None = None, images: str | os.PathLike[str] | None = None
) -> tuple[EvaluationSet, ...]:
    """Return the parts of a data set, whose layout is recognised by its files; figures are averaged over parts.

    Args:
        place: a `queries.jsonl` or a folder with one, or a folder of CIRR, FashionIQ, CIRCO or GeneCIS.
        split: of a published data set; default: "val".
        images: the folder of images, if it is not beside the annotations.

    Raises:
        QueryError: the layout is unknown, or files are missing or wrong, each by name.
    """
    path, home = Path(place).expanduser(), None if images is None else Path(images).expanduser()
    if home is not None and not home.is_dir():
        raise QueryError(f"{str(home)!r} is no folder of images")
    if not path.exists():
        raise QueryError(f"{str(path)!r} does not exist; give a queries.jsonl, or the folder of a data set")
    if path.is_file() or (path / FILE_NAME).is_file():
        if split is not None:
            raise QueryError(f"split {split!r}: a {FILE_NAME} has no splits")
        return read_own(path, home)
    if (read := _reader(path)) is not None:
        return read(path, split or "val", home)
    expected = "; ".join(patterns[0] for patterns, _ in _LAYOUTS)
    raise QueryError(f"{str(path)!r} holds no data set that is known: expected {FILE_NAME}; {expected}")


def is_evaluation(place: str | os.PathLike[str]) -> bool:
    """Whether a place looks like a data set, rather than a folder of images."""
    path = Path(place).expanduser()
    return path.is_file() or (path / FILE_NAME).is_file() or _reader(path) is not None


def _reader(folder: Path) -> Callable[[Path, str, Path | None], tuple[EvaluationSet, ...]] | None:
    for patterns, read in _LAYOUTS:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return read
    return None
