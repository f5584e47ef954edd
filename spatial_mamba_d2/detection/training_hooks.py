"""Hooks for any trainer of Detectron2.

Averaged weights, early stopping, learning rates that fall on a plateau, freezing, throughput.

Register them before the hooks that evaluate and save::

    class Trainer(DefaultTrainer):
        def build_hooks(self):
            average = WeightAverage(self.model, decay=0.999)
            first, *others = super().build_hooks()
            return [first, average, ThroughputLogger(16), *others, EarlyStopping("bbox/AP", 5, ...)]
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spatial_mamba_d2.training.run_folder import (
    evaluations_without_gain,
    patience_ends,
    read_scores,
)

logger = logging.getLogger(__name__)


class WeightAverage(HookBase):
    """An exponential moving average of all weights and statistics, updated after each iteration.

    :meth:`applied` puts it in place of the weights, to evaluate or save it. It is part of the
    trainer's state, so that a resumed training continues it exactly.

    Args:
        model: the network, also one that ``DistributedDataParallel`` wraps.
        decay: weight of the previous average, from 0 to below 1.

    Raises:
        ValueError: ``decay`` is out of its range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.network = model.module if isinstance(model, DistributedDataParallel) else model
        self.average = ModelEmaV3(self.network, decay).requires_grad_(False)
        self.has_state = False

    def before_train(self) -> None:
        if not self.has_state:  # the weights may have been loaded after the copy was made
            self.average.set(self.network)
            self.has_state = True

    def after_step(self) -> None:
        self.average.update(self.network)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the network has the average, and the average the weights in training."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange weights and average, in place."""
        pairs = zip(
            self.network.state_dict().values(),
            self.average.module.state_dict().values(),
            strict=True,
        )
        for weight, average in pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.module.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average.module.load_state_dict(state_dict["average"])
        self.has_state = True


class TrainingEnded(BaseException):
    """The training is complete before its last iteration.

    It is no ``Exception``, because Detectron2 logs those as failures of the training.
    """


class _AfterScores(HookBase):
    """Does something after evaluations, which follows from all scores so far.

    The scores are those in ``metrics.json``, of which a resumed training also has the earlier ones,
    so that it does what it would have done otherwise. Register it after the evaluation.

    Args:
        metric: its name in ``metrics.json``, such as ``bbox/AP``; higher is better.
        patience: evaluations without a new best score.
        period: iterations from one evaluation to the next.
        folder: where the trainer writes ``metrics.json``.

    Raises:
        ValueError: ``patience`` or ``period`` is not above 0.
    """

    def __init__(self, metric: str, patience: int, period: int, folder: str | Path):
        for name, value in (("patience", patience), ("period", period)):
            if value < 1:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.metric, self.patience, self.period = metric, patience, period
        self.folder = folder
        self.scores: dict[int, float] = {}  # by the iteration after which they were computed

    def before_train(self) -> None:
        self.read_scores(self.trainer.start_iter)
        self._add_latest()  # of an evaluation that was made up for before the first iteration
        if self.trainer.start_iter < self.trainer.max_iter:
            self.after_evaluation(is_new=False)

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self._add_latest()
            self.after_evaluation(is_new=True)

    def read_scores(self, end: int) -> None:
        """Those of iterations before ``end``; in the first process, which decides."""
        if comm.is_main_process():
            scores = read_scores(self.folder, self.metric)
            self.scores = {i: score for i, score in scores.items() if i < end}

    def after_evaluation(self, *, is_new: bool) -> None:
        """Also once before the first iteration, when nothing is new."""
        raise NotImplementedError

    def _add_latest(self) -> None:
        if self.metric in self.trainer.storage.latest():
            value, iteration = self.trainer.storage.latest()[self.metric]
            self.scores[iteration] = float(value)


class EarlyStopping(_AfterScores):
    """Ends the training by :class:`TrainingEnded` when a score has not risen for a while.

    Exact across a resume: see :class:`PlateauSchedule` for the arguments. Before the end,
    ``model_final`` is saved if the trainer has a ``checkpointer``.
    """

    def after_evaluation(self, *, is_new: bool) -> None:
        reason = comm.all_gather(patience_ends(self.scores, self.patience, self.metric))[0]
        if not reason:
            return
        checkpointer = getattr(self.trainer, "checkpointer", None)
        if is_new and checkpointer is not None and comm.is_main_process():
            checkpointer.save("model_final", iteration=self.trainer.iter)
        logger.info("the training ends early: %s", reason)
        raise TrainingEnded(reason)


class PlateauSchedule(_AfterScores):
    """Lowers the learning rate when a score has not risen for a while, and then waits again.

    It changes the base rates of Detectron2's schedule, so that a warmup, and factors of groups of
    parameters, stay as they are. The rate follows from the scores in ``metrics.json`` alone: it is
    exact across a resume. Register it after the evaluation.

    Args:
        scheduler: the trainer's, such as Detectron2's ``LRMultiplier``.
        factor: of the learning rate at each plateau, above 0, below 1.
        metric: its name in ``metrics.json``, such as ``bbox/AP``; higher is better.
        patience: evaluations without a new best score.
        period: iterations from one evaluation to the next.
        folder: where the trainer writes ``metrics.json``.

    Raises:
        ValueError: ``patience`` or ``period`` is not above 0, or ``factor`` is out of its range.
    """

    def __init__(
        self,
        scheduler: Any,
        factor: float,
        metric: str,
        patience: int,
        period: int,
        folder: str | Path,
    ):
        super().__init__(metric, patience, period, folder)
        if not 0 < factor < 1:
            raise ValueError(f"factor must be in (0, 1), got {factor}")
        self.scheduler, self.factor = scheduler, factor
        self.base_rates = list(scheduler.base_lrs)
        self.num_plateaus = 0

    def lower(self) -> None:
        """The base rates of the schedule become those that the scores ask for."""
        counts = evaluations_without_gain(self.scores)
        number = sum(count > 0 and count % self.patience == 0 for count in counts)
        number = comm.all_gather(number)[0]
        if number > self.num_plateaus:
            logger.info(
                "%s has not risen in %d evaluations: learning rates are now %g of the schedule's",
                self.metric, self.patience, self.factor**number,
            )  # fmt: skip
        self.num_plateaus = number
        self.scheduler.base_lrs[:] = [rate * self.factor**number for rate in self.base_rates]

    def after_evaluation(self, *, is_new: bool) -> None:
        self.lower()
        groups = self.scheduler.optimizer.param_groups
        for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate


class FreezeByName(HookBase):
    """Parameters whose names begin with a prefix keep their values, for a while or to the end.

    The modules of those names are in eval mode, so that their statistics stay as well.

    Args:
        model: the network.
        prefixes: of parameters' names, at a dot or complete.
        until_iter: the iteration from which on they are trained; 0: never. The optimizer must have
            been given them then; without it, make the hook before the optimizer.

    Raises:
        ValueError: a prefix fits no parameter.
    """

    def __init__(self, model: nn.Module, prefixes: Sequence[str], until_iter: int = 0):
        network = model.module if isinstance(model, DistributedDataParallel) else model
        self.until_iter = until_iter
        self.parameters: list[nn.Parameter] = []
        for prefix in prefixes:
            found = [p for n, p in network.named_parameters() if _fits(n, prefix)]
            if not found:
                tops = sorted({n.rpartition(".")[0] for n, _ in network.named_parameters()})
                raise ValueError(
                    f"prefixes must be of the model's parameters, such as {', '.join(tops[:3])}, "
                    f"got {prefix!r}"
                )
            self.parameters += found
        self.modules = [
            module
            for name, module in network.named_modules()
            if any(_fits(name, prefix) for prefix in prefixes)
        ]
        if not until_iter:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
        logger.info(
            "%s parameters are frozen%s", f"{sum(p.numel() for p in self.parameters):,}",
            f" until iteration {until_iter}" if until_iter else "",
        )  # fmt: skip

    def is_active(self) -> bool:
        return not self.until_iter or self.trainer.iter < self.until_iter

    def before_train(self) -> None:
        # What an optimizer has no gradient of, it leaves alone. Trainers of Detectron2 that hold
        # another trainer do not call after_backward.
        if self.until_iter:
            self.trainer.optimizer.register_step_pre_hook(lambda *_: self.after_backward())

    def before_step(self) -> None:
        if self.is_active():
            for module in self.modules:
                module.eval()
        elif self.trainer.iter == self.until_iter:
            for module in self.modules:
                module.train()
            logger.info("iteration %d: all parameters are trained from here on", self.until_iter)

    def after_backward(self) -> None:
        if self.until_iter and self.is_active():
            for parameter in self.parameters:
                parameter.grad = None


def _fits(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


class ThroughputLogger(HookBase):
    """Logs ``images_per_s`` of each iteration and ``memory_mb``, the largest use so far.

    Memory is what PyTorch has allocated on the GPU; without one, what the process has used.

    Args:
        batch_size: images of an iteration, of all processes.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        storage = self.trainer.storage
        storage.put_scalar("images_per_s", self.batch_size / (time.perf_counter() - self.start))
        if (memory := peak_memory_mb()) is not None:
            storage.put_scalar("memory_mb", memory, smoothing_hint=False)


def peak_memory_mb() -> float | None:
    """The most memory that this process has used, of its GPU if there is one; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
