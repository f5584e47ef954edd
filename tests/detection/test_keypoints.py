"""Keypoints: trained, mirrored and scored, or refused by the key's name."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from spatial_mamba_d2.detection.data import (
    build_train_loader,
    load_dataset,
    load_training_datasets,
)
from spatial_mamba_d2.detection.trainer import Trainer, build_evaluator

HEIGHT, WIDTH = 80, 96
NAMES = ["nose", "left_ear", "right_ear", "tail"]
BOXES = [[10, 12, 30, 24], [50, 30, 34, 36]]
# x, y and visibility of each
POINTS = [[20, 15, 2, 12, 14, 2, 35, 14, 1, 25, 34, 2], [60, 35, 2, 55, 33, 2, 0, 0, 0, 80, 60, 2]]


def content():
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3],
             "iscrowd": 0, "keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
            for i, (box, points) in enumerate(zip(BOXES, POINTS, strict=True), start=1)
        ],
        "categories": [{"id": 1, "name": "cat", "keypoints": NAMES}],
    }  # fmt: skip


@pytest.fixture
def cfg_of(make_cfg, tmp_path):
    """``cfg_of(content, KEY, VALUE, ...)``"""
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")

    def cfg_of(content, *more):
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        return make_cfg(
            "DATASETS.TRAIN_JSON", file, "DATASETS.TRAIN_IMAGES", tmp_path,
            "DATASETS.TEST_JSON", file, "DATASETS.TEST_IMAGES", tmp_path,
            "MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False,
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,),
            "TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 4, "INPUT.MIN_SIZE_TRAIN", (HEIGHT,),
            "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0, *more,
        )  # fmt: skip

    return cfg_of


def score(cfg, change=lambda points: points):
    """What a detector of the truth, or of changed keypoints, scores."""
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    instances = Instances((HEIGHT, WIDTH))
    boxes = torch.tensor(BOXES).float()
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.full((2,), 0.9)
    instances.pred_classes = torch.zeros(2, dtype=torch.int64)
    points = np.array(POINTS, float).reshape(2, -1, 3)
    points[..., :2] += 0.5  # Detectron2's frame
    instances.pred_keypoints = torch.tensor(change(points))
    evaluator = build_evaluator(cfg, dataset)
    evaluator.reset()
    (record,) = dataset.records
    evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize(
    "drop", [None, "num_keypoints", "area", "iscrowd", "id"], ids=lambda x: f"without {x}"
)
def test_the_truth_scores_100(drop, cfg_of):
    file = content()
    for annotation in file["annotations"]:
        annotation.pop(drop, None)
    cfg = cfg_of(file)
    perfect = score(cfg)
    assert set(perfect) == {"bbox", "keypoints"}
    assert perfect["bbox"]["AP"] == pytest.approx(100)
    assert perfect["keypoints"]["AP"] == pytest.approx(100)
    exchanged = score(cfg, lambda points: points[:, [0, 2, 1, 3]])
    assert exchanged["keypoints"]["AP"] < 60 and exchanged["bbox"]["AP"] == pytest.approx(100)


def test_an_object_without_keypoints_counts_for_its_box_only(cfg_of, caplog):
    file = content()
    del file["annotations"][1]["keypoints"], file["annotations"][1]["num_keypoints"]
    cfg = cfg_of(file)
    datasets = load_training_datasets(cfg)
    assert "1 of 2 annotations have no keypoints" in caplog.text
    (record,) = next(iter(build_train_loader(cfg, datasets)))
    assert record["instances"].gt_keypoints.tensor[1].abs().sum() == 0
    perfect = score(cfg)
    assert perfect["keypoints"]["AP"] == pytest.approx(100)
    for annotation in file["annotations"]:
        annotation.pop("keypoints", None)
    with pytest.raises(ValueError, match="no annotation has keypoints, which MODEL.KEYPOINT_ON"):
        load_training_datasets(cfg_of(file))


def test_a_mirror_image_exchanges_left_and_right(cfg_of):
    cfg = cfg_of(content(), "INPUT.RANDOM_FLIP", "horizontal")
    datasets = load_training_datasets(cfg)
    loader = iter(build_train_loader(cfg, datasets))
    truth = torch.tensor(POINTS).float().reshape(2, -1, 3)
    plain = truth.clone()
    plain[..., :2] += 0.5 * (truth[..., 2:] > 0)
    mirrored = plain[:, [0, 2, 1, 3]].clone()
    mirrored[..., 0] = (WIDTH - mirrored[..., 0]) * (mirrored[..., 2] > 0)
    kinds = set()
    for _ in range(12):
        (record,) = next(loader)
        found = record["instances"].gt_keypoints.tensor
        kind = next(k for k, p in enumerate((plain, mirrored)) if torch.allclose(found, p))
        kinds.add(kind)
    assert kinds == {0, 1}


def test_training_and_evaluation_run(cfg_of):
    cfg = cfg_of(content(), "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0, "TEST.PICTURES", 1)
    trainer = Trainer(cfg)
    trainer.train()
    latest = {k: v for k, (v, _) in trainer.storage.latest().items()}
    assert math.isfinite(latest["loss_keypoint"])
    assert "keypoints" in trainer.last_results


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"keypoints": [1, 2, 2] * 3}, (), r"annotation 1 of image 1 must have 3 x 4 finite num"),
        ({"keypoints": [1, 2, "x"] * 4}, (), r"annotation 1 of image 1 must have 3 x 4 finite num"),
        ({"keypoints": 5}, (), r"annotation 1 of image 1 must have 3 x 4 finite numbers .* got 5"),
        ({"keypoints": {"nose": [1, 2, 2]}}, (), r"annotation 1 of image 1 .* got {'nose'"),
        ({}, ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 5),
         r"annotation 1 of image 1 must have 3 x 5 .*MODEL\.ROI_KEYPOINT_HEAD\.NUM_KEYPOINTS"),
    ],
)  # fmt: skip
def test_keypoints_that_do_not_fit(change, more, message, cfg_of):
    file = content()
    file["annotations"][0].update(change)
    with pytest.raises(ValueError, match=message):
        load_training_datasets(cfg_of(file, *more))


@pytest.mark.parametrize("value", [5, [1, 2, "x"] * 4, [1, math.inf, 2] * 4])
def test_wrong_keypoints_are_skipped_if_asked_for(value, cfg_of):
    """A detector of what is left scores 100."""
    file = content()
    file["annotations"].append({**file["annotations"][0], "id": 3, "keypoints": value})
    cfg = cfg_of(file, "DATASETS.ON_ERROR", "skip")
    assert score(cfg)["keypoints"]["AP"] == pytest.approx(100)
    (dataset,) = load_training_datasets(cfg)
    assert len(dataset.records[0]["annotations"]) == 2
    with pytest.raises(ValueError, match="nothing is usable"):
        for annotation in file["annotations"]:
            annotation["keypoints"] = value
        load_training_datasets(cfg_of(file, "DATASETS.ON_ERROR", "skip"))


def test_keypoints_that_are_nan_are_missing_and_strings_are_numbers(cfg_of):
    file = content()
    file["annotations"][0]["keypoints"] = [str(value) for value in POINTS[0]]
    assert score(cfg_of(file))["keypoints"]["AP"] == pytest.approx(100)
    file["annotations"][0]["keypoints"] = math.nan
    dataset = load_dataset(cfg := cfg_of(file), cfg.DATASETS.TEST[0], is_train=False)
    first, second = dataset.records[0]["annotations"]
    assert not any(first["keypoints"][2::3]) and second["keypoints"][2::3] == POINTS[1][2::3]


@pytest.mark.parametrize(
    "pair",
    ["left_ear right_ear", "LEFT-EAR RIGHT-EAR", "Left_Ear Right_ear", "ear_left ear_right",
     "ear-left ear-right", "ear_l ear_r", "ear_L ear_R", "ear.L ear.R", "l_ear r_ear",
     "L-ear R-ear", "LEar REar", "lEar rEar", "earL earR", "leftEar rightEar", "L1 R1",
     "ear l 1|ear r 1"],
)  # fmt: skip
def test_pairs_of_keypoints_by_their_names(pair, cfg_of, caplog):
    one, other = pair.split("|") if "|" in pair else pair.split(" ")
    file = content()
    file["categories"][0]["keypoints"] = ["nose", one, other, "tail"]
    caplog.set_level(logging.INFO)
    (dataset,) = load_training_datasets(cfg_of(file, "INPUT.RANDOM_FLIP", "horizontal"))
    assert dataset.keypoints.flip_indices.tolist() == [0, 2, 1, 3]
    assert f"mirror images exchange {one} and {other}, but not nose, tail" in caplog.text


@pytest.mark.parametrize("flip", ["horizontal", "none"])
def test_keypoints_of_which_no_two_are_a_pair(flip, cfg_of, caplog):
    file = content()
    file["categories"][0]["keypoints"] = ["Nase", "Ohr links", "Ohr rechts", "left_tail"]
    (dataset,) = load_training_datasets(cfg_of(file, "INPUT.RANDOM_FLIP", flip))
    assert dataset.keypoints.flip_indices.tolist() == [0, 1, 2, 3]
    warned = "no two of the keypoints Nase, Ohr links, Ohr rechts, left_tail" in caplog.text
    assert warned == ("INPUT.RANDOM_FLIP none" in caplog.text) == (flip == "horizontal")


def test_without_names_nothing_says_what_is_left_and_right(cfg_of):
    file = content()
    del file["categories"][0]["keypoints"]
    with pytest.raises(ValueError, match="no names of keypoints.*INPUT.RANDOM_FLIP none"):
        load_training_datasets(cfg_of(file))
    (dataset,) = load_training_datasets(cfg_of(file, "INPUT.RANDOM_FLIP", "none"))
    assert dataset.keypoints.flip_indices.tolist() == [0, 1, 2, 3]
