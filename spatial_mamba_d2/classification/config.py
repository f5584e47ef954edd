"""The configuration of the classification tool: the official recipe, on the generated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from spatial_mamba_d2.config import (
    add_backbone_config,
    load,
    require_at_least,
    require_between,
    require_low_high,
)


def classification_defaults() -> CfgNode:
    """All keys; each is explained where it is set."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/classifier"
    cfg.SEED = 0  # for initial weights, order and augmentations; runs can be repeated exactly

    cfg.MODEL = CfgNode()
    cfg.MODEL.DEVICE = "cuda"  # or cuda:N, or cpu, the fallback if there is no GPU
    cfg.MODEL.WEIGHTS = ""  # checkpoint to start from or to evaluate: ours or the authors'
    # Prefixes of parameters that keep their initial values even if MODEL.WEIGHTS has them, such as
    # ("head.",) for other classes.
    cfg.MODEL.WEIGHTS_SKIP = ()
    cfg.MODEL.NUM_CLASSES = 5
    cfg.MODEL.PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, ImageNet
    cfg.MODEL.PIXEL_STD = (58.395, 57.12, 57.375)
    add_backbone_config(cfg)
    del cfg.MODEL.SPATIAL_MAMBA["OUT_FEATURES"]  # a classifier has one output

    cfg.DATASETS = CfgNode()  # images in class folders: ROOT/SPLIT/CLASS/*
    cfg.DATASETS.ROOT = "datasets/shape_classes"
    cfg.DATASETS.TRAIN = "train"
    cfg.DATASETS.TEST = "val"
    # Names of the class folders in the order of the classes: imagenet-1k, a file in ROOT, or "" for
    # those in TRAIN, sorted.
    cfg.DATASETS.CLASSES = ""
    # Broken images and folders that are no class: "raise" an error that names them, or "skip" them.
    cfg.DATASETS.ON_ERROR = "raise"
    cfg.DATASETS.CHECK_DECODE = False  # decode every image at the start, to find broken ones
    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 8  # per process

    cfg.INPUT = CfgNode()  # for training, except CROP_PX, which evaluation uses too
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

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.IMS_PER_BATCH = 1024  # over all processes
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # micro-batches per iteration
    # Learning rates for a batch of 512; they are scaled with IMS_PER_BATCH.
    cfg.SOLVER.BASE_LR = 5e-4
    cfg.SOLVER.WARMUP_LR = 5e-7
    cfg.SOLVER.MIN_LR = 5e-6
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.WEIGHT_DECAY = 0.05  # not for biases and one-dimensional parameters
    cfg.SOLVER.EPOCHS = 300
    cfg.SOLVER.WARMUP_EPOCHS = 20
    cfg.SOLVER.CHECKPOINT_EPOCHS = 1
    cfg.SOLVER.LABEL_SMOOTHING = 0.1
    cfg.SOLVER.EMA_DECAY = 0.9999  # 0: no moving average of the weights
    cfg.SOLVER.MESA = CfgNode()  # the outputs of the moving average as further targets
    cfg.SOLVER.MESA.WEIGHT = 1.0  # 0: none
    cfg.SOLVER.MESA.START = 0.25  # fraction of the epochs before it starts
    cfg.SOLVER.AMP = CfgNode()
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.AMP.PRECISION = "float16"  # or bfloat16
    cfg.SOLVER.CLIP_GRADIENTS = CfgNode()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0  # bound on the norm of all gradients together
    cfg.SOLVER.LOG_PERIOD = 50

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_EPOCHS = 1  # 0: only at the end
    cfg.TEST.SHORT_PX = 256  # bicubic, before the centre crop of INPUT.CROP_PX
    cfg.TEST.IMS_PER_BATCH = 128  # per process
    return cfg


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the YAML file, then ``KEY VALUE`` pairs; checked, resolved and frozen.

    For the fallback without a GPU see :func:`~spatial_mamba_d2.config.resolve_device`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key (with the nearest valid one), or a value out of its range.
    """
    return load(classification_defaults(), config_file, overrides, _check)


def _check(cfg: CfgNode) -> None:
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
    if cfg.SOLVER.MESA.WEIGHT and not cfg.SOLVER.EMA_DECAY:
        raise ValueError(
            "SOLVER.MESA.WEIGHT must be 0 without a moving average (SOLVER.EMA_DECAY 0), "
            f"got {cfg.SOLVER.MESA.WEIGHT}"
        )
