"""Hooks of Detectron2's training loop: evaluation, the best checkpoint, signals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage

from spatial_mamba_d2.detection.scores import main_scores
from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.system.atomic import naming
from spatial_mamba_d2.training.run_folder import DETECTION_BEST, score_of_iteration

logger = logging.getLogger(__name__)


class FinalEvaluation(hooks.EvalHook):
    """Detectron2's after the last iteration, with the scores in that iteration's line of metrics.

    A finished training that is resumed is evaluated again; its metrics get no second line then.

    Args:
        cfg: of the training.
        evaluate: returns ``{task: {metric: value}}``, for several data sets by their names, in the
            first process.
        suffix: of the keys of what it returns.
        period: from one evaluation to the next, in iterations; 0: only the last.
    """

    def __init__(
        self, cfg: CfgNode, evaluate: Callable[[], Any], suffix: str = "", period: int = 0
    ):
        super().__init__(period, evaluate)
        self.cfg = cfg
        self.main_scores = main_scores(cfg, suffix)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period and done % self._period == 0):
            self._do_eval()

    def after_train(self) -> None:
        trainer = self.trainer
        if trainer.start_iter == trainer.max_iter and trainer.iteration_is_complete:
            trainer.storage.iter = trainer.max_iter - 1
            if self._is_recorded(trainer.max_iter):
                self._func()
                comm.synchronize()
            else:
                self._do_eval()
        del self._func  # as Detectron2's: it holds the trainer

    def _is_recorded(self, done: int) -> bool:
        """Whether the metrics have the scores after so many iterations; the same everywhere."""
        found = False
        if comm.is_main_process():
            for name in self.main_scores:
                score = score_of_iteration(self.cfg.OUTPUT_DIR, done, name)
                if score is not None and not found:
                    found = True
                    self._use_score(name, score, done)
        return bool(comm.all_gather(found)[0])

    def _use_score(self, name: str, score: float, num_iterations: int) -> None:
        """In the first process, of the weights of now."""


class Evaluation(FinalEvaluation):
    """Every ``TEST.EVAL_PERIOD`` iterations; the weights with the best score are kept.

    That is in ``model_best.pth``; of several data sets the first one decides. A signal ends an
    evaluation at once, with the state saved; a resumed training begins with it then. After an
    iteration that failed there is none.
    """

    def __init__(self, cfg: CfgNode, evaluate: Callable[[], Any]):
        super().__init__(cfg, evaluate, period=cfg.TEST.EVAL_PERIOD)
        self.best_score: float | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        done = trainer.start_iter
        if not done or not self._period or done % self._period or done >= trainer.max_iter:
            return
        if not self._is_recorded(done):
            logger.info("evaluation after iteration %d, which was not finished", done)
            trainer.storage.iter = done - 1
            self._do_eval()
            trainer.storage.iter = done

    def _do_eval(self) -> None:
        try:
            super()._do_eval()
        except stopping.Stopped:
            if self.trainer.iter < self.trainer.max_iter:  # else the final checkpoint is there
                save_stopped(self.trainer)
            raise
        results = self.trainer.last_results
        if comm.is_main_process() and results:
            flat = flatten_results_dict(results)
            for name in self.main_scores:
                if name in flat:
                    self._use_score(name, float(flat[name]), self.trainer.storage.iter + 1)
                    break

    def _use_score(self, name: str, score: float, num_iterations: int) -> None:
        checkpointer = self.trainer.checkpointer
        if self.best_score is None:
            self.best_score = checkpointer.read_best_score()
        if score > self.best_score:  # not if it is no number
            checkpointer.save_best(score, num_iterations - 1)
            logger.info("the best %s so far, %.3f: saved as %s", name, score, DETECTION_BEST)
            self.best_score = score


class StopOnSignal(HookBase):
    """Ends the training after an iteration if a signal has asked one of the processes to."""

    def after_step(self) -> None:
        if signum := self.trainer.signum:
            save_stopped(self.trainer)
            raise stopping.Stopped(signum)


def save_stopped(trainer: Any) -> None:
    """The state after the iteration of now, for ``--resume``."""
    checkpointer, iteration = trainer.checkpointer, trainer.iter
    if iteration < trainer.start_iter:
        return
    if comm.is_main_process():
        names = {f"model_{iteration:07d}.pth"}
        if iteration == trainer.max_iter - 1:
            names.add("model_final.pth")
        last = Path(checkpointer.get_checkpoint_file()) if checkpointer.has_checkpoint() else None
        if last is None or last.name not in names:
            checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        logger.warning(
            "stopped by a signal: the state after iteration %d is in %s; continue with --resume",
            iteration + 1, checkpointer.get_checkpoint_file(),
        )  # fmt: skip
    comm.synchronize()


class StoppableLoader:
    """A loader of test images that raises Stopped when a signal has asked this process to stop."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            stopping.stop_if_requested()
            yield batch


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's, which fails if it is asked twice for an early iteration, as at a stop."""

    def __init__(self, max_iter: int):
        super().__init__(max_iter)
        self.told = -1

    def write(self, **kwargs: Any) -> None:
        iteration = get_event_storage().iter
        histories = get_event_storage().histories()
        any_done = "lr" in histories  # not in a finished training
        if any_done and iteration != self.told:
            self.told = iteration
            super().write(**kwargs)
            if "images_per_s" in histories:
                window = min(self._window_size, len(histories["images_per_s"].values()))
                speed = histories["images_per_s"].median(window)
                latest = get_event_storage().latest().get("memory_mb")
                memory = "" if latest is None else f", at most {latest[0]:.0f} MB of memory"
                logger.info("%.1f images/s%s", speed, memory)


class NamedWriter(EventWriter):
    """Another writer, whose errors name the file."""

    def __init__(self, writer: EventWriter, path: Path):
        self.writer, self.path = writer, path

    def write(self, **kwargs: Any) -> None:
        with naming(self.path):
            self.writer.write(**kwargs)

    def close(self) -> None:
        with naming(self.path):
            self.writer.close()
