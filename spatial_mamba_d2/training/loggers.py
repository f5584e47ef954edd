"""Where the numbers of a training go besides ``metrics.json``: ``SOLVER.LOGGERS``.

=============  ========================================================  =======================
name           what is written                                           needs
=============  ========================================================  =======================
tensorboard    event files in ``OUTPUT_DIR``; detection's have images    nothing; of detection,
                                                                         the extra ``detection``
csv            ``metrics.csv``: a row for each iteration and number      nothing
wandb          a run of Weights & Biases; ``WANDB_PROJECT`` and the      the extra ``loggers``
               other variables of wandb say where
mlflow         a run of MLflow; ``MLFLOW_TRACKING_URI`` and the other    the extra ``loggers``
               variables of MLflow say where
=============  ========================================================  =======================

A resumed training continues the same run. A logger that fails is switched off with a warning: the
training goes on. Nothing here needs Lightning or Detectron2, which wrap these loggers in their own
(:mod:`~spatial_mamba_d2.training.metrics_file`, :mod:`~spatial_mamba_d2.detection.loggers`).
"""

from __future__ import annotations

import csv
import importlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spatial_mamba_d2.config import flat_items
from spatial_mamba_d2.system.yaml_file import parse_yaml

logger = logging.getLogger(__name__)

PROJECT = "spatial-mamba-d2"  # of wandb and MLflow, unless their variables say otherwise
CSV = "metrics.csv"
TENSORBOARD = "tensorboard"  # each trainer has its own
_MAX_PARAMS, _MAX_LENGTH = 100, 500  # of a request to MLflow, of a value


class NumberLog(Protocol):
    """What gets the numbers of a training."""

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Numbers by name, of one iteration."""

    def close(self) -> None: ...


class CsvLog:
    """Appends ``iteration,name,value`` to a file."""

    def __init__(self, cfg: Any):
        path = Path(cfg.OUTPUT_DIR, CSV)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self.file = path.open("a", newline="", encoding="utf-8")
        self.table = csv.writer(self.file, lineterminator="\n")
        if is_new:
            self.table.writerow(("iteration", "name", "value"))

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        self.table.writerows((iteration, name, value) for name, value in numbers.items())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class WandbLog:
    """A run of Weights & Biases; its id is in ``OUTPUT_DIR``, by which it is continued."""

    def __init__(self, cfg: Any):
        wandb = importlib.import_module("wandb")
        mark = Path(cfg.OUTPUT_DIR, "wandb_run.txt")
        run_id = mark.read_text(encoding="utf-8") if mark.is_file() else secrets.token_hex(4)
        self.run = wandb.init(
            id=run_id,
            resume="allow",
            dir=cfg.OUTPUT_DIR,
            name=Path(cfg.OUTPUT_DIR).name,
            config=parse_yaml(cfg.dump().encode(), "configuration"),
            settings=wandb.Settings(silent=True),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
        )
        mark.write_text(run_id, encoding="utf-8")

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        self.run.log(dict(numbers), step=iteration)

    def close(self) -> None:
        self.run.finish()


class MlflowLog:
    """A run of MLflow; its id is in ``OUTPUT_DIR``, by which it is continued."""

    def __init__(self, cfg: Any):
        self.entities = importlib.import_module("mlflow.entities")
        self.client = importlib.import_module("mlflow").MlflowClient()
        mark = Path(cfg.OUTPUT_DIR, "mlflow_run.txt")
        if mark.is_file():
            self.run_id = mark.read_text(encoding="utf-8")
            self.client.update_run(self.run_id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        run = self.client.create_run(experiment, run_name=Path(cfg.OUTPUT_DIR).name)
        self.run_id = run.info.run_id
        pairs = flat_items(parse_yaml(cfg.dump().encode(), "configuration"))
        params = [self.entities.Param(key, str(value)[:_MAX_LENGTH]) for key, value in pairs]
        for start in range(0, len(params), _MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS])
        mark.write_text(self.run_id, encoding="utf-8")

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [
            self.entities.Metric(name, value, now_ms, iteration) for name, value in numbers.items()
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


LOGS: dict[str, Callable[[Any], NumberLog]] = {
    "csv": CsvLog,
    "wandb": WandbLog,
    "mlflow": MlflowLog,
}
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}


def check_loggers(names: Sequence[str]) -> None:
    """Raises ValueError if a name is unknown, or its package is not installed."""
    for name in names:
        if name not in (TENSORBOARD, *LOGS):
            raise ValueError(
                f"SOLVER.LOGGERS must be among {', '.join((TENSORBOARD, *LOGS))}, "
                f"got {', '.join(names)}"
            )
        try:
            importlib.import_module(_PACKAGES.get(name, "csv"))
        except ImportError as error:
            raise ValueError(
                f"SOLVER.LOGGERS {name} needs its package ({error}): "
                "pip install 'spatial-mamba-d2[loggers]'"
            ) from None


class Tolerant:
    """A logger that is switched off, with a warning, when it fails.

    Args:
        name: of the logger.
        build: makes it.

    Attributes:
        target: the logger; None once it is switched off.
    """

    def __init__(self, name: str, build: Callable[[], Any]):
        self.name = name
        self.target: Any = None
        self.target = self._try(build)

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of the logger, unless it is switched off."""
        if self.target is not None:
            self._try(getattr(self.target, method), *args, **kwargs)

    def _try(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever a service or its package raises
            logger.warning(
                "SOLVER.LOGGERS: %s has failed and is switched off: %s: %s",
                self.name, type(error).__name__, error,
            )  # fmt: skip
            self.target = None
            return None
