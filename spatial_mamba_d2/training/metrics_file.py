"""Metrics as lines of JSON, as Detectron2 writes them too; and Lightning's front of the loggers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from spatial_mamba_d2.system.atomic import naming
from spatial_mamba_d2.training.loggers import LOGS, TENSORBOARD, NumberLog, Tolerant


class MetricsFile(Logger):
    """Appends ``{"iteration": ..., name: value, ...}`` to a file, also in resumed training."""

    name = "metrics"
    version = None

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        iteration = None if step is None else int(step)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` has them."""


class NamedLogger(Logger):
    """A logger of ``SOLVER.LOGGERS``, in the first process; it is made when it gets numbers."""

    version = None

    def __init__(self, name: str, cfg: Any):
        super().__init__()
        self._name, self.cfg = name, cfg
        self._log: Tolerant | None = None

    @property
    def name(self) -> str:
        return self._name

    def _build(self) -> NumberLog:
        if self.name == TENSORBOARD:
            return TensorBoardLog(self.cfg.OUTPUT_DIR)
        return LOGS[self.name](self.cfg)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._log is None:
            self._log = Tolerant(self.name, self._build)
        self._log.call("log", metrics, 0 if step is None else int(step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the loggers that want them take the configuration."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """After a training, and after an evaluation, which may be followed by a training."""
        if self._log is not None:
            self._log.call("close")
        self._log = None


class TensorBoardLog:
    """Lightning's, in the folder ``tensorboard``."""

    def __init__(self, folder: str):
        self.logger = TensorBoardLogger(folder, name="", version="tensorboard")

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        self.logger.log_metrics(dict(numbers), iteration)

    def close(self) -> None:
        self.logger.finalize("success")
