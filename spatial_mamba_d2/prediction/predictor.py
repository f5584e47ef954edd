"""One callable for all tasks: an image, or many, in and results out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.prediction.archives import find_members, is_archive
from spatial_mamba_d2.prediction.blending import Blender, WindowLabels
from spatial_mamba_d2.prediction.items import frame_path
from spatial_mamba_d2.prediction.merging import merge_detections
from spatial_mamba_d2.prediction.results import (
    LabelMap,
    Result,
    join_detections,
)
from spatial_mamba_d2.prediction.sources import (
    LIST_SUFFIXES,
    ArrayRaster,
    Raster,
    find_sources,
    open_raster,
)
from spatial_mamba_d2.prediction.streams import Stream, is_stream
from spatial_mamba_d2.prediction.videos import Video, is_video
from spatial_mamba_d2.prediction.windows import Grid, check_window

SCORE_THRESH = 0.5
# One image, uint8[H, W, C] or a file; or several, or a folder, a pattern or a list of them.
Source: TypeAlias = np.ndarray | str | Path | Iterable[Any]
_Opened: TypeAlias = tuple[Raster, Path | None, float | None]  # with its path, and time in a video


class ImagePredictor(Protocol):
    """What a task provides: a model for images.

    Attributes:
        task: ``detection``, ``segmentation`` or ``classification``.
        names: of the classes.
        num_channels: of the images.
        value_range: of images with more than 8 bits, see
            :func:`~spatial_mamba_d2.data.images.read_image`.

    It may have ``band_names``, of the bands that it takes from rasters with several. In
    segmentation it is a :class:`SemanticPredictor`.
    """

    task: str
    names: tuple[str, ...]
    num_channels: int
    value_range: PixelRange | None

    def __call__(self, image: np.ndarray) -> Any:
        """``uint8[H, W, C]`` -> the result of the task."""

    def batch(self, images: Sequence[np.ndarray]) -> list[Any]:
        """``uint8[H, W, C]`` of one size, predicted together -> the result of each."""

    def draw(self, image: np.ndarray, result: Any) -> np.ndarray:
        """``uint8[H, W, C]`` and a result -> a drawing, RGB ``uint8[H', W', 3]``."""


class SemanticPredictor(ImagePredictor, Protocol):
    """What segmentation provides."""

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each class and pixel, ``float32[K, H, W]`` of each image, all of one size."""


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
        batch_size: int = 1,
    ) -> Any:
        """The result of one image, or an iterator over those of several.

        Args:
            source: one image: an array ``uint8[H, W, C]``, usually RGB, or the path of a file.
                Several: a video, a tar file with images, a stream (``rtsp://...``), a camera
                (``/dev/video0``), a folder, a pattern, a list in a ``.txt`` file, or an iterable of
                images, which are read when their turn comes.
            score_thresh: the lowest score of detections.
            window_px: predict larger images by square windows with this side, and merge: see
                :mod:`.merging` and :mod:`.blending`. None: each image at once, as in evaluation.
            overlap_px: what neighbouring windows share; see :class:`.windows.Grid`.
            batch_size: number of images, or windows, that are predicted together if they follow
                each other and are of one size.

        Returns:
            :class:`.Detections`, :class:`.LabelMap` or :class:`.ClassScores`, or an iterator.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an image cannot be read, or an argument is out of its range.
        """
        check_arguments(self.task, score_thresh, window_px, overlap_px, batch_size)
        if isinstance(source, np.ndarray) or _is_image_file(source):
            images = iter([self._open(source, window_px)])
        else:
            if isinstance(source, (str, os.PathLike)) and not is_stream(source):
                source = find_sources([source])
            images = self._several(source, window_px)
        results = self._predict(images, score_thresh, window_px, overlap_px, batch_size)
        if isinstance(source, np.ndarray) or _is_image_file(source):
            return next(results)
        return results

    def _several(self, source: Source, window_px: int | None) -> Iterator[_Opened]:
        if isinstance(source, (str, os.PathLike)):
            stream = Stream(source)
            for number, pixels, time in stream:
                yield self._array(pixels), frame_path(Path(stream.name), number), time
            return
        for image in source:
            if not isinstance(image, np.ndarray) and is_video(Path(image)):
                video = Video(Path(image))
                for number, time in enumerate(video.times_s.tolist()):
                    frame = self._array(video.read(number))
                    yield frame, frame_path(video.path, number), time
            elif not isinstance(image, np.ndarray) and is_archive(Path(image)):
                for member in find_members(Path(image)):
                    pixels = read_image(member, self.model.num_channels, self.model.value_range)
                    yield ArrayRaster(pixels), Path(str(member)), None
            else:
                yield self._open(image, window_px)

    def _open(self, image: Any, window_px: int | None) -> _Opened:
        if isinstance(image, np.ndarray):
            return self._array(image), None, None
        path, model = Path(image), self.model
        raster: Raster
        if window_px is None:
            raster = ArrayRaster(read_image(path, model.num_channels, model.value_range))
        else:
            names = getattr(model, "band_names", ())
            raster = open_raster(path, model.num_channels, model.value_range, names)
        return raster, path, None

    def _array(self, image: np.ndarray) -> ArrayRaster:
        raster = ArrayRaster(image)
        if image.shape[2] != self.model.num_channels:
            raise ValueError(
                f"image must have {self.model.num_channels} channels, got {image.shape[2]}"
            )
        return raster

    def _predict(
        self,
        images: Iterator[_Opened],
        score_thresh: float,
        window_px: int | None,
        overlap_px: int | None,
        batch_size: int,
    ) -> Iterator[Any]:
        """Results in the order of the images, of which those without windows share batches."""
        waiting: list[tuple[np.ndarray, Path | None, float | None]] = []

        def flush() -> Iterator[Any]:
            if waiting:
                pixels = [image for image, _, _ in waiting]
                places = [(path, time) for _, path, time in waiting]
                waiting.clear()
                for result, (path, time) in zip(
                    self.predict_images(pixels, score_thresh), places, strict=True
                ):
                    yield replace(result, source=path, time_s=time)

        for raster, path, time in images:
            grid = grid_of(raster.size, window_px, overlap_px)
            if len(grid) > 1:
                yield from flush()
                result = self._predict_windows(raster, grid, score_thresh, batch_size)
                yield replace(result, source=path, time_s=time)
                continue
            image = raster.read(grid[0])
            if image is None:  # nothing but nodata
                image = np.zeros((*raster.size, self.model.num_channels), np.uint8)
            if waiting and waiting[0][0].shape != image.shape:
                yield from flush()
            waiting.append((image, path, time))
            if len(waiting) == batch_size:
                yield from flush()
        yield from flush()

    def _predict_windows(
        self, raster: Raster, grid: Grid, score_thresh: float, batch_size: int
    ) -> Result:
        blender = Blender(grid, len(self.names)) if self.task == "segmentation" else None

        def predicted(indices: Iterable[int]) -> Iterator[Any]:
            for batch in _batches(indices, grid, batch_size):
                results = self.predict_windows([raster.read(grid[index]) for index in batch])
                for index, result in zip(batch, results, strict=True):
                    if blender is not None and result is not None:
                        result = blender.pack(index, result)
                    yield result

        if blender is None:
            merged = merge_detections(grid, predicted(range(len(grid))), self.names, score_thresh)
            return join_detections(merged, self.names, grid.size)
        kept: dict[int, WindowLabels | None] = {}

        def load(index: int) -> WindowLabels | None:
            for earlier in [i for i in kept if grid.row_of(i) < grid.row_of(index) - 2]:
                del kept[earlier]  # at most three rows of windows overlap
            if index not in kept:
                row = grid.indices_of_row(grid.row_of(index))
                kept.update(zip(row, predicted(row), strict=True))
            return kept[index]

        label = np.concatenate([strip for _, strip in blender.strips(load)])
        return LabelMap(label=label, names=self.names)

    def predict_image(self, image: np.ndarray, score_thresh: float = SCORE_THRESH) -> Result:
        """``uint8[H, W, C]`` -> the result of the task."""
        return self.predict_images([image], score_thresh)[0]

    def predict_images(
        self, images: Sequence[np.ndarray], score_thresh: float = SCORE_THRESH
    ) -> list[Result]:
        """``uint8[H, W, C]`` of one size, in one batch -> the result of each."""
        results = self.model.batch(images)
        if self.task == "detection":
            results = [result.select(result.scores >= score_thresh) for result in results]
        return results

    def predict_windows(self, images: Sequence[np.ndarray | None]) -> list[Any]:
        """Windows of one size, ``uint8[h, w, C]``, in one batch -> what is merged.

        Returns:
            of each: :class:`.Detections` in its frame, of all scores; in segmentation
            probabilities, ``float32[K, h, w]``; or None for None, which stands for nodata.
        """
        found = [image for image in images if image is not None]
        predict: Callable[[Sequence[np.ndarray]], list[Any]] = self.model.batch
        if self.task == "segmentation":
            predict = cast(SemanticPredictor, self.model).probabilities
        results = iter(predict(found) if found else ())
        return [None if image is None else next(results) for image in images]


def _is_image_file(source: Source) -> bool:
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = Path(source)
    holds_several = path.suffix.lower() in LIST_SUFFIXES or is_video(path) or is_archive(path)
    return path.is_file() and not holds_several


def _batches(indices: Iterable[int], grid: Grid, batch_size: int) -> Iterator[list[int]]:
    """Windows that follow each other and are of one size."""
    batch: list[int] = []
    for index in indices:
        if len(batch) == batch_size or (batch and grid[batch[0]].size != grid[index].size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def check_arguments(
    task: str,
    score_thresh: float,
    window_px: int | None,
    overlap_px: int | None,
    batch_size: int = 1,
) -> None:
    """Raises ValueError if an argument of :meth:`Predictor.__call__` is out of its range."""
    if batch_size < 1:
        raise ValueError(f"batch_size (--batch-size) must be at least 1, got {batch_size}")
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
