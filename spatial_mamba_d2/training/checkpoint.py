"""Lightning's checkpoints, written atomically and read without executing code from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.models.checkpoints.writing import write_checkpoint
from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.training.module import TrainingModule
from spatial_mamba_d2.training.resuming import require_training_state
from spatial_mamba_d2.training.run_folder import (
    BEST,
    BEST_SCORE,
    LAST,
    patience_ends,
    write_config,
)

logger = logging.getLogger(__name__)


class SafeCheckpointIO(TorchCheckpointIO):
    """A file appears under its name only when it is complete and on disk.

    Lightning's own writes a file in the system's temporary folder and moves it, which is a copy
    where that is another file system, and may be half done when the process is killed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Raises OSError: see :func:`~spatial_mamba_d2.system.atomic.replacing`."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises FileNotFoundError or WeightsError: see :func:`read_checkpoint`."""
        return read_checkpoint(path)


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt`` and ``best.ckpt``, and ends the training when a signal asks for it.

    ``last.ckpt`` is written every ``period`` iterations, before each evaluation, at the end and
    when the training is stopped. So an evaluation has nothing to lose: it ends at once on a signal.
    After it, ``best.ckpt`` becomes a copy of ``last.ckpt`` if the score is the best, and holds that
    score itself: whatever is killed or resumed then, only a better one replaces it. The settings
    are recorded in ``config.yaml`` after the first iteration: what fails earlier leaves nothing.

    With a patience, the training ends early when the main score has not risen for so many
    evaluations, of all those in ``metrics.json``, so that kills and resumes change nothing.

    Args:
        folder: of the checkpoints, and of ``metrics.json``.
        period: iterations from one ``last.ckpt`` to the next.
        patience: evaluations without a new best score that end the training; 0: none do.
        scores: ``{iteration, from 0: main score}`` of the evaluations that took place before.

    Attributes:
        end: why the training ends early; "" if it does not.
    """

    def __init__(self, folder: str | Path, period: int, patience: int, scores: Mapping[int, float]):
        self.last, self.best = Path(folder, LAST), Path(folder, BEST)
        self.period = period
        self.patience, self.scores = patience, dict(scores)
        self.end = ""
        self.best_score: float | None = None  # read by the first process
        self.saved_step = -1
        self.is_recorded = False

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if trainer.is_global_zero:
            self._find_best_score()

    def _find_best_score(self) -> float:
        if self.best_score is None:
            self.best_score = read_best_score(self.best)
        return self.best_score

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        stopping.install()  # Lightning's handlers end a training with exit code 0

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
        if trainer.is_global_zero and not self.is_recorded:
            write_config(pl_module.cfg, self.last.parent)
            self.is_recorded = True
        step, schedule = trainer.global_step, pl_module.schedule
        signum = pl_module.guard.signum if pl_module.guard is not None else 0
        if step % self.period == 0 or schedule.evaluates_after(step) or signum:
            self._save_last(trainer)
        if signum and trainer.is_global_zero:
            logger.warning(
                "%s: the state after iteration %d is in %s; continue with --resume",
                stopping.Stopped(signum), step, self.last,
            )  # fmt: skip

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Here the iteration before has also been logged."""
        self._stop(pl_module)

    @staticmethod
    def _stop(module: lightning.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        if module.guard is not None and module.guard.signum:
            raise stopping.Stopped(module.guard.signum)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._stop(pl_module)
        if self.saved_step != pl_module.iteration:
            if trainer.state.fn == "fit":
                self._save_last(trainer)
            else:  # the evaluation of a checkpoint
                self.saved_step = pl_module.iteration

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        score = pl_module.scores.get(pl_module.main_score, math.nan)
        if trainer.is_global_zero:
            self.keep_if_best(score)
        self.scores[pl_module.iteration - 1] = score
        self.end = patience_ends(self.scores, self.patience, pl_module.main_score)
        trainer.should_stop = trainer.should_stop or bool(self.end)

    def keep_if_best(self, score: float) -> None:
        """Make ``last.ckpt``, whose score this is, the best one if it is."""
        if score > self._find_best_score():  # not if it is no number
            write_checkpoint({**read_checkpoint(self.last), BEST_SCORE: score}, self.best)
            self.best_score = score

    def _save_last(self, trainer: lightning.Trainer) -> None:
        if self.saved_step != trainer.global_step:
            trainer.save_checkpoint(self.last)
            self.saved_step = trainer.global_step


def read_best_score(best: Path) -> float:
    """The score that ``best.ckpt`` was kept for; minus infinity if there is none.

    Raises:
        ValueError: the file is not of a training.
    """
    if not best.is_file():
        return -math.inf
    content = read_checkpoint(best)
    score = content.get(BEST_SCORE)
    if score is None:  # written by version 0.1.0, with Lightning's own callback
        kept = content.get("callbacks") or {}
        states = [state for state in kept.values() if isinstance(state, dict)]
        score = next((s["best_model_score"] for s in states if s.get("monitor")), None)
    if score is None:
        require_training_state(content, [BEST_SCORE], best)
        return -math.inf
    return float(score)
