"""labelme's JSON files, one next to each image: polygons, rectangles, circles and masks."""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.class_file import read_class_lines
from spatial_mamba_d2.data.coco_masks import finite_numbers, short
from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.formats.instance_builder import (
    SPLIT_NAMES,
    InstanceBuilder,
    name_split,
)
from spatial_mamba_d2.data.formats.records import LabelledData, UnusableDataError
from spatial_mamba_d2.data.images import SUFFIXES, files_below
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.label_maps import read_bitmap
from spatial_mamba_d2.data.sample_coco import mask_to_rle

_NO_CLASSES = ("__ignore__", "_background_")  # of labelme's labels.txt
_CIRCLE_POINTS = 48


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read_labelme(path: Path) -> LabelledData:
    """Read all files below ``path``.

    Raises:
        UnusableDataError: there is none.
    """
    findings: list[Finding] = []
    names = None
    if (path / "labels.txt").is_file():
        names = [n for n in read_class_lines(path, "labels.txt") if n not in _NO_CLASSES]
    builder = InstanceBuilder(names)
    images: set[str] = set()
    others: list[Path] = []
    for file in files_below(path):
        if file.suffix.lower() in SUFFIXES:
            others.append(file)
        if file.suffix.lower() != ".json":
            continue
        try:
            content = read_json(file)
        except ValueError as error:
            findings.append(Finding("unreadable label file", str(file), str(error)))
            continue
        if not is_labelme(content):
            continue
        image = _find_image(file, content.get("imagePath"))
        images.add(str(image.absolute()))
        split = name_split(file.relative_to(path).parts[:-1])
        _read_shapes(builder, split, file, image, content, names, findings)
    for file in others:
        if str(file.absolute()) not in images:
            message = f"{file}: no file of labels for this image"
            findings.append(Finding("image without label", str(file), message))
    classes, splits = builder.build(SPLIT_NAMES)
    if not splits:
        raise UnusableDataError(f"{path}: no file of labelme that can be read")
    return LabelledData(path, "labelme", "detection", classes, splits, findings)


def _find_image(file: Path, name: Any) -> Path:
    """``imagePath`` as it is, or the image of the file's own name if there is none."""
    if isinstance(name, str) and name:
        named = Path(file.parent, name.replace("\\", "/"))
        if named.is_file():
            return Path(*named.parts) if ".." not in named.parts else named.resolve()
        if (beside := file.with_name(named.name)).is_file():
            return beside
    else:
        named = file.with_suffix(".jpg")
    for suffix in sorted(SUFFIXES):
        if (same := file.with_suffix(suffix)).is_file():
            return same
    return named


def _read_shapes(
    builder: InstanceBuilder,
    split: str,
    file: Path,
    image_file: Path,
    content: dict[str, Any],
    names: list[str] | None,
    findings: list[Finding],
) -> None:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size = None
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        size = height, width
    image = builder.add_image(split, image_file, size)
    groups: dict[Any, list[list[float]]] = {}
    for number, shape in enumerate(content["shapes"]):
        where = f"{file}, shape {number}"

        def report(kind: str, reason: str, where: str = where) -> None:
            findings.append(Finding(kind, str(file), f"{where}: {reason}"))

        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            report("malformed annotation", f"needs a label, got {short(shape)}")
            continue
        label = shape["label"].strip()
        if label in _NO_CLASSES:
            continue
        if names is not None and label not in names:
            report("unknown class", f"{label!r} is none of the names in labels.txt")
            continue
        points = finite_numbers(
            [v for p in _points(shape.get("points")) for v in (p if len(p) == 2 else [math.nan])]
        )
        if points is None:
            report("malformed annotation", "points must be pairs of finite numbers")
            continue
        kind = shape.get("shape_type") or "polygon"
        if kind == "polygon":
            if len(points) < 6:
                report("degenerate polygon", f"must have 3 or more points, got {len(points) // 2}")
            elif shape.get("group_id") is not None:
                groups.setdefault((label, shape["group_id"]), []).append(points)
            else:
                builder.add_object(split, image, label, mask=[points])
        elif kind == "rectangle" and len(points) in (4, 8):
            x1, x2 = min(points[::2]), max(points[::2])
            y1, y2 = min(points[1::2]), max(points[1::2])
            if x2 > x1 and y2 > y1:
                builder.add_object(split, image, label, box=[x1, y1, x2 - x1, y2 - y1])
            else:
                report("box without area", f"rectangle {points} must have width and height above 0")
        elif kind == "circle" and len(points) == 4:
            builder.add_object(split, image, label, mask=[_circle(*points)])
        elif kind == "mask" and size and len(points) == 4:
            rle = _read_bitmap(shape.get("mask"), points, size)
            if rle is None:
                report("wrong RLE", "mask must be a PNG image within the image")
            else:
                builder.add_object(split, image, label, mask=rle)
        else:
            report("shape without area", f"{kind} with {len(points) // 2} points is no object")
    for (label, _), polygons in groups.items():
        builder.add_object(split, image, label, mask=polygons)


def _points(value: Any) -> list[Any]:
    is_list = isinstance(value, list) and value and all(isinstance(p, list) for p in value)
    return value if is_list else [[math.nan]]


def _circle(x: float, y: float, edge_x: float, edge_y: float) -> list[float]:
    angles = np.linspace(0, 2 * math.pi, _CIRCLE_POINTS, endpoint=False)
    radius = math.hypot(edge_x - x, edge_y - y)
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    return points.ravel().tolist()


def _read_bitmap(
    text: Any, points: list[float], size: tuple[int, int]
) -> dict[str, list[int]] | None:
    """RLE of a mask that stands as PNG, in base 64, at the place that ``points`` say."""
    try:
        bitmap = read_bitmap(io.BytesIO(base64.b64decode(str(text), validate=True)))
    except (binascii.Error, ValueError, OSError):
        return None
    left, top = round(points[0]), round(points[1])
    height, width = bitmap.shape
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1]:
        return None
    complete = np.zeros(size, bool)
    complete[top : top + height, left : left + width] = bitmap
    return mask_to_rle(complete)
