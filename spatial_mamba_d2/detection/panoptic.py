"""Panoptic segmentation: its ground truth, and the panoptic quality of predictions.

A category is a thing, which has instances (index of the class), or stuff: a label from 1 on of the
semantic head, whose label 0 stands for all things. Panoptic quality is that of Kirillov et al.,
"Panoptic Segmentation", CVPR 2019, computed as COCO's panopticapi does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from pycocotools import mask as coco_mask

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.label_maps import read_label
from spatial_mamba_d2.data.panoptic import segment_ids
from spatial_mamba_d2.system.tables import markdown_table

logger = logging.getLogger(__name__)

# Columns of the sums of each category: IoU of the matched segments, and numbers of segments
IOU, MATCHED, FALSE, MISSED = range(4)


class Segments(NamedTuple):
    """The segments of an image.

    Attributes:
        ids: int[H, W], the segment of each pixel; 0 is none.
        categories: of each segment, by its id.
        crowds: ids of the segments that are groups of things.
    """

    ids: np.ndarray
    categories: dict[int, int]
    crowds: frozenset[int] = frozenset()


def read_semantic(path: str, size: tuple[int, int], num_classes: int, ignored: int) -> np.ndarray:
    """A label map of a semantic head: integers ``[H, W]``.

    Args:
        size: height and width of the image.
        num_classes: labels are below it, or ``ignored``.

    Raises:
        FileNotFoundError, ValueError: the file is missing, no label map, of another size than the
            image, or has other labels.
    """
    label = read_label(Path(path))
    if label.shape != size:
        raise ValueError(f"label map {path}: must have its image's size {size}, got {label.shape}")
    if wrong := sorted({*np.unique(label).tolist()} - {*range(num_classes), ignored}):
        raise ValueError(
            f"label map {path}: labels must be below MODEL.SEM_SEG_HEAD.NUM_CLASSES {num_classes}, "
            f"or MODEL.SEM_SEG_HEAD.IGNORE_VALUE {ignored}, got {wrong[:10]}"
        )
    return label


def count_segments(truth: Segments, found: Segments, num_categories: int) -> np.ndarray:
    """The sums of one image, from which :func:`panoptic_quality` is computed.

    A found segment matches one of the truth of its category if their IoU, without pixels that
    belong to no segment of the truth, is above 1/2. Found segments that lie mostly in such pixels,
    or in crowds of their category, do not count.

    Returns:
        float64 ``[num_categories, 4]``: IoU of matches, matches, false segments, missed segments.
    """
    sums = np.zeros((num_categories, 4))
    base = int(found.ids.max(initial=0)) + 1
    codes, areas = np.unique(truth.ids.astype(np.int64) * base + found.ids, return_counts=True)
    overlaps = {divmod(code, base): area for code, area in zip(codes.tolist(), areas, strict=True)}
    true_area: dict[int, int] = {}
    found_area: dict[int, int] = {}
    for (true_id, found_id), area in overlaps.items():
        true_area[true_id] = true_area.get(true_id, 0) + area
        found_area[found_id] = found_area.get(found_id, 0) + area
    matched_true, matched_found = set(), set()
    for (true_id, found_id), area in overlaps.items():
        if not true_id or not found_id or true_id in truth.crowds:
            continue
        category = truth.categories[true_id]
        if found.categories[found_id] != category:
            continue
        outside = overlaps.get((0, found_id), 0)
        iou = area / (true_area[true_id] + found_area[found_id] - area - outside)
        if iou > 0.5:
            sums[category, [IOU, MATCHED]] += iou, 1
            matched_true.add(true_id)
            matched_found.add(found_id)
    for true_id, category in truth.categories.items():
        if true_id not in truth.crowds and true_id not in matched_true and true_id in true_area:
            sums[category, MISSED] += 1
    for found_id, category in found.categories.items():
        if found_id in matched_found or found_id not in found_area:
            continue
        unsure = [0, *(c for c in truth.crowds if truth.categories[c] == category)]
        covered = sum(overlaps.get((true_id, found_id), 0) for true_id in unsure)
        if covered / found_area[found_id] <= 0.5:
            sums[category, FALSE] += 1
    return sums


def panoptic_quality(sums: np.ndarray, num_things: int) -> dict[str, float]:
    """Panoptic, segmentation and recognition quality in percent, means over categories.

    Args:
        sums: of all images, see :func:`count_segments`; the first ``num_things`` are things.

    Returns:
        ``PQ SQ RQ`` of all categories that occur, with ``_th`` of things, with ``_st`` of stuff;
        NaN where there is none.
    """
    iou, matched, false, missed = sums.T
    occurs = matched + false + missed > 0
    size = np.maximum(matched + false / 2 + missed / 2, 0.5)
    values = {"PQ": iou / size, "SQ": iou / np.maximum(matched, 1), "RQ": matched / size}
    is_thing = np.arange(len(sums)) < num_things
    groups = {"": occurs, "_th": occurs & is_thing, "_st": occurs & ~is_thing}
    return {
        f"{name}{suffix}": float(100 * value[chosen].mean()) if chosen.any() else float("nan")
        for suffix, chosen in groups.items()
        for name, value in values.items()
    }


GroundTruth = Callable[[dict[str, Any]], Segments]


def build_ground_truth(cfg: CfgNode, metadata: Metadata) -> GroundTruth:
    """From a record of a data set to the segments of its image.

    COCO's panoptic annotations if Detectron2's catalogue knows them. Otherwise instances over stuff
    of the label map, smaller ones on top; pixels of neither belong to no segment.

    Raises:
        FileNotFoundError, ValueError: annotations are missing or unusable.
    """
    num_things = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if metadata.get("panoptic_json"):
        return _build_panoptic_reader(metadata, num_things)
    semantic = cfg.MODEL.SEM_SEG_HEAD

    def ground_truth(record: dict[str, Any]) -> Segments:
        height, width = size = (record["height"], record["width"])
        ids = np.zeros(size, np.int64)
        categories: dict[int, int] = {}
        crowds = set()
        label = read_semantic(
            record["sem_seg_file_name"], size, semantic.NUM_CLASSES, semantic.IGNORE_VALUE
        )
        for value in np.unique(label).tolist():
            if value not in (0, semantic.IGNORE_VALUE):
                categories[len(categories) + 1] = num_things + value
                ids[label == value] = len(categories)
        masks = [(_decode(a["segmentation"], height, width), a) for a in record["annotations"]]
        for mask, annotation in sorted(masks, key=lambda item: -int(item[0].sum())):
            categories[len(categories) + 1] = annotation["category_id"]
            ids[mask] = len(categories)
            if annotation["iscrowd"]:
                crowds.add(len(categories))
        return Segments(ids, categories, frozenset(crowds))

    return ground_truth


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.decode(segmentation).astype(bool)


def _build_panoptic_reader(metadata: Metadata, num_things: int) -> GroundTruth:
    annotations = {a["image_id"]: a for a in read_json(metadata.panoptic_json)["annotations"]}
    category = {
        **{id_: num_things + n for id_, n in metadata.stuff_dataset_id_to_contiguous_id.items()},
        **metadata.thing_dataset_id_to_contiguous_id,
    }

    def ground_truth(record: dict[str, Any]) -> Segments:
        annotation = annotations[record["image_id"]]
        segments = annotation["segments_info"]
        ids = segment_ids(read_image(Path(metadata.panoptic_root, annotation["file_name"])))
        return Segments(
            ids,
            {s["id"]: category[s["category_id"]] for s in segments},
            frozenset(s["id"] for s in segments if s.get("iscrowd")),
        )

    return ground_truth


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic quality, by :func:`panoptic_quality`, under ``panoptic_seg``.

    Args:
        cfg: of the detector.
        records: of the data set, with ``image_id``.
        ground_truth: from :func:`build_ground_truth`.
    """

    def __init__(self, cfg: CfgNode, records: list[dict[str, Any]], ground_truth: GroundTruth):
        self.records = {record["image_id"]: record for record in records}
        self.ground_truth = ground_truth
        self.num_things = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.num_categories = self.num_things + cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.reset()

    def reset(self) -> None:
        self.sums = np.zeros((self.num_categories, 4))

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for item, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            categories = {
                s["id"]: s["category_id"] + (0 if s["isthing"] else self.num_things)
                for s in segments
            }
            truth = self.ground_truth(self.records[item["image_id"]])
            found = Segments(ids.cpu().numpy(), categories)
            self.sums += count_segments(truth, found, self.num_categories)

    def evaluate(self) -> dict[str, dict[str, float]]:
        sums = comm.gather(self.sums)
        if not comm.is_main_process():
            return {}
        results = panoptic_quality(np.sum(sums, axis=0), self.num_things)
        rows = [
            (title, *(f"{results[name + suffix]:.2f}" for name in ("PQ", "SQ", "RQ")))
            for title, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st"))
        ]
        table = markdown_table(("categories", "PQ", "SQ", "RQ"), rows)
        logger.info("panoptic quality:\n%s", table)
        return {"panoptic_seg": results}
