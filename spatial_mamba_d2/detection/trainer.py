"""Detectron2's training loop with AdamW, mixed precision on any device, accumulation and resume."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.data import BatchStream, build_test_loader, build_train_loader
from spatial_mamba_d2.detection.datasets import evaluation_metadata
from spatial_mamba_d2.detection.optimizer import build_optimizer, clip_gradients
from spatial_mamba_d2.detection.visualize import PictureWriter

logger = logging.getLogger(__name__)


class Step(SimpleTrainer):
    """One iteration: forward and backward in parts, under autocast where asked, clip, step.

    Unlike Detectron2's ``AMPTrainer`` it runs on any device that has autocast. Losses are means
    over the parts, so that accumulation changes memory, not the recipe.
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
        self.parts = cfg.SOLVER.ACCUMULATION_STEPS
        per_process = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        if per_process % self.parts:
            raise ValueError(
                f"SOLVER.ACCUMULATION_STEPS must divide the {per_process} images per process, "
                f"got {self.parts}"
            )
        self.scaler = torch.amp.GradScaler(
            self.device_type,
            enabled=cfg.SOLVER.AMP.ENABLED and self.precision is torch.float16,
        )

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self.cfg.SEED >= 0:  # sampling and drop path depend on the iteration, not on the past
            seed_all_rng((self.cfg.SEED * 1_000_003 + self.iter * 1009 + comm.get_rank()) % 2**31)

        self.optimizer.zero_grad()
        size = len(batch) // self.parts
        losses: dict[str, torch.Tensor] = {}
        for part in range(self.parts):
            last = part == self.parts - 1
            with self._no_sync() if not last else contextlib.nullcontext():
                with torch.autocast(
                    self.device_type, self.precision, enabled=self.cfg.SOLVER.AMP.ENABLED
                ):
                    outputs = self.model(batch[part * size : (part + 1) * size])
                outputs = {name: value / self.parts for name, value in outputs.items()}
                self.scaler.scale(sum(outputs.values())).backward()
            for name, value in outputs.items():
                losses[name] = losses.get(name, 0) + value.detach()
        self.after_backward()
        self._write_metrics(losses, data_time)

        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.cfg, self.model.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _no_sync(self) -> contextlib.AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with our data, optimizer, step and checkpoints.

    Args:
        cfg: from :func:`~.config.load_config`, with data sets resolved.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        data_loader = build_train_loader(cfg)
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=[comm.get_local_rank()] if on_gpu else None,
        )
        self._trainer = Step(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            skip=tuple(cfg.MODEL.WEIGHTS_SKIP),
            classes=MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes"),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def last_results(self) -> dict[str, Any] | None:
        """What the last evaluation gave, if there was one."""
        return getattr(self, "_last_eval_results", None)

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        stream = self._trainer.data_loader.batch_sampler
        assert isinstance(stream, BatchStream)
        stream.start = self.start_iter

    @property
    def _write_period(self) -> int:
        """Iterations from one line of metrics to the next: 20, fewer in a short training."""
        return max(1, min(20, self.max_iter // 50))

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's, with our period of writing."""
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = self._write_period
        return built

    def build_writers(self) -> list[EventWriter]:
        """Console, metrics.json (medians over the iterations since the last line), TensorBoard."""
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(str(folder / "metrics.json"), window_size=self._write_period),
            TensorboardXWriter(str(folder)),
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        size = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%s parameters, %s of them trained", f"{size:,}", f"{trainable:,}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO evaluation by pycocotools and, where asked, prediction pictures."""
        metadata = evaluation_metadata(dataset_name)
        output_dir = Path(cfg.OUTPUT_DIR) / "inference"
        evaluators: Sequence[DatasetEvaluator] = [
            COCOEvaluator(
                metadata.name,
                tasks=("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
                output_dir=str(output_dir),
                max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                use_fast_impl=False,
            )
        ]
        if cfg.TEST.PICTURES:
            pictures = PictureWriter(
                metadata,
                Path(cfg.OUTPUT_DIR) / "pictures",
                cfg.TEST.PICTURES,
                cfg.TEST.PICTURES_SCORE_THRESH,
            )
            evaluators = [*evaluators, pictures]
        return DatasetEvaluators(evaluators)
