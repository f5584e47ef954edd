"""Checkpoints of all tasks: task, configuration and classes are recognised."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="Lightning is not installed")
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from spatial_mamba_d2.classification.config import load_config as classification_config
from spatial_mamba_d2.detection import build_model
from spatial_mamba_d2.detection.config import load_config as detection_config
from spatial_mamba_d2.models import build_backbone, build_classifier
from spatial_mamba_d2.prediction import ClassScores, Detections, LabelMap, load_predictor
from spatial_mamba_d2.segmentation.config import load_config as segmentation_config
from spatial_mamba_d2.segmentation.module import build_model as build_segmentor

SMALL = {
    "detection": [
        "INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_HEADS.NUM_CLASSES", "2",
        "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "5",
    ],
    "segmentation": [
        "MODEL.UPERNET.CHANNELS", "16", "MODEL.UPERNET.AUX_CHANNELS", "8", "MODEL.NUM_CLASSES", "3",
        "INPUT.SHORT_PX", "64", "DATASETS.CLASSES", "",
    ],
    "classification": ["MODEL.NUM_CLASSES", "2", "INPUT.CROP_PX", "32", "TEST.SHORT_PX", "36"],
}  # fmt: skip
NAMES = {"detection": ["cat", "dog"], "segmentation": ["a", "b", "c"], "classification": ["x", "y"]}
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)


@pytest.fixture
def config_of(root, test_variant):
    def config(task, *more):
        words = [*SMALL[task], "MODEL.SPATIAL_MAMBA.VARIANT", test_variant, "MODEL.DEVICE", "cpu"]
        if task == "detection":
            recipe = root / "configs/mask_rcnn_spatial_mamba_t.yaml"
            return detection_config(recipe, [*words, *more])
        loaders = {"segmentation": segmentation_config, "classification": classification_config}
        return loaders[task](None, [*words, *more])

    return config


@pytest.fixture
def checkpoint(config_of, tmp_path):
    """``checkpoint(task)``: of a small model, with names and configuration in it."""

    def write(task, *, with_config=True, with_names=True):
        cfg = config_of(task)
        torch.manual_seed(0)
        if task == "detection":
            model = build_model(cfg)
        elif task == "segmentation":
            model = build_segmentor(cfg)
        else:
            model = build_classifier("test", 2)
        content = {"model": model.state_dict()}
        if with_names:
            content["classes"] = NAMES[task]
            content["palette"] = [[i, i, i] for i in range(3)]
        if with_config:
            content["config"] = cfg.dump()
        path = tmp_path / f"{task}.pth"
        torch.save(content, path)
        return path

    return write


RESULTS = {"detection": Detections, "segmentation": LabelMap, "classification": ClassScores}


@pytest.mark.parametrize("task", RESULTS)
def test_a_checkpoint_is_enough(task, checkpoint, config_of):
    path = checkpoint(task)
    predict = load_predictor(path)
    assert predict.task == task and predict.names == tuple(NAMES[task])
    result = predict(IMAGE, score_thresh=0)
    assert isinstance(result, RESULTS[task]) and result.image_size == (48, 80)
    # The settings are those of the training, not the defaults.
    other = load_predictor(path, overrides=list(map(str, changed_size(task))))
    assert not same(result, other(IMAGE, score_thresh=0))
    drawing = predict.model.draw(IMAGE, result)
    assert drawing.dtype == np.uint8 and drawing.shape[2] == 3


def changed_size(task):
    key = {"detection": "INPUT.MIN_SIZE_TEST", "segmentation": "INPUT.SHORT_PX",
           "classification": "INPUT.CROP_PX"}[task]  # fmt: skip
    return key, 36


def same(first, second):
    if isinstance(first, Detections):
        return np.array_equal(first.boxes, second.boxes)
    if isinstance(first, LabelMap):
        return np.array_equal(first.label, second.label)
    return np.array_equal(first.scores, second.scores)


@pytest.mark.parametrize("task", RESULTS)
def test_the_configuration_next_to_the_weights(task, checkpoint, config_of, tmp_path):
    alone = load_predictor(checkpoint(task))(IMAGE, score_thresh=0)
    path = checkpoint(task, with_config=False)
    (tmp_path / "config.yaml").write_text(config_of(task).dump())
    assert same(load_predictor(path)(IMAGE, score_thresh=0), alone)
    elsewhere = tmp_path / "moved" / "weights.pth"
    elsewhere.parent.mkdir()
    shutil.copy(path, elsewhere)
    given = load_predictor(elsewhere, config=tmp_path / "config.yaml")
    assert same(given(IMAGE, score_thresh=0), alone)


@pytest.mark.parametrize("task", RESULTS)
def test_sizes_of_a_published_model_come_from_its_parameters(task, checkpoint):
    path = checkpoint(task, with_config=False, with_names=task == "classification")
    predict = load_predictor(path, overrides=["MODEL.DEVICE", "cpu"])
    assert predict.task == task and len(predict.names) == len(NAMES[task])


def test_published_classifier(official_state, tmp_path):
    path = tmp_path / "spatialmamba_tiny.pth"
    torch.save({"model": official_state("tiny")}, path)
    predict = load_predictor(path)
    assert predict.task == "classification" and "tench" in predict.names[0]
    assert predict(IMAGE).scores.sum() == pytest.approx(1, abs=1e-4)


def test_errors_name_the_file_and_what_is_wrong(checkpoint, tmp_path, test_variant):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_predictor(tmp_path / "absent.pth")
    path = checkpoint("classification")
    with pytest.raises(ValueError, match="task must be one of detection.*got 'pose'"):
        load_predictor(path, task="pose")
    with pytest.raises(FileNotFoundError, match="config: no such file: .*absent.yaml"):
        load_predictor(path, config=tmp_path / "absent.yaml")
    torch.save(build_backbone(test_variant).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="backbone.pth holds a backbone without a head"):
        load_predictor(tmp_path / "backbone.pth")
    content = torch.load(path)
    content["config"] = "MODEL: {NUM_CLASES: 2}"
    torch.save(content, path)
    with pytest.raises(ValueError, match="classification.pth.*unknown config key MODEL.NUM_CLASES"):
        load_predictor(path)


def test_windows_through_real_models(checkpoint):
    image = np.tile(IMAGE, (3, 3, 1))
    detections = load_predictor(checkpoint("detection"))(image, window_px=96, score_thresh=0)
    assert detections.image_size == image.shape[:2]
    label = load_predictor(checkpoint("segmentation"))(image, window_px=96).label
    assert label.shape == image.shape[:2] and label.max() < 3
    with pytest.raises(ValueError, match="window_px .* has no meaning in classification"):
        load_predictor(checkpoint("classification"))(image, window_px=96)
