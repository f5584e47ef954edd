"""Predictions of a stream or a camera as files, written as its frames come.

A frame cannot be read again, so there are no parts, nothing to resume and nothing to share: each
frame is predicted and written at once.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.prediction.bulk import SUMMARY, Options, write_summary
from spatial_mamba_d2.prediction.items import frame_path
from spatial_mamba_d2.prediction.predictor import Predictor, grid_of
from spatial_mamba_d2.prediction.progress import StreamProgress
from spatial_mamba_d2.prediction.streams import Stream
from spatial_mamba_d2.prediction.writer import ImageInfo, Writer, add_result
from spatial_mamba_d2.prediction.writers import FORMATS
from spatial_mamba_d2.system import stopping

logger = logging.getLogger(__name__)


def record_stream(
    address: str | Path,
    output: Path,
    predictor: Predictor,
    options: Options,
    *,
    max_frames: int | None = None,
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """Predict the frames of a stream or a camera, and write files.

    It ends with the stream, at one of the bounds, or when SIGINT (Ctrl-C) or SIGTERM asks for it;
    a second signal ends the process at once, without the files that all frames share.

    Args:
        address: see :class:`.streams.Stream`.
        output: the folder of the results: new or empty, unless ``options.overwrite``.
        max_frames: that are predicted.
        max_seconds: of the stream's time, from the first frame on.

    Returns:
        the content of ``summary.json``.

    Raises:
        ValueError: a bound or an option is out of its range, ``output`` is not empty, the stream
            cannot be read, or breaks off: then the results until there are written.
        ImportError: PyAV is not installed.
        OSError: a file cannot be written.
    """
    formats = options.checked_formats(predictor.task)
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames (--max-frames) must be at least 1, got {max_frames}")
    if max_seconds is not None and not 0 < max_seconds < math.inf:
        raise ValueError(f"seconds (--seconds) must be above 0 and finite, got {max_seconds}")
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise ValueError(
            f"output: {output} must be empty for a stream, whose frames are not known before; "
            "choose another folder, or replace files with --overwrite"
        )
    writers: list[Writer] = [
        FORMATS[name](output, predictor.names, predictor.model, True) for name in formats
    ]
    check_outputs([output / SUMMARY], [], overwrite=options.overwrite)
    recording = _Recording(address, predictor, options, max_frames, max_seconds)
    with stopping.noticed("writing the results"), ExitStack() as files:
        results = recording.results()
        first = list(islice(results, 1))
        if not first and recording.error is not None:  # and no file is begun
            raise recording.error
        for writer in writers:
            writer.open(files)
        for image, result in chain(first, results):
            with ExitStack() as files_of_image:
                for writer in writers:
                    writer.start(image, files_of_image)
                add_result(writers, image, result)
                for writer in writers:
                    writer.finish(image)
        for writer in writers:
            writer.close()
    summary = {
        "images": recording.num_written,
        "formats": formats,
        "skipped": [],
        "stream": recording.stream.shown,
        "dropped": recording.stream.num_dropped,
        "ended": recording.reason,
    }
    write_summary(output, summary)
    logger.info(
        "%d frames are in %s, %d were dropped: %s",
        recording.num_written, output, recording.stream.num_dropped, recording.reason,
    )  # fmt: skip
    if recording.error is not None:
        raise ValueError(
            f"{recording.error}; the results of {recording.num_written} frames are in {output}"
        ) from recording.error
    return summary


class _Recording:
    """The frames that are predicted, with the reason why there are no more.

    Attributes:
        num_written: results that were taken.
        reason: why it has ended.
        error: what ended it, if it is one.
    """

    def __init__(
        self,
        address: str | Path,
        predictor: Predictor,
        options: Options,
        max_frames: int | None,
        max_seconds: float | None,
    ):
        self.predictor, self.options = predictor, options
        self.max_frames, self.max_seconds = max_frames, max_seconds
        self.stream = Stream(address, should_stop=lambda: bool(stopping.requested()))
        self.num_written = 0
        self.reason = "the stream ended"
        self.error: ValueError | None = None
        self._waiting: deque[tuple[int, np.ndarray, float]] = deque()  # of the current batch

    def results(self) -> Iterator[tuple[ImageInfo, Any]]:
        options, progress = self.options, StreamProgress()
        results = self.predictor(
            self._frames(),
            score_thresh=options.score_thresh,
            window_px=options.window_px,
            overlap_px=options.overlap_px,
            batch_size=options.batch_size,
        )
        for result in results:
            number, pixels, time_s = self._waiting.popleft()
            path, size = frame_path(Path(self.stream.name), number), pixels.shape[:2]
            is_whole = len(grid_of(size, options.window_px, options.overlap_px)) == 1
            self.num_written += 1
            yield (
                ImageInfo(
                    self.num_written,
                    path,
                    path,
                    size,
                    None,
                    is_whole,
                    time_s,
                    partial(np.asarray, pixels),
                ),
                result,
            )
            progress.show(self.num_written, self.stream.num_dropped)

    def _frames(self) -> Iterator[np.ndarray]:
        try:
            for count, (number, pixels, time_s) in enumerate(self.stream):
                if self.max_seconds is not None and time_s >= self.max_seconds:
                    self.reason = f"{self.max_seconds:g} seconds are over"
                    return
                self._waiting.append((number, pixels, time_s))
                yield pixels
                if count + 1 == self.max_frames:
                    self.reason = f"it has {self.max_frames} frames"
                    return
        except ValueError as error:
            self.error, self.reason = error, str(error)
        if stopping.requested():
            self.reason = "it was asked to stop"
