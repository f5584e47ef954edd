"""``SOLVER.LOGGERS`` as Detectron2's writers: see :mod:`spatial_mamba_d2.training.loggers`."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from spatial_mamba_d2.training.loggers import LOGS, TENSORBOARD, NumberLog, Tolerant


class NumberWriter(EventWriter):
    """Passes each number of the event storage on once, smoothed as in ``metrics.json``.

    Args:
        log: what gets them.
        window_size: iterations of which a number that is smoothed is the median.
    """

    def __init__(self, log: NumberLog, window_size: int):
        self.log = log
        self.window_size = window_size
        self.last = -1  # iteration that has been written

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(self.window_size)
        rows: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in latest.items():
            if iteration > self.last:
                rows.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(rows):
            self.log.log(rows[iteration], iteration)
            self.last = iteration

    def close(self) -> None:
        self.log.close()


class TolerantWriter(EventWriter):
    """A writer that is switched off, with a warning, when it fails."""

    def __init__(self, writer: Tolerant):
        self.writer = writer

    def write(self, **kwargs: Any) -> None:
        self.writer.call("write", **kwargs)

    def close(self) -> None:
        self.writer.call("close")


def build_logger(name: str, cfg: CfgNode, window_size: int) -> TolerantWriter:
    """The logger of a name in ``SOLVER.LOGGERS``, which never raises.

    Args:
        window_size: iterations of which a number that is smoothed is the median.
    """

    def build() -> EventWriter:
        if name == TENSORBOARD:
            return TensorboardXWriter(cfg.OUTPUT_DIR, window_size)
        return NumberWriter(LOGS[name](cfg), window_size)

    return TolerantWriter(Tolerant(name, build))
