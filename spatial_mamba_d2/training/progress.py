"""What a training on Lightning tells while it runs: lines, and a bar if there is a terminal."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.training.guard import is_child_of_lightning
from spatial_mamba_d2.training.module import TrainingModule

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
EVALUATION_PERIOD_S = 10.0  # from one line of an evaluation to the next


class ProgressLines(Callback):
    """A line every ``period`` iterations, in the form of Detectron2's, and of long evaluations.

    It also ends an evaluation when a signal asks for it.
    """

    def __init__(self, period: int):
        self.period = period
        self.evaluation_start = self.last_line = 0.0
        self._forget()

    def _forget(self) -> None:
        self.times: list[float] = []
        self.data_times: list[float] = []

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._forget()

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if batch_idx % pl_module.cfg.SOLVER.ACCUMULATION_STEPS == 0:
            self.data_times.append(time.perf_counter() - pl_module.iteration_start)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.ends_iteration(batch_idx):
            return
        self.times.append(time.perf_counter() - pl_module.iteration_start)
        step, last = trainer.global_step, pl_module.schedule.iterations
        if step % self.period == 0 or step == last:
            logger.info("%s", self._line(pl_module, step, last))
            self._forget()

    def _line(self, module: TrainingModule, step: int, last: int) -> str:
        seconds = sum(self.times) / len(self.times)
        data_seconds = sum(self.data_times) / max(1, len(self.data_times))
        parts = [f"eta: {_duration(seconds * (last - step))}", f"iter: {step - 1}"]
        parts += [f"{name}: {float(value):.4g}" for name, value in module.losses.items()]
        parts += [
            f"time: {seconds:.4f}",
            f"data_time: {data_seconds:.4f}",
            f"lr: {module.rate:.5g}",
        ]
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        return "  ".join(parts)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        stopping.install()  # see Checkpoints
        self.evaluation_start = self.last_line = time.perf_counter()

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not is_child_of_lightning():
            if stopping.requested() and trainer.state.fn == "fit" and trainer.is_global_zero:
                logger.warning("the evaluation is not finished: --resume begins with it")
            stopping.stop_if_requested()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        now = time.perf_counter()
        if now - self.last_line < EVALUATION_PERIOD_S:
            return
        self.last_line = now
        total = int(sum(trainer.num_val_batches))
        seconds = (now - self.evaluation_start) / (batch_idx + 1)
        logger.info(
            "evaluation: %d of %d batches, %.4f s each, eta %s",
            batch_idx + 1, total, seconds, _duration(seconds * (total - batch_idx - 1)),
        )  # fmt: skip


class _Bar(TQDMProgressBar):
    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, Any]:
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)  # the name of a folder
        return metrics


def build_progress(period: int) -> list[Callback]:
    """Lines, and a bar too where standard output is a terminal."""
    bar: list[Callback] = [_Bar(refresh_rate=10)] if sys.stdout.isatty() else []
    return [*bar, ProgressLines(period)]


@contextmanager
def logged_to(folder: str | Path) -> Iterator[None]:
    """Within it, the package's messages are also appended to ``folder/log.txt``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(Path(folder, LOG_FILE), encoding="utf-8")
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    )
    package = logging.getLogger("spatial_mamba_d2")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _duration(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=int(seconds))
