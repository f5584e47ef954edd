"""What a server counts, in Prometheus's text format."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from itertools import accumulate

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts requests; used by the thread of the event loop alone."""

    def __init__(self) -> None:
        self.started = time.time()
        self.num_requests: Counter[int] = Counter()  # by status
        self.num_bytes = 0
        self.histogram = [0] * (len(BOUNDS_S) + 1)
        self.predicting_s = 0.0

    def add_prediction(self, seconds: float) -> None:
        self.histogram[bisect_left(BOUNDS_S, seconds)] += 1
        self.predicting_s += seconds

    def text(self, num_pending: int) -> str:
        """The page.

        Args:
            num_pending: requests that are read, wait or are predicted now.
        """
        prefix = "spatial_mamba"
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, values: dict[str, float]) -> None:
            lines.append(f"# HELP {prefix}_{name} {meaning}")
            lines.append(f"# TYPE {prefix}_{name} {kind}")
            lines.extend(f"{prefix}_{name}{label} {value}" for label, value in values.items())

        codes = sorted(self.num_requests.items())
        by_status = {f'{{status="{code}"}}': float(number) for code, number in codes}
        add("requests_total", "counter", "Answered requests for predictions.", by_status)
        received = {"": float(self.num_bytes)}
        add("received_bytes_total", "counter", "Bytes of their bodies.", received)
        add("pending_requests", "gauge", "Requests read, waiting or predicted now.",
            {"": num_pending})  # fmt: skip
        add("start_time_seconds", "gauge", "Unix time of the start.", {"": self.started})
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        counts = list(accumulate(self.histogram))
        values: dict[str, float] = {
            f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, counts, strict=True)
        }
        values |= {"_sum": self.predicting_s, "_count": counts[-1]}
        add("prediction_seconds", "histogram", "From bytes to the answer, without waiting.", values)
        return "\n".join(lines) + "\n"
