"""What ``tools/train_cls.py`` runs in each process."""

from __future__ import annotations

import argparse

from fvcore.common.config import CfgNode

from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.module import Classifier
from spatial_mamba_d2.data.imagenet import (
    ClassificationData,
    TrainTransform,
    build_test_transform,
    load_classes,
)
from spatial_mamba_d2.training import fit as launch


def build_data(cfg: CfgNode) -> ClassificationData:
    """The data module of ``cfg``; it has read nothing but the names of the classes."""
    data, augment = cfg.DATASETS, cfg.INPUT
    mean, std = (
        tuple(value / 255 for value in values)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    options = {
        "scale": tuple(augment.SCALE_RANGE),
        "ratio": tuple(augment.RATIO_RANGE),
        "hflip": augment.FLIP_PROB,
        "color_jitter": augment.COLOR_JITTER or None,
        "auto_augment": augment.AUTO_AUGMENT or None,
        "interpolation": "bicubic",
        "re_prob": augment.ERASE_PROB,
        "re_mode": "pixel",
    }
    return ClassificationData(
        data.ROOT,
        data.TRAIN,
        data.TEST,
        load_classes(data.CLASSES, data.ROOT, data.TRAIN, cfg.MODEL.NUM_CLASSES),
        TrainTransform(augment.CROP_PX, mean, std, options),
        build_test_transform(cfg.TEST.SHORT_PX, augment.CROP_PX, mean, std),
        epochs=cfg.SOLVER.EPOCHS,
        check_decode=data.CHECK_DECODE,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        parts=cfg.SOLVER.ACCUMULATION_STEPS,
        test_batch_size=cfg.TEST.IMS_PER_BATCH,
        seed=cfg.SEED,
        workers=cfg.DATALOADER.NUM_WORKERS,
        on_error=data.ON_ERROR,
    )


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as :func:`~spatial_mamba_d2.training.fit.fit` does; return scores in percent."""
    cfg = launch.start(args, load_config)
    data = build_data(cfg)
    data.setup("fit")  # for the length of an epoch
    epoch = data.epoch_iterations()
    return launch.fit(
        Classifier(cfg, tuple(data.classes), epoch),
        data,
        args,
        iterations=data.iterations(),
        eval_period=cfg.TEST.EVAL_EPOCHS * epoch,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_EPOCHS * epoch,
        metric="top1",
    )


def test(args: argparse.Namespace) -> dict[str, float]:
    """Test as :func:`~spatial_mamba_d2.training.fit.evaluate` does; scores in percent."""
    cfg = launch.start(args, load_config)
    data = build_data(cfg)
    return launch.evaluate(Classifier(cfg, tuple(data.classes)), data, args)
