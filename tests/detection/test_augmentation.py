"""Resizing as OpenCV does it, and the recipes' augmentation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T

from spatial_mamba_d2.detection.augmentation import (
    ResizeShortestEdge,
    ResizeTransform,
    build_augmentation,
)
from spatial_mamba_d2.detection.config import load_config


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 127, 3), np.uint8)


def test_pixels_are_opencvs(image):
    transform = ResizeShortestEdge([60], 1000, "choice").get_transform(image)
    expected = cv2.resize(image, (85, 60), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(transform.apply_image(image), expected)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((300, 640), (625, 1333))],
)
def test_sizes_are_those_of_the_recipe(shape, size):
    cfg = load_config(None, ["INPUT.MIN_SIZE_TEST", "800", "INPUT.MAX_SIZE_TEST", "1333"])
    (resize,) = build_augmentation(cfg, is_train=False)
    transform = resize.get_transform(np.zeros((*shape, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == size


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (8, 2400), (1, 1), (3, 100_000)])
def test_lines_of_pixels_stay_bounded_and_keep_some(shape):
    image = np.full((*shape, 3), 7, np.uint8)
    resized = ResizeShortestEdge([800], 1333, "choice").get_transform(image).apply_image(image)
    assert 1 <= min(resized.shape[:2]) and max(resized.shape[:2]) <= 1333
    assert (resized == 7).all()


def test_integer_coordinates_are_not_truncated():
    polygon = np.array([[1, 1], [3, 5]])
    scaled = ResizeTransform(10, 10, 15, 25).apply_coords(polygon)
    assert scaled.tolist() == [[2.5, 1.5], [7.5, 7.5]]
    assert polygon.tolist() == [[1, 1], [3, 5]]


def test_labels_and_inverse(image):
    transform = ResizeTransform(90, 127, 45, 60)
    labels = image[:, :, 0]
    assert set(np.unique(transform.apply_segmentation(labels))) <= set(np.unique(labels))
    back = transform.inverse().apply_coords(transform.apply_coords(np.array([[7.0, 9.0]])))
    assert back == pytest.approx(np.array([[7.0, 9.0]]))
    gray = transform.apply_image(image[:, :, :1])
    assert gray.shape == (45, 60, 1)


def test_three_times_recipe_crops_half_of_the_images(root):
    cfg = load_config(root / "configs/mask_rcnn_spatial_mamba_t_3x.yaml")
    augmentations = T.AugmentationList(build_augmentation(cfg, is_train=True))
    np.random.seed(0)
    picture = np.zeros((480, 640, 3), np.uint8)
    cropped, shortest = 0, set()
    for _ in range(60):
        aug_input = T.AugInput(picture)
        transforms = augmentations(aug_input)
        cropped += any(isinstance(t, T.CropTransform) for t in transforms.transforms)
        shortest.add(min(aug_input.image.shape[:2]))
        assert max(aug_input.image.shape[:2]) <= 1333
    assert 18 <= cropped <= 42
    assert {480, 800} <= shortest and len(shortest) >= 8


@pytest.mark.parametrize(
    ("kind", "size", "low", "high"),
    [
        ("absolute", "[20, 30]", (20, 30), (20, 30)),
        ("absolute", "[500, 30]", (40, 30), (40, 30)),  # no more than the image has
        ("absolute_range", "[20, 30]", (20, 20), (30, 30)),
        ("relative", "[0.5, 0.25]", (20, 15), (20, 15)),
        ("relative", "[0.001, 0.001]", (1, 1), (1, 1)),
        ("relative_range", "[0.5, 0.25]", (20, 15), (40, 60)),
    ],
)
def test_crops_of_each_type(kind, size, low, high):
    words = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size]
    crop, *_ = build_augmentation(load_config(None, words), is_train=True)
    image = np.zeros((40, 60, 3), np.uint8)
    for _ in range(5):
        height, width, _ = crop.get_transform(image).apply_image(image).shape
        assert low[0] <= height <= high[0] and low[1] <= width <= high[1]


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_flip(flip):
    augmentations = build_augmentation(load_config(None, ["INPUT.RANDOM_FLIP", flip]), True)
    flips = [a for a in augmentations if isinstance(a, T.RandomFlip)]
    assert len(flips) == (flip != "none")
    assert all(getattr(a, flip) for a in flips)
