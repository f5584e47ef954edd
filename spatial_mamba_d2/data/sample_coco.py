"""Generated sample data as files in COCO format: what all generators write in the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spatial_mamba_d2.data.json_file import read_json

FOLDERS = {"train": "training", "val": "validation"}  # folder of each split, named as in ADE20K


def check_counts(counts: Mapping[str, int]) -> None:
    """Raises ValueError if the number of images in a split is not at least 1."""
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"num_{split} must be at least 1, got {count}")


def check_position(split: str, index: int) -> None:
    """Raises ValueError if there is no such split, or ``index`` is negative."""
    if split not in FOLDERS:
        raise ValueError(f"split must be one of {list(FOLDERS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index must be at least 0, got {index}")


def image_record(image_id: int, file_name: str, size: tuple[int, ...]) -> dict[str, Any]:
    """The entry of an image; ``size`` is its height and width."""
    height, width = size
    return {
        "id": image_id,
        "file_name": file_name,
        "height": height,
        "width": width,
        "license": 1,
    }


def annotation_record(
    mask: np.ndarray, category_id: int, iscrowd: bool = False, *, top: int = 0, left: int = 0
) -> dict[str, Any]:
    """The entry of an object, except for its ids.

    Args:
        mask: ``bool[h, w]``, not empty: of the image, or a part of it that holds the object.
        iscrowd: its mask is RLE then, and ``mask`` that of the image.
        top, left: of the part in the image.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    offset = (left, top)
    return {
        "category_id": category_id,
        "bbox": [x + left, y + top, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(np.count_nonzero(mask)),
        "iscrowd": int(iscrowd),
        "segmentation": mask_to_rle(mask)
        if iscrowd
        else [
            [value + offset[i % 2] for i, value in enumerate(polygon)]
            for polygon in mask_to_polygons(mask)
        ],
    }


def write_annotations(
    root: Path,
    split: str,
    description: str,
    parameters: dict[str, Any],
    *,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> None:
    """Write ``instances_<split>.json``.

    Args:
        parameters: of the generator, with its ``version``; :func:`read_parameters` reads them.
    """
    content = {
        "info": {
            "description": description,
            "version": str(parameters["version"]),
            "contributor": "spatial_mamba_d2",
            "parameters": parameters,
        },
        "licenses": [
            {
                "id": 1,
                "name": "CC0 1.0 Universal",
                "url": "https://creativecommons.org/publicdomain/zero/1.0/",
            }
        ],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    _json_file(root, split).write_text(json.dumps(content), encoding="utf-8")


def read_parameters(root: Path) -> list[Any]:
    """What the annotation file of each split says that the tree was made with."""
    contents = [read_json(_json_file(root, split)) for split in FOLDERS]
    return [content["info"]["parameters"] for content in contents]


def _json_file(root: Path, split: str) -> Path:
    return root / f"instances_{split}.json"


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Trace a mask, bool [H, W], along its pixel edges into COCO polygons [x0, y0, x1, y1, ...].

    COCO's rasteriser turns them back into exactly this mask. A polygon has no holes, so a region
    that has one is cut in two, through the hole.
    """
    # With every pixel doubled, a pixel's left edge is met at an even position and its right edge
    # at an odd one; rounding (position / 2) up gives the edges themselves, and corners with them.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return []
    polygons = []
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        points = contour[:, 0]
        if parent >= 0:  # the contour of a hole
            cut = (int(points[:, 0].min()) + int(points[:, 0].max())) // 4 + 1
            is_left = np.arange(mask.shape[1]) < cut
            return mask_to_polygons(mask & is_left) + mask_to_polygons(mask & ~is_left)
        corners = (points + 1) // 2
        is_new = (corners != np.roll(corners, 1, axis=0)).any(axis=1)
        polygons.append(corners[is_new].ravel().tolist())
    return polygons


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a mask, bool [H, W], as COCO's uncompressed RLE.

    Its counts are the lengths of the runs of 0, 1, 0, ... in column-major order.
    """
    flat = mask.ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=False))  # the first run, of 0, may be empty
    counts = np.diff(starts, prepend=0, append=flat.size)
    return {"size": list(mask.shape), "counts": counts.tolist()}
