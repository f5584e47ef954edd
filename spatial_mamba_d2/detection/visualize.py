"""Drawings of predictions, next to the ground truth if there is one."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.visualizer import ColorMode, Visualizer
from pycocotools.coco import COCO

from spatial_mamba_d2.data.drawing import as_rgb, enlargement
from spatial_mamba_d2.data.images import read_image, write_image
from spatial_mamba_d2.data.outputs import name_outputs
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.detection.mask_rle import RleMasks
from spatial_mamba_d2.prediction.results import Detections

logger = logging.getLogger(__name__)
_SHORTEST_PX = 480  # smaller images are enlarged to this, so that labels can be read


def draw_instances(
    image: np.ndarray, instances: Instances, metadata: Metadata, score_thresh: float
) -> np.ndarray:
    """Draw boxes, masks, class names and scores.

    Args:
        image: ``uint8[H, W, C]``, RGB or of other channels, see :func:`~.drawing.as_rgb`.
        instances: a detector's output in the frame of ``image``.
        score_thresh: lowest score to draw.

    Returns:
        RGB, ``uint8[H', W', 3]``, enlarged if the image is small.
    """
    visualizer = _visualizer(image, metadata)
    kept = instances[instances.scores >= score_thresh].to("cpu")
    if kept.has("pred_masks") and isinstance(kept.pred_masks, RleMasks):
        kept.pred_masks = kept.pred_masks.rles  # which Detectron2 decodes one by one
    return visualizer.draw_instance_predictions(kept).get_image()


def _visualizer(image: np.ndarray, metadata: Metadata) -> Visualizer:
    rgb = np.ascontiguousarray(as_rgb(image))
    return Visualizer(rgb, metadata, enlargement(image, _SHORTEST_PX), ColorMode.IMAGE)


def draw_detections(image: np.ndarray, result: Detections) -> np.ndarray:
    """All of ``result`` in its image, ``uint8[H, W, C]``; see :func:`draw_instances`."""
    instances = Instances(result.image_size)
    instances.pred_boxes = Boxes(torch.from_numpy(result.boxes))
    instances.scores = torch.from_numpy(result.scores)
    instances.pred_classes = torch.from_numpy(result.classes)
    if result.masks is not None:
        instances.pred_masks = torch.from_numpy(result.bitmaps())
    metadata = Metadata(thing_classes=list(result.names))
    return draw_instances(image, instances, metadata, score_thresh=0)


def draw_targets(image: np.ndarray, instances: Instances, classes: Sequence[str]) -> np.ndarray:
    """Draw what a detector is trained on in an image, RGB ``uint8[H, W, 3]``.

    Args:
        instances: ``gt_boxes``, ``gt_classes`` and maybe ``gt_masks``, in the frame of ``image``.
        classes: names by index.
    """
    visualizer = Visualizer(image, None, enlargement(image, _SHORTEST_PX), ColorMode.IMAGE)
    output = visualizer.overlay_instances(
        boxes=instances.gt_boxes,
        masks=instances.gt_masks if instances.has("gt_masks") else None,
        labels=[classes[index] for index in instances.gt_classes.tolist()],
    )
    return output.get_image()


def draw_ground_truth(
    image: np.ndarray, annotations: list[dict[str, Any]], coco: COCO, metadata: Metadata
) -> np.ndarray:
    """Draw COCO annotations of ``image``, ``uint8[H, W, C]``; see :func:`draw_instances`.

    Those without a mask are drawn as boxes.
    """
    classes = metadata.thing_dataset_id_to_contiguous_id
    names = metadata.thing_classes
    visualizer = _visualizer(image, metadata)
    x, y, w, h = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4).T
    output = visualizer.overlay_instances(
        boxes=np.stack((x, y, x + w, y + h), axis=1),
        masks=[
            coco.annToMask(a) if a.get("segmentation") else np.zeros(image.shape[:2], np.uint8)
            for a in annotations
        ],
        keypoints=_keypoints(annotations),
        labels=[
            names[classes[a["category_id"]]] + (" (crowd)" if a.get("iscrowd") else "")
            for a in annotations
        ],
    )
    return output.get_image()


def _keypoints(annotations: list[dict[str, Any]]) -> np.ndarray | None:
    """float[N, K, 3], x, y and whether it is visible; None if an annotation has none."""
    lists = [annotation.get("keypoints", []) for annotation in annotations]
    if not lists or not all(lists) or len({len(points) for points in lists}) != 1:
        return None
    return np.array(lists, float).reshape(len(lists), -1, 3) + (0.5, 0.5, 0)


class VisualizationWriter(DatasetEvaluator):
    """Writes ground truth and prediction, side by side, of the first images of a test set.

    Args:
        metadata: of a data set in COCO format.
        folder: where the drawings go.
        num_images: how many images to draw, over all processes.
        score_thresh: lowest score to draw.
        num_channels, value_range: see :func:`~spatial_mamba_d2.data.images.read_image`.
    """

    def __init__(
        self,
        metadata: Metadata,
        folder: Path,
        num_images: int,
        score_thresh: float,
        num_channels: int = 3,
        value_range: PixelRange | None = None,
    ):
        self.metadata = metadata
        self.folder = folder
        self.num_images = math.ceil(num_images / comm.get_world_size())
        self.score_thresh = score_thresh
        self.num_channels, self.value_range = num_channels, value_range
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            self.coco = COCO(metadata.json_file)
        root = Path(metadata.get("image_root") or "/")
        images = self.coco.dataset["images"]
        files = list(dict.fromkeys(os.path.abspath(root / i["file_name"]) for i in images))
        names = name_outputs([Path(file) for file in files], root, folder, (".png",))
        self.names = dict(zip(files, names, strict=True))

    def reset(self) -> None:
        self.num_written = 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            if self.num_written >= self.num_images:
                return
            image = read_image(record["file_name"], self.num_channels, self.value_range)
            annotations = self.coco.loadAnns(self.coco.getAnnIds(imgIds=[record["image_id"]]))
            pair = (
                draw_ground_truth(image, annotations, self.coco, self.metadata),
                draw_instances(image, output["instances"], self.metadata, self.score_thresh),
            )
            name = self.names[os.path.abspath(record["file_name"])]
            write_image(name.with_name(f"{name.name}.png"), np.concatenate(pair, axis=1))
            self.num_written += 1

    def evaluate(self) -> dict[str, Any]:
        logger.info("drawings (ground truth | prediction) are in %s", self.folder)
        return {}
