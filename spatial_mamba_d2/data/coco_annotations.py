"""One annotation after the other of a COCO file: what is wrong, and what only looks different.

Annotation tools write the same content in many ways. What can be understood in one way only is
turned into what Detectron2 and pycocotools need, and counted; everything else is a fault.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spatial_mamba_d2.data.coco_boxes import BoxStatistics, examine_boxes
from spatial_mamba_d2.data.coco_masks import (
    Mask,
    finite_numbers,
    mask_area,
    mask_box,
    read_mask,
    short,
)
from spatial_mamba_d2.data.faults import Fault

REPEATED = "repeated annotation"
EMPTY_BOX = "box without area"
STRAY = "stray parts of polygons (below 3 points, or an odd number of numbers) were left out"
LOSSES = (STRAY,)  # counts of what is not used, not only rewritten
_CROWD_WORDS = {"0": 0, "1": 1, "false": 0, "true": 1}
_WHOLE = re.compile(r"-?\d{1,18}(\.0*)?")
_NO_MASK_BOX = (math.nan,) * 4


def whole_number(value: Any) -> int | None:
    """The integer that a number or a string such as ``1.0``, ``"1"`` or ``"01"`` means, or None."""
    if type(value) is int:
        return value
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.partition(".")[0])
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return None


class AnnotationReader:
    """Reads the annotations of a file, and counts.

    Args:
        images: key of an image -> its id, and its height and width.
        image_key: the key that an ``image_id`` means: :func:`image_key` or :func:`exact_image_key`.
        classes: id of a category in the file -> id of the class. They differ if several categories
            are one class.

    Attributes:
        counts: how often annotations were changed, by what was changed.
        num_crowds: how many usable annotations are crowds.
        num_objects: class id -> number of usable annotations that are no crowds.
    """

    def __init__(
        self,
        images: Mapping[int | str, tuple[int | str, tuple[int, int]]],
        image_key: Callable[[Any], int | str | None],
        classes: Mapping[int, int],
    ):
        self.images = images
        self.image_key = image_key
        self.classes = classes
        self.counts: Counter[str] = Counter()
        self.num_crowds = 0
        self.num_objects: Counter[int] = Counter()
        self.num_usable = 0
        self.ids_are_usable = True
        self._first: dict[Any, dict[str, Any]] = {}  # annotation by id
        self._contents: dict[Any, set[bytes]] = {}  # digests, by an id that is repeated
        # For the statistics, four numbers or one of each box that is no crowd's
        self._boxes = array("d")
        self._mask_boxes = array("d")
        self._areas = array("d")
        self._sizes = array("l")

    def read(self, annotation: Any) -> Fault | dict[str, Any]:
        """Why an annotation cannot be used, or what has to change in it, which is mostly nothing.

        The id is another matter: see :attr:`ids_are_usable`.
        """
        if not isinstance(annotation, dict):
            return Fault("malformed annotation", f"must be an object, got {short(annotation)}")
        change: dict[str, Any] = {}

        given = annotation.get("image_id")
        key = self.image_key(given)
        image = None if key is None else self.images.get(key)
        if image is None:
            return Fault("unknown image_id", f"no usable image has the id {short(given)}")
        image_id, size = image
        if type(given) is not type(image_id) or given != image_id:
            change["image_id"] = image_id
            self.counts["image_id is written in another way than the image's id"] += 1

        given = annotation.get("category_id")
        category_id = whole_number(given)
        class_id = None if category_id is None else self.classes.get(category_id)
        if class_id is None:
            return Fault("unknown category_id", f"no category has the id {short(given)}")
        if type(given) is not int:
            self.counts["category_id is a whole float or a string, and was read as integer"] += 1
        if type(given) is not int or given != class_id:
            change["category_id"] = class_id

        given = annotation.get("iscrowd", 0)
        is_crowd = given
        if type(given) is not int or given not in (0, 1):
            is_crowd = _CROWD_WORDS.get(str(given).lower(), whole_number(given))
            if given is None or given != given:
                is_crowd = 0
            if is_crowd not in (0, 1):
                return Fault("malformed annotation", f"iscrowd is {short(given)}, not 0 or 1")
        if "iscrowd" not in annotation or is_crowd is not given:
            change["iscrowd"] = is_crowd
            self.counts["iscrowd is missing or no integer, and was filled in"] += 1

        fault = self._read_shape(annotation, size, is_crowd, change)
        if fault:
            return fault
        if self._is_repeated(annotation):
            return Fault(REPEATED, "another one has the same id and content")
        self.num_usable += 1
        if is_crowd:
            self.num_crowds += 1
        else:
            self.num_objects[class_id] += 1
        return change

    def _read_shape(
        self,
        annotation: dict[str, Any],
        size: tuple[int, int],
        is_crowd: int,
        change: dict[str, Any],
    ) -> Fault | None:
        """Mask, box and area, which follow from each other."""
        given = annotation.get("bbox")
        if isinstance(given, list) and len(given) == 4:
            box = finite_numbers(given)
            if box is None:
                return Fault("degenerate box", f"bbox must be 4 finite numbers, got {short(given)}")
        elif given is None or given == [] or given != given:
            box = None
        else:
            return Fault("degenerate box", f"bbox must be 4 finite numbers, got {short(given)}")
        if box and (box[2] < 0 or box[3] < 0):
            return Fault("degenerate box", f"bbox {box} must have width and height above 0")

        given_mask = annotation.get("segmentation")
        mask = read_mask(given_mask, size)
        if is_crowd and box and mask == Mask(None):
            x, y, w, h = box
            mask = Mask([[x, y, x + w, y, x + w, y + h, x, y + h]])
        if isinstance(mask, Fault):
            # COCO's own boxes without area have masks without area.
            return mask if box is None or (box[2] and box[3]) else _empty_box(box)
        segmentation, num_stray = mask
        around = _NO_MASK_BOX if segmentation is None else mask_box(segmentation)
        if segmentation is not given_mask:
            if segmentation is not None or "segmentation" in annotation:
                change["segmentation"] = segmentation
            if num_stray:
                self.counts[STRAY] += num_stray
            elif segmentation is not None:
                self.counts["segmentation is written in another way, and was rewritten"] += 1

        if box is None or not (box[2] and box[3]):
            x1, y1, x2, y2 = around
            if box is None and segmentation is None:
                return Fault("degenerate box", f"bbox must be 4 finite numbers, got {short(given)}")
            if not (x2 > x1 and y2 > y1):  # nor are NaN
                return _empty_box(box or [x1, y1, x2 - x1, y2 - y1])
            box = [x1, y1, x2 - x1, y2 - y1]
            self.counts["bbox is missing or empty, and was computed from the mask"] += 1
        x, y, w, h = box
        if box is not given:
            change["bbox"] = box
            if given and any(isinstance(side, str) for side in given):
                self.counts["bbox holds strings, and was read as numbers"] += 1
        height, width = size
        is_outside = x >= width or y >= height or x + w <= 0 or y + h <= 0
        given = annotation.get("area")
        area = finite_numbers([given])
        if not is_crowd:
            self._boxes.extend((x, y, w, h))
            self._mask_boxes.extend(around)
            self._sizes.extend(size)
            self._areas.append(area[0] if area else math.nan)
        if is_outside:
            return Fault(
                "box outside of the image", f"bbox {box}, the image has {width} x {height} pixels"
            )
        if area is None or area[0] <= 0:
            change["area"] = mask_area(segmentation) if segmentation else w * h
            self.counts["area is missing or 0, and was computed"] += 1
        elif area[0] is not given:
            change["area"] = area[0]
            self.counts["area is a string, and was read as number"] += 1
        return None

    def _is_repeated(self, annotation: dict[str, Any]) -> bool:
        """Whether the same annotation was there before. Another one of its id needs a new id."""
        id_ = annotation.get("id")
        if type(id_) is not int or id_ < 1:  # pycocotools takes 0 for "no match"
            self.ids_are_usable = False
        if not isinstance(id_, (int, str)):
            return False
        if id_ not in self._first:
            self._first[id_] = annotation
            return False
        self.ids_are_usable = False
        if id_ not in self._contents:
            self._contents[id_] = {_digest(self._first[id_])}
        digest = _digest(annotation)
        if digest in self._contents[id_]:
            return True
        self._contents[id_].add(digest)
        return False

    def statistics(self) -> BoxStatistics:
        """What all boxes show together."""
        return examine_boxes(
            np.array(self._boxes).reshape(-1, 4),
            np.array(self._sizes).reshape(-1, 2),
            np.array(self._areas),
            np.array(self._mask_boxes).reshape(-1, 4),
        )


def exact_image_key(id_: Any) -> int | str | None:
    """The id of an image as it is written, for files in which ``"01"`` and ``"1"`` are two."""
    return id_ if isinstance(id_, str) else whole_number(id_)


def image_key(id_: Any) -> int | str | None:
    """Equal for all ways in which one id of an image is written; None if it cannot be an id."""
    number = whole_number(id_)
    if number is not None:
        return number
    return id_ if isinstance(id_, str) else None


def _digest(annotation: dict[str, Any]) -> bytes:
    """Equal for equal annotations, and fast to look up among those that share an id."""
    text = json.dumps(annotation, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _empty_box(box: list[float]) -> Fault:
    return Fault(EMPTY_BOX, f"bbox {box} must have width and height above 0")
