"""Drawings of label maps: image, ground truth and prediction side by side, with a legend."""

from __future__ import annotations

import cv2
import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.data.drawing import (
    LINE_PX,
    as_rgb,
    blank_lines,
    enlarge,
    paint,
    text_width,
    widen,
    write_text,
)
from spatial_mamba_d2.data.label_maps import Classes

OPACITY = 0.6


def draw_panels(image: np.ndarray, maps: dict[str, np.ndarray], classes: Classes) -> np.ndarray:
    """The image, then the image under each label map, above a legend of the classes in them.

    Args:
        image: ``uint8[H, W, C]``, RGB or of other channels, see :func:`~.drawing.as_rgb`.
        maps: title -> class indices, ``[H, W]``.

    Returns:
        RGB, ``uint8[H', W', 3]``.
    """
    image = enlarge(as_rgb(image))
    panels = [_titled(image, "image")]
    for title, label in maps.items():
        color = paint(enlarge(label, nearest=True), classes.palette)
        overlay = cv2.addWeighted(image, 1 - OPACITY, color, OPACITY, 0)
        panels.append(_titled(overlay, title))
    row = np.concatenate(panels, axis=1)
    ignored = ignore_index(len(classes.palette))
    present = np.unique(np.concatenate([np.unique(label) for label in maps.values()]))
    legend = _legend([int(i) for i in present if i != ignored], classes, row.shape[1])
    return np.concatenate([row, legend])


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    image = widen(image)
    head = blank_lines(1, image.shape[1])
    write_text(head, title, x=6)
    return np.concatenate([head, image])


def _legend(indices: list[int], classes: Classes, width: int) -> np.ndarray:
    """A coloured square and the name of each class, in as many lines as needed."""
    places = []  # (class index, x, line)
    x = line = 0
    for index in indices:
        needed = LINE_PX + text_width(classes.names[index]) + 14
        if x and x + needed > width:
            x, line = 0, line + 1
        places.append((index, x, line))
        x += needed
    legend = blank_lines(line + 1, width)
    for index, x, line in places:
        top = line * LINE_PX
        legend[top + 4 : top + LINE_PX - 4, x + 4 : x + LINE_PX - 4] = classes.palette[index]
        write_text(legend, classes.names[index], x + LINE_PX, line)
    return legend
