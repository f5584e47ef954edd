"""The classifier's output as :class:`~spatial_mamba_d2.prediction.ClassScores`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import Tensor

from spatial_mamba_d2.classification.predict import Predictor, class_words
from spatial_mamba_d2.classification.visualize import draw_scores
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.prediction.results import ClassScores

RECIPE = "spatial_mamba_"
WITHOUT_DATA: list[str] = []


def sizes_of(state: Mapping[str, Tensor]) -> list[Any]:
    """``KEY VALUE`` pairs that the shapes of a classifier's parameters tell."""
    return ["MODEL.NUM_CLASSES", len(state["head.weight"])]


class ImagePredictor:
    """A classifier; see :class:`~.prediction.predictor.ImagePredictor`."""

    task = "classification"
    num_channels = 3

    def __init__(self, cfg: CfgNode):
        self.predictor = Predictor(cfg)
        self.names = class_words(self.predictor.classes)
        self.value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)

    def __call__(self, image: np.ndarray) -> ClassScores:
        return self.batch([image])[0]

    def batch(self, images: Sequence[np.ndarray]) -> list[ClassScores]:
        return [
            ClassScores(scores=scores, names=self.names, image_size=image.shape[:2])
            for scores, image in zip(self.predictor.classify(images), images, strict=True)
        ]

    def draw(self, image: np.ndarray, result: ClassScores) -> np.ndarray:
        """RGB ``uint8[H, W, 3]`` -> a drawing, RGB ``uint8[H', W', 3]``."""
        return draw_scores(image, result)
