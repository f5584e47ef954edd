"""Masks of COCO annotations as annotation tools write them: polygons and run lengths (RLE)."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from itertools import islice
from operator import mul
from typing import Any, NamedTuple

from spatial_mamba_d2.data.faults import Fault

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, in pixels
MIN_AREA = 1e-3  # square pixels; rounding can leave a little of a line


class Mask(NamedTuple):
    """A mask that pycocotools and Detectron2 take.

    Attributes:
        segmentation: list of polygons ``[x0, y0, x1, y1, ...]``, or RLE; None if there is no mask.
            It is the given object itself if nothing had to change.
        num_stray: parts of polygons that were left out: too few numbers, or an odd number of them.
    """

    segmentation: list[list[float]] | dict[str, Any] | None
    num_stray: int = 0


def read_mask(segmentation: Any, size: tuple[int, int]) -> Mask | Fault:
    """The mask in the field ``segmentation`` of an annotation, or why it cannot be used.

    Nothing, as ``[]``, ``[[]]``, ``{}``, ``""`` and NaN, is no mask. Polygons may also be a flat
    list of numbers, or lists of points ``[x, y]``; RLE may also stand in a list of its own.

    Args:
        size: height and width of the image.
    """
    if isinstance(segmentation, list):
        if len(segmentation) == 1 and isinstance(segmentation[0], dict):
            segmentation = segmentation[0]
        else:
            return _read_polygons(segmentation)
    if not segmentation or segmentation != segmentation:  # NaN is what pandas writes for nothing
        return Mask(None)
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, size)
    return Fault(
        "degenerate polygon", f"segmentation must be polygons or RLE, got {short(segmentation)}"
    )


def mask_area(segmentation: list[list[float]] | dict[str, Any]) -> float:
    """The area in square pixels; where polygons of one object overlap, it counts twice."""
    if isinstance(segmentation, dict):
        return float(sum(_runs(segmentation)[1::2]))
    return sum(map(polygon_area, segmentation))


def mask_box(segmentation: list[list[float]] | dict[str, Any]) -> Box:
    """The smallest box around a mask, without parts of polygons that have no area.

    If only all parts together have an area worth the name, all of them count.
    """
    if isinstance(segmentation, list):
        if len(segmentation) > 1:
            parts = [part for part in segmentation if polygon_area(part) >= MIN_AREA]
            segmentation = parts or segmentation
        x1 = min(min(polygon[0::2]) for polygon in segmentation)
        y1 = min(min(polygon[1::2]) for polygon in segmentation)
        x2 = max(max(polygon[0::2]) for polygon in segmentation)
        y2 = max(max(polygon[1::2]) for polygon in segmentation)
        return x1, y1, x2, y2
    height = segmentation["size"][0]
    columns: list[int] = []
    rows: list[int] = []
    position = 0
    for number, run in enumerate(_runs(segmentation)):
        if number % 2 and run:
            first, last = position, position + run - 1
            columns += (first // height, last // height)
            if first // height == last // height:
                rows += (first % height, last % height)
            else:  # from one column into the next: over the lower edge
                rows += (0, height - 1)
        position += run
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def polygon_area(polygon: Sequence[float]) -> float:
    """The area of ``[x0, y0, x1, y1, ...]``, in square pixels."""
    x, y = polygon[0::2], polygon[1::2]
    forward = sum(map(mul, x, islice(y, 1, None))) + x[-1] * y[0]
    backward = sum(map(mul, y, islice(x, 1, None))) + y[-1] * x[0]
    return abs(forward - backward) / 2


def finite_numbers(values: Any) -> list[float] | None:
    """A list of finite numbers, which may be written as strings; None if it is not one."""
    if not isinstance(values, list):
        return None
    try:
        if math.isfinite(sum(values)):  # inf and NaN survive a sum
            return values
    except OverflowError:
        return None
    except TypeError:
        pass
    else:
        return None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if math.isfinite(sum(numbers)) else None


def short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_polygons(parts: list[Any]) -> Mask | Fault:
    """A part without area is harmless if another one has some."""
    kind = "degenerate polygon"
    area = 0.0
    for part in parts:
        if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
            break
        numbers = finite_numbers(part)
        if numbers is not part:
            break
        area += polygon_area(part)
    else:
        if area >= MIN_AREA:
            return Mask(parts)
    polygons: list[list[float]] = []
    stray: list[str] = []
    for part in _parts(parts):
        points = part
        if isinstance(part, list) and part and all(isinstance(point, list) for point in part):
            points = [number for point in part for number in point]
            if any(len(point) != 2 for point in part):
                return Fault(kind, f"a point must be [x, y], got {short(part)}")
        polygon = finite_numbers(points)
        if polygon is None:
            return Fault(kind, f"a polygon must be finite numbers, got {short(part)}")
        if len(polygon) < 6 or len(polygon) % 2:
            if polygon:
                stray.append(f"{len(polygon)} numbers: {short(part)}")
        else:
            polygons.append(polygon)
    if not polygons:
        if not stray:
            return Mask(None)
        return Fault(kind, f"a polygon must be 3 or more pairs of numbers, got {stray[0]}")
    if sum(map(polygon_area, polygons)) < MIN_AREA:
        return Fault(kind, f"the polygons enclose no area: {short(parts)}")
    return Mask(polygons, len(stray))


def _parts(parts: list[Any]) -> list[Any]:
    """The polygons in a list that may also be one polygon, flat or of points."""
    is_flat = parts and not any(isinstance(part, (list, dict)) for part in parts)
    of_points = len(parts) > 2 and all(
        isinstance(part, list) and len(part) == 2 and not any(isinstance(x, list) for x in part)
        for part in parts
    )
    return [parts] if is_flat or of_points else parts


def _read_rle(rle: dict[str, Any], size: tuple[int, int]) -> Mask | Fault:
    kind = "wrong RLE"
    if rle.get("size") != list(size):
        found = short(rle.get("size"))
        return Fault(kind, f"its size is {found}, that of the image {list(size)}")
    given = rle.get("counts")
    counts = _unquoted(given) if isinstance(given, str) else given
    runs = _decode_counts(counts) if isinstance(counts, str) else counts
    if isinstance(runs, list) and any(isinstance(run, float) for run in runs):
        # NaN at the end is what pandas fills rows of unequal lengths with; elsewhere a run is lost.
        end = len(runs)
        while end and runs[end - 1] != runs[end - 1]:
            end -= 1
        runs = counts = [
            int(run) if isinstance(run, float) and run.is_integer() else run for run in runs[:end]
        ]
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        return Fault(kind, f"counts must be integers from 0 on, got {short(given)}")
    pixels = size[0] * size[1]
    if sum(runs) != pixels:
        return Fault(kind, f"counts sum to {sum(runs)}, the image has {pixels} pixels")
    if not any(runs[1::2]):
        return Fault(kind, "marks no pixel")
    if counts is given and all(type(side) is int for side in rle["size"]):
        return Mask(rle)
    return Mask({"size": list(size), "counts": counts})


def _unquoted(counts: str) -> str:
    """``b'...'``, what Python's ``str`` makes of bytes, without the quotes."""
    if counts[:2] not in ("b'", 'b"'):
        return counts
    try:
        return ast.literal_eval(counts).decode()
    except (SyntaxError, ValueError):
        return counts


def _runs(rle: dict[str, Any]) -> list[int]:
    counts = rle["counts"]
    runs = _decode_counts(counts) if isinstance(counts, str) else counts
    assert runs is not None, "read_mask has checked it"
    return runs


def _decode_counts(text: str) -> list[int] | None:
    """The run lengths in a compressed RLE; None if it is not one.

    The format is that of `rleToString` in pycocotools: 5 bits a character from chr(48) on, the
    lowest first; bit 6 says that more follow, and the last one's highest bit is the sign. From the
    fourth number on, each is the difference to the one two places before. Done here because
    pycocotools decodes a string that is cut off into what the memory happens to hold.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        chunk = ord(character) - 48
        if not 0 <= chunk < 64:
            return None
        value |= (chunk & 31) << shift
        shift += 5
        if not chunk & 32:
            if chunk & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value, shift = 0, 0
    return counts if shift == 0 else None
