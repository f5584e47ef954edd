"""The configuration of the classification tool: the official recipe, on the generated pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from spatial_mamba_d2.config import (
    add_spatial_mamba_config,
    merge_config,
    require_at_least,
    require_low_high,
    require_one_of,
    use_cpu_without_gpu,
)

logger = logging.getLogger(__name__)


def classification_defaults() -> CfgNode:
    """All keys; each is explained where it is set."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/classifier"
    cfg.SEED = 0  # of initial weights, order and augmentations; training can be repeated exactly

    cfg.MODEL = CfgNode()
    cfg.MODEL.DEVICE = "cuda"  # or cpu, which it becomes where there is no GPU
    cfg.MODEL.WEIGHTS = ""  # to start from, or to evaluate: ours or the authors'
    # Prefixes of parameters that keep their initial values though MODEL.WEIGHTS has them, such as
    # ("head.",) for other classes.
    cfg.MODEL.WEIGHTS_SKIP = ()
    cfg.MODEL.NUM_CLASSES = 5
    cfg.MODEL.PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, ImageNet
    cfg.MODEL.PIXEL_STD = (58.395, 57.12, 57.375)
    add_spatial_mamba_config(cfg)
    del cfg.MODEL.SPATIAL_MAMBA["OUT_FEATURES"]  # a classifier has one output

    cfg.DATASETS = CfgNode()  # images in class folders: ROOT/SPLIT/CLASS/*
    cfg.DATASETS.ROOT = "datasets/shape_classes"
    cfg.DATASETS.TRAIN = "train"
    cfg.DATASETS.TEST = "val"
    # Names of the class folders in the order of the classes: imagenet-1k, a file in ROOT, or "" for
    # those in TRAIN, sorted.
    cfg.DATASETS.CLASSES = ""
    # A broken image, or a folder that is no class: "raise" an error that names it, or "skip" it.
    cfg.DATASETS.ON_ERROR = "raise"
    cfg.DATASETS.CHECK_DECODE = False  # read every image at the start, to find the broken ones
    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 8  # for each process

    cfg.INPUT = CfgNode()  # of training, but for the size
    cfg.INPUT.CROP_PX = 224
    cfg.INPUT.SCALE_RANGE = (0.08, 1.0)  # area of the crop, of the image's
    cfg.INPUT.RATIO_RANGE = (0.75, 1.3333333333333333)  # its width / height
    cfg.INPUT.FLIP_PROB = 0.5
    cfg.INPUT.COLOR_JITTER = 0.4  # timm leaves it out where there is an AUTO_AUGMENT
    cfg.INPUT.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm's language; "" for none
    cfg.INPUT.ERASE_PROB = 0.25
    cfg.INPUT.MIXING = CfgNode()  # of the images of a batch; both 0: none
    cfg.INPUT.MIXING.MIXUP = 0.8
    cfg.INPUT.MIXING.CUTMIX = 1.0
    cfg.INPUT.MIXING.PROB = 1.0
    cfg.INPUT.MIXING.SWITCH_PROB = 0.5  # of CutMix, where both are on

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.IMS_PER_BATCH = 1024  # of all processes together
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # a batch is processed in this many parts
    # Learning rates of a batch of 512; they are scaled with IMS_PER_BATCH.
    cfg.SOLVER.BASE_LR = 5e-4
    cfg.SOLVER.WARMUP_LR = 5e-7
    cfg.SOLVER.MIN_LR = 5e-6
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.WEIGHT_DECAY = 0.05  # not of biases and of what has one dimension
    cfg.SOLVER.EPOCHS = 300
    cfg.SOLVER.WARMUP_EPOCHS = 20
    cfg.SOLVER.CHECKPOINT_EPOCHS = 1
    cfg.SOLVER.LABEL_SMOOTHING = 0.1
    cfg.SOLVER.EMA_DECAY = 0.9999  # 0: no moving average of the weights
    cfg.SOLVER.MESA = CfgNode()  # the moving average's outputs are targets too
    cfg.SOLVER.MESA.WEIGHT = 1.0  # 0: none
    cfg.SOLVER.MESA.START = 0.25  # of the epochs
    cfg.SOLVER.AMP = CfgNode()
    cfg.SOLVER.AMP.ENABLED = True
    cfg.SOLVER.AMP.PRECISION = "float16"  # or bfloat16; on a CPU float16 means none
    cfg.SOLVER.CLIP_GRADIENTS = CfgNode()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0  # of the norm of all gradients together
    cfg.SOLVER.LOG_PERIOD = 50

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_EPOCHS = 1  # 0: only at the end
    cfg.TEST.SHORT_PX = 256  # bicubic, before the centre crop of INPUT.CROP_PX
    cfg.TEST.IMS_PER_BATCH = 128  # of each process
    return cfg


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the YAML file, then ``KEY VALUE`` pairs; checked and frozen.

    Without a GPU, ``MODEL.DEVICE`` becomes ``cpu``, ``MODEL.SPATIAL_MAMBA.BN`` is not ``sync``, and
    there is no mixed precision with float16.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key (with the nearest valid one), or a value out of its range.
    """
    cfg = classification_defaults()
    merge_config(cfg, config_file, overrides)
    _check(cfg)
    use_cpu_without_gpu(cfg)
    amp = cfg.SOLVER.AMP
    if cfg.MODEL.DEVICE == "cpu" and amp.ENABLED and amp.PRECISION == "float16":
        logger.info("float16 is slow on a CPU: SOLVER.AMP.ENABLED is False")
        amp.ENABLED = False
    cfg.freeze()
    return cfg


def _check(cfg: CfgNode) -> None:
    require_one_of(
        cfg,
        {
            "MODEL.DEVICE": ("cuda", "cpu"),
            "DATASETS.ON_ERROR": ("raise", "skip"),
            "SOLVER.AMP.PRECISION": ("bfloat16", "float16"),
        },
    )
    require_at_least(
        cfg,
        {
            "SEED": 0,
            "MODEL.NUM_CLASSES": 2,
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.CROP_PX": 1,
            "INPUT.COLOR_JITTER": 0,
            "INPUT.MIXING.MIXUP": 0,
            "INPUT.MIXING.CUTMIX": 0,
            "SOLVER.IMS_PER_BATCH": 1,
            "SOLVER.ACCUMULATION_STEPS": 1,
            "SOLVER.EPOCHS": 1,
            "SOLVER.WARMUP_EPOCHS": 0,
            "SOLVER.CHECKPOINT_EPOCHS": 1,
            "SOLVER.LOG_PERIOD": 1,
            "SOLVER.MESA.WEIGHT": 0,
            "TEST.EVAL_EPOCHS": 0,
            "TEST.SHORT_PX": cfg.INPUT.CROP_PX,
            "TEST.IMS_PER_BATCH": 1,
        },
    )
    shares = {
        "INPUT.FLIP_PROB": cfg.INPUT.FLIP_PROB,
        "INPUT.ERASE_PROB": cfg.INPUT.ERASE_PROB,
        "INPUT.MIXING.PROB": cfg.INPUT.MIXING.PROB,
        "INPUT.MIXING.SWITCH_PROB": cfg.INPUT.MIXING.SWITCH_PROB,
        "SOLVER.MESA.START": cfg.SOLVER.MESA.START,
    }
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{key} must be in [0, 1], got {value}")
    for key in ("EMA_DECAY", "LABEL_SMOOTHING"):
        if not 0 <= cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} must be in [0, 1), got {cfg.SOLVER[key]}")
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
