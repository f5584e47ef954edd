"""Frames of video files, decoded by PyAV (the extra ``video``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.images import naming_file

VIDEO_SUFFIXES = {
    ".avi", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv",
}  # fmt: skip


def is_video(path: Path) -> bool:
    """Whether it is a video file by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


class Video:
    """A file whose frames are read by number, from 0 in the order of display.

    Frames are counted by the packets of the file, without decoding them, unless these have no time
    stamps. A frame that cannot be decoded keeps its number.

    Attributes:
        size: height and width of the first frame, upright.
        times_s: of the frames, from the first one, ``float64[N]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no video, or none of its frames can be decoded.
        ImportError: PyAV is not installed.
    """

    _next: int
    _frames: Iterator[tuple[int, Any]]
    _ahead: tuple[int, Any] | None

    def __init__(self, path: Path):
        self.path = path
        with self._opened() as (container, stream):
            stamps = _stamps_of_packets(container, stream)
            unit = float(stream.time_base)
            rate = float(stream.average_rate or stream.guessed_rate or 1)
        self._numbers = None if stamps is None else {s: i for i, s in enumerate(stamps)}
        if stamps is None:  # the frames may have some
            found = [frame.pts for _, frame in self._decode()]
            stamps = [pts for pts in found if pts is not None]
            if len(stamps) < len(found):
                stamps, unit = list(range(len(found))), 1 / rate
        self.times_s = (np.array(stamps, np.int64) - (stamps or [0])[0]) * unit
        self._restart()
        if self._ahead is None:
            raise ValueError(f"video file {path} has no frame that can be decoded")
        self.size: tuple[int, int] = upright(self._ahead[1]).shape[:2]

    def __len__(self) -> int:
        return len(self.times_s)

    def read(self, number: int) -> np.ndarray:
        """A frame, upright: RGB ``uint8[H, W, 3]``. Fast if numbers rise.

        Raises:
            ValueError: it cannot be decoded, or has another size than the first one.
        """
        if number < self._next:
            self._restart()
        self._next = number
        while self._ahead is not None and self._ahead[0] < number:
            self._ahead = next(self._frames, None)
        if self._ahead is None or self._ahead[0] > number:
            raise ValueError(
                f"video file {self.path} has a frame that cannot be decoded: number {number}, at "
                f"{self.times_s[number]:.3f} s"
            )
        image = upright(self._ahead[1])
        if image.shape[:2] != self.size:
            raise ValueError(
                f"video file {self.path} must have frames of {self.size[0]} x {self.size[1]} "
                f"pixels as its first one, number {number} has {image.shape[0]} x {image.shape[1]}"
            )
        return image

    def _restart(self) -> None:
        self._next = 0
        self._frames = self._decode()
        self._ahead = next(self._frames, None)

    def _decode(self) -> Iterator[tuple[int, Any]]:
        """Number and frame, of those that can be decoded."""
        with self._opened() as (container, stream):
            for count, frame in enumerate(decode_frames(container, stream)):
                number = count if self._numbers is None else self._numbers.get(frame.pts)
                if number is not None:
                    yield number, frame

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        av = import_av()
        with naming_file("video", self.path), as_value_error(av), av.open(self.path) as container:
            yield container, video_stream(container)


def video_stream(container: Any) -> Any:
    """The first video of what PyAV has opened. Raises ValueError if there is none."""
    if not container.streams.video:
        raise ValueError("there is no video in it")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def decode_frames(container: Any, stream: Any) -> Iterator[Any]:
    """All frames but those of packets that are damaged."""
    for packet in container.demux(stream):
        with suppress(ValueError):  # InvalidDataError
            yield from packet.decode()


def _stamps_of_packets(container: Any, stream: Any) -> list[int] | None:
    """The time stamps of the frames, sorted; None if packets have none, or the same one."""
    packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
    stamps = [packet.pts for packet in packets]
    if None in stamps or len(set(stamps)) < len(stamps):
        return None
    return sorted(stamps)


def upright(frame: Any) -> np.ndarray:
    """A frame of PyAV as RGB ``uint8[H, W, 3]``, turned as it is shown."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90)) if frame.rotation else image


@contextmanager
def as_value_error(av: Any) -> Iterator[None]:
    """What FFmpeg says, except that there is no such file, as a ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from error


def import_av() -> Any:
    """PyAV. Raises ImportError, which names the extra, if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'spatial-mamba-d2[video]'") from error
    return av
