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

from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.system.atomic import naming
from spatial_mamba_d2.training.run_folder import DETECTION_BEST, score_of_iteration

logger = logging.getLogger(__name__)


class Evaluation(hooks.EvalHook):
    """Detectron2's, and the weights with the best score are kept as ``model_best.pth``.

    A signal ends it at once, with the state saved; a resumed training begins with it then.
    After an iteration that failed there is none.

    Args:
        cfg: of the training.
        evaluate: returns ``{task: {metric: value}}``, in the first process.
    """

    def __init__(self, cfg: CfgNode, evaluate: Callable[[], Any]):
        super().__init__(cfg.TEST.EVAL_PERIOD, evaluate)
        self.cfg = cfg
        self.best_score: float | None = None
        # The score that decides, and what stands in for it where it is not computed.
        asked = {"keypoints": cfg.MODEL.KEYPOINT_ON, "segm": cfg.MODEL.MASK_ON, "bbox": True}
        self.main_scores = [f"{task}/AP" for task, is_asked in asked.items() if is_asked]

    def before_train(self) -> None:
        trainer = self.trainer
        done = trainer.start_iter
        if not done or not self._period or done % self._period or done >= trainer.max_iter:
            return
        score = None
        if comm.is_main_process():
            for name in self.main_scores:
                if score is None:
                    score = score_of_iteration(self.cfg.OUTPUT_DIR, done, name)
            if score is not None:
                self._keep_if_best(score, done)
        if not comm.all_gather(score is not None)[0]:
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
            names = [n for main in self.main_scores for n in flat if f"/{n}".endswith(f"/{main}")]
            if names:
                self._keep_if_best(float(flat[names[0]]), self.trainer.storage.iter + 1)

    def _keep_if_best(self, score: float, num_iterations: int) -> None:
        checkpointer = self.trainer.checkpointer
        if self.best_score is None:
            self.best_score = checkpointer.read_best_score()
        if score > self.best_score:  # not if it is no number
            checkpointer.save_best(score, num_iterations - 1)
            logger.info("the best score so far, %.3f: saved as %s", score, DETECTION_BEST)
            self.best_score = score

    def after_train(self) -> None:
        if self.trainer.iteration_is_complete:
            super().after_train()
        else:
            del self._func  # as Detectron2's: it holds the trainer


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
        if iteration != self.told:
            self.told = iteration
            super().write(**kwargs)


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
