"""Training and test images of segmentation, for Lightning's trainer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch.utils.data import Dataset

from spatial_mamba_d2.data.ade20k import (
    CheckedSplit,
    check_split,
    check_training_counts,
    load_classes,
)
from spatial_mamba_d2.data.class_file import numbered_names
from spatial_mamba_d2.data.class_indices import as_label_tensor
from spatial_mamba_d2.data.faults import (
    Fault,
    OnError,
    check_once,
    read_or_skip,
    settle_faults,
)
from spatial_mamba_d2.data.images import read_size
from spatial_mamba_d2.data.label_format import LabelFormat, build_label_format
from spatial_mamba_d2.data.label_maps import Classes, Pair, read_pair
from spatial_mamba_d2.data.pair_files import Layout
from spatial_mamba_d2.data.pixels import PixelRange, build_pixel_range
from spatial_mamba_d2.data.samplers import SkippingDataset
from spatial_mamba_d2.data.segmentation_transforms import TestTransform, TrainTransform
from spatial_mamba_d2.segmentation.inference import Protocol
from spatial_mamba_d2.training.data_module import DataModule

logger = logging.getLogger(__name__)


class TestImages(Dataset[dict[str, Any]]):
    """One image at a time: ``views``, ``label``, ``index``, ``file``, ``name`` of the pair.

    A broken one has ``error`` instead of ``views`` and ``label``.
    """

    __test__ = False

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: LabelFormat,
        transform: TestTransform,
        on_error: OnError,
        num_channels: int = 3,
        value_range: PixelRange | None = None,
    ):
        self.pairs = pairs
        self.read = partial(
            read_pair, labels=labels, num_channels=num_channels, value_range=value_range
        )
        self.transform = transform
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        sample: dict[str, Any] = {"index": index, "file": str(pair.image), "name": pair.name}
        content, error = read_or_skip(self.read, pair, self.on_error)
        if error:
            return {**sample, "error": error}
        image, label = content
        return {**sample, "views": self.transform(image), "label": as_label_tensor(label)}


class SegmentationData(DataModule[Pair]):
    """Training and test images for the trainer.

    Args:
        root, train, test: the folder, and the names of its splits.
        labels: the meaning of the integers in label files.
        names: of the classes, for messages; None: numbers.
        layout: where the files are.
        num_channels, value_range: see :func:`~.images.read_image`.
        **kwargs: see :class:`~spatial_mamba_d2.training.data_module.DataModule`.

    Attributes:
        checked: split -> its pairs, how often the classes occur, and what was left out.

    Raises:
        FileNotFoundError, ValueError: from ``setup``, see :func:`~.ade20k.check_split` and
            :func:`~.ade20k.check_training_counts`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        labels: LabelFormat,
        train_transform: TrainTransform,
        test_transform: TestTransform,
        *,
        names: Sequence[str] | None = None,
        layout: Layout | None = None,
        num_channels: int = 3,
        value_range: PixelRange | None = None,
        **kwargs: Any,
    ):
        super().__init__(root, train, test, **kwargs)
        self.labels, self.layout = labels, layout
        self.num_channels, self.value_range = num_channels, value_range
        self.names = names or numbered_names(labels.num_classes)
        self.train_transform, self.test_transform = train_transform, test_transform
        self.checked: dict[str, CheckedSplit] = {}

    def load_split(self, split: str) -> list[Pair]:
        checked = check_split(
            self.root,
            split,
            self.labels,
            layout=self.layout,
            num_channels=self.num_channels,
            value_range=self.value_range,
            on_error=self.on_error,
            check_decode=self.check_decode,
        )
        self.checked[split] = checked
        where = f"{self.root}, {split}"
        logger.info(
            "%s: %d images with labels\n%s",
            where,
            len(checked.pairs),
            checked.counts.table(self.names),
        )
        if split == self.train:
            check_training_counts(checked.counts, self.names, self.labels, where)
        if split != self.test:
            return checked.pairs
        too_large = self._too_large(checked.pairs)
        pairs = [pair for index, pair in enumerate(checked.pairs) if index not in too_large]
        settle_faults(list(too_large.values()), self.on_error, where=where, num_usable=len(pairs))
        left_out = Counter(checked.left_out) + Counter(f.kind for f in too_large.values())
        self.checked[split] = replace(checked, left_out=left_out)
        return pairs

    def _too_large(self, pairs: Sequence[Pair]) -> dict[int, Fault]:
        """Index of a pair -> why its views would be too large."""
        if self.test_transform.max_px is None:
            return {}

        def check() -> dict[str, Any]:
            faults = []
            for index, pair in enumerate(pairs):
                size = read_size(pair.image, self.num_channels, self.value_range)
                try:
                    self.test_transform.sizes(*size)
                except ValueError as error:
                    faults.append([index, "too large", f"{pair.image}: {error}"])
            return {"faults": faults}

        parameters = [asdict(self.test_transform), self.num_channels, self.value_range]
        content = check_once("view_sizes", [pair.image for pair in pairs], parameters, check)
        return {index: Fault(kind, reason) for index, kind, reason in content["faults"]}

    def image_file(self, item: Pair) -> Path:
        return item.image

    def training_samples(self, items: list[Pair]) -> SkippingDataset[Pair]:
        read = partial(
            read_pair,
            labels=self.labels,
            num_channels=self.num_channels,
            value_range=self.value_range,
        )
        return SkippingDataset(
            items, read, self.train_transform, seed=self.seed, on_error=self.on_error
        )

    def test_samples(self, items: list[Pair]) -> TestImages:
        return TestImages(
            items,
            self.labels,
            self.test_transform,
            self.on_error,
            self.num_channels,
            self.value_range,
        )


def label_format(cfg: CfgNode, names: Sequence[str]) -> LabelFormat:
    """What label files store, from ``cfg.DATASETS``; raises as :func:`build_label_format`."""
    data = cfg.DATASETS
    return build_label_format(
        names, data.LABEL_OFFSET, data.IGNORE_LABELS, data.LABEL_MAP, data.ROOT
    )


def build_test_transform(cfg: CfgNode, protocol: Protocol) -> TestTransform:
    """What makes the views that ``protocol`` asks for."""
    return TestTransform(
        scales=protocol.scales,
        scales_of=protocol.scales_of,
        max_px=cfg.TEST.MAX_WHOLE_PX if protocol.mode == "whole" else None,
        **_frame_and_statistics(cfg),
    )


def _frame_and_statistics(cfg: CfgNode) -> dict[str, Any]:
    return {
        "short_px": cfg.INPUT.SHORT_PX,
        "long_px": cfg.INPUT.LONG_PX,
        "mean": tuple(cfg.MODEL.PIXEL_MEAN),
        "std": tuple(cfg.MODEL.PIXEL_STD),
    }


def build_data(
    cfg: CfgNode, protocol: Protocol, classes: Classes | None = None
) -> SegmentationData:
    """The data module of ``cfg``, which has read nothing but names of classes and ``LABEL_MAP``."""
    data = cfg.DATASETS
    classes = classes or load_classes(data.CLASSES, data.ROOT, cfg.MODEL.NUM_CLASSES)
    return SegmentationData(
        data.ROOT,
        data.TRAIN,
        data.TEST,
        label_format(cfg, classes.names),
        TrainTransform(
            ratio_range=tuple(cfg.INPUT.RATIO_RANGE),
            crop_px=cfg.INPUT.CROP_PX,
            max_class_share=cfg.INPUT.MAX_CLASS_SHARE,
            flip=cfg.INPUT.FLIP,
            photometric=cfg.INPUT.PHOTOMETRIC,
            **_frame_and_statistics(cfg),
        ),
        build_test_transform(cfg, protocol),
        names=classes.names,
        layout=Layout(data.IMAGE_FOLDER, data.LABEL_FOLDER, data.IMAGE_SUFFIX, data.LABEL_SUFFIX),
        num_channels=cfg.INPUT.CHANNELS,
        value_range=build_pixel_range(cfg.INPUT.PIXEL_RANGE),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        on_error=data.ON_ERROR,
    )
