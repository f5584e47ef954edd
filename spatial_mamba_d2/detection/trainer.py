"""Detectron2's training loop with our data, steps, checkpoints, evaluation and exact resume."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
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
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spatial_mamba_d2.data.samplers import ResumableBatchSampler
from spatial_mamba_d2.detection.backbone import compile_backbone
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
from spatial_mamba_d2.detection.loggers import build_logger
from spatial_mamba_d2.detection.mask_rle import with_rle_masks
from spatial_mamba_d2.detection.optimizer import (
    PLATEAU,
    build_optimizer,
    build_schedule,
    clip_gradients,
)
from spatial_mamba_d2.detection.scores import main_scores
from spatial_mamba_d2.detection.step import AccumulatingTrainer
from spatial_mamba_d2.detection.test_time_augmentation import (
    build_augmented_model,
    without_resize,
)
from spatial_mamba_d2.detection.training_hooks import (
    EarlyStopping,
    FreezeByName,
    PlateauSchedule,
    ThroughputLogger,
    TrainingEnded,
    WeightAverage,
)
from spatial_mamba_d2.training.guard import IterationGuard, require_finite_weights
from spatial_mamba_d2.training.resuming import ConfiguredSchedule, require_iterations_left
from spatial_mamba_d2.training.run_folder import METRICS, write_config

logger = logging.getLogger(__name__)


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
        if cfg.MODEL.COMPILE:
            compile_backbone(model)
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
        self._trainer = AccumulatingTrainer(
            model,
            data_loader,
            optimizer,
            device=cfg.MODEL.DEVICE,
            precision=getattr(torch, cfg.SOLVER.AMP.PRECISION) if cfg.SOLVER.AMP.ENABLED else None,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            seed=cfg.SEED,
            clip=partial(clip_gradients, cfg),
        )
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
        self.plateau = self._build_plateau(cfg)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        # Detectron2's hook of evaluation calls self.test(cfg, model).
        self.test = self._evaluating(  # type: ignore[method-assign]
            partial(type(self).test, classes=self.classes)
        )
        self.iteration_is_complete = True
        self.register_hooks(self.build_hooks())

    def _build_plateau(self, cfg: CfgNode) -> PlateauSchedule | None:
        if cfg.SOLVER.LR_SCHEDULER_NAME != PLATEAU:
            return None
        return PlateauSchedule(
            self.scheduler,
            cfg.SOLVER.GAMMA,
            main_scores(cfg)[0],
            cfg.SOLVER.PLATEAU_PATIENCE,
            cfg.TEST.EVAL_PERIOD,
            cfg.OUTPUT_DIR,
        )

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
        return self._trainer.signum

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
        if self.plateau:  # as of the checkpoint, which comes before the evaluation after it
            self.plateau.read_scores(done - 1)
            self.plateau.lower()
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
        built.append(self.plateau)
        if self.cfg.TEST.PATIENCE:
            metric, period = main_scores(self.cfg)[0], self.cfg.TEST.EVAL_PERIOD
            folder = self.cfg.OUTPUT_DIR
            built.append(EarlyStopping(metric, self.cfg.TEST.PATIENCE, period, folder))
        return [*built, StopOnSignal()]

    def build_writers(self) -> list[EventWriter]:
        """Console, metrics.json (medians over the iterations since the last line), and loggers."""
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            ProgressPrinter(self.max_iter),
            NamedWriter(
                JSONWriter(str(folder / METRICS), window_size=self._write_period), folder / METRICS
            ),
            *(build_logger(name, self.cfg, self._write_period) for name in self.cfg.SOLVER.LOGGERS),
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
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_schedule(cfg, optimizer)

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
