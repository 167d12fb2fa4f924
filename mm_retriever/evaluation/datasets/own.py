"""A user's own evaluation set: `queries.jsonl` and the folder of images that is searched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets.evaluation_set import EvaluationQuery, EvaluationSet, Picture, checked
from mm_retriever.evaluation.datasets.queries import FILE_NAME, read_queries

MEASURES = ("nDCG@10", "MRR", "Recall@1", "Recall@5", "Recall@10", "Hit@10", "mAP@10")


def read_own(place: Path, images: Path | None) -> tuple[EvaluationSet, ...]:
    """Return the set of a `queries.jsonl`, of MegaPairs' triplets, or of ratings that the web page exported.

    All images below the folder are searched, and those that the queries name as targets and negatives elsewhere.

    Args:
        place: the file, or its folder.
        images: the folder of images, to which paths are relative; default: that of the file.
    """
    file = place / FILE_NAME if place.is_dir() else place
    home = (file.parent if images is None else images).absolute()
    labelled = read_queries(file, images=images)
    found = images_below(home)
    pictures: dict[str, Picture] = {_name(path, home): path for path in found}
    extra = {path for query in labelled for path in (*query.targets, *query.negatives)} - set(found)
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
    note = f"{len(extra)} targets and negatives lie outside {home} and are searched too"
    notes = (note,) if extra and found else ()
    return (
        checked(
            EvaluationSet(str(file), "own", tuple(queries), pictures, gallery, MEASURES, removed=True, notes=notes)
        ),
    )


def images_below(folder: Path) -> list[Path]:
    """Return the images below a folder, as `mm-retriever index` takes them.

    Raises:
        QueryError: a folder that cannot be read.
    """
    from mm_retriever.ingest.folder import walk

    unreadable: list[str] = []
    found = [Path(path) for path in walk(str(folder), lambda name, reason: unreadable.append(f"{name}: {reason}"))]
    if unreadable:
        raise QueryError(f"{len(unreadable)} files or folders below {str(folder)!r} cannot be read: {unreadable[0]}")
    return found


def _name(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
