"""Collects objects of formats that are not COCO's, as records in COCO's form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.coco_masks import mask_box
from spatial_mamba_d2.data.formats.records import ALL, Instances

# Digits after the point that coordinates are rounded to, in pixels: COCO's own precision, which
# six digits of a fraction have too, up to images of 10000 pixels.
DIGITS = 2


class InstanceBuilder:
    """Images and objects of all splits, one after the other.

    Args:
        classes: their names in the order of the file; None: names are sorted once all are known.
    """

    def __init__(self, classes: Sequence[str] | None = None):
        self.classes = None if classes is None else list(classes)
        self._images: dict[str, list[dict[str, Any]]] = {}
        self._objects: dict[str, list[dict[str, Any]]] = {}
        self._num_images = 0

    def add_image(self, split: str, path: Path, size: tuple[int, int] | None) -> dict[str, Any]:
        """The entry of an image, for :meth:`add_object`.

        Args:
            size: height and width that the annotations were made for; None: the file tells.
        """
        self._num_images += 1
        entry: dict[str, Any] = {"id": self._num_images, "file_name": str(path.absolute())}
        if size is not None:
            entry |= {"height": size[0], "width": size[1]}
        self._images.setdefault(split, []).append(entry)
        return entry

    def add_object(
        self,
        split: str,
        image: dict[str, Any],
        name: str,
        *,
        box: Sequence[float] | None = None,
        mask: list[list[float]] | dict[str, Any] | None = None,
        is_crowd: bool = False,
    ) -> None:
        """Add an object of class ``name`` by its box, its mask or both.

        Args:
            box: x, y, width, height in pixels.
            mask: polygons or RLE.
        """
        if isinstance(mask, list):
            mask = [[_rounded(value) for value in polygon] for polygon in mask]
        if box is None and mask is not None and _is_shape(mask):
            x1, y1, x2, y2 = mask_box(mask)
            box = [x1, y1, x2 - x1, y2 - y1]
        entry = {
            "image_id": image["id"],
            "name": name,
            "bbox": [_rounded(value) for value in box or []],
            "iscrowd": int(is_crowd),
        }
        if mask is not None:
            entry["segmentation"] = mask
        self._objects.setdefault(split, []).append(entry)

    def build(self, split_names: Sequence[str] = ()) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Names of the classes, and the splits.

        Args:
            split_names: their order.
        """
        names = self.classes
        if names is None:
            names = sorted({o["name"] for objects in self._objects.values() for o in objects})
        ids = {name: index for index, name in enumerate(names, start=1)}
        categories = [{"id": id_, "name": name} for name, id_ in ids.items()]
        splits = {}
        number = 0
        for split in [*split_names, *(s for s in self._images if s not in split_names)]:
            if split not in self._images:
                continue
            annotations = []
            for entry in self._objects.get(split, []):
                number += 1
                category = {"category_id": ids[entry.pop("name")]}
                annotations.append({"id": number, **category, **entry})
            content = {
                "images": self._images[split],
                "annotations": annotations,
                "categories": [dict(category) for category in categories],
            }
            splits[split] = Instances(content, Path("/"))
        return tuple(names), splits


def _rounded(value: float) -> float:
    number = round(float(value), DIGITS)
    return int(number) if number.is_integer() else number


def _is_shape(mask: list[list[float]] | dict[str, Any]) -> bool:
    return not isinstance(mask, list) or all(len(polygon) >= 6 for polygon in mask)


def name_split(parts: Sequence[str]) -> str:
    """``train``, ``val`` or ``test`` by the names of folders, or of a file; otherwise ``all``."""
    for part in parts:
        if split := SPLIT_WORDS.get(part.lower()):
            return split
    return ALL


SPLIT_WORDS = {
    "train": "train", "training": "train", "trn": "train", "trainset": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "valset": "val",
    "test": "test", "testing": "test", "testset": "test",
}  # fmt: skip
SPLIT_NAMES = ("train", "val", "test")
