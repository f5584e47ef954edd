"""The configuration of the segmentation tools: the official recipe, on the generated shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from spatial_mamba_d2.config import (
    add_backbone_config,
    load,
    require_at_least,
    require_low_high,
    require_one_of,
)


def segmentation_defaults() -> CfgNode:
    """All keys; each is explained where it is set."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/upernet"
    cfg.SEED = 0  # for initial weights, order and augmentations; runs can be repeated exactly

    cfg.MODEL = CfgNode()
    cfg.MODEL.DEVICE = "cuda"  # or cuda:N, or cpu, the fallback if there is no GPU
    cfg.MODEL.WEIGHTS = ""  # checkpoint to start from or to evaluate: ours or the authors'
    # Prefixes of parameters that keep their initial values even if MODEL.WEIGHTS has them, such as
    # ("decode_head.classify", "auxiliary_head.classify") for other classes.
    cfg.MODEL.WEIGHTS_SKIP = ()
    cfg.MODEL.NUM_CLASSES = 6
    cfg.MODEL.PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, ImageNet
    cfg.MODEL.PIXEL_STD = (58.395, 57.12, 57.375)
    add_backbone_config(cfg)
    del cfg.MODEL.SPATIAL_MAMBA["OUT_FEATURES"]  # UPerNet takes all four
    cfg.MODEL.SPATIAL_MAMBA.BN = "sync"  # for the heads too; becomes train without a GPU
    cfg.MODEL.UPERNET = CfgNode()
    cfg.MODEL.UPERNET.CHANNELS = 512
    cfg.MODEL.UPERNET.DROPOUT = 0.1
    cfg.MODEL.UPERNET.AUX_CHANNELS = 256
    cfg.MODEL.UPERNET.AUX_WEIGHT = 0.4  # weight of the auxiliary loss
    cfg.MODEL.CLASS_WEIGHTS = ()  # weight of each class in both losses; (): 1 for all

    # Any data set in ADE20K's folder layout: ROOT/images/SPLIT/*, ROOT/annotations/SPLIT/*.png
    cfg.DATASETS = CfgNode()
    cfg.DATASETS.ROOT = "datasets/shapes"
    cfg.DATASETS.TRAIN = "training"
    cfg.DATASETS.TEST = "validation"
    cfg.DATASETS.CLASSES = "objectInfo.txt"  # a file of names in ROOT, ade20k, or "" for numbers
    cfg.DATASETS.LABEL_OFFSET = 1  # class 0 is stored as this
    cfg.DATASETS.IGNORE_LABELS = (0,)  # stored integers that are ignored in training and scores
    # Broken image or label files: "raise" an error that names them, or "skip" and count them.
    cfg.DATASETS.ON_ERROR = "raise"
    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 4  # per process

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

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.IMS_PER_BATCH = 16  # over all processes
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # micro-batches per iteration
    cfg.SOLVER.BASE_LR = 6e-5
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    cfg.SOLVER.WARMUP_ITERS = 1500
    cfg.SOLVER.WARMUP_FACTOR = 1e-6
    cfg.SOLVER.MAX_ITER = 160_000  # the learning rate falls linearly to 0 by then
    cfg.SOLVER.CHECKPOINT_PERIOD = 2000
    cfg.SOLVER.EMA_DECAY = 0.0  # above 0: evaluate and save a moving average of the weights
    cfg.SOLVER.AMP = CfgNode()
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # or float16
    cfg.SOLVER.CLIP_GRADIENTS = CfgNode()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # bound on the norm of all gradients together
    cfg.SOLVER.LOG_PERIOD = 50

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


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the YAML file, then ``KEY VALUE`` pairs; checked, resolved and frozen.

    For the fallback without a GPU see :func:`~spatial_mamba_d2.config.resolve_device`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key (with the nearest valid one), or a value out of its range.
    """
    return load(segmentation_defaults(), config_file, overrides, _check)


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
        },
    )
    if cfg.TEST.STRIDE_PX > cfg.TEST.CROP_PX:
        raise ValueError(
            f"TEST.STRIDE_PX must be at most TEST.CROP_PX {cfg.TEST.CROP_PX} to cover all pixels, "
            f"got {cfg.TEST.STRIDE_PX}"
        )
    weights = cfg.MODEL.CLASS_WEIGHTS
    if weights and (len(weights) != cfg.MODEL.NUM_CLASSES or min(weights) < 0):
        raise ValueError(
            f"MODEL.CLASS_WEIGHTS must be empty or {cfg.MODEL.NUM_CLASSES} (MODEL.NUM_CLASSES) "
            f"numbers of at least 0, got {weights}"
        )
    require_low_high(cfg, ("INPUT.RATIO_RANGE",))
    if not cfg.TEST.SCALES or min(cfg.TEST.SCALES) <= 0:
        raise ValueError(f"TEST.SCALES must be numbers above 0, got {cfg.TEST.SCALES}")
