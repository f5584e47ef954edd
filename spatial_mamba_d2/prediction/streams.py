"""Frames of cameras and streams, decoded by PyAV (the extra ``video``) as they arrive."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from spatial_mamba_d2.prediction.videos import (
    as_value_error,
    decode_frames,
    import_av,
    upright,
    video_stream,
)

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FILE_SCHEMES = ("http", "https")  # of servers that may send a file, and wait for its reader
_SCHEMES = (
    *_FILE_SCHEMES, "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp",
)  # fmt: skip
# What a playlist or another answer may lead to: addresses of the network, and no file.
_PROTOCOLS = (
    "http,https,httpproxy,rtmp,rtmpe,rtmps,rtmpt,rtmpte,rtmpts,rtp,srt,srtp,tcp,tls,udp,crypto,data"
)
TIMEOUT_S = 30.0  # for which nothing may arrive
_NUM_AHEAD = 4  # frames that are decoded ahead
_LOOK_S = 0.2  # so often somebody who waits looks whether he should stop


def is_stream(word: str | Path) -> bool:
    """Whether it is the address of a stream, or the device file of a camera."""
    return bool(_URL.match(str(word))) or Path(word).is_char_device()


class Stream:
    """The frames of a stream or a camera until it ends; iterable once.

    A thread decodes them. Of a camera or a live stream, frames that nobody has taken when the next
    one comes are dropped, so that predictions do not fall behind. What comes by HTTP and says how
    long it is, is a file: it is read as fast as its frames are taken, and none is dropped.

    Args:
        address: such as ``rtsp://...``, ``http://...`` or ``/dev/video0``.
        should_stop: asked several times a second; True ends the iteration.

    Attributes:
        shown: the address without user, password and query, for messages.
        name: of the frames in results, which are ``NAME/000123``.
        num_dropped: frames that were dropped so far.

    Raises:
        ValueError: the address has another scheme; when it is iterated: there is no such stream,
            it has no video, or it breaks off.
        ImportError: PyAV is not installed.
    """

    def __init__(self, address: str | Path, should_stop: Callable[[], bool] = lambda: False):
        self.address = str(address)
        self.is_camera = not _URL.match(self.address)
        parts = urlsplit(self.address)
        if not self.is_camera and parts.scheme not in _SCHEMES:
            raise ValueError(
                f"stream must begin with one of {', '.join(f'{s}://' for s in _SCHEMES)}, "
                f"got {parts.scheme}://"
            )
        place = parts.netloc.rpartition("@")[2] + parts.path
        self.shown = self.address if self.is_camera else f"{parts.scheme}://{place}"
        self.name = re.sub(r"[^\w.-]+", "_", parts.path if self.is_camera else place).strip("._")
        self.name = self.name or "stream"
        self.num_dropped = 0
        self._is_live = parts.scheme not in _FILE_SCHEMES
        self._should_stop = should_stop
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Any, float]] = deque()
        self._is_closed = self._has_ended = False
        self._num_read = 0
        self._error: BaseException | None = None
        import_av()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, float]]:
        """Number, RGB ``uint8[H, W, 3]``, and time in seconds from the first frame."""
        # It may wait for the network when the process ends, which does not wait for it.
        threading.Thread(target=self._read, daemon=True).start()
        try:
            while (item := self._take()) is not None:
                number, frame, time_s = item
                yield number, upright(frame), time_s
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()

    def _take(self) -> tuple[int, Any, float] | None:
        with self._changed:
            while not self._waiting and not self._has_ended and not self._should_stop():
                self._changed.wait(_LOOK_S)
            if self._should_stop():
                return None
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
        if isinstance(self._error, (ValueError, OSError)):
            what = (
                f"broke off after {self._num_read} frames" if self._num_read else "cannot be read"
            )
            raise ValueError(f"stream {self.shown} {what}: {self._error}") from self._error
        if self._error is not None:
            raise self._error
        return None

    def _put(self, item: tuple[int, Any, float]) -> bool:
        """Whether somebody still takes frames."""
        with self._changed:
            if self._is_live:
                self.num_dropped += len(self._waiting)
                self._waiting.clear()
            while len(self._waiting) == _NUM_AHEAD and not self._is_closed:
                self._changed.wait()
            self._waiting.append(item)
            self._num_read += 1
            self._changed.notify_all()
            return not self._is_closed

    def _read(self) -> None:
        try:
            self._decode()
        except BaseException as error:  # which belongs to the thread that takes the frames
            self._error = error
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _decode(self) -> None:
        av = import_av()
        arguments: dict[str, Any] = {"options": {"protocol_whitelist": _PROTOCOLS}}
        if self.is_camera:
            arguments = {"format": "v4l2"}
        start, first = time.monotonic(), None
        try:
            with as_value_error(av), av.open(
                self.address, timeout=(TIMEOUT_S, TIMEOUT_S), **arguments
            ) as container:  # fmt: skip
                stream = video_stream(container)
                self._is_live = self._is_live or container.duration is None
                if self._is_live:  # threads for frames delay each by as many as there are
                    stream.thread_type = "SLICE"
                for number, frame in enumerate(decode_frames(container, stream)):
                    if frame.pts is None:
                        seconds = time.monotonic() - start
                    else:
                        seconds = float(frame.pts * stream.time_base)
                    first = seconds if first is None else first
                    if not self._put((number, frame, seconds - first)):
                        return
                if first is None:
                    raise ValueError("no frame of it can be decoded")
        except ValueError as error:
            if isinstance(error.__cause__, av.error.ExitError):
                raise ValueError(f"nothing has arrived for {TIMEOUT_S:g} seconds") from error
            raise
