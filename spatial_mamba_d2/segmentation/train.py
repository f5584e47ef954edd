"""What ``tools/train_seg.py`` and ``tools/test_seg.py`` run in each process."""

from __future__ import annotations

import argparse

from fvcore.common.config import CfgNode

from spatial_mamba_d2.data.ade20k import LabelFormat, SegmentationData, load_classes
from spatial_mamba_d2.data.segmentation_transforms import TestTransform, TrainTransform
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.module import Segmentor
from spatial_mamba_d2.training import fit as launch


def build_data(cfg: CfgNode) -> SegmentationData:
    """The data module of ``cfg``; it reads nothing yet."""
    protocol = build_protocol(cfg)
    frame = {
        "short_px": cfg.INPUT.SHORT_PX,
        "long_px": cfg.INPUT.LONG_PX,
        "mean": tuple(cfg.MODEL.PIXEL_MEAN),
        "std": tuple(cfg.MODEL.PIXEL_STD),
    }
    return SegmentationData(
        cfg.DATASETS.ROOT,
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        LabelFormat(
            cfg.MODEL.NUM_CLASSES, cfg.DATASETS.LABEL_OFFSET, tuple(cfg.DATASETS.IGNORE_LABELS)
        ),
        TrainTransform(
            ratio_range=tuple(cfg.INPUT.RATIO_RANGE),
            crop_px=cfg.INPUT.CROP_PX,
            max_class_share=cfg.INPUT.MAX_CLASS_SHARE,
            flip=cfg.INPUT.FLIP,
            photometric=cfg.INPUT.PHOTOMETRIC,
            **frame,
        ),
        TestTransform(scales=protocol.scales, scales_of=protocol.scales_of, **frame),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        iterations=cfg.SOLVER.MAX_ITER,
        parts=cfg.SOLVER.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        workers=cfg.DATALOADER.NUM_WORKERS,
        on_error=cfg.DATASETS.ON_ERROR,
    )


def build_segmentor(cfg: CfgNode) -> Segmentor:
    """The Lightning module of ``cfg``, with the class names of its data set."""
    classes = load_classes(cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.MODEL.NUM_CLASSES)
    return Segmentor(cfg, classes)


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as :func:`~spatial_mamba_d2.training.fit.fit` does; return scores in percent."""
    cfg = launch.start(args, load_config)
    return launch.fit(
        build_segmentor(cfg),
        build_data(cfg),
        args,
        iterations=cfg.SOLVER.MAX_ITER,
        eval_period=cfg.TEST.EVAL_PERIOD,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        metric="mIoU",
    )


def test(args: argparse.Namespace) -> dict[str, float]:
    """Test as :func:`~spatial_mamba_d2.training.fit.evaluate` does; scores in percent."""
    cfg = launch.start(args, load_config)
    return launch.evaluate(build_segmentor(cfg), build_data(cfg), args)
