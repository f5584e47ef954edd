"""Mask R-CNN as a file."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.data.shapes import render_image
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.export import (
    ExportableDetector,
    compare_detections,
    detect_in,
    require_exportable,
)
from spatial_mamba_d2.export import checks, formats
from spatial_mamba_d2.export.exportable import Tolerance
from spatial_mamba_d2.export.portable import portable_copy
from spatial_mamba_d2.models import load_weights
from spatial_mamba_d2.prediction import load_predictor

THRESHOLD = 0.0517  # of scores; no other number in the graph is equal


@pytest.fixture
def model(make_cfg, filled_state):
    model = build_model(make_cfg()).eval()
    load_weights(model, filled_state(model))
    return model


def outputs_of(function, image):
    with torch.no_grad():
        values = function(torch.from_numpy(image))
    return dict(zip(("boxes", "scores", "classes", "masks"), map(np.asarray, values), strict=False))


def test_the_function_equals_detectron2(model):
    """Bitwise, over the same modules and operators; in portable form, up to rounding."""
    function, portable = ExportableDetector(model), ExportableDetector(portable_copy(model))
    for index, px in enumerate(((96, 96), (131, 131), (70, 70))):
        image = render_image("val", index, image_px=px).image
        expected = detect_in(model, torch.from_numpy(image))
        assert len(expected["scores"]) > 3
        found = outputs_of(function, image)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name
        differences = compare_detections(
            expected, outputs_of(portable, image), Tolerance(), 0.05, 100
        )
        assert all(d.is_accepted for d in differences), differences


def test_nothing_is_found(model):
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    found = outputs_of(ExportableDetector(model), np.zeros((70, 90, 3), np.uint8))
    assert [found[name].shape for name in found] == [(0, 4), (0,), (0,), (0, 28, 28)]


@pytest.mark.slow
def test_files_for_onnxruntime_and_openvino(model, root, overrides, coco_mini, tmp_path):
    """Photos in five sizes, images in which nothing is found, and the predictor of the file."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} (extra export) is not installed")
    weights, path = tmp_path / "detector.pth", tmp_path / "model.onnx"
    names = ["circle", "square", "triangle", "star", "cross"]
    cfg = load_config(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml", overrides)
    torch.save({"model": model.state_dict(), "classes": names, "config": cfg.dump()}, weights)
    words = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(THRESHOLD)]
    photos = sorted((coco_mini / "images").glob("*.jpg"))[:5]
    metadata = deploy.export_model(weights, "onnx", path, overrides=words, images=photos)
    assert metadata["outputs"] == ["boxes", "scores", "classes", "masks"]
    assert metadata["classes"] == names

    expected = load_predictor(weights, overrides=words)(photos[0], score_thresh=THRESHOLD)
    found = load_predictor(path)(photos[0], score_thresh=THRESHOLD)
    assert len(found) == len(expected) > 3
    assert np.allclose(found.boxes, expected.boxes, rtol=0, atol=0.05)
    assert np.mean(found.bitmaps() == expected.bitmaps()) > 0.999

    exportable, _ = deploy.build_exportable(weights, overrides=words)
    raise_threshold(path, empty := tmp_path / "empty.onnx")
    for format in ("onnx", "openvino") if find_spec("openvino") else ("onnx",):
        if format == "openvino":
            for file in (path, empty):
                formats.convert_to_openvino(file, file.with_suffix(".xml"), json.dumps(metadata))
        suffix = formats.SUFFIXES[format]
        run = formats.open_file(path.with_suffix(suffix), format)
        inputs = checks.check_images(exportable, None, photos)
        table = checks.compare(exportable, run, inputs, formats.tolerance_of("fp32"))
        assert "compared with PyTorch on 5 inputs" in table
        find_nothing = formats.open_file(empty.with_suffix(suffix), format)
        for size in ((96, 100), (33, 40)):
            found = find_nothing(np.zeros((*size, 3), np.uint8))
            shapes = [found[name].shape for name in metadata["outputs"]]
            assert shapes == [(0, 4), (0,), (0,), (0, 28, 28)]
            assert found["classes"].dtype == np.int64


def test_a_detector_is_not_compiled_by_aotinductor(model, root, overrides, tmp_path):
    torch.save({"model": model.state_dict()}, weights := tmp_path / "detector.pth")
    config = root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml"
    with pytest.raises(ValueError, match="format aoti is for classifiers and UPerNets, got detect"):
        deploy.export_model(
            weights, "aoti", tmp_path / "m.pt2", config_file=config, overrides=overrides
        )


def raise_threshold(path, target):
    """A file in which no object has the score that is reported."""
    import onnx

    model = onnx.load(path)
    thresholds = [
        x for x in model.graph.initializer
        if x.data_type == onnx.TensorProto.FLOAT
        and np.array_equal(onnx.numpy_helper.to_array(x).ravel(), np.float32([THRESHOLD]))
    ]  # fmt: skip
    assert len(thresholds) == 1
    shape = list(thresholds[0].dims)
    changed = onnx.numpy_helper.from_array(np.ones(shape, np.float32), thresholds[0].name)
    thresholds[0].CopyFrom(changed)
    onnx.save(model, target)


def answer(boxes, scores, classes, masks):
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "scores": np.array(scores, np.float32),
        "classes": np.array(classes),
        "masks": np.array(masks, np.float32).reshape(-1, 28, 28),
    }


def test_differences_are_seen():
    mask = np.zeros((28, 28))
    mask[5:20, 5:20] = 0.9
    expected = answer([[0, 0, 20, 20], [30, 30, 60, 60]], [0.9, 0.3], [1, 2], [mask, mask])

    def accepted(found, limit=100):
        return all(
            d.is_accepted for d in compare_detections(expected, found, Tolerance(), 0.05, limit)
        )

    swapped = {name: value[::-1] for name, value in expected.items()}
    assert accepted(expected) and accepted(swapped)
    moved, other = expected["boxes"] + 0.1, mask.copy()
    other[5] = 0
    assert not accepted({**expected, "boxes": moved})
    assert not accepted({**expected, "scores": expected["scores"] - 1e-3})
    assert not accepted({**expected, "classes": np.array([1, 1])})
    assert not accepted({**expected, "masks": np.array([mask, other])})
    first = {name: value[:1] for name, value in expected.items()}
    assert not accepted(first)
    # What is within the margin of the threshold, or of the last one of the most, may be missing.
    expected["scores"][1] = 0.0505
    assert accepted(first)
    nothing = answer([], [], [], [])
    expected = nothing
    assert accepted(nothing) and not accepted(first)


def test_architectures_without_a_form_for_export(make_cfg):
    model = build_model(make_cfg("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"))
    with pytest.raises(ValueError, match="POOLER_TYPE must be ROIAlign for export, got RoIPool"):
        require_exportable(model)
    with pytest.raises(ValueError, match="META_ARCHITECTURE must be GeneralizedRCNN .* got Linear"):
        require_exportable(torch.nn.Linear(1, 1))
