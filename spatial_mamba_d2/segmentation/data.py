"""Training and test images of segmentation, for Lightning's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset

from spatial_mamba_d2.data.ade20k import load_split
from spatial_mamba_d2.data.faults import OnError, read_or_skip
from spatial_mamba_d2.data.label_maps import LabelFormat, Pair, read_pair
from spatial_mamba_d2.data.samplers import SkippingDataset
from spatial_mamba_d2.data.segmentation_transforms import TestTransform, TrainTransform
from spatial_mamba_d2.segmentation.inference import Protocol
from spatial_mamba_d2.training.data_module import DataModule


class TestImages(Dataset[dict[str, Any]]):
    """One image at a time: ``views``, ``label``, ``index``, ``file``; ``error`` of a broken one."""

    __test__ = False

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: LabelFormat,
        transform: TestTransform,
        on_error: OnError,
    ):
        self.pairs = pairs
        self.labels = labels
        self.transform = transform
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        sample: dict[str, Any] = {"index": index, "file": str(pair.image)}
        content, error = read_or_skip(partial(read_pair, labels=self.labels), pair, self.on_error)
        if error:
            return {**sample, "error": error}
        image, label = content
        return {**sample, "views": self.transform(image), "label": torch.from_numpy(label)}


class SegmentationData(DataModule[Pair]):
    """Training and test images for the trainer.

    Args:
        root, train, test: the folder, and the names of its splits.
        labels: the meaning of the integers in label files.
        **kwargs: see :class:`~spatial_mamba_d2.training.data_module.DataModule`.

    Raises:
        FileNotFoundError, ValueError: from ``setup``, see :func:`~.ade20k.load_split`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        labels: LabelFormat,
        train_transform: TrainTransform,
        test_transform: TestTransform,
        **kwargs: Any,
    ):
        super().__init__(root, train, test, **kwargs)
        self.labels = labels
        self.train_transform, self.test_transform = train_transform, test_transform

    def load_split(self, split: str) -> list[Pair]:
        return load_split(self.root, split, self.labels, on_error=self.on_error)

    def training_samples(self, items: list[Pair]) -> SkippingDataset[Pair]:
        read = partial(read_pair, labels=self.labels)
        return SkippingDataset(
            items, read, self.train_transform, seed=self.seed, on_error=self.on_error
        )

    def test_samples(self, items: list[Pair]) -> TestImages:
        return TestImages(items, self.labels, self.test_transform, self.on_error)


def build_data(cfg: CfgNode, protocol: Protocol) -> SegmentationData:
    """The data module of ``cfg``; it reads nothing yet."""
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
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        on_error=cfg.DATASETS.ON_ERROR,
    )
