"""Mask R-CNN as a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.data.shapes import render_image
from spatial_mamba_d2.detection.export import (
    ExportableDetector,
    compare_detections,
    detect_in,
    require_exportable,
)
from spatial_mamba_d2.export import formats
from spatial_mamba_d2.export.exportable import Tolerance
from spatial_mamba_d2.export.portable import portable_copy
from spatial_mamba_d2.models import load_weights


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
def test_onnx(model, root, overrides, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} (extra export) is not installed")
    weights, path = tmp_path / "detector.pth", tmp_path / "model.onnx"
    names = ["circle", "square", "triangle", "star", "cross"]
    torch.save({"model": model.state_dict(), "classes": names}, weights)
    metadata = deploy.export_model(
        weights, "onnx", path, overrides=overrides,
        config_file=root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml",
    )  # fmt: skip
    assert metadata["outputs"] == ["boxes", "scores", "classes", "masks"]
    assert metadata["classes"] == names
    run = formats.open_file(path, "onnx")
    for image in (np.full((96, 100, 3), 124, np.uint8), np.zeros((33, 40, 3), np.uint8)):
        found = run(image)  # one box on a level, or none
        expected = detect_in(model, torch.from_numpy(image))
        assert abs(len(found["scores"]) - len(expected["scores"])) <= 1


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
