"""Checks of objects, in addition to those of every training (:mod:`spatial_mamba_d2.data.coco`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.checks.polygons import crosses_itself, leaves_image
from spatial_mamba_d2.data.checks.report import SplitCounts
from spatial_mamba_d2.data.coco import USUAL_CROWDS, examine_coco
from spatial_mamba_d2.data.coco_boxes import SLACK_PX, boxes_agree, boxes_inside
from spatial_mamba_d2.data.coco_masks import MIN_AREA, mask_area, mask_box, read_mask
from spatial_mamba_d2.data.faults import Fault, Finding
from spatial_mamba_d2.data.formats import Instances
from spatial_mamba_d2.data.images import files_below, is_image

_SAME_PX = 1.0  # sides of boxes that differ by less are the same
_SAME_AREA = 0.05  # share by which the areas of equal masks may differ
_AREA_RATIO = 2.0  # between the field area and the mask's area, and the other way round
_MANY_CROWDS = 5  # fewer in a split may be what COCO means by crowds
Box = tuple[float, float, float, float]


class CheckedInstances:
    """One split: what is wrong, and what is left.

    Attributes:
        findings: of this split.
        notes: how things were understood.
        counts: of what is usable.
        files: of the images that are usable.
        num_by_name: name of a class -> number of its objects.
        categories: id in the file -> name.
    """

    def __init__(self, split: str, part: Instances, classes: Mapping[str, int]):
        self.split, self.part = split, part
        self.where = str(part.json_file or split)
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.counts = SplitCounts(by_class=[0] * len(classes), images_by_class=[0] * len(classes))
        self.files: list[Path] = []
        self.categories: dict[int, str] = {}
        self._check(classes)

    def _check(self, classes: Mapping[str, int]) -> None:
        content = self.part.content
        found, paths, notes = examine_coco(content, self.part.image_root, self.part.json_file)
        usable = {section: set(range(len(content[section]))) for section in content
                  if section in ("images", "annotations", "categories")}  # fmt: skip
        file_of_id = {
            _hashable(image.get("id")): path
            for image, path in zip(content["images"], paths, strict=True)
            if isinstance(image, dict)
        }
        for section, position, kind, reason in found["faults"]:
            usable[section].discard(position)
            entry = content[section][position]
            file = self.where
            if section == "images":
                file = paths[position] or self.where
            elif section == "annotations" and isinstance(entry, dict):
                file = file_of_id.get(_hashable(entry.get("image_id"))) or self.where
            self.findings.append(Finding(kind, file, reason, _box_of(entry)))
        if found["problem"]:
            message = f"{self.where}: {found['problem']}"
            self.findings.append(Finding("boxes in another form", self.where, message))
        self.notes += [text for text, is_warning in [*notes, *found["notes"]] if not is_warning]
        for section, position, change in found["changes"]:
            entry = content[section][position]
            if position in usable[section] and "segmentation" in change:
                num_stray = _num_stray(entry["segmentation"], change["segmentation"])
                if num_stray:
                    path = file_of_id.get(_hashable(entry.get("image_id"))) or self.where
                    message = f"annotation {entry.get('id')} of {path}: {num_stray} parts"
                    message += " have less than 3 points, or no pairs of numbers"
                    self.findings.append(
                        Finding("stray polygon part", path, message, _box_of(entry))
                    )
            entry.update(change)
        self.categories = dict(found["categories"])
        merged = [text for text, _ in found["notes"] if "have the same name" in text]
        self.findings += [Finding("classes of one name", self.where, f"{self.where}: {text}")
                          for text in merged]  # fmt: skip
        repeated = [text for text, _ in found["notes"] if "belong to several entries" in text]
        self.findings += [Finding("image in several entries", text.rpartition(": ")[2], text)
                          for text in repeated]  # fmt: skip
        images = {
            content["images"][i]["id"]: (content["images"][i], str(paths[i]))
            for i in sorted(usable["images"])
        }
        self.files = [Path(path) for _, path in images.values()]
        self.counts.num_images = len(images)
        objects: dict[Any, list[dict[str, Any]]] = {id_: [] for id_ in images}
        for number, position in enumerate(sorted(usable["annotations"]), start=1):
            annotation = content["annotations"][position]
            if found["renumber"]:
                annotation["id"] = number
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]].append(annotation)
        for id_, (image, path) in images.items():
            self._check_image(image, path, objects[id_], classes)
        self._check_crowds([a for of_image in objects.values() for a in of_image])
        self._check_names()

    def _check_image(
        self,
        image: dict[str, Any],
        path: str,
        annotations: list[dict[str, Any]],
        classes: Mapping[str, int],
    ) -> None:
        size = image["height"], image["width"]
        ordinary = [a for a in annotations if not a["iscrowd"]]
        self.counts.num_objects += len(ordinary)
        self.counts.objects_an_image[len(ordinary)] += 1
        present = set()
        for annotation in ordinary:
            index = classes[self.categories[annotation["category_id"]]]
            self.counts.by_class[index] += 1
            present.add(index)
            self.counts.object_px.append(float(np.sqrt(np.prod(annotation["bbox"][2:]))))
            for kind, reason in check_object(annotation, size):
                message = f"annotation {annotation['id']} of {path}: {reason}"
                self.findings.append(Finding(kind, path, message, _box_of(annotation)))
        for index in present:
            self.counts.images_by_class[index] += 1
        self.findings += self._repeated(path, ordinary)

    def _repeated(self, path: str, annotations: list[dict[str, Any]]) -> Iterator[Finding]:
        """Objects that are there twice, of one class or of two."""
        if len(annotations) < 2:
            return
        boxes = np.array([a["bbox"] for a in annotations], np.float64)
        corners = np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]))
        order = np.argsort(corners[:, 0], kind="stable")
        for place, first in enumerate(order):
            for second in order[place + 1 :]:
                if corners[second, 0] - corners[first, 0] > _SAME_PX:
                    break
                # Of tiny objects, a pixel is much.
                tolerance = min(_SAME_PX, 0.1 * boxes[[first, second], 2:].min())
                if np.abs(corners[first] - corners[second]).max() > tolerance:
                    continue
                a, b = sorted((annotations[first], annotations[second]), key=lambda x: x["id"])
                if not _same_mask(a, b):
                    continue
                names = [self.categories[x["category_id"]] for x in (a, b)]
                kind = "duplicate object" if names[0] == names[1] else "object with two classes"
                what = names[0] if names[0] == names[1] else " and ".join(names)
                message = f"annotations {a['id']} and {b['id']} of {path}: same box, {what}"
                yield Finding(kind, path, message, _box_of(a))

    def _check_crowds(self, annotations: list[dict[str, Any]]) -> None:
        crowds = sum(a["iscrowd"] for a in annotations)
        if crowds >= _MANY_CROWDS and crowds > USUAL_CROWDS * len(annotations):
            message = (
                f"{self.where}: {crowds} of {len(annotations)} annotations are crowds (iscrowd 1), "
                "which neither train nor count"
            )
            self.findings.append(Finding("many crowds", self.where, message))

    def _check_names(self) -> None:
        self.findings += similar_names(list(self.categories.values()), self.where)


def similar_names(names: list[str], where: str) -> list[Finding]:
    """Names of classes that differ only in capitals, blanks, hyphens or underscores."""
    first: dict[str, str] = {}
    found = []
    for name in names:
        key = "".join(name.casefold().replace("-", " ").replace("_", " ").split())
        other = first.setdefault(key, name)
        if other != name:
            message = f"{where}: classes {other!r} and {name!r} differ only in how they are written"
            found.append(Finding("similar class names", where, message))
    return found


def check_object(annotation: dict[str, Any], size: tuple[int, int]) -> Iterator[Fault]:
    """What is suspicious about one object that a training would take."""
    height, width = size
    x, y, w, h = annotation["bbox"]
    corners = np.array([[x, y, x + w, y + h]], np.float64)
    if not boxes_inside(corners, np.array([width]), np.array([height])).all():
        reason = f"box {_shown(annotation['bbox'])} in an image of {width} x {height} pixels"
        yield Fault("box leaves the image", reason)
    if w * h < 1:
        yield Fault("tiny object", f"box {_shown(annotation['bbox'])} is smaller than a pixel")
    mask = read_mask(annotation.get("segmentation"), size)
    area = annotation["area"]
    if isinstance(mask, Fault) or mask.segmentation is None:
        if area > _AREA_RATIO * w * h:
            yield Fault("wrong area", f"area is {area:g}, its box has {w * h:g} square pixels")
        return
    segmentation = mask.segmentation
    around = np.array([mask_box(segmentation)], np.float64)
    if not boxes_agree(corners, around).all():
        box = [*around[0, :2], *(around[0, 2:] - around[0, :2])]
        reason = f"box {_shown(annotation['bbox'])}, mask within {_shown(box)}"
        yield Fault("box and mask disagree", reason)
    real = mask_area(segmentation)
    if not real / _AREA_RATIO <= area <= _AREA_RATIO * max(real, 1):
        yield Fault("wrong area", f"area is {area:g}, its mask has {real:g} square pixels")
    if isinstance(segmentation, dict):
        return
    for polygon in segmentation:
        if leaves_image(polygon, height, width, SLACK_PX):
            yield Fault("polygon leaves the image", f"in an image of {width} x {height} pixels")
        if crosses_itself(polygon):
            yield Fault("polygon crosses itself", f"{len(polygon) // 2} points")


def check_unused_images(parts: Mapping[str, Instances]) -> list[Finding]:
    """Images next to those of the data set that no entry names."""
    used = {file.absolute() for part in parts.values() for file in part.image_files()}
    folders = {file.parent for file in used}
    found = []
    for folder in sorted(f for f in folders if f.is_dir()):
        for file in files_below(folder):
            if file.parent == folder and file not in used and is_image(file, folder):
                message = f"{file}: no entry names this image"
                found.append(Finding("image without entry", str(file), message))
    return found


def _num_stray(given: Any, kept: Any) -> int:
    """How many parts of polygons were left out of a mask."""
    return len(given) - len(kept) if isinstance(given, list) and isinstance(kept, list) else 0


def _same_mask(a: dict[str, Any], b: dict[str, Any]) -> bool:
    areas = [x["area"] for x in (a, b)]
    return abs(areas[0] - areas[1]) <= _SAME_AREA * max(*areas, MIN_AREA)


def _box_of(annotation: Any) -> Box | None:
    """Corners of its box, if it has one that can be drawn."""
    box = annotation.get("bbox") if isinstance(annotation, dict) else None
    try:
        x, y, w, h = (float(v) for v in box or [])
    except (TypeError, ValueError):
        return None
    return (x, y, x + w, y + h) if np.isfinite([x, y, w, h]).all() else None


def _shown(box: Any) -> str:
    return str([round(float(value), 1) for value in box])


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, str, float)) else None
