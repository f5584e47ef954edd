"""Limits that follow from the data, and images without objects."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from spatial_mamba_d2.data.cells import generate_cells
from spatial_mamba_d2.detection import mapper
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.data import load_training_datasets
from spatial_mamba_d2.detection.limits import limit_for
from spatial_mamba_d2.detection.predict import Predictor
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.profiling.dense_scenes import measure


@pytest.fixture
def config(root):
    return str(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml")


def test_the_limit_has_room_for_the_fullest_image():
    assert [limit_for(n) for n in (0, 1, 66, 67, 2000)] == [100, 100, 100, 200, 3000]


@pytest.fixture
def crowded(shapes, tmp_path):
    """The sample, one of whose test images has 150 more objects; the overrides."""
    content = json.loads((shapes / "instances_val.json").read_text())
    some = next(a for a in content["annotations"] if not a["iscrowd"])
    content["annotations"] += [{**some, "id": 1000 + i} for i in range(150)]
    path = tmp_path / "crowded.json"
    path.write_text(json.dumps(content))
    return ("DATASETS.TEST_JSON", path, "TEST.DETECTIONS_PER_IMAGE", "auto")


def test_auto_is_a_number_in_training_evaluation_and_checkpoint(
    config, crowded, arguments, tmp_path
):
    run(arguments(*crowded, "SOLVER.MAX_ITER", 2, config_file=config))
    output = tmp_path / "output"
    assert (
        "TEST.DETECTIONS_PER_IMAGE is 300, because an image has 15"
        in (output / "log.txt").read_text()
    )
    assert "at most 300 detections for an image" in (output / "scores.json").read_text()
    assert "DETECTIONS_PER_IMAGE: 300" in (output / "config.yaml").read_text()
    weights = ("MODEL.WEIGHTS", output / "model_final.pth")
    run(arguments(*crowded, *weights, config_file=config, eval_only=True))
    # Predictions know the number, and ask for one where there are no data
    assert Predictor(load_config(output / "config.yaml", [str(w) for w in weights]))
    auto = ["TEST.DETECTIONS_PER_IMAGE", "auto", *map(str, weights)]
    with pytest.raises(ValueError, match="TEST.DETECTIONS_PER_IMAGE must be a number in predic"):
        Predictor(load_config(output / "config.yaml", auto))


def test_wrong_limits_are_named(make_cfg):
    with pytest.raises(ValueError, match="DETECTIONS_PER_IMAGE must be a whole number or auto"):
        make_cfg("TEST.DETECTIONS_PER_IMAGE", "all")
    with pytest.raises(ValueError, match="TEST.DETECTIONS_PER_IMAGE must be at least 1, got 0"):
        make_cfg("TEST.DETECTIONS_PER_IMAGE", 0)


@pytest.fixture
def negatives(tmp_path):
    """Three images without objects, by a list."""
    folder = tmp_path / "negatives"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "hard.txt").write_text("# found by the first training\na.png\nc.png\n")
    return folder


def test_negatives_are_in_the_training_set(make_cfg, negatives):
    words = ("DATASETS.TRAIN_NEGATIVES", negatives / "hard.txt", "DATASETS.NEGATIVES_REPEAT", 3)
    training, added = load_training_datasets(make_cfg(*words))
    names = [record["file_name"][-5:] for record in added.records]
    assert names == ["a.png", "c.png"] * 3 and training.records
    assert added.records[0]["annotations"] == [] and added.records[0]["width"] == 90
    (_, all_of_them) = load_training_datasets(make_cfg("DATASETS.TRAIN_NEGATIVES", negatives))
    assert len(all_of_them.records) == 3
    shutil.copy(negatives / "hard.txt", negatives / "d.png")
    with pytest.raises(ValueError, match="DATASETS.TRAIN_NEGATIVES: problems found: 1"):
        load_training_datasets(make_cfg("DATASETS.TRAIN_NEGATIVES", negatives))
    skip = ("DATASETS.TRAIN_NEGATIVES", negatives, "DATASETS.ON_ERROR", "skip")
    assert len(load_training_datasets(make_cfg(*skip))[1].records) == 3
    with pytest.raises(FileNotFoundError, match="DATASETS.TRAIN_NEGATIVES: no such file or fold"):
        load_training_datasets(make_cfg("DATASETS.TRAIN_NEGATIVES", negatives / "e.png"))
    with pytest.raises(ValueError, match="TRAIN_NEGATIVES names no images"):
        make_cfg("DATASETS.NEGATIVES_REPEAT", 2)
    with pytest.raises(ValueError, match="not for PointRend, which fails on a batch without obj"):
        load_config("point_rend_spatial_mamba_t.yaml", ["DATASETS.TRAIN_NEGATIVES", "photos"])


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn", "retinanet"])
def test_negatives_alone_train(name, root, arguments, negatives, curve, tmp_path):
    """Every loss is finite in a batch without any object; those of boxes and masks are 0."""
    retina = name == "retinanet"
    words = [
        "DATASETS.TRAIN_NEGATIVES", negatives, "DATASETS.NEGATIVES_REPEAT", 1000,
        "SOLVER.MAX_ITER", 1, "INPUT.MAX_SIZE_TRAIN", 96, "DATALOADER.NUM_WORKERS", 0,
        "DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", "", "DATASETS.TEST", (),
        "SOLVER.STEPS", (), "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50,
        "MODEL.RETINANET.NUM_CLASSES" if retina else "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    ]  # fmt: skip
    run(arguments(*words, config_file=str(root / f"configs/{name}_spatial_mamba_t.yaml")))
    for key in ("loss_box_reg",) if retina else ("loss_rpn_loc",):
        assert curve(tmp_path / "output", key) == {0: 0.0}
    assert curve(tmp_path / "output", "total_loss")[0] > 0


@pytest.mark.parametrize("jitter", [False, True])
def test_objects_outside_of_a_crop_are_dropped_early_and_the_same(
    jitter, make_cfg, tmp_path, monkeypatch
):
    root = generate_cells(
        tmp_path / "cells", num_train=1, num_val=1, image_px=160, num_objects=100, cell_px=10
    )
    words = ["DATASETS.TRAIN_JSON", root / "instances_train.json", "MODEL.ROI_HEADS.NUM_CLASSES", 1,
             "DATASETS.TRAIN_IMAGES", root / "images/training"]  # fmt: skip
    if jitter:
        words += ["INPUT.SCALE_JITTER.ENABLED", True, "INPUT.SCALE_JITTER.SIZE", 96]
    else:
        words += ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE",
                  (64, 64)]  # fmt: skip
    cfg = make_cfg(*words)
    (dataset,) = load_training_datasets(cfg)
    numbers = []
    for seed in range(5):
        found = []
        for early in (True, False):
            with monkeypatch.context() as patch:
                if not early:
                    patch.setattr(mapper, "objects_in_view", lambda annotations, *_: annotations)
                made = mapper.Mapper(cfg, is_train=True)
                item = made.transform(*made.read(dataset.records[0]), np.random.default_rng(seed))
            found.append(item["instances"])
        assert torch.equal(found[0].gt_boxes.tensor, found[1].gt_boxes.tensor)
        for one, two in zip(*(f.gt_masks.polygons for f in found), strict=True):
            assert all(map(np.array_equal, one, two))
        numbers.append(len(found[0]))
    assert 0 < min(numbers) < 100


def test_figures_of_scenes(make_cfg, tmp_path):
    folder = generate_cells(
        tmp_path / "cells", num_train=1, num_val=2, image_px=160, num_objects=50, cell_px=10
    )
    cfg = make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    config, weights = tmp_path / "config.yaml", tmp_path / "detector.pth"
    config.write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict(), "classes": ["cell"]}, weights)
    figures = measure(config, weights, folder)
    assert figures["detections"] > 0 and figures["rle_mb"] > 0
    assert 0 <= figures["mask_recall50"] <= 100 and 0 <= figures["box_recall50"] <= 100
