"""What ``tools/train_cls.py`` runs in each process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.data import ClassificationData, build_data
from spatial_mamba_d2.classification.module import Classifier
from spatial_mamba_d2.training.fit import evaluate, fit, start


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train, or with ``args.eval_only`` evaluate, and return scores in percent.

    Raises:
        FileNotFoundError, ValueError: configuration, data, weights or devices are not usable.
    """
    cfg = start(args, load_config)

    def build() -> tuple[Classifier, ClassificationData]:
        data = build_data(cfg)
        classes = tuple(data.classes)
        if args.eval_only:
            return Classifier(cfg, classes), data
        data.setup("fit")  # the schedule counts in epochs, whose length depends on the data
        return Classifier(cfg, classes, data.epoch_iterations), data

    return evaluate(*build(), args) if args.eval_only else fit(cfg, build, args)


def check_data(config_file: str | Path | None, overrides: Sequence[str]) -> list[str]:
    """What :meth:`.DataModule.check` says of the data of a configuration."""
    return build_data(load_config(config_file, overrides)).check()
