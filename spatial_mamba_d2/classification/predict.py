"""Classification of single images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from timm.data import ImageNetInfo

from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.data import pixel_statistics
from spatial_mamba_d2.classification.module import build_model
from spatial_mamba_d2.classification.visualize import draw_classes
from spatial_mamba_d2.data.imagenet import build_test_transform, load_classes
from spatial_mamba_d2.data.images import Draw, Drawer
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.models.checkpoints.loading import load_for_prediction

TOP = 5


class Predictor:
    """A classifier from a configuration and ``MODEL.WEIGHTS``, for images one at a time.

    Attributes:
        classes: names, from the checkpoint, or else of the configuration.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, or do not fit.
    """

    def __init__(self, cfg: CfgNode):
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.model = build_model(cfg).eval().to(self.device)
        content = load_for_prediction(self.model, cfg.MODEL.WEIGHTS)
        data = cfg.DATASETS
        self.classes = tuple(content.get("classes") or ()) or load_classes(
            data.CLASSES, data.ROOT, data.TRAIN, cfg.MODEL.NUM_CLASSES
        )
        self.transform = build_test_transform(
            cfg.TEST.SHORT_PX, cfg.INPUT.CROP_PX, *pixel_statistics(cfg)
        )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """RGB image, ``uint8[H, W, 3]`` -> probability of each class, ``float32[K]``."""
        return self.classify([image])[0]

    @torch.no_grad()
    def classify(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The same for several images, in one batch: ``float32[N, K]``."""
        views = torch.stack([self.transform(Image.fromarray(image)) for image in images])
        return self.model(views.to(self.device)).float().softmax(dim=-1).cpu().numpy()


def class_words(names: Sequence[str]) -> tuple[str, ...]:
    """The names of classes, with words in place of ImageNet's WordNet ids."""
    info = ImageNetInfo()
    words = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    return tuple(words.get(name, name) for name in names)


def build_draw(config_file: str | Path | None, overrides: Sequence[str]) -> Draw:
    """Draws the most probable classes for :func:`~.images.visualize_images`.

    WordNet ids are drawn as words. Unlike in evaluation, images are upright.

    Raises:
        FileNotFoundError, ValueError: configuration or weights are unusable.
    """
    cfg = load_config(config_file, overrides)
    predictor = Predictor(cfg)
    names = class_words(predictor.classes)

    def draw(image: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
        probabilities = predictor(image)
        lines = [f"{names[i]} {probabilities[i]:.1%}" for i in probabilities.argsort()[::-1][:TOP]]
        return draw_classes(image, lines), lines[0]

    return Drawer(draw, value_range=build_pixel_range(cfg.INPUT.PIXEL_RANGE))
