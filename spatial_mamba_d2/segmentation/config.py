"""The configuration of the segmentation tools: the official recipe, on the generated shapes."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from spatial_mamba_d2.config import (
    add_lightning_config,
    config_loader,
    require_at_least,
    require_between,
    require_low_high,
    require_one_of,
    require_whole,
)


def segmentation_defaults() -> CfgNode:
    """All keys; each is explained where it is set, here or in ``add_lightning_config``."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/upernet"
    add_lightning_config(cfg)

    cfg.MODEL.NUM_CLASSES = 6
    cfg.MODEL.SPATIAL_MAMBA.BN = "sync"  # for the heads too; becomes train without a GPU
    cfg.MODEL.UPERNET = CfgNode()
    cfg.MODEL.UPERNET.CHANNELS = 512
    cfg.MODEL.UPERNET.DROPOUT = 0.1
    cfg.MODEL.UPERNET.AUX_CHANNELS = 256
    cfg.MODEL.UPERNET.AUX_WEIGHT = 0.4  # weight of the auxiliary loss
    cfg.MODEL.CLASS_WEIGHTS = ()  # weight of each class in both losses; (): 1 for all

    # Any data set in ADE20K's folder layout: ROOT/images/SPLIT/*, ROOT/annotations/SPLIT/*.png
    cfg.DATASETS.ROOT = "datasets/shapes"
    cfg.DATASETS.TRAIN = "training"
    cfg.DATASETS.TEST = "validation"
    cfg.DATASETS.CLASSES = "objectInfo.txt"  # a file of names in ROOT, ade20k, or "" for numbers
    cfg.DATASETS.LABEL_OFFSET = 1  # class 0 is stored as this
    cfg.DATASETS.IGNORE_LABELS = (0,)  # stored integers that are ignored in training and scores

    cfg.INPUT = CfgNode()
    # Images are resized to this short side in training and evaluation, unless the long side would
    # exceed LONG_PX.
    cfg.INPUT.SHORT_PX = 512
    cfg.INPUT.LONG_PX = 2048
    cfg.INPUT.RATIO_RANGE = (0.5, 2.0)  # in training, both are multiplied by a factor in this range
    cfg.INPUT.CROP_PX = 512
    cfg.INPUT.MAX_CLASS_SHARE = 0.75  # a crop with a larger share of one class is drawn again
    cfg.INPUT.FLIP = True
    cfg.INPUT.PHOTOMETRIC = True

    cfg.SOLVER.IMS_PER_BATCH = 16  # over all processes
    cfg.SOLVER.BASE_LR = 6e-5
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    cfg.SOLVER.WARMUP_ITERS = 1500
    cfg.SOLVER.WARMUP_FACTOR = 1e-6
    cfg.SOLVER.MAX_ITER = 160_000  # the learning rate falls linearly to 0 by then
    cfg.SOLVER.CHECKPOINT_PERIOD = 2000

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 16_000  # iterations; 0: only at the end
    cfg.TEST.MODE = "whole"  # "whole" images, or "slide": windows with averaged logits
    cfg.TEST.CROP_PX = 512  # side of the sliding window
    cfg.TEST.STRIDE_PX = 341
    # ss: fitted into the frame of INPUT. ms: 0.75, 1 and 1.25 times the image, with flip.
    # ms_wide: 0.5 to 1.75 times the image in six steps, with flip. custom: the three keys below.
    cfg.TEST.PROTOCOL = "ss"
    cfg.TEST.SCALES = (1.0,)
    cfg.TEST.SCALES_OF = "frame"  # or "image"
    cfg.TEST.FLIP = False
    cfg.TEST.PICTURES = 8  # test images to draw with ground truth and prediction
    return cfg


def _check(cfg: CfgNode) -> None:
    require_one_of(
        cfg,
        {
            "TEST.MODE": ("whole", "slide"),
            "TEST.PROTOCOL": ("ss", "ms", "ms_wide", "custom"),
            "TEST.SCALES_OF": ("frame", "image"),
        },
    )
    require_at_least(
        cfg,
        {
            "SEED": 0,
            "MODEL.NUM_CLASSES": 1,
            "INPUT.SHORT_PX": 1,
            "INPUT.LONG_PX": cfg.INPUT.SHORT_PX,
            "INPUT.CROP_PX": 1,
            "TEST.CROP_PX": 1,
            "TEST.STRIDE_PX": 1,
            "DATASETS.LABEL_OFFSET": 0,
            "DATASETS.IGNORE_LABELS": 0,
            "MODEL.UPERNET.CHANNELS": 1,
            "MODEL.UPERNET.AUX_CHANNELS": 1,
            "MODEL.UPERNET.AUX_WEIGHT": 0,
        },
    )
    require_between(cfg, ("MODEL.UPERNET.DROPOUT",), 0, 1, include_high=False)
    require_between(cfg, ("INPUT.MAX_CLASS_SHARE",), 0, 1, include_low=False)
    require_whole(cfg, ("DATASETS.IGNORE_LABELS",))
    if cfg.TEST.STRIDE_PX > cfg.TEST.CROP_PX:
        raise ValueError(
            f"TEST.STRIDE_PX must be at most TEST.CROP_PX {cfg.TEST.CROP_PX} to cover all pixels, "
            f"got {cfg.TEST.STRIDE_PX}"
        )
    weights = cfg.MODEL.CLASS_WEIGHTS
    if weights and (len(weights) != cfg.MODEL.NUM_CLASSES or min(weights) < 0 or not any(weights)):
        raise ValueError(
            f"MODEL.CLASS_WEIGHTS must be empty or {cfg.MODEL.NUM_CLASSES} (MODEL.NUM_CLASSES) "
            f"numbers of at least 0, not all 0, got {weights}"
        )
    require_low_high(cfg, ("INPUT.RATIO_RANGE",))
    if not cfg.TEST.SCALES or min(cfg.TEST.SCALES) <= 0:
        raise ValueError(f"TEST.SCALES must be numbers above 0, got {cfg.TEST.SCALES}")


load_config = config_loader(segmentation_defaults, _check)
