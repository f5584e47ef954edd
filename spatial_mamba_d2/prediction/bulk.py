"""Predictions of many images, of any size, as files: what ``tools/predict.py`` calls.

First each item, an image or a window of one, gets its part (:mod:`.parts`); then the parts are
merged and written in the order of the images. So a killed run continues where it was, and the
files are the same bytes whatever happened, and whatever number of processes shared the items.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index, index_dtype
from spatial_mamba_d2.data.images import read_size
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.outputs import check_outputs, common_folder, name_outputs, same_folder
from spatial_mamba_d2.models.checkpoints.reading import file_sha256
from spatial_mamba_d2.prediction.blending import Blender
from spatial_mamba_d2.prediction.loading import load_predictor
from spatial_mamba_d2.prediction.merging import merge_detections
from spatial_mamba_d2.prediction.parts import FOLDER, Part, Parts, digest
from spatial_mamba_d2.prediction.predictor import (
    SCORE_THRESH,
    Predictor,
    check_arguments,
    grid_of,
)
from spatial_mamba_d2.prediction.results import LabelMap
from spatial_mamba_d2.prediction.sources import (
    FileRaster,
    Raster,
    find_sources,
    open_raster,
    read_georeference,
)
from spatial_mamba_d2.prediction.windows import Grid
from spatial_mamba_d2.prediction.writers import FORMATS, ImageInfo, Writer, check_formats
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.cli import log_to_stdout

logger = logging.getLogger(__name__)
SUMMARY = "summary.json"
_LOG_PERIOD_S = 10
_BROKEN = (FileNotFoundError, ValueError)  # what reading an image raises about the image


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
        the content of ``summary.json``: what was written, and what was skipped and why.

    Raises:
        FileNotFoundError, ValueError: an input does not exist, an option is out of its range,
            files would be written over, or no image could be read.
        OSError: a file cannot be written; ``resume`` continues.
    """
    return _Run(inputs, output, predictor, options, identity).run()


class _Run:
    def __init__(
        self,
        inputs: Sequence[str | Path],
        output: Path,
        predictor: Predictor,
        options: Options,
        identity: str,
    ):
        check_arguments(predictor.task, options.score_thresh, options.window_px, options.overlap_px)
        self.formats = check_formats(options.formats, predictor.task)
        self.predictor, self.options, self.output = predictor, options, output
        folders = [Path(word) for word in inputs if Path(word).is_dir()]
        for folder in folders:
            if same_folder(folder, output):
                raise ValueError(
                    f"output: must be another folder than the input {folder}, such as "
                    f"{folder / 'predictions'}"
                )
        self.files = find_sources(inputs, leave_out=output)
        root = common_folder(folders if len(inputs) == len(folders) else [*folders, *self.files])
        self.names = name_outputs(self.files, root, Path(), ("",))
        self.writers: list[Writer] = [
            FORMATS[name](output, predictor.names, predictor.model) for name in self.formats
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
        }
        self.digest = digest(self.settings)

    def run(self) -> dict[str, Any]:
        options = self.options
        if (options.resume or options.merge) and (finished := self._finished()):
            logger.info("%s is complete already", self.output)
            Parts(
                self.output, self.settings, self.predictor.names, may_exist=True
            ).remove()  # a kill may have left some
            return finished
        shares = options.shard is not None or options.merge
        planned = [path for writer in self.writers for path in writer.paths(self.files, self.names)]
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
        progress = _Progress(self.files)
        for index, file in enumerate(self.files):
            try:
                size = self._size(file)
            except _BROKEN as error:
                if self._is_mine(index, 0):
                    self.parts.skip(index, 0, str(error))
                progress.skip(str(error))
            else:
                self._predict_image(index, file, size, progress)
            progress.show(index + 1)

    def _size(self, file: Path) -> tuple[int, int]:
        model = self.predictor.model
        if self.options.window_px is None:
            return read_size(file, model.num_channels, model.value_range)
        return open_raster(file, model.num_channels, model.value_range).size

    def _grid(self, size: tuple[int, int]) -> Grid:
        return grid_of(size, self.options.window_px, self.options.overlap_px)

    def _is_mine(self, image: int, window: int) -> bool:
        if self.options.shard is None:
            return True
        number, count = self.options.shard
        return (image + window) % count == number - 1

    def _predict_image(
        self, index: int, file: Path, size: tuple[int, int], progress: _Progress
    ) -> None:
        grid = self._grid(size)
        items = [window for window in range(len(grid)) if self._is_mine(index, window)]
        items = [window for window in items if not self.parts.has_result(index, window)]
        predict = self._item_predictor(file, grid) if items else None
        for count, window in enumerate(items):
            assert predict is not None
            progress.show(index + count / len(items))
            try:
                result = predict(window)
            except _BROKEN as error:
                reason = f"{error}{self._place(grid, window)}"
                self.parts.skip(index, window, reason)
                progress.skip(reason)
            else:
                self.parts.write(index, window, result)

    def _item_predictor(self, file: Path, grid: Grid) -> Callable[[int], Part | None]:
        predictor, model = self.predictor, self.predictor.model
        raster: Raster
        if self.options.window_px is None:
            raster = FileRaster(file, model.num_channels, model.value_range)
        else:
            raster = open_raster(file, model.num_channels, model.value_range)
        thresh = self.options.score_thresh
        if len(grid) == 1 or predictor.task != "segmentation":
            return lambda window: predictor.predict_window(raster, grid, window, thresh)
        blender = Blender(grid, len(predictor.names))
        return lambda window: predictor.predict_labels(raster, blender, window)

    def _place(self, grid: Grid, window: int) -> str:
        if len(grid) == 1:
            return ""
        top, left, bottom, right = grid[window]
        return f" (rows {top} to {bottom}, columns {left} to {right})"

    # -- files ------------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        skipped: list[dict[str, str]] = []
        num_written = 0
        with ExitStack() as files:
            for writer in self.writers:
                writer.open(files)
            for index, file in enumerate(self.files):
                is_written, reasons = self._write_image(index, file)
                num_written += is_written
                skipped += [{"image": file.as_posix(), "reason": r} for r in reasons]
            if not num_written:
                raise ValueError(
                    f"input: none of {len(self.files)} files could be read as an image: "
                    f"{skipped[0]['reason']}"
                )
            for writer in self.writers:
                writer.close()
        summary = {
            "images": num_written,
            "formats": self.formats,
            "skipped": skipped,
            "settings": self.digest,
        }
        with replacing(self.output / SUMMARY) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        for item in skipped:
            logger.info("skipped: %s", item["reason"])
        logger.info("%d of %d images are in %s", num_written, len(self.files), self.output)
        return summary

    def _write_image(self, index: int, file: Path) -> tuple[bool, list[str]]:
        """Whether there is a result, and why some or all of the image was skipped."""
        try:
            size = self._size(file)
            georeference = read_georeference(file)
        except _BROKEN as error:
            return False, [str(error)]
        grid = self._grid(size)
        found = [self.parts.reason(index, window) for window in range(len(grid))]
        reasons = [reason for reason in found if reason is not None]
        if len(reasons) == len(grid):
            return False, reasons[:1]
        image = ImageInfo(
            index + 1, file, self.names[index], size, georeference, is_whole=len(grid) == 1
        )
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
                blender = Blender(grid, len(names))
                for _, rows in blender.strips(read):  # type: ignore[arg-type]
                    for writer in self.writers:
                        writer.add_rows(image, rows)
            return
        results: Iterable[Any] = map(read, range(len(grid)))
        if not image.is_whole:
            results = merge_detections(grid, results, names)
        for result in results:
            for writer in self.writers if result is not None else ():
                writer.add(image, replace(result, source=image.file))

    def _add_label(self, image: ImageInfo, result: Any) -> None:
        if result is None:  # nothing but nodata
            number = len(self.predictor.names)
            label = np.full(image.size, ignore_index(number), index_dtype(number))
            result = LabelMap(label=label, names=self.predictor.names)
        for writer in self.writers:
            writer.add(image, replace(result, source=image.file))
            writer.add_rows(image, result.label)


class _Progress:
    """Messages about how far a run is, every few seconds."""

    def __init__(self, files: Sequence[Path]):
        self.files, self.num_skipped = files, 0
        self.start = self.last = time.monotonic()

    def skip(self, reason: str) -> None:
        self.num_skipped += 1
        logger.warning("skipped: %s", reason)

    def show(self, done: float) -> None:
        """Args: done: images, with a fraction of one that is handled by windows."""
        now = time.monotonic()
        if now - self.last < _LOG_PERIOD_S:
            return
        self.last = now
        left_s = (now - self.start) / max(done, 1e-9) * (len(self.files) - done)
        skipped = f", {self.num_skipped} skipped" if self.num_skipped else ""
        logger.info(
            "%.4g of %d images%s, about %s left",
            done, len(self.files), skipped, timedelta(seconds=round(left_s)),
        )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """``tools/predict.py`` with its arguments."""
    log_to_stdout()
    options = Options(
        formats=[name for word in args.format for name in word.split(",") if name],
        score_thresh=args.score_thresh,
        window_px=args.window,
        overlap_px=args.overlap,
        resume=args.resume,
        overwrite=args.overwrite,
        shard=_shard(args.shard),
        merge=args.merge,
    )
    predictor = load_predictor(
        args.weights, args.config_file or None, args.device, args.task, args.opts
    )
    identity = json.dumps([file_sha256(args.weights), args.config_file, args.opts])
    predict_files(args.input, args.output, predictor, options, identity=identity)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise ValueError(f"shard (--shard) must be I/N, such as 1/3, got {text!r}")
    return int(number), int(count)
