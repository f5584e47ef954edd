"""A detector with an optimised backbone finds the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spatial_mamba_d2.detection import build_model
from spatial_mamba_d2.models import optimize_for_inference


@pytest.fixture
def detector(make_cfg):
    torch.manual_seed(0)
    model = build_model(make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)).eval()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def detect(model, images):
    with torch.no_grad():
        return [output["instances"] for output in model([{"image": image} for image in images])]


def test_the_same_detections(detector):
    optimized = optimize_for_inference(detector)
    assert type(optimized.backbone.bottom_up.stages[0]).__name__ == "OptimizedStage"
    assert optimized.backbone.output_shape() == detector.backbone.output_shape()
    images = [torch.randint(0, 256, (3, 75, 101)), torch.randint(0, 256, (3, 64, 40))]
    for model in (optimized, copy.deepcopy(optimized)):
        for found, expected in zip(detect(model, images), detect(detector, images), strict=True):
            assert len(found) == len(expected) > 0
            torch.testing.assert_close(
                found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-2
            )
            torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
            assert torch.equal(found.pred_classes, expected.pred_classes)


def test_bfloat16_backbone_under_float32_heads(detector):
    images = [torch.randint(0, 256, (3, 75, 101))]
    (found,) = detect(optimize_for_inference(detector, torch.bfloat16), images)
    assert found.scores.dtype == torch.float32 and found.scores.isfinite().all()


def test_training_and_checkpoints_are_refused(detector):
    optimized = optimize_for_inference(detector)
    for refused in (
        optimized.train,
        optimized.backbone.train,
        optimized.state_dict,
        lambda: optimized.load_state_dict(detector.state_dict()),
    ):
        with pytest.raises(RuntimeError, match="its weights are folded and packed for inference"):
            refused()
