"""CIRR, FashionIQ, CIRCO and GeneCIS, in the folders and files in which they are published.

Each function takes the folder, the split and the folder of the images, or None for the published place. The rules of
each data set (what recall counts, whether the query image stays in the ranking) are those of its paper's code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from mm_retriever.errors import QueryError, shown
from mm_retriever.evaluation.datasets.evaluation_set import Crop, EvaluationQuery, EvaluationSet, Picture, checked
from mm_retriever.evaluation.datasets.jsonfiles import (
    Record,
    first_of,
    read_list,
    read_names,
    read_object,
    refuse_missing,
)

FASHION = ("dress", "shirt", "toptee")
GENECIS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
_SUFFIXES = (".png", ".jpg", ".jpeg")
_COCO = "unlabeled2017"


def read_cirr(folder: Path, split: str, images: Path | None) -> tuple[EvaluationSet, ...]:
    """Return CIRR: recall with the query image removed, and within subsets of six. Source: arXiv:2108.04024.

    Args:
        folder: has `captions` and `image_splits`, in itself or in `cirr`.
        split: "train", "val" or "test" ("test1").
        images: what "./dev/x.png" is relative to; default: the folder, or `img_raw` in it.
    """
    split = "test1" if split == "test" else split
    root = first_of((folder / "captions", folder / "cirr" / "captions"), "CIRR's folder of captions").parent
    places = read_object(root / "image_splits" / f"split.rc2.{split}.json")
    paths = {name: places.text(name) for name in places.values}
    homes = (folder, folder / "img_raw", folder.parent) if images is None else (images,)
    home = next((home for home in homes if any((home / path).is_file() for path in paths.values())), homes[0])
    pictures: dict[str, Picture] = {name: home / path for name, path in paths.items()}
    queries = []
    for record in read_list(root / "captions" / f"cap.rc2.{split}.json"):
        group = record.inside("img_set").texts("members")
        queries.append(
            EvaluationQuery(
                id=str(record.whole("pairid")),
                words={"text": record.text("caption")},
                image=record.text("reference"),
                targets=() if split == "test1" else (record.text("target_hard"),),
                subset=tuple(group),
            )
        )
    measures = (*_at("Recall", 1, 5, 10, 50), *_at("R_subset", 1, 2, 3))
    return (_whole(f"CIRR {split}", "cirr", queries, pictures, measures, removed=True),)


def read_fashion_iq(folder: Path, split: str, images: Path | None) -> tuple[EvaluationSet, ...]:
    """Return FashionIQ's three categories: recall with the query image left in. Source: arXiv:1905.12794.

    Args:
        folder: has `captions` and `image_splits`.
        split: "train" or "val"; the answers of "test" are not published.
        images: has the images by their ids; default: `images` in the folder.
    """
    if split not in ("train", "val"):
        raise QueryError(f"FashionIQ: split {split!r}: there are train and val; the answers of test are not published")
    home = images or first_of((folder / "images", folder / "resized_image"), "FashionIQ's folder of images")
    held = {path.stem: path for path in sorted(home.rglob("*")) if path.suffix.lower() in _SUFFIXES}
    parts = []
    for kind in FASHION:
        names = read_names(folder / "image_splits" / f"split.{kind}.{split}.json")
        pictures: dict[str, Picture] = {name: held.get(name, home / f"{name}.jpg") for name in names}
        queries = []
        for number, record in enumerate(read_list(folder / "captions" / f"cap.{kind}.{split}.json")):
            captions = record.texts("captions")
            if len(captions) != 2:
                raise record.error("captions", "two texts")
            first, second = (caption.strip() for caption in captions)
            queries.append(
                EvaluationQuery(
                    id=str(number),
                    words={"text": f"{first}, and {second}", "c1": first, "c2": second},
                    image=record.text("candidate"),
                    targets=(record.text("target"),),
                )
            )
        measures = _at("Recall", 10, 50)
        parts.append(_whole(f"FashionIQ {split}, {kind}", "fashioniq", queries, pictures, measures, removed=False))
    return tuple(parts)


def read_circo(folder: Path, split: str, images: Path | None) -> tuple[EvaluationSet, ...]:
    """Return CIRCO: mAP over all right images, recall of the single target. Source: arXiv:2303.15247.

    Args:
        folder: has `annotations`.
        split: "val" or "test".
        images: COCO's unlabelled images of 2017; default: `COCO2017_unlabeled/unlabeled2017` in the folder.
    """
    home = images or first_of(
        (folder / _COCO, folder / "COCO2017_unlabeled" / _COCO), f"CIRCO's gallery, COCO's {_COCO}"
    )
    held = sorted(path for path in home.glob("*.jpg") if path.stem.isdigit())
    pictures: dict[str, Picture] = {str(int(path.stem)): path for path in held}
    if not pictures:
        raise QueryError(f"{home} has no images such as 000000000008.jpg")
    queries = []
    for record in read_list(folder / "annotations" / f"{split}.json"):
        change, shared_concept = record.text("relative_caption"), record.text("shared_concept")
        labelled = split != "test"
        queries.append(
            EvaluationQuery(
                id=str(record.whole("id")),
                words={"text": change, "relative_caption": change, "shared_concept": shared_concept},
                image=str(record.whole("reference_img_id")),
                targets=tuple(map(str, record.wholes("gt_img_ids"))) if labelled else (),
                recall_target=str(record.whole("target_img_id")) if labelled else "",
            )
        )
    measures = (*_at("mAP", 5, 10, 25, 50), *_at("Recall", 5, 10, 25, 50))
    return (_whole(f"CIRCO {split}", "circo", queries, pictures, measures, removed=False),)


def read_genecis(folder: Path, split: str, images: Path | None) -> tuple[EvaluationSet, ...]:
    """Return GeneCIS' four tasks: recall among the images of each query. Source: arXiv:2306.07969.

    As in its published code, queries whose gallery has another length than most are left out; notes say how many.

    Args:
        folder: has the four lists as JSON, in itself or in `genecis`.
        split: there is one, "val".
        images: has `VG_100K` and `val2017`, the images of Visual Genome and of COCO; default: the folder.
    """
    if split != "val":
        raise QueryError(f"GeneCIS: split {split!r}: there is only val")
    root = next((place for place in (folder, folder / "genecis") if any(place.glob("*_attribute.*"))), folder)
    parts = []
    for task in GENECIS:
        file = root / f"{task}.json"
        if not file.exists() and (root / f"{task}.pkl").exists():
            raise QueryError(f"{root / task}.pkl is a pickle, which can run code: give {file}, as published later")
        parts.append(_genecis(file, task, images or folder))
    return tuple(parts)


def _genecis(file: Path, task: str, home: Path) -> EvaluationSet:
    records = read_list(file)
    galleries = [record.all_inside("gallery") for record in records]
    usual = Counter(map(len, galleries)).most_common(1)[0][0]
    pictures: dict[str, Picture] = {}
    queries = []
    for number, (record, gallery) in enumerate(zip(records, galleries, strict=True)):
        if len(gallery) != usual:
            continue
        named = []
        for picture in (record.inside("reference"), record.inside("target"), *gallery):
            name, place = _genecis_picture(picture, home)
            pictures[name] = place
            named.append(name)
        reference, *among = named
        words = {"text": record.text("condition"), "condition": record.text("condition")}
        searched = tuple(dict.fromkeys(sorted(among)))  # the target must not be first by its place
        queries.append(EvaluationQuery(str(number), words, reference, (among[0],), among=searched))
    left_out = len(records) - len(queries)
    note = f"GeneCIS {task}: {left_out} queries left out, whose gallery has not the usual {usual + 1} images"
    measures = _at("Recall", 1, 2, 3)
    refuse_missing(_files(pictures), str(file))
    return checked(
        EvaluationSet(
            f"GeneCIS {task}",
            "genecis",
            tuple(queries),
            pictures,
            tuple(dict.fromkeys(name for query in queries for name in query.among)),
            measures,
            removed=False,
            notes=(note,) if left_out else (),
        )
    )


def _genecis_picture(record: Record, home: Path) -> tuple[str, Picture]:
    """COCO's images whole, Visual Genome's cut to the object."""
    if "val_image_id" in record.values:
        name = f"{record.whole('val_image_id'):012d}"
        return name, home / "val2017" / f"{name}.jpg"
    box = record.values.get("instance_bbox")
    numbers = box if isinstance(box, list) and len(box) == 4 else ()
    if len(numbers) != 4 or not all(isinstance(number, int | float) and 0 <= number < 1e6 for number in numbers):
        raise record.error("instance_bbox", "left, top, width and height in pixels")
    left, top, width, height = map(float, numbers)
    if not (width and height):
        raise record.error("instance_bbox", "a width and height above 0")
    place = home / "VG_100K" / f"{record.whole('image_id')}.jpg"
    return f"{place.stem} {shown(numbers)}", Crop(place, (left, top, width, height))


def _whole(
    name: str,
    layout: str,
    queries: Iterable[EvaluationQuery],
    pictures: Mapping[str, Picture],
    measures: tuple[str, ...],
    *,
    removed: bool,
) -> EvaluationSet:
    """A set whose gallery is every image it has."""
    refuse_missing(_files(pictures), name)
    gallery = tuple(sorted(pictures))
    return checked(EvaluationSet(name, layout, tuple(queries), pictures, gallery, measures, removed))


def _files(pictures: Mapping[str, Picture]) -> dict[str, Path]:
    return {name: picture.path if isinstance(picture, Crop) else picture for name, picture in pictures.items()}


def _at(measure: str, *depths: int) -> tuple[str, ...]:
    return tuple(f"{measure}@{depth}" for depth in depths)
