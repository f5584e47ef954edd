"""One callable for all tasks: an image, or many, in and results out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.prediction.blending import Blender, WindowLabels
from spatial_mamba_d2.prediction.merging import merge_detections
from spatial_mamba_d2.prediction.results import (
    Detections,
    LabelMap,
    Result,
    join_detections,
)
from spatial_mamba_d2.prediction.sources import ArrayRaster, Raster, find_sources, open_raster
from spatial_mamba_d2.prediction.windows import Grid, check_window

SCORE_THRESH = 0.5
# One image, uint8[H, W, C] or a file; or several, or a folder, a pattern or a list of them.
Source: TypeAlias = np.ndarray | str | Path | Iterable[Any]


class ImagePredictor(Protocol):
    """What a task provides: a model for images one at a time.

    Attributes:
        task: ``detection``, ``segmentation`` or ``classification``.
        names: of the classes.
        num_channels: of the images.
        value_range: of images with more than 8 bits, see
            :func:`~spatial_mamba_d2.data.images.read_image`.
    """

    task: str
    names: tuple[str, ...]
    num_channels: int
    value_range: PixelRange | None

    def __call__(self, image: np.ndarray) -> Any:
        """``uint8[H, W, C]`` -> the result of the task."""

    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        """``uint8[H, W, C]`` and a result -> a drawing, RGB ``uint8[H', W', 3]``."""


class Predictor:
    """Predicts for one image at once, and for several one after the other.

    >>> predict = load_predictor("model_final.pth")
    >>> predict("photo.jpg").to_coco()
    >>> for result in predict("photos/**/*.jpg"): print(result.source, len(result))

    Attributes:
        model: the :class:`ImagePredictor` of the task.
    """

    def __init__(self, model: ImagePredictor):
        self.model = model

    @property
    def task(self) -> str:
        return self.model.task

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self.model.names

    def __call__(
        self,
        source: Source,
        *,
        score_thresh: float = SCORE_THRESH,
        window_px: int | None = None,
        overlap_px: int | None = None,
    ) -> Any:
        """The result of one image, or an iterator over those of several.

        Args:
            source: one image: an array ``uint8[H, W, C]``, usually RGB, or the path of a file.
                Several: a folder, a pattern, a list in a ``.txt`` file, or an iterable of images,
                which are read when their turn comes.
            score_thresh: the lowest score of detections.
            window_px: predict larger images by square windows with this side, and merge: see
                :mod:`.merging` and :mod:`.blending`. None: each image at once, as in evaluation.
            overlap_px: what neighbouring windows share; see :class:`.windows.Grid`.

        Returns:
            :class:`.Detections`, :class:`.LabelMap` or :class:`.ClassScores`, or an iterator.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an image cannot be read, or an argument is out of its range.
        """
        check_arguments(self.task, score_thresh, window_px, overlap_px)
        options = score_thresh, window_px, overlap_px
        if isinstance(source, np.ndarray):
            return self._predict_raster(self._array(source), *options)
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            if path.is_file() and path.suffix.lower() not in (".txt", ".lst"):
                return self._predict_file(path, *options)
            source = find_sources([path])
        return (
            self._predict_raster(self._array(image), *options)
            if isinstance(image, np.ndarray)
            else self._predict_file(Path(image), *options)
            for image in source
        )

    def _array(self, image: np.ndarray) -> ArrayRaster:
        raster = ArrayRaster(image)
        if image.shape[2] != self.model.num_channels:
            raise ValueError(
                f"image must have {self.model.num_channels} channels, got {image.shape[2]}"
            )
        return raster

    def _predict_file(
        self, path: Path, thresh: float, window: int | None, overlap: int | None
    ) -> Any:
        raster: Raster
        if window is None:
            raster = ArrayRaster(read_image(path, self.model.num_channels, self.model.value_range))
        else:
            raster = open_raster(path, self.model.num_channels, self.model.value_range)
        return replace(self._predict_raster(raster, thresh, window, overlap), source=path)

    def _predict_raster(
        self, raster: Raster, thresh: float, window_px: int | None, overlap_px: int | None
    ) -> Any:
        grid = grid_of(raster.size, window_px, overlap_px)
        if len(grid) == 1:
            image = raster.read(grid[0])
            return self.predict_image(np.zeros((*raster.size, self.model.num_channels), np.uint8)
                                      if image is None else image, thresh)  # fmt: skip
        if self.task == "segmentation":
            return self._blend(raster, grid)
        windows = (self.predict_window(raster, grid, i, thresh) for i in range(len(grid)))
        merged = merge_detections(grid, windows, self.names)
        return join_detections(merged, self.names, grid.size)

    def predict_image(self, image: np.ndarray, score_thresh: float = SCORE_THRESH) -> Result:
        """``uint8[H, W, C]`` -> the result of the task."""
        result = self.model(image)
        if isinstance(result, Detections):
            result = result.select(result.scores >= score_thresh)
        return result

    def predict_window(
        self, raster: Raster, grid: Grid, index: int, score_thresh: float
    ) -> Detections | None:
        """The objects in a window, in its frame; None if it holds nothing but nodata."""
        image = raster.read(grid[index])
        return None if image is None else self.predict_image(image, score_thresh)  # type: ignore[return-value]

    def predict_labels(self, raster: Raster, blender: Blender, index: int) -> WindowLabels | None:
        """What :class:`.Blender` keeps of a window; None if it holds nothing but nodata."""
        image = raster.read(blender.grid[index])
        if image is None:
            return None
        return blender.pack(index, self.model.probabilities(image))  # type: ignore[attr-defined]

    def _blend(self, raster: Raster, grid: Grid) -> LabelMap:
        blender = Blender(grid, len(self.names))
        kept: dict[int, WindowLabels | None] = {}

        def load(index: int) -> WindowLabels | None:
            for earlier in [i for i in kept if grid.row_of(i) < grid.row_of(index) - 2]:
                del kept[earlier]  # at most three rows of windows overlap
            if index not in kept:
                kept[index] = self.predict_labels(raster, blender, index)
            return kept[index]

        label = np.concatenate([strip for _, strip in blender.strips(load)])
        return LabelMap(label=label, names=self.names)


def check_arguments(
    task: str, score_thresh: float, window_px: int | None, overlap_px: int | None
) -> None:
    """Raises ValueError if an argument of :meth:`Predictor.__call__` is out of its range."""
    if not 0 <= score_thresh <= 1:
        raise ValueError(f"score_thresh must be in [0, 1], got {score_thresh}")
    if window_px is None:
        if overlap_px is not None:
            raise ValueError(f"overlap_px needs window_px (--window), got {overlap_px} alone")
        return
    if task == "classification":
        raise ValueError(f"window_px (--window) has no meaning in classification, got {window_px}")
    check_window(window_px, overlap_px)


def grid_of(size: tuple[int, int], window_px: int | None, overlap_px: int | None) -> Grid:
    """The windows of an image; without ``window_px``, one."""
    if window_px is None:
        return Grid(size, max(*size, 4), 1)
    return Grid(size, window_px, overlap_px)
