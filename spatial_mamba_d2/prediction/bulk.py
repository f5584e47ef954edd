"""Predictions of many images, of any size, as files.

First each item, an image or a window of one, gets its part (:mod:`.parts`); then the parts are
merged and written in the order of the images. So a killed run continues where it was, and the
files are the same bytes whatever happened, and whatever number of processes shared the items.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index, index_dtype
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.outputs import check_outputs, common_folder, name_outputs, same_folder
from spatial_mamba_d2.prediction.blending import Blender
from spatial_mamba_d2.prediction.items import BROKEN, Items
from spatial_mamba_d2.prediction.merging import merge_detections
from spatial_mamba_d2.prediction.parts import FOLDER, Part, Parts, digest
from spatial_mamba_d2.prediction.predictor import (
    SCORE_THRESH,
    Predictor,
    check_arguments,
    grid_of,
)
from spatial_mamba_d2.prediction.progress import Progress
from spatial_mamba_d2.prediction.results import LabelMap
from spatial_mamba_d2.prediction.sources import find_sources, is_raster, read_georeference
from spatial_mamba_d2.prediction.windows import Grid
from spatial_mamba_d2.prediction.writer import ImageInfo, Writer, add_result
from spatial_mamba_d2.prediction.writers import FORMATS, check_formats
from spatial_mamba_d2.system.atomic import replacing

logger = logging.getLogger(__name__)
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Options:
    """How to predict many images; what they mean for one is at :meth:`.Predictor.__call__`.

    Attributes:
        formats: keys of :data:`.writers.FORMATS`.
        resume: continue an unfinished run.
        overwrite: replace files of earlier results, but never an input.
        shard: (i, n): handle the i-th of n parts of the items, from 1 on, and write nothing else.
        merge: write the results of items that shards have handled.
    """

    formats: Sequence[str] = ("coco",)
    score_thresh: float = SCORE_THRESH
    window_px: int | None = None
    overlap_px: int | None = None
    batch_size: int = 1
    resume: bool = False
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        check_formats(self.formats)
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            number, count = self.shard
            raise ValueError(f"shard must be I/N with 1 <= I <= N, got {number}/{count}")
        if self.shard is not None and self.merge:
            raise ValueError("merge (--merge) comes after all shards, without --shard")

    def checked_formats(self, task: str) -> list[str]:
        """The formats, each once.

        Raises:
            ValueError: one of them, or another option of a prediction, does not fit the task.
        """
        check_arguments(task, self.score_thresh, self.window_px, self.overlap_px, self.batch_size)
        return check_formats(self.formats, task)


def predict_files(
    inputs: Sequence[str | Path],
    output: Path,
    predictor: Predictor,
    options: Options,
    *,
    identity: str = "",
) -> dict[str, Any]:
    """Predict for images and write files.

    Args:
        inputs: see :func:`.sources.find_sources`.
        output: the folder of the results.
        identity: of the model, such as a hash of its file: results of another one are not mixed.

    Returns:
        the content of ``summary.json``: what was written, what was skipped and why, and which
        rasters have no coordinates, though a format has them.

    Raises:
        FileNotFoundError, ValueError: an input does not exist, an option is out of its range,
            files would be written over, or no image could be read.
        OSError: a file cannot be written; ``resume`` continues.
    """
    return _Run(inputs, output, predictor, options, identity).run()


def write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    """``summary.json``, whose presence says that a run has ended."""
    with replacing(output / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


class _Run:
    def __init__(
        self,
        inputs: Sequence[str | Path],
        output: Path,
        predictor: Predictor,
        options: Options,
        identity: str,
    ):
        self.formats = options.checked_formats(predictor.task)
        self.predictor, self.options, self.output = predictor, options, output
        folders = [Path(word) for word in inputs if Path(word).is_dir()]
        for folder in folders:
            if same_folder(folder, output):
                raise ValueError(
                    f"output: must be another folder than the input {folder}, such as "
                    f"{folder / 'predictions'}"
                )
        self.files = find_sources(inputs, leave_out=output)
        model = predictor.model
        self.items = Items(
            self.files,
            model.num_channels,
            model.value_range,
            by_windows=options.window_px is not None,
            band_names=getattr(model, "band_names", ()),
        )
        root = common_folder(folders if len(inputs) == len(folders) else [*folders, *self.files])
        self.names = name_outputs([item.path for item in self.items], root, Path(), ("",))
        self.writers: list[Writer] = [
            FORMATS[name](output, predictor.names, model, self.items.has_times)
            for name in self.formats
        ]
        status = [file.stat() for file in self.files]
        self.settings = {
            "weights": identity,
            "images": digest(
                {
                    str(i): [file.as_posix(), s.st_size, s.st_mtime_ns]
                    for i, (file, s) in enumerate(zip(self.files, status, strict=True))
                }
            ),  # fmt: skip
            "task": predictor.task,
            "classes": list(predictor.names),
            "formats": self.formats,
            "score_thresh": options.score_thresh,
            "window_px": options.window_px,
            "overlap_px": options.overlap_px,
            "batch_size": options.batch_size,
        }
        self.digest = digest(self.settings)
        self._last_blender: Blender | None = None

    def run(self) -> dict[str, Any]:
        options = self.options
        if (options.resume or options.merge) and (finished := self._finished()):
            logger.info("%s is complete already", self.output)
            Parts(
                self.output, self.settings, self.predictor.names, may_exist=True
            ).remove()  # a kill may have left some
            return finished
        shares = options.shard is not None or options.merge
        paths = [item.path for item in self.items]
        planned = [path for writer in self.writers for path in writer.paths(paths, self.names)]
        is_unfinished = (self.output / FOLDER).exists() and (options.resume or shares)
        check_outputs(
            [*planned, self.output / SUMMARY],
            self.files,
            overwrite=options.overwrite or is_unfinished,
        )
        self.parts = Parts(
            self.output, self.settings, self.predictor.names, may_exist=options.resume or shares
        )
        if not options.merge:
            self._predict()
        if options.shard is not None:
            number, count = options.shard
            logger.info("shard %d of %d is done; after all of them, --merge", number, count)
            return {}
        summary = self._write()
        self.parts.remove()
        return summary

    def _finished(self) -> dict[str, Any] | None:
        """The summary of a run with the same settings that has ended."""
        try:
            content = read_json(self.output / SUMMARY)
        except (OSError, ValueError):
            return None
        is_same = isinstance(content, dict) and content.get("settings") == self.digest
        return content if is_same else None

    # -- parts ------------------------------------------------------------------------------

    def _predict(self) -> None:
        progress = Progress(len(self.items))
        for number, batch in enumerate(self._batches()):
            if self._is_mine(number):
                self._predict_batch(batch, progress)
                index, window = batch[-1]
                progress.show(index + (window + 1) / len(self._grid(index) or [None]))

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Images, or windows of them, that follow each other and have one size.

        They are the same in each run and shard, because bits of results depend on them. An image
        that cannot be read is a batch of its own.
        """
        batch: list[tuple[int, int]] = []
        kind: Any = None  # of the items in the batch
        for index in range(len(self.items)):
            grid = self._grid(index)
            for window in range(len(grid) if grid else 1):
                new_kind = (grid[window].size, len(grid) == 1) if grid else None
                is_full = len(batch) == self.options.batch_size
                if batch and (is_full or kind is None or kind != new_kind):
                    yield batch
                    batch = []
                kind = new_kind
                batch.append((index, window))
        if batch:
            yield batch

    def _grid(self, index: int) -> Grid | None:
        """The windows of an image; None if it cannot be read."""
        try:
            size = self.items.size(index)
        except BROKEN:
            return None
        return grid_of(size, self.options.window_px, self.options.overlap_px)

    def _is_mine(self, batch: int) -> bool:
        if self.options.shard is None:
            return True
        number, count = self.options.shard
        return batch % count == number - 1

    def _predict_batch(self, batch: list[tuple[int, int]], progress: Progress) -> None:
        if all(self.parts.has_result(*item) for item in batch):
            return
        images: dict[tuple[int, int], np.ndarray | None] = {}
        for index, window in batch:
            try:
                raster, grid = self.items.raster(index), self._grid(index)
                if grid is None:
                    self.items.size(index)  # says why
                    continue
                images[index, window] = raster.read(grid[window])
            except BROKEN as error:
                self._skip(index, window, error, progress)
        self._predict_images(images, progress)

    def _predict_images(
        self, images: Mapping[tuple[int, int], np.ndarray | None], progress: Progress
    ) -> None:
        try:
            results = self._results(images)
        except BROKEN as error:  # what the model says about an image
            if len(images) == 1:
                self._skip(*next(iter(images)), error, progress)
            else:
                for item, image in images.items():
                    self._predict_images({item: image}, progress)
            return
        for (index, window), result in zip(images, results, strict=True):
            self.parts.write(index, window, result)

    def _results(self, images: Mapping[tuple[int, int], np.ndarray | None]) -> list[Part | None]:
        """Of the items of a batch, which are either complete images or windows."""
        pixels = list(images.values())
        grids = [self._grid(index) for index, _ in images]
        if all(grid is not None and len(grid) == 1 for grid in grids):
            found = [image for image in pixels if image is not None]
            thresh = self.options.score_thresh
            results = iter(self.predictor.predict_images(found, thresh) if found else ())
            return [None if image is None else next(results) for image in pixels]
        windows = self.predictor.predict_windows(pixels)
        if self.predictor.task != "segmentation":
            return windows
        return [
            None if result is None or grid is None
            else self._blender(grid).pack(window, result)
            for (_, window), grid, result in zip(images, grids, windows, strict=True)
        ]  # fmt: skip

    def _blender(self, grid: Grid) -> Blender:
        """Of the windows of an image; the last one stays, because it takes time to make."""
        if self._last_blender is None or self._last_blender.grid.size != grid.size:
            self._last_blender = Blender(grid, len(self.predictor.names))
        return self._last_blender

    def _skip(self, index: int, window: int, error: Exception, progress: Progress) -> None:
        grid = self._grid(index)
        place = ""
        if grid is not None and len(grid) > 1:
            top, left, bottom, right = grid[window]
            place = f" (rows {top} to {bottom}, columns {left} to {right})"
        self.parts.skip(index, window, f"{error}{place}")
        progress.skip(f"{error}{place}")

    # -- files ------------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        skipped: list[dict[str, str]] = []
        self.in_pixels: list[str] = []  # rasters without a coordinate reference system
        num_written = 0
        with ExitStack() as files:
            for writer in self.writers:
                writer.open(files)
            for index in range(len(self.items)):
                is_written, reasons = self._write_image(index)
                num_written += is_written
                path = self.items[index].path.as_posix()
                skipped += [{"image": path, "reason": reason} for reason in reasons]
            if not num_written:
                raise ValueError(
                    f"input: none of {len(self.items)} files could be read as an image: "
                    f"{skipped[0]['reason']}"
                )
            for writer in self.writers:
                writer.close()
        summary = {
            "images": num_written,
            "formats": self.formats,
            "skipped": skipped,
            "in_pixels": self.in_pixels,
            "settings": self.digest,
        }
        write_summary(self.output, summary)
        for item in skipped:
            logger.info("skipped: %s", item["reason"])
        if self.in_pixels:
            logger.warning(
                "%d rasters have no coordinate reference system, such as %s: their results are in "
                "pixels", len(self.in_pixels), self.in_pixels[0],
            )  # fmt: skip
        logger.info("%d of %d images are in %s", num_written, len(self.items), self.output)
        return summary

    def _write_image(self, index: int) -> tuple[bool, list[str]]:
        """Whether there is a result, and why some or all of the image was skipped."""
        item = self.items[index]
        try:
            size = self.items.size(index)
            georeference = None if item.frame is not None else read_georeference(item.file)
        except BROKEN as error:
            return False, [str(error)]
        grid = grid_of(size, self.options.window_px, self.options.overlap_px)
        found = [self.parts.reason(index, window) for window in range(len(grid))]
        reasons = [reason for reason in found if reason is not None]
        if len(reasons) == len(grid):
            return False, reasons[:1]
        image = ImageInfo(
            index + 1,
            item.path,
            self.names[index],
            size,
            georeference,
            is_whole=len(grid) == 1,
            time_s=item.time_s,
            pixels=partial(self.items.pixels, index),
        )
        has_coordinates = any(writer.has_coordinates for writer in self.writers)
        if has_coordinates and georeference is None and is_raster(item.path):
            self.in_pixels.append(item.path.as_posix())
        with ExitStack() as files:
            for writer in self.writers:
                writer.start(image, files)
            self._add(image, grid)
            for writer in self.writers:
                writer.finish(image)
        return True, reasons

    def _add(self, image: ImageInfo, grid: Grid) -> None:
        read = partial(self.parts.read, image.number - 1)
        names = self.predictor.names
        if self.predictor.task == "segmentation":
            if image.is_whole:
                self._add_label(image, read(0))
            else:
                blender = self._blender(grid)
                for _, rows in blender.strips(read):  # type: ignore[arg-type]
                    for writer in self.writers:
                        writer.add_rows(image, rows)
            return
        results: Iterable[Any] = map(read, range(len(grid)))
        if not image.is_whole:
            results = merge_detections(grid, results, names, self.options.score_thresh)
        for result in results:
            if result is not None:
                add_result(self.writers, image, result)

    def _add_label(self, image: ImageInfo, result: Any) -> None:
        if result is None:  # nothing but nodata
            number = len(self.predictor.names)
            label = np.full(image.size, ignore_index(number), index_dtype(number))
            result = LabelMap(label=label, names=self.predictor.names)
        add_result(self.writers, image, result)
