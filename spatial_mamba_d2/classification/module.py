"""The Lightning module of classification: mixing, loss, MESA, optimizer, schedule, evaluation."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fvcore.common.config import CfgNode
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from spatial_mamba_d2.classification.data import BROKEN, ClassificationData
from spatial_mamba_d2.config import backbone_kwargs
from spatial_mamba_d2.data.imagenet import EMPTY_CLASS, NO_CLASS
from spatial_mamba_d2.models import SpatialMambaClassifier, build_classifier
from spatial_mamba_d2.models.param_groups import adamw
from spatial_mamba_d2.training.module import Schedule, TrainingModule

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode) -> SpatialMambaClassifier:
    """The classifier as ``cfg.MODEL`` says, with initial weights."""
    variant = cfg.MODEL.SPATIAL_MAMBA.VARIANT
    return build_classifier(variant, cfg.MODEL.NUM_CLASSES, **backbone_kwargs(cfg))


class Classifier(TrainingModule):
    """The classifier with what the trainer needs to train and evaluate it.

    Its scores are ``top1`` and, for more than five classes, ``top5``, in percent, of the network
    that is evaluated; with a moving average also ``training_top1`` and ``training_top5`` of the
    network in training.

    Args:
        cfg: from :func:`~.config.load_config`.
        classes: names of the classes.
        epoch_iterations: iterations of an epoch, the unit of the schedule.
    """

    main_score = "top1"

    def __init__(self, cfg: CfgNode, classes: tuple[str, ...], epoch_iterations: int = 1):
        schedule = Schedule(
            iterations=cfg.SOLVER.EPOCHS * epoch_iterations,
            eval_period=cfg.TEST.EVAL_EPOCHS * epoch_iterations,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_EPOCHS * epoch_iterations,
        )
        super().__init__(cfg, build_model(cfg), schedule)
        self.classes = self.class_names = classes
        self.epoch_iterations = epoch_iterations
        self.loss = SoftTargetCrossEntropy()
        mixing = cfg.INPUT.MIXING
        self.mixup: Mixup | None = None
        if mixing.MIXUP or mixing.CUTMIX:
            self.mixup = Mixup(
                mixing.MIXUP,
                mixing.CUTMIX,
                prob=mixing.PROB,
                switch_prob=mixing.SWITCH_PROB,
                label_smoothing=cfg.SOLVER.LABEL_SMOOTHING,
                num_classes=cfg.MODEL.NUM_CLASSES,
            )
        self.accuracies: dict[str, MulticlassAccuracy] = {}

    def setup(self, stage: str) -> None:
        """Raises ValueError if the images of a micro-batch cannot be mixed in pairs."""
        solver = self.cfg.SOLVER
        num_micro_batches = self.trainer.world_size * solver.ACCUMULATION_STEPS
        micro_batch = solver.IMS_PER_BATCH // num_micro_batches
        if stage == "fit" and self.mixup is not None and micro_batch % 2:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of 2 x {self.trainer.world_size} "
                f"processes x {solver.ACCUMULATION_STEPS} SOLVER.ACCUMULATION_STEPS (Mixup pairs "
                f"images), got {solver.IMS_PER_BATCH}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = list(self.classes)

    def configure_optimizers(self) -> Any:
        """AdamW with the official groups: one-dimensional parameters and biases do not decay.

        Learning rates are those of the configuration times batch size / 512.
        """
        solver = self.cfg.SOLVER
        scale = solver.IMS_PER_BATCH / 512
        groups = param_groups_weight_decay(self.model, solver.WEIGHT_DECAY)
        optimizer = adamw(groups, solver.BASE_LR * scale, solver)
        warmup = solver.WARMUP_EPOCHS * self.epoch_iterations
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, self.schedule.iterations - warmup),
            lr_min=solver.MIN_LR * scale,
            warmup_lr_init=solver.WARMUP_LR * scale,
            warmup_t=warmup,
            warmup_prefix=True,
            cycle_limit=1,
            t_in_epochs=False,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.trainer.global_step)

    def mix(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and soft targets ``Tensor[B, K]`` of mixed and smoothed classes."""
        if self.mixup is not None:
            return self.mixup(image, target)
        smoothing = self.cfg.SOLVER.LABEL_SMOOTHING
        return image, mixup_target(target, self.cfg.MODEL.NUM_CLASSES, 1.0, smoothing)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        image, target = self.mix(*batch)
        logits = self.model(image).float()
        class_loss = self.loss(logits, target)
        losses = {"loss_class": class_loss.detach()}
        loss = class_loss
        mesa = self.cfg.SOLVER.MESA
        if mesa.WEIGHT and self.trainer.global_step >= self.mesa_start:
            mesa_loss = mesa.WEIGHT * self.loss(logits, self.mesa_targets(image))
            losses["loss_mesa"] = mesa_loss.detach()
            loss = loss + mesa_loss
        return self.report_losses(loss, losses)

    @property
    def mesa_start(self) -> int:
        """The iteration from which MESA takes part in the loss."""
        solver = self.cfg.SOLVER
        return int(solver.MESA.START * solver.EPOCHS) * self.epoch_iterations

    @torch.no_grad()
    def mesa_targets(self, image: Tensor) -> Tensor:
        """Class probabilities from the moving average, ``Tensor[B, K]``.

        MESA: Du et al., "Sharpness-Aware Training for Free", arXiv 2205.14083.
        """
        return self.evaluated_model(image).float().softmax(dim=-1)

    @property
    def data(self) -> ClassificationData:
        """The data that the trainer uses."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # which Lightning sets

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.num_images = self.skipped = 0
        num_classes = self.cfg.MODEL.NUM_CLASSES
        self.accuracies = {
            f"{name}top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro").to(
                self.device
            )
            for name in self.networks()
            for k in ((1, 5) if num_classes > 5 else (1,))
        }

    def networks(self) -> dict[str, nn.Module]:
        """What is evaluated, by the prefix of the names of its scores."""
        both = {"": self.evaluated_model, "training_": self.model}
        return both if self.ema is not None else {"": self.model}

    def validation_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> None:
        image, target, errors = batch
        for error in filter(None, errors):
            self.skipped += 1
            logger.warning("skipped broken image no. %d: %s", self.skipped, error)
        usable = target != BROKEN
        self.num_images += int(usable.sum())
        if not usable.any():
            return
        image, target = image[usable], target[usable]
        for name, network in self.networks().items():
            logits = network(image).float()
            for metric, accuracy in self.accuracies.items():
                if metric.rpartition("top")[0] == name:
                    accuracy.update(logits, target)

    def on_validation_epoch_end(self) -> None:
        num_images, broken = map(self.sum_over_processes, (self.num_images, self.skipped))
        scores = {
            name: 100 * float(accuracy.compute()) for name, accuracy in self.accuracies.items()
        }
        self.finish_evaluation(scores)
        if self.trainer.is_global_zero:
            protocol = {"short_px": self.cfg.TEST.SHORT_PX, "crop_px": self.cfg.INPUT.CROP_PX}
            left_out = dict(self.data.left_out[self.cfg.DATASETS.TEST])
            if broken:
                left_out["broken when read"] = broken
            skipped = sum(n for k, n in left_out.items() if k not in (NO_CLASS, EMPTY_CLASS))
            content = {
                "protocol": protocol,
                "images": num_images,
                "skipped_images": skipped,
                "skipped": left_out,  # by kind, also what was left out before the evaluation
            }
            path = self.write_scores(self.cfg.DATASETS.TEST, content)
            logger.info(
                "%s: %s%s; written to %s",
                self.evaluated_weights,
                ", ".join(f"{name} {value:.2f} %" for name, value in scores.items()),
                f", {skipped} images skipped" if skipped else "",
                path,
            )
