"""The backbone as Detectron2 builds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

from spatial_mamba_d2.detection import add_spatial_mamba_config
from spatial_mamba_d2.detection.config import load_config


def test_a_detectron2_user_needs_one_call(test_variant):
    cfg = get_cfg()
    add_spatial_mamba_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_spatial_mamba_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    cfg.MODEL.SPATIAL_MAMBA.VARIANT = test_variant
    cfg.MODEL.SPATIAL_MAMBA.OUT_FEATURES = ["res3", "res5"]
    backbone = build_backbone(cfg)
    assert backbone.output_shape() == {
        "res3": ShapeSpec(channels=32, stride=8),
        "res5": ShapeSpec(channels=128, stride=32),
    }
    outputs = backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(x.shape[1:]) for name, x in outputs.items()} == {
        "res3": (32, 8, 12),
        "res5": (128, 2, 3),
    }
    assert not any(p.requires_grad for p in backbone.stem.parameters())


def test_pyramid_keeps_its_promise(test_variant):
    cfg = load_config(None, ["MODEL.SPATIAL_MAMBA.VARIANT", test_variant,
                             "MODEL.BACKBONE.NAME", "build_spatial_mamba_fpn_backbone",
                             "MODEL.FPN.IN_FEATURES", "['res2','res3','res4','res5']",
                             "MODEL.RPN.IN_FEATURES", "p2",
                             "MODEL.ROI_HEADS.IN_FEATURES", "p2"])  # fmt: skip
    pyramid = build_backbone(cfg)
    outputs = pyramid(torch.randn(1, 3, 64, 96))
    for name, spec in pyramid.output_shape().items():
        assert outputs[name].shape == (1, spec.channels, 64 // spec.stride, -(-96 // spec.stride))
    assert pyramid.size_divisibility == 32


def test_options_reach_the_model(root):
    cfg = load_config(
        root / "configs/mask_rcnn_spatial_mamba_t.yaml",
        ["MODEL.SPATIAL_MAMBA.BN", "frozen", "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "0.4",
         "MODEL.SPATIAL_MAMBA.GRAD_CHECKPOINTING", "True", "MODEL.DEVICE", "cpu"],
    )  # fmt: skip
    backbone = build_model(cfg).backbone.bottom_up
    assert not backbone.stem.conv1.norm.weight.requires_grad
    assert backbone.stages[-1].blocks[-1].drop_path2.drop_prob == pytest.approx(0.4)
    assert backbone.grad_checkpointing


@pytest.mark.parametrize("variant", ["t", "s", "b"])
def test_parameters_of_the_detectors(variant, root, golden):
    size = {"t": "tiny", "s": "small", "b": "base"}[variant]
    cfg = load_config(
        root / f"configs/mask_rcnn_spatial_mamba_{variant}.yaml", ["MODEL.DEVICE", "cpu"]
    )
    model = build_model(cfg)
    official = golden(f"official_keys_maskrcnn_{size}.json")
    assert sum(p.numel() for p in model.parameters()) == official["params"]


def published_yaml(root, tmp_path):
    return root / "configs/mask_rcnn_spatial_mamba_s.yaml"


def yaml_of_a_run(root, tmp_path):
    cfg = load_config(
        root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml",
        ["DATASETS.TEST_JSON", "a.json", "DATASETS.TEST_IMAGES", "images", "SOLVER.MAX_ITER", "7"],
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("source", [published_yaml, yaml_of_a_run])
def test_detectron2_reads_our_files_and_predicts(source, root, tmp_path):
    """As any script of Detectron2 does: ``get_cfg``, our keys, a file, ``DefaultPredictor``."""
    cfg = get_cfg()
    add_spatial_mamba_config(cfg)
    cfg.merge_from_file(str(source(root, tmp_path)))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    expected = {"mask_rcnn": 62_713_200}.get(source(root, tmp_path).name[:9])
    assert expected in (None, sum(p.numel() for p in model.parameters()))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.INPUT.MIN_SIZE_TEST = 64
    predictor = DefaultPredictor(cfg)
    assert predictor(np.zeros((48, 80, 3), np.uint8))["instances"].image_size == (48, 80)
    for name, value in model.state_dict().items():
        assert torch.equal(predictor.model.state_dict()[name], value)
