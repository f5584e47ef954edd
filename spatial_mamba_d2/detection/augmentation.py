"""Image augmentation of the published recipes, resizing as OpenCV (and so mmcv) does it."""

from __future__ import annotations

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform


class ResizeTransform(Transform):
    """Bilinear resize by OpenCV: no antialiasing, half-pixel centres.

    Detectron2's own goes through Pillow, which antialiases when it shrinks; the published models
    were trained and tested on OpenCV's pixels.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        size = (self.new_w, self.new_h)
        return cv2.resize(segmentation, size, interpolation=cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        # Not in place: polygons may come as integers, which would be truncated.
        return coords * (self.new_w / self.w, self.new_h / self.h)

    def inverse(self) -> ResizeTransform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge`` with :class:`ResizeTransform`."""

    def get_transform(self, image: np.ndarray) -> Transform:
        pillow = super().get_transform(image)
        if not isinstance(pillow, T.ResizeTransform):
            return pillow  # size 0 asks for no resize
        # Of a line of pixels nothing would be left when the long side is bounded.
        return ResizeTransform(pillow.h, pillow.w, max(1, pillow.new_h), max(1, pillow.new_w))


class ResizeScale(T.ResizeScale):
    """Detectron2's ``ResizeScale`` with :class:`ResizeTransform`, of at least one pixel."""

    def get_transform(self, image: np.ndarray) -> Transform:
        pillow = super().get_transform(image)
        return ResizeTransform(pillow.h, pillow.w, max(1, pillow.new_h), max(1, pillow.new_w))


class RandomCrop(T.RandomCrop):
    """Detectron2's ``RandomCrop``, in whole pixels (its sides may be 384.0), of which one is left.

    Without that, it fails on sides in pixels, and on small shares of small images.
    """

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(1, int(height)), max(1, int(width))


class OneOf(T.Augmentation):
    """One of two lists of augmentations, each with probability 1/2."""

    def __init__(self, first: list[T.Augmentation], second: list[T.Augmentation]):
        super().__init__()
        self.choices = (T.AugmentationList(first), T.AugmentationList(second))

    def __call__(self, aug_input: T.AugInput) -> Transform:
        return self.choices[np.random.randint(2)](aug_input)


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Resize to ``cfg.INPUT`` sizes; in training also crop, flip, and jitter of the scale."""
    if not is_train:
        return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    max_size = cfg.INPUT.MAX_SIZE_TRAIN
    resize = ResizeShortestEdge(
        cfg.INPUT.MIN_SIZE_TRAIN, max_size, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    )
    augmentations: list[T.Augmentation] = [resize]
    if cfg.INPUT.RESIZE_CROP.ENABLED:
        crop = [
            ResizeShortestEdge(cfg.INPUT.RESIZE_CROP.SIZES, max_size, "choice"),
            RandomCrop("absolute_range", cfg.INPUT.RESIZE_CROP.CROP_RANGE),
            resize,
        ]
        augmentations = [OneOf([resize], crop)]
    if cfg.INPUT.SCALE_JITTER.ENABLED:
        side_px = cfg.INPUT.SCALE_JITTER.SIZE
        jitter = ResizeScale(*cfg.INPUT.SCALE_JITTER.SCALES, side_px, side_px)
        augmentations = [jitter, T.FixedSizeCrop((side_px, side_px))]
    if cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(
            T.RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    return augmentations
