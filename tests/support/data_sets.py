"""Small made-up copies of published data sets, in their published layouts, of images of one colour."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mm_retriever.evaluation.datasets import EvaluationQuery, EvaluationSet


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_images(folder: Path, names: Iterable[str], size: tuple[int, int] = (8, 8)) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (37 * number % 256, 91 * number % 256, 151 * number % 256)).save(path)


def write_cirr(folder: Path) -> Path:
    """Eight images, two queries; for the test split the same without answers."""
    names = "abcdefgh"
    write_images(folder, [f"dev/{name}.png" for name in names])
    queries: list[dict[str, Any]] = []
    for pairid, reference, target, members in ((12, "a", "b", "abcdef"), (13, "c", "d", "cdefgh")):
        img_set = {"id": pairid, "members": list(members), "reference_rank": 0, "target_rank": 1}
        answers = {"target_hard": target, "target_soft": {target: 1.0}}
        queries.append({"pairid": pairid, "reference": reference, "caption": "in blue", "img_set": img_set} | answers)
    for split in ("val", "test1"):
        write_json(folder / f"image_splits/split.rc2.{split}.json", {name: f"./dev/{name}.png" for name in names})
    write_json(folder / "captions/cap.rc2.val.json", queries)
    unlabelled = [{key: query[key] for key in ("pairid", "reference", "caption", "img_set")} for query in queries]
    write_json(folder / "captions/cap.rc2.test1.json", unlabelled)
    return folder


def write_fashion_iq(folder: Path) -> Path:
    """Three categories with a query, two and three, over two images more than queries each."""
    for count, kind in enumerate(("dress", "shirt", "toptee"), 1):
        names = [f"{kind}{number}" for number in range(count + 2)]
        write_images(folder / "images", [f"{name}.jpg" for name in names])
        write_json(folder / f"image_splits/split.{kind}.val.json", names)
        queries = [
            {"candidate": names[0], "target": names[number + 1], "captions": [" is red", "has dots "]}
            for number in range(count)
        ]
        write_json(folder / f"captions/cap.{kind}.val.json", queries)
    return folder


def write_circo(folder: Path) -> Path:
    """Six images of COCO, one query with three right images; in the test split without answers."""
    write_images(folder / "COCO2017_unlabeled/unlabeled2017", [f"{number:012d}.jpg" for number in range(1, 7)])
    query = {"id": 0, "reference_img_id": 1, "relative_caption": "is red", "shared_concept": "a dog"}
    answers = {"target_img_id": 2, "gt_img_ids": [2, 3, 4], "semantic_aspects": ["addition"]}
    write_json(folder / "annotations/val.json", [query | answers])
    write_json(folder / "annotations/test.json", [query])
    return folder


def write_genecis(folder: Path) -> Path:
    """Four tasks of two queries among three, and in one of them a query among two, which is left out."""
    write_images(folder / "val2017", [f"{number:012d}.jpg" for number in range(5)])
    write_images(folder / "VG_100K", [f"{number}.jpg" for number in range(5)], size=(10, 10))

    def named(task: str, number: int) -> dict[str, Any]:
        return {"val_image_id": number} if "object" in task else {"image_id": number, "instance_bbox": [2, 2, 2, 2]}

    for task in ("focus_attribute", "change_attribute", "focus_object", "change_object"):
        queries = [
            {
                "condition": "with a hat",
                "reference": named(task, 0),
                "target": named(task, target),
                "gallery": [named(task, other) for other in others],
            }
            for target, others in ((1, (2, 3)), (2, (3, 4)), *(((1, (2,)),) if task == "focus_object" else ()))
        ]
        write_json(folder / f"genecis/{task}.json", queries)
    return folder


def colour_set(folder: Path, count: int, *, gallery: int = 12) -> EvaluationSet:
    """Queries of a word and an image, each with one right image, over images of one colour."""
    names = [f"{number}.png" for number in range(gallery)]
    write_images(folder, names)
    queries = tuple(
        EvaluationQuery(f"q{row}", {"text": "red"}, image=names[row % 3], targets=(names[3 + row % (gallery - 3)],))
        for row in range(count)
    )
    pictures = {name: folder / name for name in names}
    return EvaluationSet("colours", "own", queries, pictures, tuple(names), ("MRR", "Recall@1"), removed=True)


def scores_of(data: EvaluationSet, best: Sequence[Sequence[str]]) -> list[list[float]]:
    """(Q, G): scores that put these images first, in this order, before the rest in the order of the gallery."""
    rows = []
    for names in best:
        order = [*names, *(name for name in data.gallery if name not in names)]
        rows.append([1.0 - order.index(name) / len(order) for name in data.gallery])
    return rows
