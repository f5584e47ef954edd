"""Evaluators of detection: COCO's scores, panoptic quality, drawings."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.evaluation.testing import flatten_results_dict

from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.detection.coco_evaluation import CocoEvaluator
from spatial_mamba_d2.detection.data import (
    DetectionDataset,
    drawing_metadata,
    register_for_evaluation,
)
from spatial_mamba_d2.detection.panoptic import PanopticEvaluator, build_ground_truth
from spatial_mamba_d2.detection.unused_keys import is_panoptic
from spatial_mamba_d2.detection.visualize import VisualizationWriter
from spatial_mamba_d2.system.atomic import replacing


def build_evaluator(cfg: CfgNode, dataset: DetectionDataset, suffix: str = "") -> DatasetEvaluators:
    """COCO evaluation by ``TEST.EVALUATOR``, panoptic quality, and drawings if asked for.

    Args:
        suffix: of the folders that results are written to.
    """
    metadata = register_for_evaluation(cfg, dataset)
    # Each of several data sets has its own files.
    several = len(cfg.DATASETS.TEST) > 1
    place = re.sub(r"[^\w.-]+", "_", dataset.name).strip("_") if several else ""
    output_dir = Path(cfg.OUTPUT_DIR)
    evaluators: list[DatasetEvaluator] = [
        CocoEvaluator(
            metadata.name,
            (
                "bbox",
                *(["segm"] if cfg.MODEL.MASK_ON else []),
                *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else []),
            ),
            output_dir / f"inference{suffix}" / place,
            evaluator=cfg.TEST.EVALUATOR,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    ]
    if is_panoptic(cfg):
        truth = build_ground_truth(cfg, MetadataCatalog.get(dataset.name))
        evaluators.append(PanopticEvaluator(cfg, dataset.records, truth))
    if cfg.TEST.PICTURES:
        folder, threshold = output_dir / f"pictures{suffix}" / place, cfg.TEST.PICTURES_SCORE_THRESH
        value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)
        evaluators.append(
            VisualizationWriter(
                drawing_metadata(metadata, dataset),
                folder,
                cfg.TEST.PICTURES,
                threshold,
                cfg.INPUT.CHANNELS,
                value_range,
            )
        )
    return DatasetEvaluators(evaluators)


def describe_protocol(cfg: CfgNode, *, augmented: bool = False) -> str:
    """How a test set is evaluated, in a line that is stored with its scores.

    Args:
        augmented: with ``TEST.AUG``.
    """
    if augmented:
        aug = cfg.TEST.AUG
        sides = ", ".join(map(str, aug.MIN_SIZES))
        images = f"test-time augmentation, short sides {sides}, long side at most {aug.MAX_SIZE}"
        images += ", each with its mirror image" if aug.FLIP else ""
    elif cfg.INPUT.MIN_SIZE_TEST:
        images = f"one scale, short side {cfg.INPUT.MIN_SIZE_TEST}, "
        images += f"long side at most {cfg.INPUT.MAX_SIZE_TEST}"
    else:
        images = "images in their own size"
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return f"{images}; at most {limit} detections for an image; {cfg.TEST.EVALUATOR}"


def write_scores(cfg: CfgNode, results: dict[str, Any], *, augmented: bool = False) -> Path:
    """Write ``OUTPUT_DIR/scores.json``, or ``scores_TTA.json``: the protocol, the data, the scores.

    A score that cannot be computed is ``null``.

    Args:
        results: as :meth:`~.trainer.Trainer.test` returns them.
        augmented: with ``TEST.AUG``.
    """
    content = {
        "protocol": describe_protocol(cfg, augmented=augmented),
        "data": list(cfg.DATASETS.TEST),
        **{
            name: float(value) if math.isfinite(value) else None
            for name, value in flatten_results_dict(results).items()
        },
    }
    path = Path(cfg.OUTPUT_DIR, f"scores{'_TTA' if augmented else ''}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path
