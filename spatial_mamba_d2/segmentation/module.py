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

from spatial_mamba_d2.config import backbone_kwargs
from spatial_mamba_d2.data.class_indices import as_label_array
from spatial_mamba_d2.data.images import files_below, read_image, write_image
from spatial_mamba_d2.data.label_maps import Classes
from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.data.pair_files import LABEL_WITHOUT_IMAGE, data_folders
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.models.param_groups import build_adamw
from spatial_mamba_d2.models.upernet import UPerNet, build_upernet
from spatial_mamba_d2.segmentation.config import OURS
from spatial_mamba_d2.segmentation.data import SegmentationData
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.large_images import predict
from spatial_mamba_d2.segmentation.losses import (
    balancing_weights,
    build_pixel_loss,
    dice_loss,
    lovasz_loss,
)
from spatial_mamba_d2.segmentation.metrics import Confusion, format_table
from spatial_mamba_d2.segmentation.visualize import draw_panels
from spatial_mamba_d2.training.module import Schedule, TrainingModule

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode) -> UPerNet:
    """UPerNet as ``cfg.MODEL`` says, with initial weights."""
    upernet, name = cfg.MODEL.UPERNET, cfg.MODEL.BACKBONE.NAME
    return build_upernet(
        cfg.MODEL.SPATIAL_MAMBA.VARIANT if name == OURS else name,
        cfg.MODEL.NUM_CLASSES,
        channels=upernet.CHANNELS,
        aux_channels=upernet.AUX_CHANNELS,
        dropout=upernet.DROPOUT,
        in_chans=cfg.INPUT.CHANNELS,
        **backbone_kwargs(cfg),
    )


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
        self.value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)
        self.pixel_loss = build_pixel_loss(cfg)
        weights = tuple(cfg.MODEL.CLASS_WEIGHTS)
        self.balance_classes = weights == ("auto",)
        fixed = weights and not self.balance_classes
        self.register_buffer(
            "class_weights", torch.tensor(weights, dtype=torch.float32) if fixed else None
        )

    @property
    def data(self) -> SegmentationData:
        """The data that the trainer uses."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # which Lightning sets

    def setup(self, stage: str) -> None:
        """Check what depends on processes and data.

        Raises:
            ValueError: a process has too few images at a time, or a predicted label map would
                replace a file of the data.
        """
        if stage == "fit":
            self._check_micro_batch()
            if self.balance_classes:
                counts = self.data.checked[self.cfg.DATASETS.TRAIN].counts
                weights = balancing_weights(counts.pixels)
                logger.info("MODEL.CLASS_WEIGHTS: %s", ", ".join(f"{w:.3g}" for w in weights))
                self.class_weights = torch.tensor(weights, dtype=torch.float32)
        if self.cfg.TEST.SAVE_LABELS and self.cfg.DATASETS.TEST:
            self._check_saving()

    def _check_micro_batch(self) -> None:
        solver, world_size = self.cfg.SOLVER, self.trainer.world_size
        synchronized = self.cfg.MODEL.SPATIAL_MAMBA.BN == "sync" and world_size > 1
        num_micro_batches = world_size * solver.ACCUMULATION_STEPS  # of an iteration
        if solver.IMS_PER_BATCH == num_micro_batches and not synchronized:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be at least 2 x {world_size} processes x "
                f"{solver.ACCUMULATION_STEPS} SOLVER.ACCUMULATION_STEPS, because batch norm needs "
                f"2 images at a time, or MODEL.SPATIAL_MAMBA.BN sync, got {solver.IMS_PER_BATCH}"
            )

    def _check_saving(self) -> None:
        data = self.data
        data.labels.to_stored(np.zeros((1, 1), np.uint8))  # or an error that says what is missing
        inputs = [file for pairs in data.splits.values() for p in pairs for file in p[:2]]
        # Those of splits that are not in use, too
        inputs += [
            f for folder in data_folders(data.root, data.layout) for f in files_below(folder)
        ]
        outputs = [self._label_path(pair.name) for pair in data.splits[data.test]]
        check_outputs(outputs, inputs, overwrite=True)
        if existing := [path for path in outputs if path.exists()]:
            logger.warning(
                "TEST.SAVE_LABELS: %d files will be replaced, the first: %s",
                len(existing),
                existing[0],
            )

    def _label_path(self, name: str) -> Path:
        return Path(self.cfg.TEST.SAVE_LABELS, f"{name}.png")

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
        decode = self.pixel_loss(logits, target, self.class_weights)
        aux = self.pixel_loss(auxiliary, target, self.class_weights)
        loss = decode + self.cfg.MODEL.UPERNET.AUX_WEIGHT * aux
        terms = {"loss_decode": decode, "loss_aux": aux}
        if self.cfg.MODEL.DICE_WEIGHT:
            dice = self.cfg.MODEL.DICE_WEIGHT * dice_loss(logits, target)
            loss = loss + dice
            terms["loss_dice"] = dice
        if self.cfg.MODEL.LOVASZ_WEIGHT:
            lovasz = self.cfg.MODEL.LOVASZ_WEIGHT * lovasz_loss(logits, target)
            loss = loss + lovasz
            terms["loss_lovasz"] = lovasz
        return self.report_losses(loss, terms)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.confusion = Confusion(self.cfg.MODEL.NUM_CLASSES, self.device)
        self.num_images = self.skipped = 0

    def _array(self, label: Tensor) -> np.ndarray:
        return as_label_array(label, len(self.classes.names))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if "error" in batch:
            self.skipped += 1
            logger.warning("skipped broken pair no. %d: %s", self.skipped, batch["error"])
            return
        truth = batch["label"]
        prediction = predict(
            self.evaluated_model,
            batch["views"],
            truth.shape,
            self.protocol,
            self.cfg.MODEL.NUM_CLASSES,
        )
        self.num_images += 1
        self.confusion.update(prediction, truth)
        if self.cfg.TEST.SAVE_LABELS:
            stored = self.data.labels.to_stored(self._array(prediction))
            write_image(self._label_path(batch["name"]), stored)
        if batch["index"] < self.cfg.TEST.PICTURES:
            maps = {
                "ground truth": self._array(truth),
                "prediction": self._array(prediction),
            }
            image = read_image(batch["file"], self.cfg.INPUT.CHANNELS, self.value_range)
            drawing = draw_panels(image, maps, self.classes)
            write_image(Path(self.cfg.OUTPUT_DIR, "pictures", f"{batch['name']}.png"), drawing)

    def on_validation_epoch_end(self) -> None:
        self.confusion.sum_over_processes()
        num_images, broken = map(self.sum_over_processes, (self.num_images, self.skipped))
        if not self.confusion.matrix.any():
            raise ValueError(
                f"DATASETS.TEST must have labelled pixels, got none in {self.cfg.DATASETS.ROOT}"
            )
        self.finish_evaluation(self.confusion.scores())
        if self.trainer.is_global_zero:
            self._report(num_images, broken)

    def _report(self, num_images: int, broken: int) -> None:
        """Log the table; write scores, protocol and confusion matrix to the output folder.

        Args:
            num_images: that were scored.
            broken: that turned out to be unusable when they were read.
        """
        left_out = dict(self.data.checked[self.cfg.DATASETS.TEST].left_out)
        if broken:
            left_out["broken when read"] = broken
        skipped = sum(n for kind, n in left_out.items() if kind != LABEL_WITHOUT_IMAGE)
        iou, accuracy = (values.tolist() for values in self.confusion.per_class())
        content = {
            "protocol": asdict(self.protocol),
            "images": num_images,
            "skipped_images": skipped,
            "skipped": left_out,  # by kind, also what was left out before the evaluation
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
