"""Segmentation of single images, also without ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from spatial_mamba_d2.data.ade20k import load_classes
from spatial_mamba_d2.data.images import Draw, Drawer, write_image
from spatial_mamba_d2.data.label_maps import Classes
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.data.segmentation_transforms import TestTransform
from spatial_mamba_d2.models.checkpoints.loading import load_for_prediction
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol, segment
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
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.model = build_model(cfg).eval().to(self.device)
        content = load_for_prediction(self.model, cfg.MODEL.WEIGHTS)
        self.classes = _classes(content, cfg)
        self.protocol = build_protocol(cfg)
        self.transform = TestTransform(
            cfg.INPUT.SHORT_PX,
            cfg.INPUT.LONG_PX,
            self.protocol.scales,
            tuple(cfg.MODEL.PIXEL_MEAN),
            tuple(cfg.MODEL.PIXEL_STD),
            self.protocol.scales_of,
        )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """RGB image, ``uint8[H, W, 3]`` -> class indices, ``uint8[H, W]``."""
        views = [view.to(self.device) for view in self.transform(image)]
        scores = segment(self.model, views, image.shape[:2], self.protocol)
        return scores.argmax(0).to("cpu", torch.uint8).numpy()


def _classes(checkpoint: dict[str, Any], cfg: CfgNode) -> Classes:
    if "classes" in checkpoint:
        return Classes(
            tuple(checkpoint["classes"]), tuple(tuple(color) for color in checkpoint["palette"])
        )
    return load_classes(cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.MODEL.NUM_CLASSES)


def build_draw(config_file: str | Path | None, overrides: Sequence[str]) -> Draw:
    """Draws segmentations for :func:`~.images.visualize_images`, and writes ``NAME_label.png``.

    A label file holds class indices as its integers.

    Raises:
        FileNotFoundError, ValueError: configuration or weights are unusable.
    """
    cfg = load_config(config_file, overrides)
    predictor = Predictor(cfg)

    def draw(image: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
        label = predictor(image)
        write_image(path.with_name(f"{path.name}_label.png"), label)
        shares = np.bincount(label.ravel()) / label.size
        largest = shares.argsort()[:-4:-1]
        summary = ", ".join(f"{predictor.classes.names[i]} {shares[i]:.0%}" for i in largest)
        return draw_panels(image, {"prediction": label}, predictor.classes), summary

    return Drawer(draw, value_range=build_pixel_range(cfg.INPUT.PIXEL_RANGE))
