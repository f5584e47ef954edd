"""The Lightning module of segmentation: loss, optimizer, schedule, evaluation."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.config import backbone_kwargs
from spatial_mamba_d2.data.images import read_image, write_image
from spatial_mamba_d2.data.label_maps import Classes
from spatial_mamba_d2.data.segmentation_transforms import IGNORE
from spatial_mamba_d2.models.param_groups import build_adamw
from spatial_mamba_d2.models.upernet import UPerNet, build_upernet, resize
from spatial_mamba_d2.segmentation.inference import build_protocol, segment
from spatial_mamba_d2.segmentation.metrics import Confusion, format_table
from spatial_mamba_d2.segmentation.visualize import draw_panels
from spatial_mamba_d2.training.module import Schedule, TrainingModule

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode) -> UPerNet:
    """UPerNet as ``cfg.MODEL`` says, with initial weights."""
    upernet = cfg.MODEL.UPERNET
    return build_upernet(
        cfg.MODEL.SPATIAL_MAMBA.VARIANT,
        cfg.MODEL.NUM_CLASSES,
        channels=upernet.CHANNELS,
        aux_channels=upernet.AUX_CHANNELS,
        dropout=upernet.DROPOUT,
        **backbone_kwargs(cfg),
    )


def cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over all pixels, of which the ignored ones contribute 0, as in mmsegmentation.

    So the mean over processes and micro-batches is the mean over the batch.

    Args:
        logits: ``Tensor[B, K, h, w]``, resized to the target.
        target: class indices and :data:`IGNORE`, ``Tensor[B, H, W]``.
        weights: factor for the loss of each class, ``Tensor[K]``.
    """
    logits = resize(logits, target.shape[-2:])
    losses = F.cross_entropy(logits, target.long(), weights, ignore_index=IGNORE, reduction="none")
    return losses.mean()


def learning_rate_factor(
    iteration: int, warmup_iters: int, warmup_factor: float, max_iter: int
) -> float:
    """Linear from ``warmup_factor`` to 1, then linear to 0 in the last iteration.

    mmengine's ``LinearLR`` followed by ``PolyLR`` of power 1.
    """
    if iteration < warmup_iters:
        progress = iteration / max(1, warmup_iters - 1)
        return warmup_factor + (1 - warmup_factor) * progress
    return max(0.0, 1 - (iteration - warmup_iters) / max(1, max_iter - warmup_iters - 1))


class Segmentor(TrainingModule):
    """UPerNet with what the trainer needs to train and evaluate it.

    Its scores are ``{"mIoU": ..., "mAcc": ..., "aAcc": ...}`` in percent.

    Args:
        cfg: from :func:`~.config.load_config`.
        classes: of the data set.
    """

    main_score = "mIoU"
    class_weights: Tensor | None

    def __init__(self, cfg: CfgNode, classes: Classes):
        schedule = Schedule(
            iterations=cfg.SOLVER.MAX_ITER,
            eval_period=cfg.TEST.EVAL_PERIOD,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        )
        super().__init__(cfg, build_model(cfg), schedule)
        self.classes, self.class_names = classes, classes.names
        self.protocol = build_protocol(cfg)
        weights = cfg.MODEL.CLASS_WEIGHTS
        self.register_buffer(
            "class_weights", torch.tensor(weights, dtype=torch.float32) if weights else None
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = list(self.classes.names)
        checkpoint["palette"] = [list(color) for color in self.classes.palette]

    def configure_optimizers(self) -> Any:
        solver = self.cfg.SOLVER
        optimizer = build_adamw(self.model, solver)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda iteration: learning_rate_factor(
                iteration, solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.MAX_ITER
            ),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        image, target = batch
        logits, auxiliary = self.model(image)
        decode = cross_entropy(logits, target, self.class_weights)
        aux = cross_entropy(auxiliary, target, self.class_weights)
        loss = decode + self.cfg.MODEL.UPERNET.AUX_WEIGHT * aux
        return self.report_losses(loss, {"loss_decode": decode, "loss_aux": aux})

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.confusion = Confusion(self.cfg.MODEL.NUM_CLASSES, self.device)
        self.skipped = 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if "error" in batch:
            self.skipped += 1
            logger.warning("skipped broken pair no. %d: %s", self.skipped, batch["error"])
            return
        truth = batch["label"]
        views, size = batch["views"], truth.shape
        prediction = segment(self.evaluated_model, views, size, self.protocol).argmax(0)
        self.confusion.update(prediction, truth)
        if batch["index"] < self.cfg.TEST.PICTURES:
            maps = {"ground truth": _array(truth), "prediction": _array(prediction)}
            drawing = draw_panels(read_image(batch["file"]), maps, self.classes)
            name = f"{Path(batch['file']).stem}.png"
            write_image(Path(self.cfg.OUTPUT_DIR, "pictures", name), drawing)

    def on_validation_epoch_end(self) -> None:
        self.confusion.sum_over_processes()
        skipped = self.sum_over_processes(self.skipped)
        if not self.confusion.matrix.any():
            raise ValueError(
                f"DATASETS.TEST must have labelled pixels, got none in {self.cfg.DATASETS.ROOT}"
            )
        self.finish_evaluation(self.confusion.scores())
        if self.trainer.is_global_zero:
            self._report(skipped)

    def _report(self, skipped: int) -> None:
        """Log the table; write scores, protocol and confusion matrix to the output folder."""
        iou, accuracy = (values.tolist() for values in self.confusion.per_class())
        content = {
            "protocol": asdict(self.protocol),
            "skipped_images": skipped,
            "classes": {
                name: {"IoU": i if i == i else None, "Acc": a if a == a else None}
                for name, i, a in zip(self.classes.names, iou, accuracy, strict=True)
            },
            "confusion": self.confusion.matrix.tolist(),  # rows the truth, columns the prediction
        }
        path = self.write_scores(f"{self.protocol.name}_{self.protocol.mode}", content)
        logger.info(
            "%s, %s%s\n%s\nwritten to %s",
            self.evaluated_weights,
            self.protocol,
            f", {skipped} images skipped" if skipped else "",
            format_table(self.confusion, self.classes.names),
            path,
        )


def _array(label: Tensor) -> np.ndarray:
    return label.to("cpu", torch.uint8).numpy()
