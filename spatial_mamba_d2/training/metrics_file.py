"""Metrics as lines of JSON, as Detectron2 writes them too, and for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from spatial_mamba_d2.system.atomic import naming


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


class TensorBoard(TensorBoardLogger):
    """Lightning's, whose errors name the folder."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with naming(self.log_dir):
            super().log_metrics(metrics, step)
