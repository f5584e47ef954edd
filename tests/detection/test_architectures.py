"""Detectron2's architectures on our backbone: by our recipes, and in a program of Detectron2's."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.detection import add_spatial_mamba_config
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.prediction.loading import load_predictor

BOXES, MASKS = {"bbox"}, {"bbox", "segm"}
RESULTS = {
    "faster_rcnn_spatial_mamba_t": BOXES,
    "cascade_mask_rcnn_spatial_mamba_t": MASKS,
    "cascade_mask_rcnn_spatial_mamba_t_3x": MASKS,
    "retinanet_spatial_mamba_t": BOXES,
    "panoptic_fpn_spatial_mamba_t": {*MASKS, "panoptic_seg"},
    "panoptic_point_rend_spatial_mamba_t": {*MASKS, "panoptic_seg"},
    "point_rend_spatial_mamba_t": MASKS,
    "keypoint_rcnn_spatial_mamba_t": {"bbox", "keypoints"},
    "mask_rcnn_spatial_mamba_t_lsj": MASKS,
}
# Narrow heads, few proposals
SMALL = (
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
    "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
    "TEST.DETECTIONS_PER_IMAGE", 20,
    "DATALOADER.NUM_WORKERS", 0,
    "INPUT.MAX_SIZE_TRAIN", 96,
    "INPUT.MAX_SIZE_TEST", 96,
    "SOLVER.STEPS", (),
    "SOLVER.MAX_ITER", 2,
    "SOLVER.WARMUP_ITERS", 1,
    "TEST.EVAL_PERIOD", 0,
)  # fmt: skip


POINTS_OF_STUFF = {
    "panoptic_point_rend_spatial_mamba_t": (
        "MODEL.POINT_HEAD.NUM_CLASSES", 2, "MODEL.POINT_HEAD.FC_DIM", 32,
    )
}  # fmt: skip


@pytest.fixture
def more(request):
    """``more(recipe)``: the overrides that only this recipe needs."""

    def of(name: str) -> tuple:
        if name.startswith(("panoptic", "keypoint")):
            fixture = "stuff" if name.startswith("panoptic") else "keypoints"
            return (*request.getfixturevalue(fixture), *POINTS_OF_STUFF.get(name, ()))
        return {
            "retinanet_spatial_mamba_t": ("MODEL.RETINANET.NUM_CLASSES", 5),
            "point_rend_spatial_mamba_t": ("MODEL.POINT_HEAD.NUM_CLASSES", 5,
                                           "MODEL.ROI_MASK_HEAD.FC_DIM", 32),
            "mask_rcnn_spatial_mamba_t_lsj": ("INPUT.SCALE_JITTER.SIZE", 96),
            "cascade_mask_rcnn_spatial_mamba_t_3x": ("INPUT.RESIZE_CROP.SIZES", (48, 64),
                                                     "INPUT.RESIZE_CROP.CROP_RANGE", (30, 50)),
        }.get(name, ())  # fmt: skip

    return of


def test_the_recipes_are_those_of_the_zoo():
    assert RESULTS.keys() == model_zoo.COUNTED.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_each_recipe_trains_evaluates_and_predicts(name, root, arguments, more, tmp_path):
    config = str(root / f"configs/{name}.yaml")
    assert f"--config-file configs/{name}.yaml" in (root / "configs" / f"{name}.yaml").read_text()
    results = run(arguments(*SMALL, *more(name), "TEST.PICTURES", 1, config_file=config))
    assert set(results) == RESULTS[name]
    lines = [*map(json.loads, (tmp_path / "output/metrics.json").read_text().splitlines())]
    assert len(lines) == 2 and all(math.isfinite(line["total_loss"]) for line in lines)
    assert len(list((tmp_path / "output/pictures").iterdir())) == 1
    if name.startswith("panoptic"):
        assert 0 <= results["panoptic_seg"]["PQ_st"] <= 100
        assert "panoptic_seg/PQ" in lines[-1]
    predict = load_predictor(tmp_path / "output/model_final.pth", device="cpu")
    assert predict(np.zeros((60, 80, 3), np.uint8)).image_size == (60, 80)


@pytest.mark.parametrize("name", RESULTS)
def test_each_recipe_runs_on_photos(name, root, arguments, more, photos):
    """Real images and annotations of COCO, crowds and 80 classes included."""
    words = [*SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", 80, "INPUT.MIN_SIZE_TRAIN", (96,),
             "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]  # fmt: skip
    if not name.startswith(("panoptic", "keypoint")):
        words += more(name)
        words += {"retinanet_spatial_mamba_t": ("MODEL.RETINANET.NUM_CLASSES", 80,
                                                "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
                  "point_rend_spatial_mamba_t": ("MODEL.POINT_HEAD.NUM_CLASSES", 80)
                  }.get(name, ())  # fmt: skip
    config = str(root / f"configs/{name}.yaml")
    words += [*photos(name), *POINTS_OF_STUFF.get(name, ())]
    results = run(arguments(*words, config_file=config))
    assert set(results) == RESULTS[name]
    assert all(math.isfinite(scores["AP"]) for scores in results.values() if "AP" in scores)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("cascade_mask_rcnn", ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
         "CLS_AGNOSTIC_BBOX_REG must be True for CascadeROIHeads, got False"),
        ("cascade_mask_rcnn", ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.4]"),
         r"CASCADE_HEAD.IOUS must begin with .*IOU_THRESHOLDS \[0.4\], got \(0.5, 0.6, 0.7\)"),
        ("cascade_mask_rcnn", ("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"),
         "BBOX_REG_WEIGHTS must have 2 elements"),
        ("point_rend", ("MODEL.ROI_HEADS.NUM_CLASSES", 5),
         "POINT_HEAD.NUM_CLASSES must be MODEL.ROI_HEADS.NUM_CLASSES 5, got 80"),
        ("point_rend", ("MODEL.FPN.OUT_CHANNELS", 128), "CONV_DIM must be at most .* 128 for Poi"),
        ("point_rend", ("INPUT.MASK_FORMAT", "polygon"), "MASK_FORMAT must be one of bitmask, got"),
        ("panoptic_point_rend", ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9),
         "POINT_HEAD.NUM_CLASSES must be MODEL.SEM_SEG_HEAD.NUM_CLASSES 9, got 54"),
        ("panoptic_point_rend", ("MODEL.POINT_HEAD.IN_FEATURES", "('p2', 'p3')"),
         "POINT_HEAD.IN_FEATURES must have 1 element"),
        ("mask_rcnn", ("MODEL.POINT_HEAD.FC_DIM", 8), "NAME is not PointRendMaskHead"),
        ("mask_rcnn", ("DATASETS.TRAIN_SEM_SEG", "labels"), "ARCHITECTURE is not PanopticFPN"),
        ("panoptic_fpn", ("DATASETS.TRAIN_JSON", "a.json", "DATASETS.TRAIN_IMAGES", "images"),
         "TRAIN_SEM_SEG must be given with DATASETS.TRAIN_JSON for .* PanopticFPN, got ''"),
        ("panoptic_fpn", ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1), "must be at least 2, got 1"),
        ("panoptic_fpn", ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 40), "CONVS_DIM must be a multiple of"),
        ("panoptic_fpn", ("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p7']"), "SEM_SEG_HEAD.IN_FEATURES"),
        ("retinanet", ("MODEL.RETINANET.IN_FEATURES", "['p2','p3','p4','p5','p6']"), "got p2"),
        ("mask_rcnn", ("INPUT.SCALE_JITTER.ENABLED", True, "INPUT.CROP.ENABLED", True),
         "INPUT.CROP.ENABLED must be False with INPUT.SCALE_JITTER"),
        ("mask_rcnn", ("INPUT.SCALE_JITTER.SCALES", (2.0, 0.1)), r"SCALES must be \(low, high\)"),
    ],
)  # fmt: skip
def test_what_an_architecture_cannot_be_is_named(name, words, message, root):
    with pytest.raises(ValueError, match=message):
        load_config(root / f"configs/{name}_spatial_mamba_t.yaml", [*map(str, words)])


def detectron2_cfg(variant, *words):
    """As a program of Detectron2's makes it."""
    cfg = get_cfg()
    add_spatial_mamba_config(cfg)
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.SPATIAL_MAMBA.VARIANT", variant,
        "MODEL.BACKBONE.NAME", "build_spatial_mamba_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 32,
        "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]],
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 5,
        "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
        "MODEL.POINT_HEAD.NUM_CLASSES", 5, *words,
    ])  # fmt: skip
    return cfg


def fcos(cfg):
    """Has no entry in the registry, and is built from parts."""
    cfg.MODEL.BACKBONE.NAME = "build_spatial_mamba_retinanet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    backbone = build_model(_with(cfg, "RetinaNet")).backbone
    features = [f"p{n}" for n in range(3, 8)]
    shapes = [backbone.output_shape()[name] for name in features]
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=5, conv_dims=[32], norm=""),
        head_in_features=features,
        num_classes=5,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def _with(cfg, architecture):
    cfg.MODEL.META_ARCHITECTURE = architecture
    return cfg


OTHERS = {
    "ProposalNetwork": ("MODEL.META_ARCHITECTURE", "ProposalNetwork"),
    "SemanticSegmentor": ("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    "PointRendSemSegHead": ("MODEL.META_ARCHITECTURE", "SemanticSegmentor",
                            "MODEL.SEM_SEG_HEAD.NAME", "PointRendSemSegHead"),
    "ImplicitPointRend": ("MODEL.MASK_ON", True,
                          "MODEL.ROI_MASK_HEAD.NAME", "ImplicitPointRendMaskHead",
                          "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "",
                          "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", True,
                          "MODEL.ROI_MASK_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
                          "MODEL.POINT_HEAD.NAME", "ImplicitPointHead",
                          "MODEL.POINT_HEAD.FC_DIM", 32),
    "Res5ROIHeads": ("MODEL.BACKBONE.NAME", "build_spatial_mamba_backbone",
                     "MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
                     "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]],
                     "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    "FCOS": (),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_detectron2(name, test_variant):
    """One step of training and one inference."""
    cfg = detectron2_cfg(test_variant, *OTHERS[name])
    model = fcos(cfg) if name == "FCOS" else build_model(cfg)
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, 10:50, 20:70] = True  # of the object
    objects = Instances((64, 96), gt_boxes=Boxes([[20.0, 10.0, 70.0, 50.0]]))
    objects.gt_classes, objects.gt_masks = torch.tensor([3]), BitMasks(mask)
    image = torch.randint(0, 255, (3, 64, 96)).float()
    semantic = torch.where(mask[0], 3, 0)
    with EventStorage():
        losses = model.train()([{"image": image, "instances": objects, "sem_seg": semantic}])
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    assert backbone.stem.conv1.conv.weight.grad.abs().sum() > 0
    (output,) = model.eval()([{"image": image, "height": 32, "width": 48}])
    assert output and all(
        value.shape[-2:] == (32, 48) if isinstance(value, torch.Tensor)
        else value.image_size == (32, 48)
        for value in output.values()
    )  # fmt: skip


def test_no_meta_architecture_is_forgotten():
    """Those that Detectron2 registers by itself run here, or by a recipe."""
    package = "detectron2.modeling"
    names = {n for n, cls in META_ARCH_REGISTRY if cls.__module__.startswith(package)}
    assert names == {
        "GeneralizedRCNN", "PanopticFPN", "ProposalNetwork", "RetinaNet", "SemanticSegmentor",
    }  # fmt: skip
