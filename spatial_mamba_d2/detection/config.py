"""The configuration of the detection tools: Detectron2's keys, the backbone's, and a few more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from spatial_mamba_d2.config import add_spatial_mamba_config, merge_config, require_one_of


def detection_defaults() -> CfgNode:
    """Detectron2's defaults with our keys; each is explained where it is set."""
    cfg = get_cfg()
    add_spatial_mamba_config(cfg)
    cfg.SEED = 0  # training is reproducible, and resumes on the same curve, unless negative
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # Prefixes of parameters that keep their initial values though MODEL.WEIGHTS has them, such as
    # ("roi_heads.box_predictor", "roi_heads.mask_head.predictor") for other classes.
    cfg.MODEL.WEIGHTS_SKIP = ()

    # Any data set in COCO format. Where a json is given it replaces the name in TRAIN or TEST.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""
    # A broken image or annotation: "raise" an error that names it, or "skip" it and count.
    cfg.DATASETS.ON_ERROR = "raise"

    # The 3x recipe: half of the images are resized to one of SIZES, cropped, and resized again.
    cfg.INPUT.RESIZE_CROP = CfgNode()
    cfg.INPUT.RESIZE_CROP.ENABLED = False
    cfg.INPUT.RESIZE_CROP.SIZES = (400, 500, 600)
    cfg.INPUT.RESIZE_CROP.CROP_RANGE = (384, 600)  # sides of the crop in pixels: shortest, longest

    cfg.SOLVER.BETAS = (0.9, 0.999)
    # IMS_PER_BATCH images are processed in this many parts, one after the other.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # or float16
    # Beside Detectron2's "value" and "norm" (of each parameter) there is "full_model".
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"

    cfg.TEST.PICTURES = 8  # test images drawn with ground truth and prediction after evaluation
    cfg.TEST.PICTURES_SCORE_THRESH = 0.5
    return cfg


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the YAML file, then ``KEY VALUE`` pairs; checked and frozen.

    Without a GPU, ``MODEL.DEVICE`` becomes ``cpu``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key (with the nearest valid one), or a value out of its range.
    """
    cfg = detection_defaults()
    merge_config(cfg, config_file, overrides)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).info("no CUDA device: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    _check(cfg)
    cfg.freeze()
    return cfg


def _check(cfg: CfgNode) -> None:
    choices = {
        "DATASETS.ON_ERROR": ("raise", "skip"),
        "SOLVER.AMP.PRECISION": ("bfloat16", "float16"),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "norm", "value"),
        "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    }
    require_one_of(cfg, choices)
    if cfg.SOLVER.ACCUMULATION_STEPS < 1:
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS must be at least 1, got {cfg.SOLVER.ACCUMULATION_STEPS}"
        )
    if cfg.MODEL.SPATIAL_MAMBA.BN == "sync" and cfg.MODEL.DEVICE == "cpu":
        raise ValueError("MODEL.SPATIAL_MAMBA.BN must be train or frozen on a CPU, got 'sync'")
    for split in ("TRAIN", "TEST"):
        json_file, images = cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"]
        if bool(json_file) != bool(images):
            raise ValueError(
                f"DATASETS.{split}_JSON and DATASETS.{split}_IMAGES must be given together, "
                f"got {json_file!r} and {images!r}"
            )
