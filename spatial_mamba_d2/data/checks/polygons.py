"""Polygons that are no outlines: they cross themselves, or leave the image."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from spatial_mamba_d2.data.coco_masks import polygon_area

_GRID_PX = 256  # side of the raster on which areas are compared
_LEAST_LOSS = 0.15  # of the filled area, which crossing must cost: small loops cost less
_MAX_POINTS = 2000  # of which all pairs of sides are compared


def crosses_itself(polygon: Sequence[float]) -> bool:
    """Whether two sides cross, and a good part of the area counts against the rest for it.

    Outlines that people draw have small loops, which change nothing; they do not count.
    """
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    if not 4 <= len(points) <= _MAX_POINTS:
        return False
    low, extent = points.min(axis=0), np.ptp(points, axis=0).max()
    if not extent > 0:
        return False
    scale = (_GRID_PX - 1) / extent
    raster = np.zeros((_GRID_PX, _GRID_PX), np.uint8)
    corners = np.rint((points - low) * scale).astype(np.int32)
    cv2.fillPoly(raster, [corners.reshape(-1, 1, 2)], 1)
    outline = np.zeros_like(raster)
    cv2.polylines(outline, [corners.reshape(-1, 1, 2)], True, 1)
    # fillPoly counts the pixels on the outline completely, of which about half is inside.
    filled = (int(raster.sum()) - 0.5 * int(outline.sum())) / scale**2
    enclosed = polygon_area(points.ravel().tolist())
    if filled <= 0 or filled - enclosed < _LEAST_LOSS * filled:
        return False
    return _has_crossing(points)


def _has_crossing(points: np.ndarray) -> bool:
    """Whether two sides that are no neighbours cross: points are ``float[N, 2]``."""
    ends = np.roll(points, -1, axis=0)

    def turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
            c[..., 0] - a[..., 0]
        )

    a, b = points[:, None], ends[:, None]
    c, d = points[None], ends[None]
    crossing = (turn(a, b, c) * turn(a, b, d) < 0) & (turn(c, d, a) * turn(c, d, b) < 0)
    return bool(crossing.any())


def leaves_image(polygon: Sequence[float], height: int, width: int, slack_px: float) -> bool:
    x, y = polygon[0::2], polygon[1::2]
    return (
        min(x) < -slack_px
        or min(y) < -slack_px
        or (max(x) > width + slack_px or max(y) > height + slack_px)
    )
