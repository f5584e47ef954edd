"""The configuration of the segmentation tools: the official recipe, on the generated shapes."""

from __future__ import annotations

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


def segmentation_defaults() -> CfgNode:
    """All keys; each is explained where it is set."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/upernet"
    cfg.SEED = 0  # of initial weights, order and augmentations; training can be repeated exactly

    cfg.MODEL = CfgNode()
    cfg.MODEL.DEVICE = "cuda"  # or cpu, which it becomes where there is no GPU
    cfg.MODEL.WEIGHTS = ""  # to start from, or to test: ours or the authors', of any task
    # Prefixes of parameters that keep their initial values though MODEL.WEIGHTS has them, such as
    # ("decode_head.classify", "auxiliary_head.classify") for other classes.
    cfg.MODEL.WEIGHTS_SKIP = ()
    cfg.MODEL.NUM_CLASSES = 6
    cfg.MODEL.PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, ImageNet
    cfg.MODEL.PIXEL_STD = (58.395, 57.12, 57.375)
    add_spatial_mamba_config(cfg)
    del cfg.MODEL.SPATIAL_MAMBA["OUT_FEATURES"]  # UPerNet takes all four
    cfg.MODEL.SPATIAL_MAMBA.BN = "sync"  # of the heads too; becomes train where there is no GPU
    cfg.MODEL.UPERNET = CfgNode()
    cfg.MODEL.UPERNET.CHANNELS = 512
    cfg.MODEL.UPERNET.DROPOUT = 0.1
    cfg.MODEL.UPERNET.AUX_CHANNELS = 256
    cfg.MODEL.UPERNET.AUX_WEIGHT = 0.4  # of the auxiliary head's loss
    cfg.MODEL.CLASS_WEIGHTS = ()  # of each class in both losses; (): 1 for all

    # Any data set in ADE20K's folder shape: ROOT/images/SPLIT/*, ROOT/annotations/SPLIT/*.png
    cfg.DATASETS = CfgNode()
    cfg.DATASETS.ROOT = "datasets/shapes"
    cfg.DATASETS.TRAIN = "training"
    cfg.DATASETS.TEST = "validation"
    cfg.DATASETS.CLASSES = "objectInfo.txt"  # names: a file in ROOT, or ade20k, or "" for numbers
    cfg.DATASETS.LABEL_OFFSET = 1  # class 0 is stored as this
    cfg.DATASETS.IGNORE_LABELS = (0,)  # stored integers that neither train nor count
    # A broken image or label file: "raise" an error that names it, or "skip" it and count.
    cfg.DATASETS.ON_ERROR = "raise"
    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 4  # for each process

    cfg.INPUT = CfgNode()
    cfg.INPUT.SHORT_PX = 512  # images are resized to this short side, in training and in tests,
    cfg.INPUT.LONG_PX = 2048  # unless the long side would exceed this
    cfg.INPUT.RATIO_RANGE = (0.5, 2.0)  # in training, both times a factor between these
    cfg.INPUT.CROP_PX = 512
    cfg.INPUT.MAX_CLASS_SHARE = 0.75  # of a crop's pixels; a crop with more is drawn again
    cfg.INPUT.FLIP = True
    cfg.INPUT.PHOTOMETRIC = True

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.IMS_PER_BATCH = 16  # of all processes together
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # a batch is processed in this many parts
    cfg.SOLVER.BASE_LR = 6e-5
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    cfg.SOLVER.WARMUP_ITERS = 1500
    cfg.SOLVER.WARMUP_FACTOR = 1e-6
    cfg.SOLVER.MAX_ITER = 160_000  # the learning rate falls linearly to 0 until then
    cfg.SOLVER.CHECKPOINT_PERIOD = 2000
    cfg.SOLVER.EMA_DECAY = 0.0  # above 0: evaluate and keep a moving average of the weights
    cfg.SOLVER.AMP = CfgNode()
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # or float16
    cfg.SOLVER.CLIP_GRADIENTS = CfgNode()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # of the norm of all gradients together
    cfg.SOLVER.LOG_PERIOD = 50

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 16_000  # iterations; 0: only at the end
    cfg.TEST.MODE = "whole"  # the image at once, or "slide": windows, whose logits are averaged
    cfg.TEST.CROP_PX = 512  # side of the window
    cfg.TEST.STRIDE_PX = 341
    # ss: fitted into the frame of INPUT. ms: the image itself times 0.75, 1, 1.25, mirrored too.
    # ms_wide: times 0.5 to 1.75 in six steps, mirrored too. custom: the three keys below.
    cfg.TEST.PROTOCOL = "ss"
    cfg.TEST.SCALES = (1.0,)
    cfg.TEST.SCALES_OF = "frame"  # or "image"
    cfg.TEST.FLIP = False
    cfg.TEST.PICTURES = 8  # test images drawn with ground truth and prediction
    return cfg


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the YAML file, then ``KEY VALUE`` pairs; checked and frozen.

    Without a GPU, ``MODEL.DEVICE`` becomes ``cpu`` and ``MODEL.SPATIAL_MAMBA.BN`` is not ``sync``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key (with the nearest valid one), or a value out of its range.
    """
    cfg = segmentation_defaults()
    merge_config(cfg, config_file, overrides)
    _check(cfg)
    use_cpu_without_gpu(cfg)
    cfg.freeze()
    return cfg


def _check(cfg: CfgNode) -> None:
    require_one_of(
        cfg,
        {
            "MODEL.DEVICE": ("cuda", "cpu"),
            "DATASETS.ON_ERROR": ("raise", "skip"),
            "SOLVER.AMP.PRECISION": ("bfloat16", "float16"),
            "TEST.MODE": ("whole", "slide"),
            "TEST.PROTOCOL": ("ss", "ms", "ms_wide", "custom"),
            "TEST.SCALES_OF": ("frame", "image"),
        },
    )
    require_at_least(
        cfg,
        {
            "MODEL.NUM_CLASSES": 1,
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.SHORT_PX": 1,
            "INPUT.LONG_PX": cfg.INPUT.SHORT_PX,
            "INPUT.CROP_PX": 1,
            "SEED": 0,
            "SOLVER.IMS_PER_BATCH": 1,
            "SOLVER.ACCUMULATION_STEPS": 1,
            "SOLVER.MAX_ITER": 1,
            "SOLVER.WARMUP_ITERS": 0,
            "SOLVER.CHECKPOINT_PERIOD": 1,
            "SOLVER.LOG_PERIOD": 1,
            "TEST.EVAL_PERIOD": 0,
            "TEST.CROP_PX": 1,
            "TEST.STRIDE_PX": 1,
        },
    )
    if cfg.TEST.STRIDE_PX > cfg.TEST.CROP_PX:
        raise ValueError(
            f"TEST.STRIDE_PX must be at most TEST.CROP_PX {cfg.TEST.CROP_PX}, or pixels are left "
            f"out, got {cfg.TEST.STRIDE_PX}"
        )
    weights = cfg.MODEL.CLASS_WEIGHTS
    if weights and (len(weights) != cfg.MODEL.NUM_CLASSES or min(weights) < 0):
        raise ValueError(
            f"MODEL.CLASS_WEIGHTS must be {cfg.MODEL.NUM_CLASSES} numbers from 0, as many as "
            f"MODEL.NUM_CLASSES, or none, got {weights}"
        )
    require_low_high(cfg, ("INPUT.RATIO_RANGE",))
    if not cfg.TEST.SCALES or min(cfg.TEST.SCALES) <= 0:
        raise ValueError(f"TEST.SCALES must be numbers above 0, got {cfg.TEST.SCALES}")
    if not 0 <= cfg.SOLVER.EMA_DECAY < 1:
        raise ValueError(f"SOLVER.EMA_DECAY must be in [0, 1), got {cfg.SOLVER.EMA_DECAY}")
