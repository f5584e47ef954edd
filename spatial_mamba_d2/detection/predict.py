"""Detection in single images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances

from spatial_mamba_d2.data.images import Draw, Drawer
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.detection.augmentation import build_augmentation
from spatial_mamba_d2.detection.classes import num_classes
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.limits import require_number
from spatial_mamba_d2.detection.mapper import to_input_format
from spatial_mamba_d2.detection.mask_rle import with_rle_masks
from spatial_mamba_d2.detection.visualize import draw_instances
from spatial_mamba_d2.models.checkpoints.loading import load_for_prediction


class Predictor:
    """A detector from a configuration and ``MODEL.WEIGHTS``, for images one at a time.

    Args:
        rle_masks: masks are :class:`~.mask_rle.RleMasks`, in bounded memory, instead of tensors
            ``bool[N, H, W]``.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, or do not fit.
    """

    def __init__(self, cfg: CfgNode, *, rle_masks: bool = False):
        require_number(cfg)
        model = build_model(cfg).eval()
        content = load_for_prediction(model, cfg.MODEL.WEIGHTS)
        self.model = with_rle_masks(model) if rle_masks else model
        self.metadata = _metadata(cfg, content.get("classes"))
        (self.resize,) = build_augmentation(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, image: np.ndarray) -> Instances:
        """Detect in an image, ``uint8[H, W, C]``, usually RGB; boxes and masks are in its frame."""
        return self.detect([image])[0]

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """The same for several images, in one batch, which is faster if they are of one size."""
        batch = []
        for image in images:
            height, width = image.shape[:2]
            resized = self.resize.get_transform(image).apply_image(image)
            resized = to_input_format(resized, self.input_format)
            tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
            batch.append({"image": tensor, "height": height, "width": width})
        return [output["instances"] for output in self.model(batch)]


def build_draw(config_file: str | Path | None, overrides: Sequence[str]) -> Draw:
    """Draws detections for :func:`~.images.visualize_images`.

    Raises:
        FileNotFoundError, ValueError: configuration or weights are unusable.
    """
    cfg = load_config(config_file, overrides)
    predictor, score_thresh = Predictor(cfg, rle_masks=True), cfg.TEST.PICTURES_SCORE_THRESH

    def draw(image: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
        instances = predictor(image)
        num_drawn = int((instances.scores >= score_thresh).sum())
        drawing = draw_instances(image, instances, predictor.metadata, score_thresh)
        return drawing, f"{num_drawn} objects"

    return Drawer(draw, cfg.INPUT.CHANNELS, build_pixel_range(cfg.INPUT.PIXEL_RANGE))


def _metadata(cfg: CfgNode, classes: list[str] | None) -> Metadata:
    """Class names from the checkpoint; else COCO's if their number fits, or numbers."""
    if classes is None:
        coco = MetadataCatalog.get("coco_2017_val").thing_classes
        number = num_classes(cfg)
        classes = coco if len(coco) == number else [f"class {i}" for i in range(number)]
    return Metadata(thing_classes=classes)
