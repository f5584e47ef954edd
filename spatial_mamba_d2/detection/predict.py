"""Detection in single images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances

from spatial_mamba_d2.data.coco import read_image
from spatial_mamba_d2.data.images import find_images, write_picture
from spatial_mamba_d2.detection.augmentation import build_augmentation
from spatial_mamba_d2.detection.checkpoint import load_detector_weights
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.visualize import draw_instances
from spatial_mamba_d2.models import read_checkpoint

logger = logging.getLogger(__name__)


class Predictor:
    """A detector from a configuration and ``MODEL.WEIGHTS``, for images one at a time.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, or do not fit.
    """

    def __init__(self, cfg: CfgNode):
        if not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS must name a detector's checkpoint, got ''")
        self.model = build_model(cfg).eval()
        content = read_checkpoint(cfg.MODEL.WEIGHTS)
        report = load_detector_weights(self.model, content, source_name=cfg.MODEL.WEIGHTS)
        if report.new:
            raise ValueError(f"MODEL.WEIGHTS must hold a whole detector:\n{report}")
        self.metadata = _metadata(cfg, content.get("classes"))
        (self.resize,) = build_augmentation(cfg, is_train=False)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detect in an RGB image, ``uint8[H, W, 3]``; boxes and masks are in its frame."""
        height, width = image.shape[:2]
        resized = self.resize.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return self.model([{"image": tensor, "height": height, "width": width}])[0]["instances"]


def draw_folder(
    config_file: str, overrides: Sequence[str], inputs: Sequence[Path], output: Path
) -> list[Path]:
    """Write a picture with the detections for each image in ``inputs``; broken images are reported.

    Returns:
        the pictures.

    Raises:
        FileNotFoundError, ValueError: no image, or configuration or weights are unusable.
    """
    images = find_images(inputs)
    cfg = load_config(config_file, overrides)
    predictor = Predictor(cfg)
    pictures, broken = [], 0
    for path in images:
        try:
            image = read_image(path)
        except ValueError as error:
            broken += 1
            print(f"skipped: {error}")
            continue
        instances = predictor(image)
        picture = output / f"{path.stem}.png"
        write_picture(
            picture,
            draw_instances(image, instances, predictor.metadata, cfg.TEST.PICTURES_SCORE_THRESH),
        )
        shown = int((instances.scores >= cfg.TEST.PICTURES_SCORE_THRESH).sum())
        print(f"{path}: {shown} objects -> {picture}")
        pictures.append(picture)
    print(
        f"{len(pictures)} pictures in {output}" + (f", {broken} images skipped" if broken else "")
    )
    return pictures


def _metadata(cfg: CfgNode, classes: list[str] | None) -> Metadata:
    """Class names from the checkpoint; without, COCO's where their number fits, or numbers."""
    if classes is None:
        coco = MetadataCatalog.get("coco_2017_val").thing_classes
        number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        classes = coco if len(coco) == number else [f"class {i}" for i in range(number)]
    return Metadata(thing_classes=classes)
