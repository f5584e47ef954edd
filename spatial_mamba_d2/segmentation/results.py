"""The segmentor's output as :class:`~spatial_mamba_d2.prediction.LabelMap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import Tensor

from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.prediction.results import LabelMap
from spatial_mamba_d2.segmentation.predict import Predictor
from spatial_mamba_d2.segmentation.visualize import draw_panels

RECIPE = "upernet_spatial_mamba_"
WITHOUT_DATA: list[str] = []  # a missing folder does not matter
_NUM_ADE20K = 150


def sizes_of(state: Mapping[str, Tensor]) -> list[Any]:
    """``KEY VALUE`` pairs that the shapes of a UPerNet's parameters tell."""
    num_classes, channels = state["decode_head.classify.weight"].shape[:2]
    pairs = ["MODEL.NUM_CLASSES", num_classes, "MODEL.UPERNET.CHANNELS", channels]
    if (auxiliary := state.get("auxiliary_head.classify.weight")) is not None:
        pairs += ["MODEL.UPERNET.AUX_CHANNELS", auxiliary.shape[1]]
    if num_classes != _NUM_ADE20K:  # other classes than the recipe's
        pairs += ["DATASETS.CLASSES", ""]
    return pairs


class ImagePredictor:
    """A segmentor; see :class:`~.prediction.predictor.ImagePredictor`."""

    task = "segmentation"

    def __init__(self, cfg: CfgNode):
        self.predictor = Predictor(cfg)
        self.names = self.predictor.classes.names
        self.num_channels: int = cfg.INPUT.CHANNELS
        self.band_names: tuple[str, ...] = tuple(cfg.INPUT.BAND_NAMES)
        self.value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)

    def __call__(self, image: np.ndarray) -> LabelMap:
        return self.batch([image])[0]

    def batch(self, images: Sequence[np.ndarray]) -> list[LabelMap]:
        labels = self.predictor.label(images)
        return [LabelMap(label=label, names=self.names) for label in labels]

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each class and pixel, ``float32[K, H, W]`` of each image."""
        protocol = self.predictor.protocol
        scores = self.predictor.scores(images)
        if len(protocol.scales) * (1 + protocol.flip) == 1:
            scores = scores.softmax(1)  # of several views, they are probabilities already
        return list(scores.cpu().numpy())

    def draw(self, image: np.ndarray, result: LabelMap) -> np.ndarray:
        """``uint8[H, W, C]`` -> a drawing, RGB ``uint8[H', W', 3]``."""
        return draw_panels(image, {"prediction": result.label}, self.predictor.classes)
