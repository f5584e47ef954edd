"""Keypoints of COCO annotations: their names, their mirror images, and what may be missing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)

from spatial_mamba_d2.data.coco import CocoDataset
from spatial_mamba_d2.data.coco_masks import finite_numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keypoints:
    """Attributes:
    names: of the keypoints, in the order of the annotations.
    flip_indices: int[K], which keypoint each one becomes in the mirror image.
    """

    names: list[str]
    flip_indices: np.ndarray


def read_keypoints(cfg: CfgNode, coco: CocoDataset, json_file: str) -> tuple[Keypoints, bool]:
    """The keypoints of a file, whose annotations all have some after this call.

    Annotations without keypoints get unlabelled ones, which neither train nor count.

    Returns:
        also whether an annotation was changed.

    Raises:
        ValueError: ``MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS`` is another number than in the file, or
            nothing says which keypoints are each other's mirror images.
    """
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    annotations = [a for record in coco.records for a in record["annotations"]]
    missing = changed = 0
    for annotation in annotations:
        points: list[float] = annotation.get("keypoints")
        if not points:
            annotation["keypoints"] = [0] * (3 * number)
            annotation["num_keypoints"] = 0
            missing += 1 - annotation["iscrowd"]
            changed += 1
            continue
        if finite_numbers(points) is not points or len(points) != 3 * number:
            raise ValueError(
                f"{json_file}: annotation {annotation['id']} must have 3 x {number} finite numbers "
                f"as keypoints (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), got {len(points)}"
            )
        visible = len([v for v in points[2::3] if v > 0])
        if annotation.get("num_keypoints") != visible:
            annotation["num_keypoints"] = visible
            changed += 1
    num_objects = sum(1 - a["iscrowd"] for a in annotations)
    if num_objects and missing == num_objects:
        raise ValueError(f"{json_file}: no annotation has keypoints, which MODEL.KEYPOINT_ON needs")
    if missing:
        logger.warning("%s: %d of %d annotations have no keypoints: only their boxes train",
                       json_file, missing, num_objects)  # fmt: skip
    return _names_and_flips(cfg, coco, json_file), bool(changed)


def _names_and_flips(cfg: CfgNode, coco: CocoDataset, json_file: str) -> Keypoints:
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    lists = list(coco.keypoints.values())
    names = lists[0] if lists else []
    if any(other != names for other in lists) or (names and len(names) != number):
        raise ValueError(
            f"{json_file}: all categories must have the same {number} keypoints "
            f"(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), got {lists[:3]}"
        )
    if not names and number == len(COCO_PERSON_KEYPOINT_NAMES):
        names = list(COCO_PERSON_KEYPOINT_NAMES)
    if not names:
        if cfg.INPUT.RANDOM_FLIP == "horizontal":
            raise ValueError(
                f"{json_file}: its categories have no names of keypoints, which say what a mirror "
                "image exchanges (left_eye and right_eye): add them, or set INPUT.RANDOM_FLIP none"
            )
        return Keypoints([f"keypoint {i}" for i in range(number)], np.arange(number))
    known = dict(COCO_PERSON_KEYPOINT_FLIP_MAP)
    mirror = {**known, **{right: left for left, right in known.items()}}
    flips = [_find(names, mirror.get(name) or _mirrored(name), i) for i, name in enumerate(names)]
    return Keypoints(names, np.array(flips))


def _mirrored(name: str) -> str:
    """``left_eye`` -> ``right_eye`` and back; other names as they are."""
    for one, other in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
        if one in name:
            return name.replace(one, other)
        if other in name:
            return name.replace(other, one)
    for one, other in (("l_", "r_"), ("L_", "R_"), ("l-", "r-"), ("L-", "R-")):
        if name.startswith(one):
            return other + name[2:]
        if name.startswith(other):
            return one + name[2:]
    return name


def _find(names: list[str], name: str, default: int) -> int:
    return names.index(name) if name in names else default


def count_visible(record: dict[str, Any]) -> int:
    """The labelled keypoints of an image's objects, as Detectron2 counts them."""
    return sum(
        sum(1 for v in annotation.get("keypoints", ())[2::3] if v > 0)
        for annotation in record["annotations"]
        if not annotation.get("iscrowd")
    )
