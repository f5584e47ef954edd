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
