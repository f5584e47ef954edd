"""Detectron2's training loop with AdamW, mixed precision on any device, accumulation and resume."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation import (
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spatial_mamba_d2.data.samplers import ResumableBatchSampler
from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.data import (
    build_test_loader,
    build_train_loader,
    load_dataset,
    load_training_datasets,
)
from spatial_mamba_d2.detection.evaluators import (
    build_evaluator,
    describe_protocol,
    write_scores,
)
from spatial_mamba_d2.detection.hooks import (
    Evaluation,
    FinalEvaluation,
    NamedWriter,
    ProgressPrinter,
    StopOnSignal,
    StoppableLoader,
)
from spatial_mamba_d2.detection.mask_rle import with_rle_masks
from spatial_mamba_d2.detection.optimizer import build_optimizer, clip_gradients
from spatial_mamba_d2.detection.scores import main_scores
from spatial_mamba_d2.detection.test_time_augmentation import (
    build_augmented_model,
    without_resize,
)
from spatial_mamba_d2.detection.training_hooks import (
    EarlyStopping,
    FreezeByName,
    ThroughputLogger,
    TrainingEnded,
    WeightAverage,
)
from spatial_mamba_d2.system.seeding import derive_seed, seed_all
from spatial_mamba_d2.training.guard import IterationGuard, require_finite_weights
from spatial_mamba_d2.training.resuming import ConfiguredSchedule, require_iterations_left
from spatial_mamba_d2.training.run_folder import METRICS, write_config

logger = logging.getLogger(__name__)


class AccumulatingTrainer(SimpleTrainer):
    """One iteration: forward and backward of each micro-batch, clipping, and the optimizer's step.

    Unlike Detectron2's ``AMPTrainer`` it runs on any device that has autocast. Losses are means
    over the micro-batches, so that accumulation changes memory, not the recipe.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
    ):
        super().__init__(model, data_loader, optimizer)
        self.cfg = cfg
        self.device_type = torch.device(cfg.MODEL.DEVICE).type
        self.precision = getattr(torch, cfg.SOLVER.AMP.PRECISION)
        self.accumulation_steps = cfg.SOLVER.ACCUMULATION_STEPS
        self.scaler = torch.amp.GradScaler(
            self.device_type,
            enabled=cfg.SOLVER.AMP.ENABLED and self.precision is torch.float16,
        )

    def run_step(self) -> None:
        start = time.perf_counter()
        micro_batches = [next(self._data_loader_iter) for _ in range(self.accumulation_steps)]
        data_time = time.perf_counter() - start
        # Sampling and drop path depend on the iteration, not on the past. Seeded after the images
        # are fetched, because the first fetch of a process draws a random number.
        if self.cfg.SEED >= 0:
            seed_all(derive_seed(self.cfg.SEED, "step", self.iter, comm.get_rank()))

        self.optimizer.zero_grad()
        losses: dict[str, torch.Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == self.accumulation_steps
            with contextlib.nullcontext() if is_last else self._no_sync():
                with torch.autocast(
                    self.device_type, self.precision, enabled=self.cfg.SOLVER.AMP.ENABLED
                ):
                    outputs = self._compute_losses(micro_batch)
                outputs = {name: value / self.accumulation_steps for name, value in outputs.items()}
                self.scaler.scale(sum(outputs.values())).backward()
            for name, value in outputs.items():
                losses[name] = losses.get(name, 0) + value.detach()
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.cfg, self.model.parameters())
        self.guard.check(self.iter, losses, norm, self.optimizer.param_groups[0]["lr"])
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _compute_losses(self, micro_batch: Any) -> dict[str, Any]:
        try:
            return self.model(micro_batch)
        except FloatingPointError as error:  # Detectron2's, about boxes and scores of proposals
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(self.guard.explain(self.iter, str(error), rate)) from error

    def _no_sync(self) -> contextlib.AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])

    def find_scale(self) -> float | None:
        """Of the loss, with float16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def close_loader(self) -> None:
        """End the processes that load data."""
        self._data_loader_iter_obj = None


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with our data, optimizer, step and checkpoints.

    Args:
        cfg: from :func:`~.config.load_config`.
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer.__init__, which would build Detectron2's own step, checkpointer and
        # data loader first; from here on this is its order.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        self.freezing = None
        if cfg.MODEL.FREEZE:  # before the optimizer, which gets what is trained
            self.freezing = FreezeByName(model, cfg.MODEL.FREEZE, cfg.SOLVER.UNFREEZE_ITER)
        optimizer = build_optimizer(cfg, model)
        datasets = load_training_datasets(cfg)
        # Also what is read only at the first evaluation, so that its faults are found now
        self.classes = datasets[0].classes
        for name in cfg.DATASETS.TEST:
            load_dataset(cfg, name, is_train=False, classes=self.classes)
        data_loader = build_train_loader(cfg, datasets)
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=[comm.get_local_rank()] if on_gpu else None,
        )
        self._trainer = AccumulatingTrainer(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            skip=tuple(cfg.MODEL.WEIGHTS_SKIP),
            classes=self.classes,
            config=cfg.dump(),
            trainer=weakref.proxy(self),
        )
        trainer = weakref.proxy(self)
        self._trainer.guard = IterationGuard(
            lambda: trainer.last_checkpoint,
            self._trainer.find_scale,
            torch.device(cfg.MODEL.DEVICE),
        )
        self._trainer.after_backward = lambda: trainer.after_backward()
        self.average = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self.checkpointer.average = self.average
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        # Detectron2's hook of evaluation calls self.test(cfg, model).
        self.test = self._evaluating(  # type: ignore[method-assign]
            partial(type(self).test, classes=self.classes)
        )
        self.iteration_is_complete = True
        self.register_hooks(self.build_hooks())

    @property
    def last_results(self) -> dict[str, Any] | None:
        """Results of the last evaluation, if there was one."""
        return getattr(self, "_last_eval_results", None)

    @property
    def network(self) -> nn.Module:
        """The model without its wrapper for several processes."""
        is_wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if is_wrapped else self.model

    @property
    def last_checkpoint(self) -> Path | None:
        """Of ``OUTPUT_DIR``, if there is one."""
        found = self.checkpointer.has_checkpoint()
        return Path(self.checkpointer.get_checkpoint_file()) if found else None

    @property
    def signum(self) -> int:
        """The signal that asked one of the processes to stop, or 0."""
        return self._trainer.guard.signum

    def _evaluating(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """``evaluate``, which finds the moving average of the weights if there is one."""
        average = self.average

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with average.applied() if average else contextlib.nullcontext():
                return evaluate(*args, **kwargs)

        return wrapped

    def train(self) -> Any:
        """Returns the results of the last evaluation, also of a training that ended early."""
        try:
            return super().train()
        except TrainingEnded:
            return self.last_results

    def before_step(self) -> None:
        self.iteration_is_complete = False
        super().before_step()

    def after_step(self) -> None:
        if comm.is_main_process() and self.iter == self.start_iter:
            write_config(self.cfg, self.cfg.OUTPUT_DIR)
        super().after_step()
        self.iteration_is_complete = True

    def after_train(self) -> None:
        super().after_train()
        self._trainer.close_loader()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of a checkpoint, with the learning rate and decay that the configuration says.

        Raises:
            ValueError: the checkpoint's training is longer than ``SOLVER.MAX_ITER``.
        """
        done = state_dict["iteration"] + 1
        require_iterations_left(done, self.max_iter, "SOLVER.MAX_ITER", "the last checkpoint")
        configured = ConfiguredSchedule(self._trainer.optimizer, self.scheduler)
        hooks_state = dict(state_dict.get("hooks", {}))
        others = hooks_state.get("WeightAverage")
        if others and self.average is None:  # the checkpoint has the average as its weights
            self.network.load_state_dict(hooks_state.pop("WeightAverage")["average"])
        super().load_state_dict({**state_dict, "hooks": hooks_state})
        if others and self.average:
            self.average.exchange()
        configured.restore(done)

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        sampler = self._trainer.data_loader.batch_sampler
        assert isinstance(sampler, ResumableBatchSampler)
        sampler.start = self.start_iter

    @property
    def _write_period(self) -> int:
        """Iterations between lines of metrics: 20, or fewer in a short training."""
        return max(1, min(20, self.max_iter // 50))

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's, with our evaluation and write period, and what keys and signals ask for."""
        built: list[HookBase | None] = [
            ThroughputLogger(self.cfg.SOLVER.IMS_PER_BATCH),
            self.freezing,
            self.average,
        ]
        for hook in super().build_hooks():
            is_evaluation = isinstance(hook, hooks.EvalHook)
            built.append(Evaluation(self.cfg, hook._func) if is_evaluation else hook)
            if is_evaluation and self.cfg.TEST.AUG.ENABLED:
                test = partial(self.test_augmented, self.cfg, self.model, self.classes)
                built.append(FinalEvaluation(self.cfg, self._evaluating(test), "_TTA"))
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = self._write_period
        if self.cfg.TEST.PATIENCE:
            metric, period = main_scores(self.cfg)[0], self.cfg.TEST.EVAL_PERIOD
            folder = self.cfg.OUTPUT_DIR
            built.append(EarlyStopping(metric, self.cfg.TEST.PATIENCE, period, folder))
        return [*built, StopOnSignal()]

    def build_writers(self) -> list[EventWriter]:
        """Console, metrics.json (medians over the iterations since the last line), TensorBoard."""
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            ProgressPrinter(self.max_iter),
            NamedWriter(
                JSONWriter(str(folder / METRICS), window_size=self._write_period), folder / METRICS
            ),
            NamedWriter(TensorboardXWriter(str(folder)), folder),
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%s parameters, %s of them trained", f"{total:,}", f"{trained:,}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_train_loader(cfg, load_training_datasets(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, load_dataset(cfg, dataset_name, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, load_dataset(cfg, dataset_name, is_train=False))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | None = None,
        classes: Sequence[str] | None = None,
        augmented: bool = False,
    ) -> dict[str, Any]:
        """Evaluate on each data set of ``DATASETS.TEST``, which is read once.

        The scores are also written, with the protocol, by :func:`~.evaluators.write_scores`.

        Args:
            classes: names of the model's, by which those of the data are matched; None: those of
                the data.
            augmented: whether ``model`` computes several views of an image, for the protocol.

        Returns:
            ``{task: {metric: value}}``, for several data sets by their names.

        Raises:
            FloatingPointError: weights are not finite.
            Stopped: a signal asked for it.
        """
        require_finite_weights(model.state_dict(), "weights to evaluate")
        results: dict[str, Any] = {}
        for number, name in enumerate(cfg.DATASETS.TEST):
            dataset = load_dataset(cfg, name, is_train=False, classes=classes)
            loader = StoppableLoader(build_test_loader(cfg, dataset))
            evaluator = evaluators[number] if evaluators else build_evaluator(cfg, dataset)
            results[name] = inference_on_dataset(with_rle_masks(model), loader, evaluator)
            if comm.is_main_process():
                logger.info("results for %s:", name)
                print_csv_format(results[name])
        if len(results) == 1:
            results = results[name]
        if comm.is_main_process() and results:
            path = write_scores(cfg, results, augmented=augmented)
            logger.info("%s: %s", path, describe_protocol(cfg, augmented=augmented))
        return results

    @classmethod
    def test_augmented(
        cls, cfg: CfgNode, model: nn.Module, classes: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """:meth:`test` with ``TEST.AUG``; the keys end in ``_TTA``, as in Detectron2's script."""
        logger.info("evaluation: %s", describe_protocol(cfg, augmented=True))
        cfg = without_resize(cfg)
        evaluators = [
            build_evaluator(cfg, load_dataset(cfg, name, is_train=False, classes=classes), "_TTA")
            for name in cfg.DATASETS.TEST
        ]
        augmented = build_augmented_model(cfg, model)
        results = cls.test(cfg, augmented, evaluators, classes, augmented=True)
        return {f"{key}_TTA": value for key, value in results.items()}
