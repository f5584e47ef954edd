"""Predictors from files of ``tools/export_model.py``, without the frameworks of the trainings.

The file says how images are resized and what its classes are called; onnxruntime or OpenVINO runs
it. Drawings of detections need Detectron2, as they do for checkpoints.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spatial_mamba_d2.data.class_indices import as_label_array, index_dtype
from spatial_mamba_d2.data.imagenet import build_test_crop
from spatial_mamba_d2.data.label_maps import Classes, distinct_colors
from spatial_mamba_d2.data.pixels import PixelRange, build_pixel_range
from spatial_mamba_d2.data.segmentation_transforms import fitted_size, resize_image, resize_label
from spatial_mamba_d2.export.formats import INPUT, RUN_BY_SUFFIX, ExportedFile, open_file
from spatial_mamba_d2.models.upernet import resize, resized_argmax
from spatial_mamba_d2.prediction.masks import paste_rle
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap

_LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)


def is_exported(weights: str | Path) -> bool:
    """Whether this is the name of an exported file, and not of a checkpoint."""
    return Path(weights).suffix.lower() in RUN_BY_SUFFIX


def load_exported(path: str | Path) -> ExportedClassifier | ExportedSegmentor | ExportedDetector:
    """The predictor of a file for onnxruntime or OpenVINO.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or was not written by ``tools/export_model.py``.
        ImportError: its runtime is not installed.
    """
    path = Path(path)
    file = open_file(path, RUN_BY_SUFFIX[path.suffix.lower()])
    task = file.metadata.get("task")
    for predictor in (ExportedClassifier, ExportedSegmentor, ExportedDetector):
        if predictor.task == task:
            try:
                return predictor(file)
            except (KeyError, TypeError, IndexError) as error:
                reason = f"{type(error).__name__} {error}"
                raise ValueError(f"weights: {path} has incomplete metadata: {reason}") from error
    raise ValueError(f"weights: {path} must be for a task of this package, got {task!r}")


class _Exported:
    """What the predictors of all tasks have; see :class:`~.predictor.ImagePredictor`."""

    task: str

    def __init__(self, file: ExportedFile):
        metadata = file.metadata
        self.file = file
        self.names = tuple(map(str, metadata["classes"]))
        self.num_channels = int(metadata["inputs"][INPUT]["shape"][-1])
        self.value_range: PixelRange | None = build_pixel_range(metadata["pixel_range"])
        self.is_bgr = metadata["channels"] == "BGR"
        self.resize: dict[str, Any] = metadata["resize"]
        self.resize["filter"]  # an error now rather than at the first image

    def fit(self, image: np.ndarray) -> np.ndarray:
        """``uint8[H, W, C]`` in the size that the network is to see."""
        how = self.resize
        if "crop_px" in how:
            crop = build_test_crop(how["short_px"], how["crop_px"])
            return np.asarray(crop(Image.fromarray(image)))
        if "size_px" in how:
            return resize_image(image, tuple(how["size_px"]))
        if not how["short_px"]:
            return image
        height, width = image.shape[:2]
        size = fitted_size(height, width, how["short_px"], how["long_px"])
        return resize_image(image, size)

    def __call__(self, image: np.ndarray) -> Any:
        """``uint8[H, W, C]`` -> the result of the task."""
        raise NotImplementedError

    def batch(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Results of images, which are run one at a time, because most files take no batches."""
        return [self(image) for image in images]

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The file's answer to a fitted image, which may be a batch."""
        if self.is_bgr:
            pixels = pixels[..., ::-1]
        return self.file(np.ascontiguousarray(pixels))

    def visualize(self) -> Any:
        """The task's module of drawings, which stands above this subpackage."""
        return importlib.import_module(f"spatial_mamba_d2.{self.task}.visualize")


class ExportedClassifier(_Exported):
    """A classifier in a file."""

    task = "classification"

    def __call__(self, image: np.ndarray) -> ClassScores:
        scores = self.run(self.fit(image)[None])["probabilities"][0]
        return ClassScores(scores=scores, names=self.names, image_size=image.shape[:2])

    def draw(self, image: np.ndarray, result: ClassScores) -> np.ndarray:
        """RGB ``uint8[H, W, 3]`` -> a drawing, RGB ``uint8[H', W', 3]``."""
        return self.visualize().draw_scores(image, result)


class ExportedSegmentor(_Exported):
    """A UPerNet in a file, whose output is ``labels`` or ``probabilities``."""

    task = "segmentation"

    def __init__(self, file: ExportedFile):
        super().__init__(file)
        palette = file.metadata["palette"] or distinct_colors(len(self.names))
        self.classes = Classes(self.names, tuple(tuple(color) for color in palette))
        self.has_probabilities = "probabilities" in file.metadata["outputs"]

    def __call__(self, image: np.ndarray) -> LabelMap:
        size = image.shape[:2]
        if self.has_probabilities:
            scores = self._logits(image)
            label = as_label_array(resized_argmax(scores, (size,)), len(self.names))
        else:
            label = self.run(self.fit(image)[None])["labels"][0]
            label = label.astype(index_dtype(len(self.names)), copy=False)
            label = label if label.shape == size else resize_label(label, size)
        return LabelMap(label=label, names=self.names)

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each class and pixel, ``float32[K, H, W]`` of each image.

        Raises:
            ValueError: the file has label maps only.
        """
        if not self.has_probabilities:
            raise ValueError(
                f"{self.file.path} must have probabilities for windows (window_px, --window), "
                "got labels: export it with --result probabilities"
            )
        return [
            resize(self._logits(image), image.shape[:2])[0].softmax(0).numpy() for image in images
        ]

    def _logits(self, image: np.ndarray) -> torch.Tensor:
        """``Tensor[1, K, h, w]``, up to a constant for each pixel, which no class notices.

        Interpolation is linear in them, so that they are resized as those of the checkpoint are.
        """
        probabilities = torch.from_numpy(self.run(self.fit(image)[None])["probabilities"])
        return probabilities.clamp(min=_LEAST_PROBABILITY).log()

    def draw(self, image: np.ndarray, result: LabelMap) -> np.ndarray:
        """``uint8[H, W, C]`` -> a drawing, RGB ``uint8[H', W', 3]``."""
        panels = {"prediction": result.label}
        return self.visualize().draw_panels(image, panels, self.classes)


class ExportedDetector(_Exported):
    """A Mask R-CNN or Faster R-CNN in a file."""

    task = "detection"

    def __init__(self, file: ExportedFile):
        super().__init__(file)
        self.mask_threshold = float(file.metadata["mask_threshold"])

    def __call__(self, image: np.ndarray) -> Detections:
        pixels = self.fit(image)
        found = self.run(pixels)
        (height, width), (h, w) = image.shape[:2], pixels.shape[:2]
        scale = np.array([width / w, height / h] * 2, np.float32)
        limits = np.array([width, height] * 2, np.float32)
        boxes = np.clip(found["boxes"] * scale, 0, limits)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        boxes, masks = boxes[kept], None
        if "masks" in found:
            tensors = map(torch.from_numpy, (found["masks"][kept], boxes))
            pairs = zip(*tensors, strict=True)
            masks = tuple(
                paste_rle(mask, box, (height, width), self.mask_threshold) for mask, box in pairs
            )
        return Detections(
            boxes=boxes,
            scores=found["scores"][kept],
            classes=found["classes"][kept],
            masks=masks,
            names=self.names,
            image_size=(height, width),
        )

    def draw(self, image: np.ndarray, result: Detections) -> np.ndarray:
        """RGB ``uint8[H, W, 3]`` -> a drawing, RGB ``uint8[H', W', 3]``."""
        return self.visualize().draw_detections(image, result)
