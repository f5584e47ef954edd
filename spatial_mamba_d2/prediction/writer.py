"""What the writers of all formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.prediction.masks import crop_of_rle, polygons_of
from spatial_mamba_d2.prediction.predictor import ImagePredictor
from spatial_mamba_d2.prediction.results import (
    COLUMNS,
    ClassScores,
    Detections,
    LabelMap,
    count_rows,
)
from spatial_mamba_d2.prediction.sources import Georeference
from spatial_mamba_d2.system.atomic import replacing


@dataclass(frozen=True)
class ImageInfo:
    """An image of which results are written.

    Attributes:
        number: from 1 on, its id in COCO files.
        file: its path; of a frame of a video, ``VIDEO/000123``.
        name: of its results, a relative path without suffix.
        size: height and width.
        georeference: where it lies, if that is known.
        is_whole: whether it was predicted at once, and not by windows.
        time_s: of a frame of a video, from the first one.
        pixels: reads the image, ``uint8[H, W, C]``; None: it is read from its file.
    """

    number: int
    file: Path
    name: Path
    size: tuple[int, int]
    georeference: Georeference | None
    is_whole: bool
    time_s: float | None = None
    pixels: Callable[[], np.ndarray] | None = None


class Writer:
    """A format. The methods are called in the order in which they are listed here.

    Args:
        output: the folder of the results.
        names: of the classes.
        model: what predicted, for drawings.
        has_times: whether frames of videos are among the images.
    """

    tasks: tuple[str, ...] = ("detection",)
    has_coordinates = False  # of the raster, if it has some

    def __init__(
        self, output: Path, names: tuple[str, ...], model: ImagePredictor, has_times: bool = False
    ):
        self.output, self.names, self.model = output, names, model
        self.has_times = has_times

    def paths(self, files: Sequence[Path], names: Sequence[Path]) -> list[Path]:
        """The files that will be written, for images and the names of their results."""
        return [self.path_of(file, name) for file, name in zip(files, names, strict=True)]

    def path_of(self, file: Path, name: Path) -> Path:
        """The file of one image."""
        raise NotImplementedError

    def open(self, files: ExitStack) -> None:
        """Begin what all images have in common; ``files`` completes or drops it."""

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        """Begin an image; ``files`` completes or drops what belongs to it alone."""

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        """Some of the image's objects, or its class scores, or its label map."""

    def add_rows(self, image: ImageInfo, rows: np.ndarray) -> None:
        """The next rows of the image's label map, ``[h, W]``."""

    def finish(self, image: ImageInfo) -> None:
        """End the image."""

    def close(self) -> None:
        """End what all images have in common."""

    def _begin(self, path: Path, files: ExitStack, **options: Any) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.enter_context(replacing(path))
        return files.enter_context(temporary.open("w", encoding="utf-8", **options))


class OneFile(Writer):
    """A format that has one file for all images."""

    file_name = ""

    def paths(self, files: Sequence[Path], names: Sequence[Path]) -> list[Path]:
        return [self.output / self.file_name]


class TableWriter(OneFile):
    """A table with a row for each object, class of a label map, or most probable class.

    It has the columns of :data:`.results.COLUMNS`, and ``time_s`` if frames of videos are among the
    images.
    """

    tasks = ("detection", "segmentation", "classification")

    @property
    def columns(self) -> dict[str, type]:
        columns = dict(COLUMNS[self.model.task])
        return {**columns, "time_s": float} if self.has_times else columns

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, which have a value for each column."""
        raise NotImplementedError

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        self.counts = np.zeros(ignore_index(len(self.names)) + 1, np.int64)

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        if not isinstance(result, LabelMap):
            self.write(self._with_time(image, self.rows(image, result)))

    def rows(self, image: ImageInfo, result: Detections | ClassScores) -> Iterable[dict[str, Any]]:
        """The rows of a result, without the time."""
        return result.rows()

    def add_rows(self, image: ImageInfo, rows: np.ndarray) -> None:
        self.counts += np.bincount(rows.ravel(), minlength=len(self.counts))

    def finish(self, image: ImageInfo) -> None:
        rows = count_rows(self.counts, self.names, image.file)
        self.write(self._with_time(image, rows))

    def _with_time(
        self, image: ImageInfo, rows: Iterable[dict[str, Any]]
    ) -> Iterable[dict[str, Any]]:
        return ({**row, "time_s": image.time_s} for row in rows) if self.has_times else rows


def outlines(result: Detections, index: int) -> list[list[np.ndarray]]:
    """Rings of an object's mask, see :func:`.masks.polygons_of`, or of its box."""
    if result.masks is not None:
        return polygons_of(crop_of_rle(result.masks[index]))
    x1, y1, x2, y2 = result.boxes[index].tolist()
    return [[np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)])]]


def add_result(
    writers: Iterable[Writer], image: ImageInfo, result: Detections | LabelMap | ClassScores
) -> None:
    """A result of an image, or some of its objects, with what it says about the image."""
    result = replace(result, source=image.file, time_s=image.time_s)
    for writer in writers:
        writer.add(image, result)
        if isinstance(result, LabelMap):
            writer.add_rows(image, result.label)
