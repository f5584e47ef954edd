"""Segmentation of single images, also without ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from spatial_mamba_d2.data.ade20k import load_classes
from spatial_mamba_d2.data.class_indices import as_label_array
from spatial_mamba_d2.data.images import Draw, Drawer, write_image
from spatial_mamba_d2.data.label_maps import Classes
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.models.checkpoints.loading import load_for_prediction
from spatial_mamba_d2.models.upernet import SCORES_BYTES
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.data import build_test_transform, label_format
from spatial_mamba_d2.segmentation.inference import build_protocol, segment_batch
from spatial_mamba_d2.segmentation.large_images import predict
from spatial_mamba_d2.segmentation.module import build_model
from spatial_mamba_d2.segmentation.visualize import draw_panels


class Predictor:
    """A segmentor from a configuration and ``MODEL.WEIGHTS``, for images one at a time.

    Attributes:
        classes: names and colours, from the checkpoint, or else of the configuration.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, or do not fit.
    """

    def __init__(self, cfg: CfgNode):
        self.num_classes = cfg.MODEL.NUM_CLASSES
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.model = build_model(cfg).eval().to(self.device)
        content = load_for_prediction(self.model, cfg.MODEL.WEIGHTS)
        self.classes = _classes(content, cfg)
        self.protocol = build_protocol(cfg)
        self.transform = build_test_transform(cfg, self.protocol)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Image, ``uint8[H, W, C]``, usually RGB -> class indices, ``[H, W]``."""
        views = [view.to(self.device) for view in self.transform(image)]
        label = predict(self.model, views, image.shape[:2], self.protocol, self.num_classes)
        return as_label_array(label, self.num_classes)

    def label(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same for several images of one size, in one batch if their scores are not large."""
        height, width = images[0].shape[:2]
        if len(images) == 1 or 4 * self.num_classes * height * width * len(images) > SCORES_BYTES:
            return [self(image) for image in images]
        return list(self.scores(images).argmax(1).to(torch.uint8).cpu().numpy())

    def scores(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Of images of one size in one batch: see :func:`~.inference.segment_batch`."""
        views = zip(*map(self.transform, images), strict=True)
        batches = [torch.stack(view).to(self.device) for view in views]
        return segment_batch(self.model, batches, images[0].shape[:2], self.protocol)


def _classes(checkpoint: dict[str, Any], cfg: CfgNode) -> Classes:
    if "classes" in checkpoint:
        return Classes(
            tuple(checkpoint["classes"]), tuple(tuple(color) for color in checkpoint["palette"])
        )
    return load_classes(cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.MODEL.NUM_CLASSES)


def label_folder(config_file: str | Path | None, overrides: Sequence[str]) -> Path | None:
    """The folder for predicted label maps, ``TEST.SAVE_LABELS``, if there is to be one."""
    folder = load_config(config_file, overrides).TEST.SAVE_LABELS
    return Path(folder) if folder else None


def build_draw(
    config_file: str | Path | None, overrides: Sequence[str], output: Path | None = None
) -> Draw:
    """Draws segmentations for :func:`~.images.visualize_images`, and writes ``NAME_label.png``.

    A label file holds class indices as its integers. With ``TEST.SAVE_LABELS``, ``NAME.png`` in
    that folder has them in the values or colours that the label files of the data store.

    Args:
        output: the folder of the drawings, if there is such a folder.

    Raises:
        FileNotFoundError, ValueError: configuration or weights are unusable.
    """
    cfg = load_config(config_file, overrides)
    predictor = Predictor(cfg)
    labels = None
    if cfg.TEST.SAVE_LABELS and output is not None:
        labels = label_format(cfg, predictor.classes.names)
        labels.to_stored(np.zeros((1, 1), np.uint8))  # or an error that says what is missing

    def draw(image: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
        label = predictor(image)
        write_image(path.with_name(f"{path.name}_label.png"), label)
        if labels is not None and output is not None:
            stored = Path(cfg.TEST.SAVE_LABELS) / path.relative_to(output)
            write_image(stored.with_name(f"{stored.name}.png"), labels.to_stored(label))
        shares = np.bincount(label.ravel()) / label.size
        largest = shares.argsort()[:-4:-1]
        summary = ", ".join(f"{predictor.classes.names[i]} {shares[i]:.0%}" for i in largest)
        return draw_panels(image, {"prediction": label}, predictor.classes), summary

    return Drawer(draw, cfg.INPUT.CHANNELS, build_pixel_range(cfg.INPUT.PIXEL_RANGE))
