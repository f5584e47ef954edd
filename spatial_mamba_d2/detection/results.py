"""The detector's instances as :class:`~spatial_mamba_d2.prediction.Detections`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor

from spatial_mamba_d2.config import DETECTION_PATHS
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.detection.predict import Predictor
from spatial_mamba_d2.detection.visualize import draw_detections
from spatial_mamba_d2.prediction.masks import encode_bitmap
from spatial_mamba_d2.prediction.results import Detections

# The published models with these names of parameters
RECIPE = "mask_rcnn_spatial_mamba_"
# Data of the training is not needed, and may be elsewhere.
WITHOUT_DATA = [word for key in DETECTION_PATHS for word in (key, "")]


def sizes_of(state: Mapping[str, Tensor]) -> list[Any]:
    """``KEY VALUE`` pairs that the shapes of a Mask R-CNN's parameters tell."""
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    has_masks = any(name.startswith("roi_heads.mask_head.") for name in state)
    number = [] if scores is None else ["MODEL.ROI_HEADS.NUM_CLASSES", len(scores) - 1]
    return [*number, "MODEL.MASK_ON", has_masks]


class ImagePredictor:
    """A detector; see :class:`~.prediction.predictor.ImagePredictor`."""

    task = "detection"

    def __init__(self, cfg: CfgNode):
        self.predictor = Predictor(cfg)
        self.names: tuple[str, ...] = tuple(self.predictor.metadata.thing_classes)
        self.num_channels: int = cfg.INPUT.CHANNELS
        self.band_names: tuple[str, ...] = tuple(cfg.INPUT.BAND_NAMES)
        self.value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)
        self.has_masks = bool(cfg.MODEL.MASK_ON)

    def __call__(self, image: np.ndarray) -> Detections:
        return self.batch([image])[0]

    def batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        pairs = zip(self.predictor.detect(images), images, strict=True)
        return [self._detections(instances.to("cpu"), image) for instances, image in pairs]

    def _detections(self, instances: Instances, image: np.ndarray) -> Detections:
        masks = None
        if self.has_masks:
            masks = tuple(encode_bitmap(mask) for mask in instances.pred_masks.numpy())
        return Detections(
            boxes=instances.pred_boxes.tensor.numpy(),
            scores=instances.scores.numpy(),
            classes=instances.pred_classes.numpy(),
            masks=masks,
            names=self.names,
            image_size=image.shape[:2],
        )

    def draw(self, image: np.ndarray, result: Detections) -> np.ndarray:
        """``uint8[H, W, C]`` -> a drawing, RGB ``uint8[H', W', 3]``."""
        return draw_detections(image, result)
