"""Which detection belongs to which object, whatever their classes: confusion and suspects."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IOU = 0.5
_APART = 0.1  # overlap below which a detection has nothing to do with an object
_SURE = 0.8  # score from which a disagreement may be an error of the labels


@dataclass
class ImageMatches:
    """One image: numbers of detections that are right or wrong, and of objects that were missed.

    Attributes:
        detections: those above the threshold, the highest scores first.
        objects: of the image, crowds left out.
        doubtful: score and a word of what may be an error of the labels.
    """

    num_right: int = 0
    num_wrong: int = 0
    num_missed: int = 0
    detections: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    doubtful: list[tuple[float, str, int, int]] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        return self.num_wrong + self.num_missed

    @property
    def f1(self) -> float:
        total = 2 * self.num_right + self.num_errors
        return 2 * self.num_right / total if total else 1.0


@dataclass
class Matching:
    """All images, in order, and counts ``int64[K + 1, K + 1]``; the last ones are background."""

    confusion: np.ndarray
    images: list[ImageMatches]


def match_boxes(
    truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    kind: str,
    threshold: float,
) -> Matching:
    """Match detections from ``threshold`` on to objects with an IoU of 0.5 or more.

    The highest scores choose first, and take the free object with the largest overlap, whatever
    its class. Detections in crowds are left out.
    """
    index = {id_: k for k, id_ in enumerate(category_ids)}
    background = len(index)
    confusion = np.zeros((background + 1, background + 1), np.int64)
    objects_of: dict[int, list[dict[str, Any]]] = {id_: [] for id_ in image_ids}
    for annotation in truth["annotations"]:
        objects_of[annotation["image_id"]].append(annotation)
    detections_of: dict[int, list[dict[str, Any]]] = {id_: [] for id_ in image_ids}
    for detection in detections:
        if detection["score"] >= threshold and detection["image_id"] in detections_of:
            detections_of[detection["image_id"]].append(detection)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    images = []
    for id_ in image_ids:
        found = sorted(detections_of[id_], key=lambda d: -d["score"])
        overlap = _overlaps(found, objects_of[id_], kind, sizes[id_])
        images.append(_match(found, objects_of[id_], overlap, index, confusion))
    return Matching(confusion, images)


def _match(
    detections: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    overlap: np.ndarray,
    index: dict[int, int],
    confusion: np.ndarray,
) -> ImageMatches:
    background = len(index)
    is_crowd = np.array([bool(o.get("iscrowd")) for o in objects], bool)
    result = ImageMatches(
        detections=detections, objects=[o for o in objects if not o.get("iscrowd")]
    )
    free = ~is_crowd
    for row, detection in enumerate(detections):
        predicted = index[detection["category_id"]]
        values = overlap[row] if len(objects) else np.zeros(0)
        open_ = np.where(free, values, -1.0)
        best = int(open_.argmax()) if len(open_) else -1
        if best >= 0 and open_[best] >= IOU:
            free[best] = False
            true = index[objects[best]["category_id"]]
            confusion[true, predicted] += 1
            if true == predicted:
                result.num_right += 1
                continue
            result.num_wrong += 1
            result.num_missed += 1
            if detection["score"] >= _SURE:
                result.doubtful.append((detection["score"], "another class", true, predicted))
            continue
        if len(values) and (is_crowd & (values >= IOU)).any():
            continue
        confusion[background, predicted] += 1
        result.num_wrong += 1
        apart = not len(values) or values.max() < _APART
        if apart and detection["score"] >= _SURE:
            result.doubtful.append((detection["score"], "not labelled", background, predicted))
    for position in np.flatnonzero(free):
        confusion[index[objects[position]["category_id"]], background] += 1
        result.num_missed += 1
    return result


def _overlaps(
    detections: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    kind: str,
    size: tuple[int, int],
) -> np.ndarray:
    """float64[D, G], by boxes or masks; of crowds, the share of the detection in them."""
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    mask = importlib.import_module("pycocotools.mask")
    crowds = [int(bool(o.get("iscrowd"))) for o in objects]
    if kind == "bbox":
        boxes = [np.array([x["bbox"] for x in xs], np.float64) for xs in (detections, objects)]
        return np.asarray(mask.iou(boxes[0], boxes[1], crowds))
    rles = [[_rle(x["segmentation"], size, mask) for x in xs] for xs in (detections, objects)]
    return np.asarray(mask.iou(rles[0], rles[1], crowds))


def _rle(segmentation: Any, size: tuple[int, int], mask: Any) -> dict[str, Any]:
    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def find_suspects(matching: Matching, names: Sequence[str]) -> list[tuple[int, str]]:
    """What may be errors of the labels, the surest first: image and words."""
    found = []
    for position, image in enumerate(matching.images):
        for score, what, true, predicted in image.doubtful:
            words = f"{names[predicted]} ({score:.0%}), {what}"
            if true < len(names):
                words = f"labelled {names[true]}, predicted {words}"
            found.append((score, position, words))
    found.sort(key=lambda item: (-item[0], item[1]))
    return [(position, words) for _, position, words in found]
