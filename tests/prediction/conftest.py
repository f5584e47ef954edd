"""A scene whose pixels tell which object they belong to, its reader, and small models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.prediction.masks import encode_bitmap
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap

NAMES = ("ball", "bar", "ring")


@dataclass
class Scene:
    """``image``: RGB, whose colour is the object's number (0: none); ``numbers`` int32[H, W]."""

    image: np.ndarray
    numbers: np.ndarray

    @property
    def num_objects(self) -> int:
        return len(np.unique(self.numbers)) - 1


def as_image(numbers: np.ndarray) -> np.ndarray:
    return np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], axis=2).astype(np.uint8)


def make_scene(size: tuple[int, int], num_objects: int, num_large: int, seed: int = 0) -> Scene:
    """Objects that do not touch; class: number % 3."""
    rng = np.random.default_rng(seed)
    numbers = np.zeros(size, np.int32)
    number = 0
    height, width = size
    for _ in range(30 * (num_objects + num_large)):
        if number == num_objects + num_large:
            break
        shape = np.zeros(size, np.uint8)
        center = int(rng.integers(width)), int(rng.integers(height))
        if number < num_large:
            end = int(rng.integers(width)), int(rng.integers(height))
            cv2.line(shape, center, end, 1, int(rng.integers(8, 25)))
        elif number % 3 == 2:
            cv2.circle(shape, center, int(rng.integers(6, 20)), 1, 3)
        else:
            axes = int(rng.integers(3, 25)), int(rng.integers(3, 25))
            cv2.ellipse(shape, center, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        if (cv2.dilate(shape, np.ones((3, 3), np.uint8)) * numbers).any() or shape.sum() < 20:
            continue
        number += 1
        numbers[shape > 0] = number
    return Scene(as_image(numbers), numbers)


class Oracle:
    """Reads the truth out of the colours of :func:`as_image`."""

    num_channels = 3
    value_range = None
    names = NAMES

    def __init__(self, task: str = "detection", with_masks: bool = True):
        self.task, self.with_masks = task, with_masks
        self.batch_sizes: list[int] = []
        self.change: Callable[[np.ndarray], np.ndarray] = lambda mask: mask

    def __call__(self, image: np.ndarray) -> Any:
        numbers = image.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        if self.task == "segmentation":
            return LabelMap(label=(numbers % 3).astype(np.uint8), names=NAMES)
        if self.task == "classification":
            counts = np.bincount(numbers.ravel() % 3, minlength=3)
            scores = (counts / counts.sum()).astype(np.float32)
            return ClassScores(scores=scores, names=NAMES, image_size=numbers.shape)
        boxes, masks, found = [], [], []
        for number in np.unique(numbers[numbers > 0]):
            mask = self.change(numbers == number)
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
                masks.append(encode_bitmap(mask))
                found.append(number)
        found_numbers = np.array(found, np.int64)
        return Detections(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            scores=(0.5 + found_numbers % 50 / 100).astype(np.float32),
            classes=found_numbers % 3,
            masks=tuple(masks) if self.with_masks else None,
            names=NAMES,
            image_size=numbers.shape,
        )

    def batch(self, images: Sequence[np.ndarray]) -> list[Any]:
        self.batch_sizes.append(len(images))
        return [self(image) for image in images]

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        labels = [result.label for result in self.batch(images)]
        return [(label == np.arange(3)[:, None, None]).astype(np.float32) for label in labels]

    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        return 255 - image


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture(scope="session")
def scene() -> Scene:
    """900 x 1100 with 150 objects, some of them larger than windows of 256."""
    return make_scene((900, 1100), 150, 6)


@pytest.fixture(scope="session")
def small_scene(scene) -> Scene:
    """500 x 600 of it, 9 windows of 256."""
    return Scene(scene.image[:500, :600], scene.numbers[:500, :600])


@pytest.fixture
def scene_of() -> Callable[..., Scene]:
    return make_scene


SMALL = {
    "detection": [
        "INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_HEADS.NUM_CLASSES", "2",
        "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "5",
    ],
    "segmentation": [
        "MODEL.UPERNET.CHANNELS", "16", "MODEL.UPERNET.AUX_CHANNELS", "8", "MODEL.NUM_CLASSES", "3",
        "INPUT.SHORT_PX", "64", "DATASETS.CLASSES", "",
    ],
    "classification": ["MODEL.NUM_CLASSES", "2", "INPUT.CROP_PX", "32", "TEST.SHORT_PX", "36"],
}  # fmt: skip
CLASSES = {
    "detection": ["cat", "dog"],
    "segmentation": ["a", "b", "c"],
    "classification": ["x", "y"],
}


@pytest.fixture
def config_of(root, test_variant):
    def config(task, *more):
        words = [*SMALL[task], "MODEL.SPATIAL_MAMBA.VARIANT", test_variant, "MODEL.DEVICE", "cpu"]
        recipe = root / "configs/mask_rcnn_spatial_mamba_t.yaml" if task == "detection" else None
        module = importlib.import_module(f"spatial_mamba_d2.{task}.config")
        return module.load_config(recipe, [*words, *more])

    return config


@pytest.fixture
def checkpoint(config_of, tmp_path):
    """``checkpoint(task)``: of a small model, with names and configuration in it."""

    def write(task, *, with_config=True, with_names=True):
        cfg = config_of(task)
        torch.manual_seed(0)
        if task == "classification":
            model = build_classifier("test", 2)
        else:
            place = {"detection": "detection", "segmentation": "segmentation.module"}[task]
            model = importlib.import_module(f"spatial_mamba_d2.{place}").build_model(cfg)
        content = {"model": model.state_dict()}
        if with_names:
            content["classes"] = CLASSES[task]
            content["palette"] = [[i, i, i] for i in range(3)]
        if with_config:
            content["config"] = cfg.dump()
        path = tmp_path / f"{task}.pth"
        torch.save(content, path)
        return path

    return write
