"""The configuration of the detection tools: Detectron2's keys, the backbone's, and a few more."""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg

from spatial_mamba_d2.config import add_shared_config, config_loader, require_one_of
from spatial_mamba_d2.detection.data import register_json_datasets


def add_spatial_mamba_config(cfg: CfgNode) -> None:
    """Add every key that our recipes and the ``config.yaml`` of a training use, in place.

    After it, ``cfg.merge_from_file`` takes any of them. Detectron2's own defaults stay as they are.

    Args:
        cfg: from ``detectron2.config.get_cfg()``.
    """
    add_shared_config(cfg)

    # Any data set in COCO format. If a json is given, it replaces the name in TRAIN or TEST.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""

    # The 3x recipe: half of the images are resized to one of SIZES, cropped, and resized again.
    cfg.INPUT.RESIZE_CROP = CfgNode()
    cfg.INPUT.RESIZE_CROP.ENABLED = False
    cfg.INPUT.RESIZE_CROP.SIZES = (400, 500, 600)
    cfg.INPUT.RESIZE_CROP.CROP_RANGE = (384, 600)  # sides of the crop in pixels: shortest, longest

    cfg.TEST.PICTURES = 8  # test images to draw with ground truth and prediction
    cfg.TEST.PICTURES_SCORE_THRESH = 0.5


def detection_defaults() -> CfgNode:
    """Detectron2's defaults with our keys, and with other values where our recipes need them."""
    cfg = get_cfg()
    add_spatial_mamba_config(cfg)
    cfg.SEED = 0  # training is reproducible, and resumes on the same curve, unless negative
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # Detectron2 also has "value" and "norm" (of each parameter).
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    return cfg


def _check_and_resolve(cfg: CfgNode) -> None:
    require_one_of(
        cfg,
        {
            "INPUT.FORMAT": ("RGB", "BGR"),
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "norm", "value"),
            "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
        },
    )
    for split in ("TRAIN", "TEST"):
        json_file, images = cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"]
        if bool(json_file) != bool(images):
            raise ValueError(
                f"DATASETS.{split}_JSON and DATASETS.{split}_IMAGES must be given together, "
                f"got {json_file!r} and {images!r}"
            )
    register_json_datasets(cfg)


load_config = config_loader(detection_defaults, _check_and_resolve)
