"""An optimised detector finds the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.structures import Boxes
from torch import nn

from spatial_mamba_d2.detection import build_model
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.models import optimize_for_inference

# Enough channels for Winograd's algorithm; the boxes of all anchors and classes
WORDS = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.POST_NMS_TOPK_TEST", 60,
         "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 48,
         "MODEL.ROI_MASK_HEAD.CONV_DIM", 64, "TEST.DETECTIONS_PER_IMAGE", 20)  # fmt: skip
ARCHITECTURES = {
    "faster_rcnn": (),
    "mask_rcnn": (),
    "cascade_mask_rcnn": (),
    "keypoint_rcnn": (),
    "retinanet": ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    "point_rend": ("MODEL.POINT_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.FC_DIM", 32),
    "panoptic_fpn": ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 64),
}
IMAGES = (75, 101), (64, 40)


def randomise(model):
    """Statistics of batch norms, and scores that differ."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if name.endswith(("cls_score", "objectness_logits", ".predictor")):
            nn.init.normal_(module.weight, std=0.3)
    return model


def build(config, words):
    torch.manual_seed(0)
    return randomise(build_model(load_config(config, [str(word) for word in words]))).eval()


@pytest.fixture
def build_architecture(root, test_variant):
    def of(name, *more):
        device = ("MODEL.DEVICE", "cpu", "MODEL.SPATIAL_MAMBA.VARIANT", test_variant)
        config = root / f"configs/{name}_spatial_mamba_t.yaml"
        return build(config, (*device, *WORDS, *ARCHITECTURES[name], *more))

    return of


@pytest.fixture
def detector(build_architecture):
    return build_architecture("mask_rcnn")


def images_of(*sizes):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=g) for size in sizes]


def detect(model, images):
    with torch.no_grad():
        return [output["instances"] for output in model([{"image": image} for image in images])]


def assert_equal(found, expected, atol_px=1e-2, atol_score=1e-4):
    assert len(found) == len(expected) > 0
    assert found.get_fields().keys() == expected.get_fields().keys()
    for name, value in expected.get_fields().items():
        actual = found.get(name)
        if name == "pred_boxes":
            torch.testing.assert_close(actual.tensor, value.tensor, rtol=0, atol=atol_px)
        elif name == "pred_masks":
            union = (actual | value).sum(dim=(1, 2)).clamp(min=1)
            differing = (actual != value).sum(dim=(1, 2))
            assert ((1 - differing / union) >= 0.99).all() or differing.max() <= 2
        elif name == "scores":
            torch.testing.assert_close(actual, value, rtol=0, atol=atol_score)
        elif not value.is_floating_point():
            assert torch.equal(actual, value)
        else:
            torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_detections(name, build_architecture):
    model = build_architecture(name)
    optimized = optimize_for_inference(model)
    assert type(optimized.backbone).__name__ == "OptimizedFPN"
    assert optimized.backbone.output_shape() == model.backbone.output_shape()
    images = images_of(*IMAGES)
    for found, expected in zip(detect(optimized, images), detect(model, images), strict=True):
        assert_equal(found, expected)
    if name == "panoptic_fpn":
        with torch.no_grad():
            a, b = (m([{"image": images[0]}])[0]["sem_seg"] for m in (optimized, model))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


def test_copies_find_the_same(detector):
    optimized = optimize_for_inference(detector)
    images = images_of((33, 70))
    (expected,) = detect(optimized, images)
    for model in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert_equal(detect(model, images)[0], expected)


def test_the_training_model_stays(detector):
    before = {name: type(module) for name, module in detector.named_modules()}
    optimize_for_inference(detector)
    assert {name: type(module) for name, module in detector.named_modules()} == before
    detector.train()


@pytest.mark.parametrize(
    "words",
    [
        ("MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 2,
         "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.CONV_DIM", 64,
         "MODEL.ROI_MASK_HEAD.NORM", "BN"),
        ("MODEL.FPN.FUSE_TYPE", "avg", "MODEL.RPN.CONV_DIMS", (64, 64),
         "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True,
         "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "MODEL.FPN.OUT_CHANNELS", 40),
    ],
    ids=["norms", "other options", "another pooler"],
)  # fmt: skip
def test_options(words, build_architecture):
    model = build_architecture("mask_rcnn", *words)
    images = images_of((75, 101))
    (found,), (expected,) = (detect(m, images) for m in (optimize_for_inference(model), model))
    assert_equal(found, expected)


def test_no_detections(detector):
    detector.roi_heads.box_predictor.test_score_thresh = 1.0
    optimized = optimize_for_inference(detector)
    for model in (optimized, detector):
        (found,) = detect(model, images_of((64, 96)))
        assert len(found) == 0 and found.pred_masks.shape == (0, 64, 96)


def test_given_boxes_and_all_logits(detector):
    """What works on single heads: boxes from elsewhere, logits of all classes."""
    optimized = optimize_for_inference(detector)
    (image,) = images_of((64, 96))
    (found,) = detect(detector, [image])
    x = torch.randn(3, 64, 14, 14)
    results = []
    for model in (optimized, detector):
        with torch.no_grad():
            (given,) = model.inference([{"image": image}], [copy.deepcopy(found)], False)
            results.append((given.pred_masks, model.roi_heads.mask_head.layers(x)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert isinstance(found.pred_boxes, Boxes)


def test_adapters_in_a_head_stay(detector):
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layer = detector.roi_heads.box_head.fc2
    adapter = Adapter(layer.in_features, layer.out_features)
    detector.roi_heads.box_head.fc2 = adapter
    optimized = optimize_for_inference(detector)
    assert type(optimized.roi_heads.box_head.fc2) is Adapter
    images = images_of((64, 96))
    (found,), (expected,) = (detect(m, images) for m in (optimized, detector))
    assert_equal(found, expected)


def test_bfloat16(detector):
    """Of all activations; proposals, scores and masks are float32."""
    optimized = optimize_for_inference(detector, torch.bfloat16)
    (image,) = images_of((75, 101))
    (found,), (expected,) = (detect(m, [image]) for m in (optimized, detector))
    assert found.scores.dtype == torch.float32 and found.scores.isfinite().all()
    assert abs(len(found) - len(expected)) <= 2
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96)
        for a, b in zip(optimized.backbone(x).values(), detector.backbone(x).values(), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).abs().max() <= 0.1 * b.abs().max()


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
