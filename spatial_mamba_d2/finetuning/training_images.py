"""Training images as the network gets them: augmented, with their labels, on one sheet."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from spatial_mamba_d2.data.ade20k import load_classes as load_label_classes
from spatial_mamba_d2.data.class_indices import as_label_array
from spatial_mamba_d2.data.drawing import as_rgb

_GAP_PX = 8
_COLUMNS = 4


def draw_training_images(task: str, cfg: Any, number: int = 8) -> np.ndarray:
    """The first ``number`` images of the training that ``cfg`` describes.

    What mixes images with each other (mixup, CutMix) comes later and is not seen.

    Args:
        task: ``detection``, ``segmentation`` or ``classification``.

    Returns:
        RGB, ``uint8[H, W, 3]``.

    Raises:
        FileNotFoundError, ValueError: the data are not usable.
    """
    draw = {
        "detection": _detection,
        "segmentation": _segmentation,
        "classification": _classification,
    }[task]
    return _sheet(list(islice(draw(cfg), number)))


def _sheet(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images side by side on white, row by row."""
    rows = [images[i : i + _COLUMNS] for i in range(0, len(images), _COLUMNS)]
    height = max(image.shape[0] for image in images) + _GAP_PX
    width = max(image.shape[1] for image in images) + _GAP_PX
    canvas = np.full((len(rows) * height, min(_COLUMNS, len(images)) * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        y, x = height * (index // _COLUMNS), width * (index % _COLUMNS)
        canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    return canvas


def _detection(cfg: Any) -> Iterator[np.ndarray]:
    data = importlib.import_module("spatial_mamba_d2.detection.data")
    draw = importlib.import_module("spatial_mamba_d2.detection.visualize").draw_targets
    datasets = data.load_training_datasets(cfg)
    for batch in data.build_train_loader(cfg, datasets):
        for sample in batch:
            image = sample["image"].permute(1, 2, 0).numpy()
            if cfg.INPUT.FORMAT == "BGR":
                image = image[..., ::-1]
            image = np.ascontiguousarray(as_rgb(image.clip(0, 255).astype(np.uint8)))
            yield draw(image, sample["instances"], datasets[0].classes)


def _pixels(cfg: Any, image: Any) -> np.ndarray:
    """A normalised image, ``float[C, H, W]``, as RGB ``uint8[H, W, 3]``."""
    mean, std = np.array(cfg.MODEL.PIXEL_MEAN), np.array(cfg.MODEL.PIXEL_STD)
    values = image.permute(1, 2, 0).numpy() * std + mean
    return np.ascontiguousarray(as_rgb(values.round().clip(0, 255).astype(np.uint8)))


def _batches(task: str, cfg: Any, *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """Images and targets of a task on Lightning, one at a time."""
    data = importlib.import_module(f"spatial_mamba_d2.{task}.data").build_data(cfg, *arguments)
    data.setup("fit")
    for images, targets in data.train_dataloader():
        yield from zip(images, targets, strict=True)


def _segmentation(cfg: Any) -> Iterator[np.ndarray]:
    draw = importlib.import_module("spatial_mamba_d2.segmentation.visualize").draw_panels
    protocol = importlib.import_module("spatial_mamba_d2.segmentation.inference").build_protocol
    classes = load_label_classes(cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.MODEL.NUM_CLASSES)
    for image, target in _batches("segmentation", cfg, protocol(cfg), classes):
        maps = {"labels": as_label_array(target, cfg.MODEL.NUM_CLASSES)}
        yield draw(_pixels(cfg, image), maps, classes)


def _classification(cfg: Any) -> Iterator[np.ndarray]:
    draw = importlib.import_module("spatial_mamba_d2.classification.visualize").draw_classes
    data = importlib.import_module("spatial_mamba_d2.data.imagenet")
    names = data.load_classes(
        cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.DATASETS.TRAIN, cfg.MODEL.NUM_CLASSES
    )
    for image, target in _batches("classification", cfg):
        yield draw(_pixels(cfg, image), [names[int(target)]])
