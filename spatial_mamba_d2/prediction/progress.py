"""Messages about how far a run is."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

logger = logging.getLogger(__name__)
_LOG_PERIOD_S = 10


class Progress:
    """Messages about how far a run is, every few seconds."""

    def __init__(self, total: int):
        self.total, self.num_skipped = total, 0
        self.start = self.last = time.monotonic()

    def skip(self, reason: str) -> None:
        self.num_skipped += 1
        logger.warning("skipped: %s", reason)

    def show(self, done: float) -> None:
        """Args: done: images, with a fraction of one that is predicted by windows."""
        now = time.monotonic()
        if now - self.last < _LOG_PERIOD_S:
            return
        self.last = now
        left_s = (now - self.start) / max(done, 1e-9) * (self.total - done)
        skipped = f", {self.num_skipped} skipped" if self.num_skipped else ""
        logger.info(
            "%.4g of %d images%s, about %s left",
            done, self.total, skipped, timedelta(seconds=round(left_s)),
        )  # fmt: skip


class StreamProgress:
    """The same of a stream, whose end is not known."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def show(self, done: int, num_dropped: int) -> None:
        """Args: done: frames."""
        now = time.monotonic()
        if now - self.last < _LOG_PERIOD_S:
            return
        self.last = now
        dropped = f", {num_dropped} dropped" if num_dropped else ""
        logger.info("%d frames%s, %.3g a second", done, dropped, done / (now - self.start))
