"""COCO's scores: other packages give those of pycocotools."""

from __future__ import annotations

import importlib
import json
import logging

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spatial_mamba_d2.detection import coco_evaluation
from spatial_mamba_d2.detection.coco_evaluation import PACKAGES, evaluate_coco
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.trainer import Trainer

OTHERS = [name for name in PACKAGES if name != "pycocotools"]
TASKS = ("bbox", "segm", "keypoints")


def annotation(rng, box, category_id, size):
    """A box with an ellipse in it as mask, and 17 keypoints."""
    x, y, width, height = box
    rows, columns = np.ogrid[: size[0], : size[1]]
    inside = ((columns - x - width / 2) / width) ** 2 + ((rows - y - height / 2) / height) ** 2
    rle = coco_mask.encode(np.asfortranarray(inside < 0.25, np.uint8))
    points = np.stack([x + width * rng.random(17), y + height * rng.random(17)], 1).round(1)
    keypoints = np.concatenate([points, rng.integers(0, 3, (17, 1))], 1).ravel().tolist()
    return {
        "category_id": category_id,
        "bbox": [float(v) for v in box],
        "area": float(coco_mask.area(rle)),
        "segmentation": {"size": list(size), "counts": rle["counts"].decode()},
        "keypoints": keypoints,
        "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
    }


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A file of six images with crowds, ignored keypoints and an empty class; detections for it."""
    rng = np.random.default_rng(3)
    size, annotations, detections = (240, 320), [], []
    for image_id in range(1, 7):
        for _ in range(25 if image_id > 1 else 0):
            box = rng.integers((0, 0, 6, 6), (200, 120, 120, 120)).tolist()
            truth = annotation(rng, box, int(rng.integers(1, 4)), size)
            truth |= {"image_id": image_id, "id": len(annotations) + 1,
                      "iscrowd": int(rng.random() < 0.15)}  # fmt: skip
            annotations.append(truth)
            for _ in range(int(rng.integers(0, 4))):
                moved = (np.array(box) + rng.normal(0, 3, 4)).clip((0, 0, 3, 3)).round(2).tolist()
                detection = annotation(rng, moved, truth["category_id"], size)
                near = np.array(truth["keypoints"]) + rng.normal(0, 2, 51)
                detection |= {"keypoints": near.round(2).tolist(), "image_id": image_id}
                detection["score"] = round(float(rng.random()), 2)  # some are equal
                del detection["area"], detection["num_keypoints"]
                detections.append(detection)
    content = {
        "info": {}, "images": [{"id": i, "height": 240, "width": 320} for i in range(1, 8)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 5)],
        "annotations": annotations,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("crowded") / "truth.json"
    path.write_text(json.dumps(content))
    return str(path), detections


@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_are_those_of_pycocotools(task, crowded):
    """Of its own summary, at its own limit."""
    path, detections = crowded
    found = evaluate_coco(path, detections, task)
    truth = COCO(path)
    stripped = [{k: v for k, v in d.items() if k != "bbox" or task != "segm"} for d in detections]
    own = COCOeval(truth, truth.loadRes(stripped), task)
    own.evaluate()
    own.accumulate()
    own.summarize()
    assert found.stats.tolist() == own.stats.tolist()
    assert 0.1 < found.stats[0] < 0.9
    assert "Average Precision" in found.summary


@pytest.mark.parametrize("limit", [5, 100, 300])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("evaluator", OTHERS)
def test_the_packages_agree(evaluator, task, limit, crowded):
    """To the last digits of precision and recall at all thresholds, for classes, areas, limits."""
    pytest.importorskip(PACKAGES[evaluator].module, reason=f"{evaluator} is not installed")
    path, detections = crowded
    sigmas = np.linspace(0.02, 0.1, 17)
    expected = evaluate_coco(path, detections, task, max_detections=limit, sigmas=sigmas)
    found = evaluate_coco(
        path, detections, task, evaluator=evaluator, max_detections=limit, sigmas=sigmas
    )
    np.testing.assert_allclose(found.stats, expected.stats, rtol=0, atol=1e-12)
    for key, value in expected.eval.items():
        np.testing.assert_allclose(found.eval[key], value, rtol=0, atol=1e-12)


def test_a_missing_package_is_named(monkeypatch):
    importing = importlib.import_module

    def without_hotcoco(name):
        if name == "hotcoco":
            raise ImportError("No module named 'hotcoco'")
        return importing(name)

    monkeypatch.setattr(coco_evaluation.importlib, "import_module", without_hotcoco)
    with pytest.raises(ValueError, match=r"TEST.EVALUATOR hotcoco needs .*\[evaluation\]"):
        load_config(None, ["TEST.EVALUATOR", "hotcoco"])
    with pytest.raises(ValueError, match="TEST.EVALUATOR must be one of pycocotools, hotcoco, f"):
        load_config(None, ["TEST.EVALUATOR", "coco"])


def test_the_log_has_package_limit_and_time(make_cfg, caplog):
    caplog.set_level(logging.INFO, "spatial_mamba_d2")
    cfg = make_cfg("TEST.DETECTIONS_PER_IMAGE", 7)
    results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert set(results) == {"bbox", "segm"}
    assert "detections by pycocotools in" in caplog.text
    assert "at most 7 for an image" in caplog.text and "maxDets=  7 ]" in caplog.text
