"""A user's own queries: `queries.jsonl`, the ratings exported by the web page, and triplets in the form of MegaPairs.

    {"image": "red mug.jpg", "text": "the same in blue", "targets": ["blue mug.jpg"], "negatives": ["red mug.jpg"]}
    {"q_img": "red mug.jpg", "q_text": ["the same in blue"], "t_img": "blue mug.jpg", "hns": ["red mug.jpg"]}

Paths are relative to the folder of the file. Both forms are read for evaluation and for training.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets.evaluation_set import EvaluationQuery, EvaluationSet, Picture, checked
from mm_retriever.evaluation.datasets.jsonfiles import Record, read_lines, refuse_missing
from mm_retriever.ingest.folder import existing_path, given_path

FILE_NAME = "queries.jsonl"
_OWN = ("image", "text", "targets", "negatives", "note")
_MEGAPAIRS = ("q_img", "q_text", "t_img", "hns")


@dataclass(frozen=True)
class LabelledQuery:
    """A query and the images that answer it.

    Args:
        image: the query image; None: a query by words alone.
        text: the words; "": a query by an image alone.
        targets: the right images, at least one.
        negatives: images that look right and are wrong.
        place: file and line, for messages.
    """

    image: Path | None
    text: str
    targets: tuple[Path, ...]
    negatives: tuple[Path, ...] = ()
    place: str = ""

    @property
    def images(self) -> tuple[Path, ...]:
        """All images that it names."""
        return (*(() if self.image is None else (self.image,)), *self.targets, *self.negatives)


def read_queries(path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None) -> list[LabelledQuery]:
    """Return the queries of a file, or of `queries.jsonl` in a folder; all images that they name exist.

    A line with several `q_text` becomes one query for each, with the same images.

    Args:
        path: the file, or its folder.
        images: the folder that paths are relative to; default: that of the file.

    Raises:
        QueryError: names the missing file, the wrong line or the missing image.
    """
    file = Path(path).expanduser()
    file = file / FILE_NAME if file.is_dir() else file
    folder = file.parent if images is None else Path(images).expanduser()
    queries = [query for record in read_lines(file) for query in _queries(record, folder)]
    if not queries:
        raise QueryError(f"{str(file)!r} has no queries; expected lines of JSON with {', '.join(_OWN[:4])}")
    refuse_missing({str(image): image for query in queries for image in query.images}, str(file))
    return queries


def _queries(record: Record, folder: Path) -> Iterator[LabelledQuery]:
    if "q_text" in record.values or "q_img" in record.values:
        yield from _megapairs(record, folder)
        return
    record.only(_OWN)
    targets = _distinct(record, "targets", folder)
    negatives = _distinct(record, "negatives", folder) if record.values.get("negatives") is not None else ()
    image = record.optional_text("image")
    query = LabelledQuery(
        _place(record, image, folder) if image else None, record.optional_text("text"), targets, negatives, record.place
    )
    if query.image is None and not query.text:
        raise QueryError(f"{record.place}: neither 'image' nor 'text': there is nothing to search for")
    yield _checked(query)


def _megapairs(record: Record, folder: Path) -> Iterator[LabelledQuery]:
    record.only(_MEGAPAIRS)
    texts = record.texts("q_text")
    if not texts or not all(text.strip() for text in texts):
        raise record.error("q_text", "at least one text, none of them empty")
    query = LabelledQuery(
        image=_place(record, record.text("q_img"), folder),
        text="",
        targets=(_place(record, record.text("t_img"), folder),),
        negatives=_distinct(record, "hns", folder) if record.values.get("hns") is not None else (),
        place=record.place,
    )
    for text in texts:
        yield _checked(replace(query, text=text))


def _checked(query: LabelledQuery) -> LabelledQuery:
    if not query.targets:
        raise QueryError(f"{query.place}: no targets: name at least one right image")
    if both := set(query.targets) & set(query.negatives):
        raise QueryError(f"{query.place}: {str(min(both))!r} is both a target and a negative")
    if query.image in query.targets:
        raise QueryError(f"{query.place}: the query image is one of its targets, and would find itself; leave it out")
    return query


def _distinct(record: Record, key: str, folder: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(_place(record, name, folder) for name in record.texts(key)))


def _place(record: Record, name: str, folder: Path) -> Path:
    """The path of an image, compared as written apart from "." and "..": links are not resolved."""
    name = given_path(name)
    if "://" in name or name[:5].lower() == "data:":
        raise QueryError(f"{record.place}: {name[:80]!r} is no path; give images as files")
    if not name.strip() or "\0" in name:
        raise QueryError(f"{record.place}: {name[:80]!r} is no path of an image")
    path = Path(os.path.normpath(folder.absolute() / name))
    return path if name.isascii() else existing_path(path) or path  # in composed or decomposed letters


MEASURES = ("nDCG@10", "MRR", "Recall@1", "Recall@5", "Recall@10", "Hit@10", "mAP@10")


def read_own(place: Path, images: Path | None) -> tuple[EvaluationSet, ...]:
    """Return the set of a `queries.jsonl`, of MegaPairs' triplets, or of ratings that the web page exported.

    The gallery is all images below the folder, and targets and negatives elsewhere that the queries name. Copies of one
    file are one image, as where the retriever leaves out a query image.

    Args:
        place: the file, or its folder.
        images: the folder of images, to which paths are relative; default: that of the file.
    """
    file = place / FILE_NAME if place.is_dir() else place
    home = Path(os.path.normpath((file.parent if images is None else images).absolute()))
    labelled = read_queries(file, images=images)
    paths = images_below(home)
    first = _first_of_each(labelled, paths)
    labelled = [_renamed(query, first) for query in labelled]
    searched = [path for path in paths if first[path] == path]
    pictures: dict[str, Picture] = {_name(path, home): path for path in searched}
    extra = {path for query in labelled for path in (*query.targets, *query.negatives)} - set(searched)
    pictures |= {_name(path, home): path for path in sorted(extra)}
    gallery = tuple(pictures)
    pictures |= {_name(query.image, home): query.image for query in labelled if query.image is not None}
    queries: list[EvaluationQuery] = []
    lines = Counter[str]()
    for query in labelled:
        line = query.place.rpartition(", ")[2]
        lines[line] += 1
        queries.append(
            EvaluationQuery(
                id=line if lines[line] == 1 else f"{line}, text {lines[line]}",
                words={"text": query.text},
                image="" if query.image is None else _name(query.image, home),
                targets=tuple(_name(path, home) for path in query.targets),
                negatives=tuple(_name(path, home) for path in query.negatives),
            )
        )
    notes: tuple[str, ...] = ()
    if extra and paths:
        notes += (f"{len(extra)} targets and negatives lie outside {home} and are searched too",)
    if copies := len(paths) - len(searched):
        notes += (f"{copies} files below {home} are copies of others: the gallery has each image once",)
    return (
        checked(
            EvaluationSet(str(file), "own", tuple(queries), pictures, gallery, MEASURES, removed=True, notes=notes)
        ),
    )


def _first_of_each(queries: list[LabelledQuery], paths: list[Path]) -> dict[Path, Path]:
    """The first path of each image, for all of its paths: those that queries name before others, of the gallery's."""
    named = {path for query in queries for path in query.images}
    others = sorted(named - set(paths))
    by_size: defaultdict[int, list[Path]] = defaultdict(list)
    for path in (*(path for path in paths if path in named), *(path for path in paths if path not in named), *others):
        by_size[path.stat().st_size].append(path)
    first: dict[Path, Path] = {}
    for size, same_size in by_size.items():
        known: dict[Hashable, Path] = {}
        for path in same_size:
            first[path] = known.setdefault(_content(path) if size and len(same_size) > 1 else _file(path), path)
    return first


def _renamed(query: LabelledQuery, names: Mapping[Path, Path]) -> LabelledQuery:
    """The query with other paths of its images, where a link, another case or a copy names the same image."""
    return _checked(
        replace(
            query,
            image=query.image and names[query.image],
            targets=tuple(dict.fromkeys(names[path] for path in query.targets)),
            negatives=tuple(dict.fromkeys(names[path] for path in query.negatives)),
        )
    )


def _content(path: Path) -> Hashable:
    """What files with the same bytes have in common; a file that cannot be read is itself."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return _file(path)


def _file(path: Path) -> Hashable:
    status = path.stat()
    return status.st_dev, status.st_ino


def images_below(folder: Path) -> list[Path]:
    """Return the images below a folder, as `mm-retriever index` takes them.

    Raises:
        QueryError: a folder that cannot be read.
    """
    from mm_retriever.ingest.folder import walk

    unreadable: list[str] = []
    paths = [Path(path) for path in walk(str(folder), lambda name, reason: unreadable.append(f"{name}: {reason}"))]
    if unreadable:
        raise QueryError(f"{len(unreadable)} files or folders below {str(folder)!r} cannot be read: {unreadable[0]}")
    return paths


def _name(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
