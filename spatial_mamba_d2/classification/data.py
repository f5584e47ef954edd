"""Training and test images of classification, for Lightning's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from spatial_mamba_d2.data.faults import OnError, read_or_skip
from spatial_mamba_d2.data.imagenet import (
    ClassifiedImage,
    TrainTransform,
    build_test_transform,
    check_split,
    load_classes,
    read_sample,
)
from spatial_mamba_d2.data.pixels import PixelRange, build_pixel_range
from spatial_mamba_d2.data.samplers import SkippingDataset
from spatial_mamba_d2.training.data_module import DataModule

BROKEN = -1  # class of a test image that could not be read


class TestImages(Dataset[tuple[Tensor, int, str]]):
    """One image at a time: network input, class (or :data:`BROKEN`), and what was wrong."""

    __test__ = False

    def __init__(
        self,
        samples: Sequence[ClassifiedImage],
        transform: Any,
        on_error: OnError,
        value_range: PixelRange | None = None,
    ):
        self.samples = samples
        self.read = partial(read_sample, value_range=value_range)
        self.transform = transform
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        content, error = read_or_skip(self.read, self.samples[index], self.on_error)
        image, target = (Image.new("RGB", (8, 8)), BROKEN) if error else content
        return self.transform(image), target, error or ""


class ClassificationData(DataModule[ClassifiedImage]):
    """Training and test images for the trainer.

    Args:
        root, train, test: the folder, and the names of its splits.
        classes: names of the class folders, see :func:`~.imagenet.load_classes`.
        check_decode, value_range: see :func:`~.imagenet.load_split`.
        **kwargs: see :class:`~spatial_mamba_d2.training.data_module.DataModule`.

    Attributes:
        left_out: split -> kind of fault -> number.

    Raises:
        FileNotFoundError, ValueError: from ``setup``, see :func:`~.imagenet.check_split`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        classes: Sequence[str],
        train_transform: TrainTransform,
        test_transform: transforms.Compose,
        *,
        check_decode: bool = False,
        value_range: PixelRange | None = None,
        **kwargs: Any,
    ):
        super().__init__(root, train, test, **kwargs)
        self.classes, self.check_decode = classes, check_decode
        self.value_range = value_range
        self.left_out: dict[str, dict[str, int]] = {}
        self.train_transform, self.test_transform = train_transform, test_transform

    @property
    def epoch_iterations(self) -> int:
        """Iterations of an epoch, once ``setup`` has found the images: as many as full batches."""
        return max(1, len(self.splits[self.train]) // self.batch_size)

    def load_split(self, split: str) -> list[ClassifiedImage]:
        samples, self.left_out[split] = check_split(
            self.root,
            split,
            self.classes,
            on_error=self.on_error,
            check_decode=self.check_decode,
            value_range=self.value_range,
        )
        return samples

    def image_file(self, item: ClassifiedImage) -> Path:
        return item.path

    def training_samples(self, items: list[ClassifiedImage]) -> SkippingDataset[ClassifiedImage]:
        read = partial(read_sample, value_range=self.value_range)
        return SkippingDataset(
            items, read, self.train_transform, seed=self.seed, on_error=self.on_error
        )

    def test_samples(self, items: list[ClassifiedImage]) -> TestImages:
        return TestImages(items, self.test_transform, self.on_error, self.value_range)


def build_data(cfg: CfgNode) -> ClassificationData:
    """The data module of ``cfg``; it has read nothing but the names of the classes."""
    data, augment = cfg.DATASETS, cfg.INPUT
    mean, std = pixel_statistics(cfg)
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
        check_decode=data.CHECK_DECODE,
        value_range=build_pixel_range(augment.PIXEL_RANGE),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        test_batch_size=cfg.TEST.IMS_PER_BATCH,
        seed=cfg.SEED,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        on_error=data.ON_ERROR,
    )


def pixel_statistics(cfg: CfgNode) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels on the scale from 0 to 1."""
    mean, std = (
        tuple(value / 255 for value in values)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    return mean, std
