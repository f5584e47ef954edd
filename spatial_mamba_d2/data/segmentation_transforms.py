"""From images and label maps to network inputs, as the official segmentation recipe does it.

Images are ``uint8[H, W, C]``, RGB if C is 3, labels ``[H, W]`` as in
:mod:`~spatial_mamba_d2.data.class_indices`.
Every random choice comes from the generator that the caller passes: a sample depends on its seed
alone, whichever process or worker makes it. The numbers are those of mmsegmentation's pipelines;
resizing is OpenCV's bilinear on uint8, without antialiasing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from spatial_mamba_d2.data.class_indices import as_label_tensor, ignored_in

BRIGHTNESS = 32
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # of 180, OpenCV's full circle
CROP_TRIALS = 10


def fitted_size(height: int, width: int, short_px: int, long_px: int) -> tuple[int, int]:
    """(height, width) of the same shape, as large as ``short_px`` and ``long_px`` allow."""
    scale = min(short_px / min(height, width), long_px / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To (height, width), bilinear."""
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return resized.reshape(*size, image.shape[2])  # OpenCV drops a single channel


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To (height, width), nearest."""
    return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)


def normalize(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """``uint8[H, W, C]`` -> ``float32[H, W, C]`` of mean 0 and deviation 1."""
    return (image.astype(np.float32) - np.array(mean, np.float32)) / np.array(std, np.float32)


def to_tensor(image: np.ndarray) -> Tensor:
    """``[H, W, C]`` -> ``Tensor[C, H, W]``."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def random_crop_origin(
    label: np.ndarray, crop_px: int, max_class_share: float, rng: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a crop in which no class has more than ``max_class_share`` of the pixels.

    Ignored pixels do not count. The last of ten trials is taken as it is.
    """
    margins = [max(side - crop_px, 0) for side in label.shape]
    top = left = 0
    for _ in range(CROP_TRIALS):
        top, left = (int(rng.integers(margin + 1)) for margin in margins)
        crop = label[top : top + crop_px, left : left + crop_px]
        counts = np.bincount(crop[crop != ignored_in(crop)], minlength=2)
        if counts.max() < max_class_share * counts.sum():
            break
    return top, left


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each changed in half of the cases.

    Saturation and hue only of RGB.
    """
    is_rgb = image.shape[2] == 3

    def linear(x: np.ndarray, factor: float, offset: float = 0) -> np.ndarray:
        return np.clip(x.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

    def chosen() -> bool:
        return bool(rng.integers(2))

    if chosen():
        image = linear(image, 1, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = chosen()
    if contrast_first and chosen():
        image = linear(image, rng.uniform(*CONTRAST))
    if chosen() and is_rgb:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = linear(hsv[..., 1], rng.uniform(*SATURATION))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if chosen() and is_rgb:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-HUE, HUE)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and chosen():
        image = linear(image, rng.uniform(*CONTRAST))
    return image


@dataclass(frozen=True)
class TrainTransform:
    """Random resize, crop, flip and colours; then normalise, and pad to the crop.

    Attributes:
        short_px, long_px: the frame that an image is fitted into, before ``ratio_range``.
        ratio_range: factors on that frame, drawn uniformly.
        crop_px: side of the crop. Padding is 0 after normalisation, and ignored.
        max_class_share: see :func:`random_crop_origin`.
        flip, photometric: whether to mirror every other image, and to change colours.
    """

    short_px: int
    long_px: int
    ratio_range: tuple[float, float]
    crop_px: int
    max_class_share: float
    flip: bool
    photometric: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Image and label -> ``float32 Tensor[C, crop, crop]``, label ``Tensor[crop, crop]``."""
        ratio = rng.uniform(*self.ratio_range)
        height, width = label.shape
        size = fitted_size(height, width, int(self.short_px * ratio), int(self.long_px * ratio))
        image, label = resize_image(image, size), resize_label(label, size)
        top, left = random_crop_origin(label, self.crop_px, self.max_class_share, rng)
        window = slice(top, top + self.crop_px), slice(left, left + self.crop_px)
        image, label = image[window], label[window]
        if self.flip and rng.integers(2):
            image, label = image[:, ::-1], label[:, ::-1]
        if self.photometric:
            image = photometric_distortion(np.ascontiguousarray(image), rng)
        height, width = label.shape
        pixels = np.zeros((self.crop_px, self.crop_px, image.shape[2]), np.float32)
        pixels[:height, :width] = normalize(image, self.mean, self.std)
        target = np.full((self.crop_px, self.crop_px), ignored_in(label), label.dtype)
        target[:height, :width] = label
        return to_tensor(pixels), as_label_tensor(target)


@dataclass(frozen=True)
class TestTransform:
    """One network input for each scale; no padding.

    Attributes:
        short_px, long_px: the frame that an image is fitted into.
        scales: factors on that frame, or on the image itself.
        scales_of: ``frame`` or ``image``.
        max_px: the most pixels that a view may have, ``TEST.MAX_WHOLE_PX``; None: any number.
    """

    short_px: int
    long_px: int
    scales: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scales_of: str = "frame"
    max_px: int | None = None
    __test__ = False  # no test case, whatever pytest makes of the name

    def __call__(self, image: np.ndarray) -> list[Tensor]:
        """Image -> ``float32 Tensor[C, H_s, W_s]`` for each scale s; raises as :meth:`sizes`."""
        return [
            to_tensor(normalize(resize_image(image, size), self.mean, self.std))
            for size in self.sizes(*image.shape[:2])
        ]

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each view of an image of this size.

        Raises:
            ValueError: a view has more than ``max_px`` pixels.
        """
        sizes = [self._size(height, width, scale) for scale in self.scales]
        most = max(h * w for h, w in sizes)
        if self.max_px is not None and most > self.max_px:
            raise ValueError(
                f"a view for the model must have at most {self.max_px} pixels, TEST.MAX_WHOLE_PX, "
                f"got {most} for an image of {width} x {height}, scaled by "
                f"{', '.join(map(str, self.scales))}: use TEST.MODE slide, smaller scales, or "
                "raise TEST.MAX_WHOLE_PX if there is memory"
            )
        return sizes

    def _size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        if self.scales_of == "image":
            return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        return fitted_size(height, width, int(self.short_px * scale), int(self.long_px * scale))
