"""What ``tools/train_seg.py`` runs in each process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spatial_mamba_d2.data.ade20k import load_classes
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.data import SegmentationData, build_data
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.module import Segmentor
from spatial_mamba_d2.training.fit import evaluate, fit, start


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train, or with ``args.eval_only`` evaluate, and return scores in percent.

    Raises:
        FileNotFoundError, ValueError: configuration, data, weights or devices are not usable.
    """
    cfg = start(args, load_config)
    classes = load_classes(cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.MODEL.NUM_CLASSES)

    def build() -> tuple[Segmentor, SegmentationData]:
        segmentor = Segmentor(cfg, classes)
        return segmentor, build_data(cfg, segmentor.protocol, classes)

    return evaluate(*build(), args) if args.eval_only else fit(cfg, build, args)


def check_data(config_file: str | Path | None, overrides: Sequence[str]) -> list[str]:
    """What :meth:`.DataModule.check` says of the data of a configuration."""
    cfg = load_config(config_file, overrides)
    return build_data(cfg, build_protocol(cfg)).check()
