"""Detection in images that have no annotations."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from spatial_mamba_d2.data.images import read_image, visualize_images
from spatial_mamba_d2.detection.data import load_dataset
from spatial_mamba_d2.detection.mapper import Mapper
from spatial_mamba_d2.detection.predict import Predictor, _metadata, build_draw
from spatial_mamba_d2.models import build_classifier


@pytest.fixture
def weights(make_cfg, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "detector.pth"
    names = ["circle", "square", "triangle", "star", "cross"]
    torch.save({"model": build_model(make_cfg()).state_dict(), "classes": names}, path)
    return path


def test_folder(root, overrides, shapes, weights, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(shapes / "images/validation", folder)
    broken = next(folder.glob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:500])
    config = root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml"
    words = [*overrides, "MODEL.WEIGHTS", str(weights), "TEST.PICTURES_SCORE_THRESH", "0.0"]
    words += ["TEST.DETECTIONS_PER_IMAGE", "10"]
    drawings = visualize_images([folder], tmp_path / "drawn", partial(build_draw, config, words))
    assert len(drawings) == 4
    assert all(min(read_image(p).shape[:2]) >= 480 for p in drawings)
    said = capsys.readouterr().out
    assert f"skipped: image file {broken}" in said and ", 1 skipped" in said


def test_instances_are_in_the_frame_of_the_image(make_cfg, weights):
    predictor = Predictor(make_cfg("MODEL.WEIGHTS", weights))
    found = predictor(np.zeros((50, 81, 3), np.uint8))
    assert found.image_size == (50, 81)
    assert found.pred_masks.shape[1:] == (50, 81)
    assert list(predictor.metadata.thing_classes)[0] == "circle"


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_the_network_gets_the_channels_that_it_was_trained_on(
    input_format, make_cfg, weights, shapes
):
    """Prediction and evaluation of one image are the same: also in the order of channels."""
    cfg = make_cfg("MODEL.WEIGHTS", weights, "INPUT.FORMAT", input_format, "MODEL.PIXEL_MEAN",
                   (200, 100, 0), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)  # fmt: skip
    predictor = Predictor(cfg)
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    item = Mapper(cfg, is_train=False)(dataset.records[0])
    with torch.no_grad():
        expected = predictor.model([item])[0]["instances"]
    found = predictor(read_image(dataset.records[0]["file_name"]))
    assert len(found) > 0
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_numbers_instead_of_names_that_the_weights_do_not_have(make_cfg):
    cfg = make_cfg().clone()
    cfg.defrost()
    assert len(_metadata(cfg, None).thing_classes) == 5
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", 3
    assert _metadata(cfg, None).thing_classes == ["class 0", "class 1", "class 2"]


def test_backbone_weights_are_not_a_detector(make_cfg, tmp_path):
    torch.save(build_classifier("test").state_dict(), tmp_path / "cls.pth")
    with pytest.raises(ValueError, match="cls.pth must hold all parameters of GeneralizedRCNN"):
        Predictor(make_cfg("MODEL.WEIGHTS", tmp_path / "cls.pth"))
    with pytest.raises(ValueError, match="MODEL.WEIGHTS must name a checkpoint"):
        Predictor(make_cfg())
