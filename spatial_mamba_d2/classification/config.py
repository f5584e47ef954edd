"""The configuration of the classification tool: the official recipe, on the generated images."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from timm.data import create_transform

from spatial_mamba_d2.config import (
    add_lightning_config,
    config_loader,
    require_at_least,
    require_between,
    require_low_high,
)
from spatial_mamba_d2.training.loggers import check_loggers


def classification_defaults() -> CfgNode:
    """All keys; each is explained where it is set, here or in ``add_lightning_config``."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/classifier"
    add_lightning_config(cfg)

    cfg.MODEL.NUM_CLASSES = 5

    # Images in class folders: ROOT/SPLIT/CLASS/*
    cfg.DATASETS.ROOT = "datasets/shape_classes"
    cfg.DATASETS.TRAIN = "train"
    cfg.DATASETS.TEST = "val"
    # Names of the class folders in the order of the classes: imagenet-1k, a file in ROOT, or "" for
    # those in TRAIN, sorted.
    cfg.DATASETS.CLASSES = ""
    cfg.DATASETS.CHECK_DECODE = False  # decode every image at the start, to find broken ones
    cfg.DATALOADER.NUM_WORKERS = 8  # per process

    # For training, except CROP_PX and PIXEL_RANGE, which evaluation uses too
    cfg.INPUT.CROP_PX = 224
    cfg.INPUT.SCALE_RANGE = (0.08, 1.0)  # area of the crop, relative to the image
    cfg.INPUT.RATIO_RANGE = (0.75, 1.3333333333333333)  # width / height of the crop
    cfg.INPUT.FLIP_PROB = 0.5
    cfg.INPUT.COLOR_JITTER = 0.4  # timm ignores it if there is an AUTO_AUGMENT
    cfg.INPUT.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # in timm's notation; "" for none
    cfg.INPUT.ERASE_PROB = 0.25
    cfg.INPUT.MIXING = CfgNode()  # mixing of the images of a batch; both 0: none
    cfg.INPUT.MIXING.MIXUP = 0.8
    cfg.INPUT.MIXING.CUTMIX = 1.0
    cfg.INPUT.MIXING.PROB = 1.0
    cfg.INPUT.MIXING.SWITCH_PROB = 0.5  # probability of CutMix if both are on

    cfg.SOLVER.IMS_PER_BATCH = 1024  # over all processes
    # Learning rates for a batch of 512; they are scaled with IMS_PER_BATCH.
    cfg.SOLVER.BASE_LR = 5e-4
    cfg.SOLVER.WARMUP_LR = 5e-7
    cfg.SOLVER.MIN_LR = 5e-6
    cfg.SOLVER.WEIGHT_DECAY = 0.05  # not for biases and one-dimensional parameters
    cfg.SOLVER.EPOCHS = 300
    cfg.SOLVER.WARMUP_EPOCHS = 20
    cfg.SOLVER.CHECKPOINT_EPOCHS = 1
    cfg.SOLVER.LABEL_SMOOTHING = 0.1
    cfg.SOLVER.EMA_DECAY = 0.9999
    cfg.SOLVER.MESA = CfgNode()  # the outputs of the moving average as further targets
    cfg.SOLVER.MESA.WEIGHT = 1.0  # 0: none
    cfg.SOLVER.MESA.START = 0.25  # fraction of the epochs before it starts
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.AMP.PRECISION = "float16"
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_EPOCHS = 1  # 0: only at the end
    cfg.TEST.PATIENCE = 0  # evaluations without a new best score that end the training; 0: none do
    cfg.TEST.SHORT_PX = 256  # bicubic, before the centre crop of INPUT.CROP_PX
    cfg.TEST.IMS_PER_BATCH = 128  # per process
    return cfg


def _check_auto_augment(name: str) -> None:
    """What timm makes of INPUT.AUTO_AUGMENT must be something."""
    if not name:
        return
    try:
        create_transform(8, is_training=True, auto_augment=name)
    except Exception as error:  # mostly assertions without a text
        raise ValueError(
            "INPUT.AUTO_AUGMENT must be in timm's notation, such as rand-m9-mstd0.5-inc1, "
            f"got {name!r}: {type(error).__name__} {error}".rstrip()
        ) from None


def _check(cfg: CfgNode) -> None:
    check_loggers(cfg.SOLVER.LOGGERS)
    require_at_least(
        cfg,
        {
            "SEED": 0,
            "MODEL.NUM_CLASSES": 2,
            "INPUT.CROP_PX": 1,
            "INPUT.COLOR_JITTER": 0,
            "INPUT.MIXING.MIXUP": 0,
            "INPUT.MIXING.CUTMIX": 0,
            "SOLVER.EPOCHS": 1,
            "SOLVER.WARMUP_EPOCHS": 0,
            "SOLVER.CHECKPOINT_EPOCHS": 1,
            "SOLVER.MESA.WEIGHT": 0,
            "TEST.EVAL_EPOCHS": 0,
            "TEST.SHORT_PX": cfg.INPUT.CROP_PX,
            "TEST.IMS_PER_BATCH": 1,
        },
    )
    probabilities = "INPUT.FLIP_PROB", "INPUT.ERASE_PROB", "INPUT.MIXING.PROB"
    require_between(cfg, (*probabilities, "INPUT.MIXING.SWITCH_PROB", "SOLVER.MESA.START"), 0, 1)
    require_between(cfg, ("SOLVER.LABEL_SMOOTHING",), 0, 1, include_high=False)
    if cfg.SOLVER.WARMUP_EPOCHS >= cfg.SOLVER.EPOCHS:
        raise ValueError(
            f"SOLVER.WARMUP_EPOCHS must be below SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}, "
            f"got {cfg.SOLVER.WARMUP_EPOCHS}"
        )
    require_low_high(cfg, ("INPUT.SCALE_RANGE", "INPUT.RATIO_RANGE"))
    require_between(cfg, ("INPUT.SCALE_RANGE",), 0, 1)
    for key in ("WARMUP_LR", "MIN_LR"):
        require_between(cfg, (f"SOLVER.{key}",), 0, cfg.SOLVER.BASE_LR)
    _check_auto_augment(cfg.INPUT.AUTO_AUGMENT)
    if cfg.SOLVER.MESA.WEIGHT and not cfg.SOLVER.EMA_DECAY:
        raise ValueError(
            "SOLVER.MESA.WEIGHT must be 0 without a moving average (SOLVER.EMA_DECAY 0), "
            f"got {cfg.SOLVER.MESA.WEIGHT}"
        )


load_config = config_loader(classification_defaults, _check)
