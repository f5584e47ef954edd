"""Keypoints of COCO annotations: their names, their mirror images, and what may be missing."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

from spatial_mamba_d2.data.coco import CocoDataset
from spatial_mamba_d2.data.coco_masks import finite_numbers, short
from spatial_mamba_d2.data.faults import Fault, settle_faults

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
        also whether an annotation was changed or, if ``DATASETS.ON_ERROR`` says so, skipped.

    Raises:
        ValueError: keypoints of an annotation are no numbers,
            ``MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS`` is another number than in the file, or
            nothing says which keypoints are each other's mirror images.
    """
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    missing = changed = 0
    faults = []
    for record in coco.records:
        usable = []
        for annotation in record["annotations"]:
            given = annotation.get("keypoints")
            if not given or given != given:  # NaN is what pandas writes for nothing
                annotation["keypoints"] = [0] * (3 * number)
                annotation["num_keypoints"] = 0
                missing += 1 - annotation["iscrowd"]
                changed += 1
                usable.append(annotation)
                continue
            points = finite_numbers(given)
            if points is None or len(points) != 3 * number:
                has = f"{len(given)}: " if isinstance(given, list) else ""
                reason = (
                    f"annotation {annotation['id']} of image {record['image_id']} must have "
                    f"3 x {number} finite numbers as keypoints "
                    f"(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), got {has}{short(given)}"
                )
                faults.append(Fault("wrong keypoints", reason))
                continue
            visible = len([v for v in points[2::3] if v > 0])
            if points is not given or annotation.get("num_keypoints") != visible:
                annotation["keypoints"] = points
                annotation["num_keypoints"] = visible
                changed += 1
            usable.append(annotation)
        record["annotations"] = usable
    annotations = [a for record in coco.records for a in record["annotations"]]
    if faults:
        settle_faults(faults, cfg.DATASETS.ON_ERROR, where=json_file, num_usable=len(annotations))
    num_objects = sum(1 - a["iscrowd"] for a in annotations)
    if num_objects and missing == num_objects:
        raise ValueError(f"{json_file}: no annotation has keypoints, which MODEL.KEYPOINT_ON needs")
    if missing:
        logger.warning("%s: %d of %d annotations have no keypoints: only their boxes train",
                       json_file, missing, num_objects)  # fmt: skip
    return _names_and_flips(cfg, coco, json_file), bool(changed or faults)


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
    flips = _mirror_images(names)
    if cfg.INPUT.RANDOM_FLIP == "horizontal":
        pairs = [f"{names[i]} and {names[k]}" for i, k in enumerate(flips) if i < k]
        if pairs:
            alone = [names[i] for i, k in enumerate(flips) if i == k]
            logger.info("%s: mirror images exchange %s%s", json_file, "; ".join(pairs),
                        f", but not {', '.join(alone)}" if alone else "")  # fmt: skip
        elif number > 1:
            logger.warning(
                "%s: no two of the keypoints %s are named as left and right (left_eye and "
                "right_eye, eye_l and eye_r): mirror images exchange none. If some are, rename "
                "them, or set INPUT.RANDOM_FLIP none", json_file, ", ".join(names),
            )  # fmt: skip
    return Keypoints(names, np.array(flips))


# A side in a name: a word anywhere, or a single letter at a separator, a change of case or a digit
_WORD = re.compile(r"left|right", re.IGNORECASE)
_LETTER = re.compile(r"(?<![a-zA-Z0-9])[lr](?![a-zA-Z0-9])", re.IGNORECASE)
_ATTACHED = re.compile(r"^[LR](?=[A-Z0-9])|^[lr](?=[A-Z])|(?<=[a-z0-9])[LR]$")
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


def _mirror_images(names: list[str]) -> list[int]:
    """For each keypoint the one of the other side, itself if there is none."""
    index = {name.lower(): i for i, name in enumerate(names)}
    mirror = []
    for i, name in enumerate(names):
        others = (
            pattern.sub(lambda match: _OTHER_SIDE[match[0].lower()], name).lower()
            for pattern in (_WORD, _LETTER, _ATTACHED)
            if pattern.search(name)
        )
        mirror.append(next((index[other] for other in others if other in index), i))
    return [k if mirror[k] == i else i for i, k in enumerate(mirror)]


def count_visible(record: dict[str, Any]) -> int:
    """The labelled keypoints of an image's objects, as Detectron2 counts them."""
    return sum(
        sum(1 for v in annotation.get("keypoints", ())[2::3] if v > 0)
        for annotation in record["annotations"]
        if not annotation.get("iscrowd")
    )
