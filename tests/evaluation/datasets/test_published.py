"""CIRR, FashionIQ, CIRCO and GeneCIS. Truth: their papers' rules, on made-up copies with values worked out by hand."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.comparison import mean_figure, part_values
from mm_retriever.evaluation.datasets import EvaluationSet, read_evaluation
from mm_retriever.evaluation.metrics import KEPT, REMOVED
from mm_retriever.evaluation.results import check_submission, write_submissions
from mm_retriever.evaluation.runs import Cost, PartRun, Run, main_way, retrieved, ways_of
from mm_retriever.images import load_image
from tests.support.data_sets import scores_of, write_circo, write_cirr, write_fashion_iq, write_genecis, write_json


def found(data: EvaluationSet, *best: list[str]) -> PartRun:
    """What a model finds that puts these images first."""
    scores = np.float32(scores_of(data, best))
    return retrieved(data, np.eye(len(data.gallery), dtype=np.float32), scores, ways_of([data]))


def means(part: PartRun, way: str) -> dict[str, float]:
    return {measure: float(part_values(part, way, measure).mean()) for measure in part.data.measures}


def test_cirr_removes_the_reference_and_ranks_subsets_again(tmp_path):
    """First query: a (itself), g, b. Second: c (itself), d. So R@1 is 1/2, and both subsets have the target first."""
    (data,) = read_evaluation(write_cirr(tmp_path))
    assert (data.name, len(data.gallery), data.queries[0].subset) == ("CIRR val", 8, tuple("abcdef"))
    part = found(data, ["a", "g", "b"], ["c", "d"])
    assert main_way([data]) == REMOVED
    expected = {"Recall@1": 0.5, "Recall@5": 1, "Recall@10": 1, "Recall@50": 1}
    assert means(part, REMOVED) == pytest.approx(expected | {f"R_subset@{k}": 1.0 for k in (1, 2, 3)})
    assert means(part, KEPT)["Recall@1"] == 0
    worse = found(data, ["a", "e", "d", "b"], ["c", "d"])
    assert means(worse, REMOVED)["R_subset@2"] == 0.5, "e and d of the same subset come before b"


def test_members_of_a_subset_are_ranked_however_far_away_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("mm_retriever.evaluation.runs.DEPTH", 1)
    (data,) = read_evaluation(write_cirr(tmp_path))
    part = found(data, ["a", "g", "h", "e", "b"], ["c", "a", "d"])
    assert part.rankings[REMOVED]["12"][:3] == ["g", "e", "b"]
    assert means(part, REMOVED)["R_subset@2"] == 1
    assert means(part, REMOVED)["R_subset@1"] == 0.5


def test_fashion_iq_leaves_the_reference_in_and_averages_its_categories(tmp_path):
    """Of one, two and three queries one is answered in each category: (1 + 1/2 + 1/3) / 3, not 3 of 6."""
    parts = read_evaluation(write_fashion_iq(tmp_path))
    assert [part.name for part in parts] == [f"FashionIQ val, {kind}" for kind in ("dress", "shirt", "toptee")]
    assert main_way(parts) == KEPT
    assert parts[0].queries[0].words == {"text": "is red, and has dots", "c1": "is red", "c2": "has dots"}
    runs = [
        found(part, *([query.targets[0] if row == 0 else part.gallery[0]] for row, query in enumerate(part.queries)))
        for part in parts
    ]
    values = [part_values(run, KEPT, "Recall@1") for run in runs]
    assert mean_figure(values).mean == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_circo_divides_by_the_right_ones_or_k_and_recalls_the_single_target(tmp_path):
    """Found: 1 (itself), 3, 5, 4, 2, 6; right: 2, 3, 4; the single target is 2."""
    (data,) = read_evaluation(write_circo(tmp_path))
    part = found(data, ["1", "3", "5", "4", "2"])
    assert main_way([data]) == KEPT
    values = means(part, KEPT)
    assert values["mAP@5"] == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert values["Recall@5"] == 1
    assert part_values(part, KEPT, "mAP@2")[0] == pytest.approx((1 / 2) / 2), "of three right ones two fit"
    assert part_values(part, KEPT, "Recall@4")[0] == 0, "3 and 4 are right, and not the single target"
    asked = data.queries[0].asked("Find a picture that also {shared_concept}, but {relative_caption}")
    assert asked == "Find a picture that also a dog, but is red"
    with pytest.raises(QueryError, match=r"no words for \{c1\}; this data set has \{text\}, \{relative_caption\}"):
        data.queries[0].asked("{c1}")


def test_genecis_ranks_each_query_among_its_own_images(tmp_path):
    """First query among 1 (right), 2, 3; second among 2 (right), 3, 4."""
    parts = read_evaluation(write_genecis(tmp_path))
    objects = parts[2]
    assert objects.notes == ("GeneCIS focus_object: 1 queries left out, whose gallery has not the usual 3 images",)
    assert [len(query.among) for query in objects.queries] == [3, 3]
    first, second, third, fourth = (f"{number:012d}" for number in (1, 2, 3, 4))
    part = found(objects, [fourth, second, first], [first, second, third])
    assert set(part.rankings) == {KEPT}, "the query image is in no gallery"
    assert means(part, KEPT) == {"Recall@1": 0.5, "Recall@2": 1, "Recall@3": 1}


def test_genecis_cuts_objects_out_with_surroundings(tmp_path):
    """A box of 2 at (2, 2), widened by 0.7 to the left and of 1.7 in all: 0.6 to 4, rounded 1 to 4."""
    (attributes, *_) = read_evaluation(write_genecis(tmp_path))
    path = tmp_path / "VG_100K/1.jpg"
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    path.with_suffix(".png").replace(path)
    name = next(name for name in attributes.gallery if name.startswith("1 "))
    assert np.array_equal(np.asarray(load_image(attributes.source(name))), pixels[1:4, 1:4])


def test_submissions_are_as_the_servers_take_them(tmp_path):
    (cirr,) = read_evaluation(write_cirr(tmp_path / "cirr"), split="test")
    assert not cirr.labelled
    part = found(cirr, ["a", "g", "b"], ["c", "d"])
    ranked, subset = write_submissions(Run("BAAI/x", "{text}", [part], Cost()), tmp_path / "out")
    assert ranked.name == "cirr-BAAI-x-recall.json"
    expected = {"version": "rc2", "metric": "recall", "12": list("gbcdefh"), "13": list("dabefgh")}
    assert json.loads(ranked.read_text()) == expected
    expected = {"version": "rc2", "metric": "recall_subset", "12": list("bcd"), "13": list("def")}
    assert json.loads(subset.read_text()) == expected
    (circo,) = read_evaluation(write_circo(tmp_path / "circo"), split="test")
    (file,) = write_submissions(Run("x", "{text}", [found(circo, ["1", "5"])], Cost()), tmp_path / "out")
    assert json.loads(file.read_text()) == {"0": [1, 5, 2, 3, 4, 6]}
    (fashion, *_) = read_evaluation(write_fashion_iq(tmp_path / "fashion"))
    with pytest.raises(QueryError, match="only CIRR and CIRCO take submissions"):
        check_submission(fashion)


def test_submissions_of_prompts_without_a_letter_of_their_own_are_files_of_their_own(tmp_path):
    """The prompts "查找{text}" and "显示{text}" made the same name: the second took the place of the first."""
    (circo,) = read_evaluation(write_circo(tmp_path / "circo"), split="test")
    runs = [
        Run("x", prompt, [found(circo, [first, "5"])], Cost(), prompted=True)
        for prompt, first in (("查找{text}", "1"), ("显示{text}", "2"))
    ]
    files = [file for run in runs for file in write_submissions(run, tmp_path / "out")]
    assert [json.loads(file.read_text())["0"][0] for file in files] == [1, 2]


def test_images_elsewhere_are_found_by_their_folder(tmp_path):
    write_cirr(tmp_path)
    shutil.move(tmp_path / "dev", tmp_path / "elsewhere/dev")
    with pytest.raises(QueryError, match=r"CIRR val: 8 of 8 images are missing: .*a.png.*, and 5 more"):
        read_evaluation(tmp_path)
    (data,) = read_evaluation(tmp_path, images=tmp_path / "elsewhere")
    assert load_image(data.source("a")).size == (8, 8)


def broken(folder: Path, file: str, **changes: object) -> None:
    entries = json.loads((folder / file).read_text())
    write_json(folder / file, [{**entries[0], **changes}])


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (write_cirr, lambda d: (d / "dev/c.png").unlink(), r"1 of 8 images are missing: .*c.png"),
        (write_cirr, lambda d: (d / "image_splits/split.rc2.val.json").unlink(), r"cannot read .*split.rc2.val.json"),
        (write_cirr, lambda d: broken(d, "captions/cap.rc2.val.json", caption=5), "entry 1: 'caption' is 5"),
        (write_cirr, lambda d: broken(d, "captions/cap.rc2.val.json", target_hard="z"), "'12' wants 'z'"),
        (write_cirr, lambda d: broken(d, "captions/cap.rc2.val.json", target_hard="a"), "would find itself"),
        (write_cirr, lambda d: write_json(d / "captions/cap.rc2.val.json", []), "with at least one"),
        (write_fashion_iq, lambda d: shutil.rmtree(d / "images"), "folder of images not found; looked for"),
        (write_fashion_iq, lambda d: broken(d, "captions/cap.dress.val.json", captions=["a"]), "expected two texts"),
        (write_circo, lambda d: broken(d, "annotations/val.json", gt_img_ids=[99]), "'0' wants '99'"),
        (write_circo, lambda d: shutil.rmtree(d / "COCO2017_unlabeled"), "COCO's unlabeled2017 not found"),
        (write_genecis, lambda d: broken(d, "genecis/focus_object.json", gallery=3), "expected a list of objects"),
        (
            write_genecis,
            lambda d: broken(
                d, "genecis/focus_attribute.json", reference={"image_id": 1, "instance_bbox": [0, 0, 0, 1]}
            ),
            "a width and height above 0",
        ),
    ],
)
def test_wrong_and_missing_files_are_named(tmp_path, write, change, message):
    change(write(tmp_path))
    with pytest.raises(QueryError, match=message) as refused:
        read_evaluation(tmp_path)
    assert "\n" not in str(refused.value)


def test_pickles_are_not_opened(tmp_path):
    """GeneCIS was first published as pickles, which run whatever their writer liked."""
    write_genecis(tmp_path)
    path = tmp_path / "genecis/focus_attribute.json"
    path.unlink()
    path.with_suffix(".pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(QueryError, match="is a pickle, which can run code"):
        read_evaluation(tmp_path)


def test_a_place_without_a_data_set_and_wrong_splits_are_refused(tmp_path):
    for place, options, message in (
        (tmp_path, {}, "holds no data set that is known"),
        (tmp_path / "none", {}, "does not exist"),
        (tmp_path, {"images": tmp_path / "none"}, "is no folder of images"),
        (write_fashion_iq(tmp_path / "f"), {"split": "test"}, "answers of test are not published"),
        (write_genecis(tmp_path / "g"), {"split": "test"}, "there is only val"),
    ):
        with pytest.raises(QueryError, match=message):
            read_evaluation(place, **options)
