"""Pictures of label maps: image, ground truth and prediction side by side, with a legend."""

from __future__ import annotations

import cv2
import numpy as np

from spatial_mamba_d2.data.ade20k import Classes
from spatial_mamba_d2.data.segmentation_transforms import IGNORE

SHORTEST_PX = 240  # smaller images are enlarged to this
OPACITY = 0.6
LINE_PX = 20
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def paint(label: np.ndarray, classes: Classes) -> np.ndarray:
    """Class indices, ``uint8[H, W]`` -> RGB ``uint8[H, W, 3]``; ignored pixels are black."""
    table = np.zeros((IGNORE + 1, 3), np.uint8)
    table[: len(classes.palette)] = classes.palette
    return table[label]


def draw_panels(image: np.ndarray, maps: dict[str, np.ndarray], classes: Classes) -> np.ndarray:
    """The image beside itself with each label map over it, above a legend of the classes in them.

    Args:
        image: RGB, ``uint8[H, W, 3]``.
        maps: title -> class indices, ``uint8[H, W]``.

    Returns:
        RGB, ``uint8[H', W', 3]``.
    """
    scale = max(1.0, SHORTEST_PX / min(image.shape[:2]))
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    panels = [_titled(image, "image")]
    for title, label in maps.items():
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        overlay = cv2.addWeighted(image, 1 - OPACITY, paint(label, classes), OPACITY, 0)
        panels.append(_titled(overlay, title))
    picture = np.concatenate(panels, axis=1)
    present = np.unique(np.concatenate([np.unique(label) for label in maps.values()]))
    legend = _legend([int(i) for i in present if i != IGNORE], classes, picture.shape[1])
    return np.concatenate([picture, legend])


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    head = np.full((LINE_PX, image.shape[1], 3), 255, np.uint8)
    cv2.putText(head, title, (6, LINE_PX - 6), _FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([head, image])


def _legend(indices: list[int], classes: Classes, width: int) -> np.ndarray:
    """A coloured square and the name of each class, in as many lines as it takes."""
    places = []  # (class index, x, line)
    x = line = 0
    for index in indices:
        needed = LINE_PX + cv2.getTextSize(classes.names[index], _FONT, 0.45, 1)[0][0] + 14
        if x and x + needed > width:
            x, line = 0, line + 1
        places.append((index, x, line))
        x += needed
    legend = np.full(((line + 1) * LINE_PX, width, 3), 255, np.uint8)
    for index, x, line in places:
        top = line * LINE_PX
        legend[top + 4 : top + LINE_PX - 4, x + 4 : x + LINE_PX - 4] = classes.palette[index]
        origin = (x + LINE_PX, top + LINE_PX - 6)
        cv2.putText(legend, classes.names[index], origin, _FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return legend
