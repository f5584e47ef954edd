"""What drawings of predictions have in common: enlarged images, and lines of text."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from spatial_mamba_d2.data.class_indices import ignored_in

SHORTEST_PX = 240  # smaller images are enlarged to this, unless they exceed LONGEST_PX then
LONGEST_PX = 4096
LINE_PX = 20
FONT = cv2.FONT_HERSHEY_SIMPLEX
FONT_SCALE = 0.45


def enlargement(image: np.ndarray, shortest_px: int = SHORTEST_PX) -> float:
    """Factor that makes the short side of ``[H, W, ...]`` at least ``shortest_px``; 1 or more.

    It makes no long side longer than :data:`LONGEST_PX`.
    """
    height, width = image.shape[:2]
    factor = min(shortest_px / min(height, width), LONGEST_PX / max(height, width))
    return max(1.0, factor)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """``uint8[H, W, C]`` with any number of channels -> RGB ``uint8[H, W, 3]``: the first ones."""
    return np.repeat(image[..., :1], 3, axis=2) if image.shape[2] < 3 else image[..., :3]


def widen(image: np.ndarray, width: int = SHORTEST_PX) -> np.ndarray:
    """``uint8[H, W, 3]``, with white at its right if it is too narrow for text."""
    missing = max(0, width - image.shape[1])
    return np.pad(image, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def enlarge(image: np.ndarray, *, nearest: bool = False) -> np.ndarray:
    """``uint8[H, W, ...]``, enlarged by :func:`enlargement`.

    Args:
        nearest: repeat pixels, as label maps need it, instead of interpolating.
    """
    scale = enlargement(image)
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    interpolation = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    return cv2.resize(image, size, interpolation=interpolation)


def write_text(canvas: np.ndarray, text: str, x: int, line: int = 0) -> None:
    """Write black text into ``canvas``, RGB ``uint8[H, W, 3]``, in place.

    Args:
        x: left edge in pixels.
        line: which line of :data:`LINE_PX` pixels, from 0.
    """
    origin = (x, (line + 1) * LINE_PX - 6)
    cv2.putText(canvas, text, origin, FONT, FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)


def text_width(text: str) -> int:
    """Width of ``text`` in pixels."""
    return cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0]


def blank_lines(num_lines: int, width: int) -> np.ndarray:
    """A white canvas for lines of text, RGB ``uint8[LINE_PX num_lines, width, 3]``."""
    return np.full((num_lines * LINE_PX, width, 3), 255, np.uint8)


def paint(label: np.ndarray, palette: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Class indices ``[H, W]`` -> their colours, RGB ``uint8[H, W, 3]``; what is none is black.

    Args:
        palette: RGB of each class, ``[K, 3]``.
    """
    table = np.zeros((ignored_in(label) + 1, 3), np.uint8)
    table[: len(palette)] = palette
    return table[label]
