"""Every number of a detection report, against pycocotools or counted by hand."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.evaluation import compare, detection, evaluate_detections, evaluation
from spatial_mamba_d2.evaluation.detection import STATS
from spatial_mamba_d2.evaluation.evaluation import expected_error


@pytest.fixture(scope="module", params=["shapes", "coco_mini"])
def truth(request) -> dict:
    folder = request.getfixturevalue(request.param)
    return read_json(folder / "instances_val.json")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(evaluation, "NUM_SAMPLES", 40)


def detect(truth: dict, seed: int, noise_px: float = 4.0) -> list[dict]:
    """Detections with all kinds of errors: shifted, of other classes, doubled, invented."""
    rng = np.random.default_rng(seed)
    ids = [c["id"] for c in truth["categories"]]
    found = []
    for a in truth["annotations"]:
        if a["iscrowd"] or rng.random() < 0.15:
            continue
        box = np.array(a["bbox"], float) + rng.normal(0, noise_px, 4)
        box[2:] = np.maximum(box[2:], 2)
        category = a["category_id"] if rng.random() < 0.85 else int(rng.choice(ids))
        entry = {
            "image_id": a["image_id"],
            "category_id": category,
            "bbox": box.tolist(),
            "segmentation": a["segmentation"],
            "score": round(float(rng.random()), 3),
        }
        found.append(entry)
        if rng.random() < 0.1:
            found.append({**entry, "score": round(float(rng.random()), 3)})
    for image in truth["images"]:
        if rng.random() < 0.5:
            found.append({"image_id": image["id"], "category_id": int(rng.choice(ids)),
                          "bbox": [1.0, 2.0, 15.0, 12.0], "score": round(float(rng.random()), 3),
                          "segmentation": [[1, 2, 16, 2, 16, 14, 1, 14]]})  # fmt: skip
    return found


def oracle(truth: dict, detections: list[dict], image_ids=None, kind: str = "bbox") -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO()
        objects.dataset = {"info": {}, **copy.deepcopy(truth)}
        objects.createIndex()
        results = objects.loadRes(as_results(detections, kind))
        run = COCOeval(objects, results, kind)
        if image_ids is not None:
            run.params.imgIds = image_ids
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def as_results(detections: list[dict], kind: str) -> list[dict]:
    left_out = "segmentation" if kind == "bbox" else "bbox"
    found = copy.deepcopy([{k: v for k, v in d.items() if k != left_out} for d in detections])
    return found


def as_rle(truth: dict, detections: list[dict]) -> list[dict]:
    from pycocotools import mask

    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    return [
        {
            **d,
            "segmentation": mask.merge(mask.frPyObjects(d["segmentation"], *sizes[d["image_id"]])),
        }
        for d in detections
    ]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_cocos_numbers(truth, kind):
    detections = detect(truth, 0)
    if kind == "segm":
        detections = as_rle(truth, detections)
    found = evaluate_detections(truth, as_results(detections, kind), kind)
    run = oracle(truth, detections, kind=kind)
    for name, value in zip(STATS, run.stats, strict=True):
        assert found.scores[name] == (pytest.approx(value) if value >= 0 else None)
    precision = run.eval["precision"]
    for k, row in enumerate(found.per_class):
        values = precision[:, :, k, 0, -1]
        if (values > -1).any():
            assert row["AP"] == pytest.approx(values[values > -1].mean())
        else:
            assert np.isnan(row["AP"])


def test_images_by_their_number_of_objects(truth):
    detections = detect(truth, 1)
    found = evaluate_detections(truth, detections)
    number = dict.fromkeys((i["id"] for i in truth["images"]), 0)
    for a in truth["annotations"]:
        number[a["image_id"]] += not a["iscrowd"]
    compared = 0
    for low, high, text in ((1, 1, "1"), (2, 5, "2 to 5"), (6, 20, "6 to 20")):
        ids = sorted(i for i, n in number.items() if low <= n <= high)
        if ids:
            expected = oracle(truth, detections, ids).stats[0]
            assert found.scores[f"AP, images with {text} objects"] == pytest.approx(expected)
            compared += 1
    assert compared >= 1


def test_best_threshold_by_trying_all(truth):
    detections = detect(truth, 2)
    found = evaluate_detections(truth, detections)
    run = oracle(truth, detections)
    pairs, total = [], 0
    for entry in run.evalImgs:
        if entry is not None and entry["aRng"] == run.params.areaRng[0]:
            total += sum(not ignored for ignored in entry["gtIgnore"])
            for score, match, ignored in zip(
                entry["dtScores"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True
            ):
                if not ignored:
                    pairs.append((score, match > 0))
    best = (0.0, 0.0, 0.0)
    for threshold in {score for score, _ in pairs}:
        kept = [hit for score, hit in pairs if score >= threshold]
        best = max(best, (2 * sum(kept) / (len(kept) + total), sum(kept) / len(kept),
                          sum(kept) / total))  # fmt: skip
    scores = found.scores
    assert (scores["F1"], scores["precision"], scores["recall"]) == pytest.approx(best)


def test_confusion_counts_every_object_once(truth):
    detections = detect(truth, 3)
    found = evaluate_detections(truth, detections)
    threshold = found.scores["best threshold"]
    matrix = found.confusion
    ids = sorted(c["id"] for c in truth["categories"])
    for k, id_ in enumerate(ids):
        objects = [a for a in truth["annotations"] if a["category_id"] == id_ and not a["iscrowd"]]
        assert matrix[k].sum() == len(objects)
        kept = [d for d in detections if d["category_id"] == id_ and d["score"] >= threshold]
        assert matrix[:, k].sum() <= len(kept)  # some are in crowds
    assert matrix[-1, -1] == 0
    assert found.columns[-1] == "background"


def test_confusion_is_hotcocos(truth):
    hotcoco = pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    detections = detect(truth, 4, noise_px=1.0)
    ordinary = {**truth, "annotations": [a for a in truth["annotations"] if not a["iscrowd"]]}
    found = evaluate_detections(ordinary, detections)
    objects = hotcoco.COCO({"info": {}, "licenses": [], **copy.deepcopy(ordinary)})
    run = hotcoco.COCOeval(objects, objects.load_res(as_results(detections, "bbox")), "bbox")
    theirs = run.confusion_matrix(0.5, None, found.scores["best threshold"])["matrix"]
    # Where a detection overlaps two objects by more than half, they may choose differently.
    assert np.abs(theirs.astype(int) - found.confusion).sum() <= 0.02 * found.confusion.sum()
    errors = found.more["errors"]
    assert errors["ap50"] == pytest.approx(found.scores["AP50"], abs=1e-6)
    assert set(errors["counts"]) == {"Bkg", "Both", "Cls", "Dupe", "Loc", "Miss"}


def test_calibration(truth):
    found = evaluate_detections(truth, detect(truth, 5))
    assert sum(b["number"] for b in found.calibration) > 0
    assert all(0 <= b["accuracy"] <= 1 for b in found.calibration)
    assert expected_error(found.calibration) > 0.05  # the scores are random


def test_perfect_and_no_detections(truth):
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
         "score": 1.0} for a in truth["annotations"] if not a["iscrowd"]
    ]  # fmt: skip
    found = evaluate_detections(truth, perfect)
    assert found.scores["AP"] == pytest.approx(1.0)
    assert found.worst == [] and found.suspects == []
    assert found.interval == pytest.approx((1.0, 1.0))
    nothing = evaluate_detections(truth, [])
    assert nothing.scores["AP"] == 0 and nothing.scores["recall"] == 0
    assert len(nothing.worst) > 0


def test_label_errors_are_suspected(truth):
    wrong = copy.deepcopy(truth)
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
         "score": 0.99} for a in truth["annotations"] if not a["iscrowd"]
    ]  # fmt: skip
    largest = max((a for a in wrong["annotations"] if not a["iscrowd"]), key=lambda a: a["area"])
    other = next(c for c in wrong["categories"] if c["id"] != largest["category_id"])
    largest["category_id"] = other["id"]
    found = evaluate_detections(wrong, perfect)
    ((position, words),) = [s for s in found.suspects if "another class" in s[1]]
    assert found.more["image_ids"][position] == largest["image_id"]
    assert other["name"] in words


def test_ap_is_that_of_pycocotools(truth):
    detections = detect(truth, 7)
    run = oracle(truth, detections)
    ids = list(run.params.imgIds)
    matches = detection._matches_of(run, len(run.params.catIds), ids)
    everything = np.ones(len(ids), int)
    assert detection.average_precision(matches, everything) == pytest.approx(run.stats[0])
    half = np.arange(len(ids)) % 2
    expected = oracle(truth, detections, [i for i, w in zip(ids, half, strict=True) if w]).stats[0]
    assert detection.average_precision(matches, half) == pytest.approx(expected)
    assert detection.average_precision(matches, 3 * half) == pytest.approx(expected, abs=0.02)


def test_intervals_and_comparison(truth):
    good, bad = (evaluate_detections(truth, detect(truth, 6, noise)) for noise in (1.0, 8.0))
    for found in (good, bad):
        low, high = found.interval
        assert low <= found.scores["AP"] <= high
        assert len(found.samples) == 40
    result = compare(bad, good)
    assert result["difference"] == pytest.approx(good.scores["AP"] - bad.scores["AP"])
    assert result["low"] <= result["difference"] <= result["high"]
    assert result["is_clear"]
    assert not compare(good, good)["is_clear"]


def test_arguments_are_checked(truth):
    with pytest.raises(ValueError, match="must have images and annotations"):
        evaluate_detections({**truth, "annotations": []}, [])
